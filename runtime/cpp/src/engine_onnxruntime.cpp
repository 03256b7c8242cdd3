// ONNX Runtime on the CPU, set as Python's backend sets it.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <numeric>
#include <vector>

#include "engine.hpp"

namespace invariclip {
namespace {

// Official builds count events and look a host up for them, unless this is set before the environment is made.
bool without_telemetry() {
#ifdef _WIN32
    return _putenv_s("ORT_DISABLE_TELEMETRY", "1") == 0;
#else
    return setenv("ORT_DISABLE_TELEMETRY", "1", 0) == 0;
#endif
}

Ort::Env& environment() {
    [[maybe_unused]] static const bool quiet = without_telemetry();
    // what goes wrong is thrown; said on stderr as well it would be said twice
    static Ort::Env made(ORT_LOGGING_LEVEL_FATAL, "invariclip");
    return made;
}

class OnnxRuntime final : public Engine {
  public:
    OnnxRuntime(const Graph& graph, Input input, const std::vector<Output>& outputs, int threads)
        : path_(graph.path), input_(std::move(input)), threads_(threads), turns_(threads) {
        if (graph.compute != Compute::float32) {
            throw InputError(path_ + ": onnxruntime computes float32 on the CPU and nothing else; openvino can");
        }
        try {
            Ort::SessionOptions options;
            options.SetIntraOpNumThreads(threads);
            options.SetInterOpNumThreads(1);
            // waiting threads sleep instead of spinning: an idle program must not burn a core
            options.AddConfigEntry("session.intra_op.allow_spinning", "0");
            options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
            session_ = Ort::Session(environment(), std::filesystem::path(path_).c_str(), options);
            require_input();
            for (const Output& output : outputs) {
                require_output(output);
            }
        } catch (const Ort::Exception& error) {
            throw ArtifactError(path_ + ": ONNX Runtime cannot load it: " + one_line(error.what()));
        }
    }

    void run(const Batch& batch, const std::vector<Wanted>& wanted) override {
        const Turns::Turn turn(turns_);
        try {
            const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
            const std::vector<std::int64_t> shape(batch.shape.begin(), batch.shape.end());
            const std::size_t rows = batch.shape.front();
            const auto count = static_cast<std::int64_t>(rows);
            const std::size_t each = input_.ids ? sizeof(std::int64_t) : 1;
            const std::size_t bytes =
                std::accumulate(batch.shape.begin(), batch.shape.end(), each, std::multiplies<std::size_t>());
            // inputs are read where they lie, and never written
            const Ort::Value input = Ort::Value::CreateTensor(memory, const_cast<void*>(batch.data), bytes,  // NOLINT
                                                              shape.data(), shape.size(), type());
            std::vector<const char*> names(wanted.size());
            std::vector<Ort::Value> outputs;
            for (std::size_t place = 0; place < wanted.size(); ++place) {
                const Wanted& one = wanted[place];
                const std::array<std::int64_t, 2> size{count, static_cast<std::int64_t>(one.width)};
                const std::size_t values = rows * std::max<std::size_t>(one.width, 1);
                names[place] = one.name;
                outputs.push_back(
                    Ort::Value::CreateTensor<float>(memory, one.to, values, size.data(), one.width == 0 ? 1 : 2));
            }
            session_.Run(Ort::RunOptions{nullptr}, &input_.name, &input, 1, names.data(), outputs.data(),
                         wanted.size());
        } catch (const Ort::Exception& error) {
            throw EngineError(path_ + ": ONNX Runtime cannot answer this input: " + one_line(error.what()));
        }
    }

    [[nodiscard]] std::string describe() const override {
        return "onnxruntime " + Ort::GetVersionString() + ", " + std::to_string(threads_) + " threads, computes in f32";
    }

  private:
    [[nodiscard]] ONNXTensorElementDataType type() const noexcept {
        return input_.ids ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    }

    void require_input() {
        Ort::AllocatorWithDefaultOptions allocator;
        bool fits = session_.GetInputCount() == 1 &&
                    session_.GetInputNameAllocated(0, allocator).get() == std::string(input_.name);
        if (fits) {
            const Ort::TypeInfo info = session_.GetInputTypeInfo(0);
            const auto tensor = info.GetTensorTypeAndShapeInfo();
            const std::vector<std::int64_t> shape = tensor.GetShape();
            fits = tensor.GetElementType() == type() && shape.size() == input_.sides.size() + 1;
            for (std::size_t side = 0; fits && side < input_.sides.size(); ++side) {
                fits = shape[side + 1] == -1 || shape[side + 1] == input_.sides[side];
            }
            fits = fits && shape[0] == -1;
        }
        if (!fits) {
            refuse_input(path_, input_);
        }
    }

    void require_output(const Output& expected) {
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t place = 0; place < session_.GetOutputCount(); ++place) {
            if (session_.GetOutputNameAllocated(place, allocator).get() != std::string(expected.name)) {
                continue;
            }
            const Ort::TypeInfo type = session_.GetOutputTypeInfo(place);
            const auto tensor = type.GetTensorTypeAndShapeInfo();
            const std::vector<std::int64_t> shape = tensor.GetShape();
            const auto width = static_cast<std::int64_t>(expected.width);
            const bool fits = tensor.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
                              shape.size() == (width == 0 ? 1U : 2U) &&
                              (width == 0 || shape[1] == -1 || shape[1] == width);
            if (!fits) {
                refuse_output(path_, expected, "another shape or type");
            }
            return;
        }
        refuse_output(path_, expected, "no such output");
    }

    std::string path_;
    Input input_;
    int threads_;
    Ort::Session session_{nullptr};
    Turns turns_;
};

}  // namespace

std::unique_ptr<Engine> open_onnxruntime(const Graph& graph, const Input& input, const std::vector<Output>& outputs,
                                         int threads) {
    return std::make_unique<OnnxRuntime>(graph, input, outputs, threads);
}

}  // namespace invariclip
