// Rows in runs of a few fixed sizes, the same as Python's `invariclip.backends.batching`, so that answers are the same too.
#pragma once

#include <cstddef>
#include <vector>

namespace invariclip {

struct Run {
    std::size_t rows;    // that are asked for
    std::size_t bucket;  // that the engine gets; the last row is repeated
};

// How rows are shared out among runs of 1, 2, 4, 8, ... rows.
inline std::vector<Run> plan_runs(std::size_t rows) {
    std::vector<Run> runs;
    while (rows > 0) {
        std::size_t bucket = 1;
        while (bucket < rows) {
            bucket *= 2;
        }
        if (bucket - rows > (bucket / 8 > 1 ? bucket / 8 : 1)) {  // too much filling: the bucket below goes first
            bucket /= 2;
        }
        runs.push_back({rows < bucket ? rows : bucket, bucket});
        rows -= runs.back().rows;
    }
    return runs;
}

}  // namespace invariclip
