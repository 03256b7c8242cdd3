// Counts how often memory is asked for. In a file of its own: a compiler that sees both ends here and a `delete` there
// warns.
#include <atomic>
#include <cstdlib>
#include <new>

std::atomic<std::size_t> allocations{0};

void* operator new(std::size_t bytes) {
    ++allocations;
    if (void* made = std::malloc(bytes)) {
        return made;
    }
    throw std::bad_alloc();
}

void operator delete(void* made) noexcept { std::free(made); }
void operator delete(void* made, std::size_t) noexcept { std::free(made); }
