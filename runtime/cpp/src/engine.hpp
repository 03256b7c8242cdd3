// One loaded graph that answers; an engine is one file that makes some.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "artifact.hpp"

namespace invariclip {

// The names inside the graphs.
constexpr const char* pixels_name = "pixels";
constexpr const char* ids_name = "input_ids";
constexpr const char* embedding_name = "embedding";
constexpr const char* probabilities_name = "probabilities";
constexpr const char* logits_name = "logits";
constexpr const char* uncertainty_name = "uncertainty";

// One output and where it goes: [rows, width] floats, or [rows] where width is 0.
struct Wanted {
    const char* name;
    std::size_t width;
    float* to;
};

// What a graph takes: its name, whether it is int64 and not uint8, and its sides behind the rows; -1: any.
struct Input {
    const char* name;
    bool ids;
    std::vector<std::int64_t> sides;
};
Input image_input(const Facts& facts);
Input text_input(const TextSide& text);
// Says that a graph does not take what it should.
[[noreturn]] void refuse_input(const std::string& path, const Input& expected);

// Numbers in memory, as the input wants them; `shape` begins with the rows.
struct Batch {
    const void* data;
    std::vector<std::size_t> shape;
};

// What a graph must answer: its facts say so. A width of 0: one number a row.
struct Output {
    const char* name;
    std::size_t width;
};
std::vector<Output> outputs_of(const Facts& facts);
// Says that a graph and its facts are not of one export; `found`: what it has in place of an output.
[[noreturn]] void refuse_output(const std::string& path, const Output& expected, const std::string& found);
// A library's message in one line.
std::string one_line(const std::string& text);

class Engine {
  public:
    virtual ~Engine() = default;
    // From several threads at once. Throws EngineError.
    virtual void run(const Batch& batch, const std::vector<Wanted>& wanted) = 0;
    [[nodiscard]] virtual std::string describe() const = 0;
};

// Answers under way hold the activations of their batches, so at most two for each thread are; further calls wait.
class Turns {
  public:
    explicit Turns(int threads) : left_(2 * threads) {}
    class Turn {
      public:
        explicit Turn(Turns& of) : of_(of) {
            std::unique_lock<std::mutex> lock(of_.mutex_);
            of_.freed_.wait(lock, [this] { return of_.left_ > 0; });
            --of_.left_;
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;
        ~Turn() {
            {
                const std::lock_guard<std::mutex> lock(of_.mutex_);
                ++of_.left_;
            }
            of_.freed_.notify_one();
        }

      private:
        Turns& of_;
    };

  private:
    std::mutex mutex_;
    std::condition_variable freed_;
    int left_;
};

// Things that are costly to make, lent to one caller at a time and kept for the next.
template <typename Thing>
class Lent {
  public:
    template <typename Make>
    Thing take(Make make) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!idle_.empty()) {
                Thing thing = std::move(idle_.back());
                idle_.pop_back();
                return thing;
            }
        }
        return make();
    }
    void give(Thing thing) {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(thing));
    }

  private:
    std::mutex mutex_;
    std::vector<Thing> idle_;
};

// Each throws ArtifactError where the engine cannot load the graph, InputError where it cannot compute as asked.
#ifdef INVARICLIP_ONNXRUNTIME
std::unique_ptr<Engine> open_onnxruntime(const Graph& graph, const Input& input, const std::vector<Output>& outputs,
                                         int threads);
#endif
#ifdef INVARICLIP_OPENVINO
std::unique_ptr<Engine> open_openvino(const Graph& graph, const Input& input, const std::vector<Output>& outputs,
                                      int threads);
#endif

// The engine of a name. Its graph is held against its digest meanwhile, before anything is answered, where `verify`
// says so. Throws ArtifactError, InputError, EngineError.
std::unique_ptr<Engine> open_checked(const std::string& name, const Graph& graph, const Input& input,
                                     const std::vector<Output>& outputs, int threads, bool verify);

}  // namespace invariclip
