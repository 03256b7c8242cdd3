#include "threads.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace invariclip {
namespace {

#ifdef __linux__
std::optional<double> ratio(const std::string& quota, const std::string& period) {
    try {
        const double allowed = std::stod(quota);
        const double of = std::stod(period);
        if (allowed > 0 && of > 0) {
            return allowed / of;
        }
    } catch (const std::exception&) {  // "max": no limit
    }
    return std::nullopt;
}

std::optional<double> limit(const std::string& folder) {
    std::string quota;
    std::string period;
    if (std::ifstream unified(folder + "/cpu.max"); unified >> quota >> period) {
        return ratio(quota, period);
    }
    std::ifstream first(folder + "/cpu.cfs_quota_us");
    std::ifstream second(folder + "/cpu.cfs_period_us");
    return first >> quota && second >> period ? ratio(quota, period) : std::nullopt;
}

// The strictest limit of this process's control group and of every group above it, in cores.
std::optional<double> quota_cores() {
    std::optional<double> least;
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {
        const std::size_t first = line.find(':');
        const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const std::string name = ',' + controllers + ',';
        if (!controllers.empty() && name.find(",cpu,") == std::string::npos) {
            continue;
        }
        const std::string root = controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controllers;
        for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
            for (const std::string& mount : {root, std::string("/sys/fs/cgroup/cpu")}) {
                const std::optional<double> here = limit(mount + path);
                if (here && (!least || *here < *least)) {
                    least = here;
                }
            }
            if (path.find('/') == std::string::npos) {
                break;
            }
        }
    }
    return least;
}
#endif

}  // namespace

int available_threads() {
#ifdef __linux__
    cpu_set_t mask;
    CPU_ZERO(&mask);
    int allowed = sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask)
                                                                : static_cast<int>(std::thread::hardware_concurrency());
    if (const std::optional<double> quota = quota_cores()) {
        allowed = std::min(allowed, static_cast<int>(std::ceil(std::min(*quota, 1e6))));
    }
    return std::max(1, allowed);
#else
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#endif
}

}  // namespace invariclip
