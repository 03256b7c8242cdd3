#pragma once

namespace invariclip {

// What this process may use: the affinity mask, or less where a control group's quota says so (a part of a core counts
// as one); at least 1.
int available_threads();

}  // namespace invariclip
