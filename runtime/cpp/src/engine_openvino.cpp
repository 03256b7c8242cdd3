// OpenVINO on the CPU, set as Python's backend sets it: in the arithmetic that was asked for and nothing less.
#include <algorithm>
#include <openvino/openvino.hpp>
#include <sstream>

#include "engine.hpp"

namespace invariclip {
namespace {

constexpr const char* device = "CPU";
// What OpenVINO keeps of the shapes that it has seen; its own default is no bound
constexpr int kept_primitives = 128;

// The line of OpenVINO's message that says what is wrong; the others name its own source files.
std::string reason(const std::exception& error) {
    std::string last = "no reason given";
    std::istringstream lines(error.what());
    for (std::string line; std::getline(lines, line);) {
        line = one_line(line);
        last = line.empty() ? last : line;
    }
    return last;
}

ov::element::Type type_of(Compute compute) {
    return compute == Compute::float32    ? ov::element::f32
           : compute == Compute::bfloat16 ? ov::element::bf16
                                          : ov::element::f16;
}

void require_arithmetic(ov::Core& core, Compute compute) {
    const auto has = core.get_property(device, ov::device::capabilities);
    const std::string needs = compute == Compute::bfloat16 ? "BF16" : compute == Compute::float16 ? "FP16" : "";
    if (!needs.empty() && std::find(has.begin(), has.end(), needs) == has.end()) {
        throw InputError("this processor has no " + needs + " arithmetic; take another variant");
    }
}

class OpenVino final : public Engine {
  public:
    OpenVino(const Graph& graph, Input input, const std::vector<Output>& outputs, int threads)
        : path_(graph.path), input_(std::move(input)), turns_(threads) {
        if (graph.resizes) {
            throw InputError(path_ +
                             ": resizes by ONNX's Resize, which openvino computes differently; use onnxruntime");
        }
        try {
            ov::Core core;
            require_arithmetic(core, graph.compute);
            const std::shared_ptr<ov::Model> model = core.read_model(path_);
            require_input(*model);
            for (const Output& output : outputs) {
                require_output(*model, output);
            }
            const bool exact = graph.compute == Compute::float32;
            const ov::element::Type type = type_of(graph.compute);
            compiled_ =
                core.compile_model(model, device,
                                   ov::AnyMap{ov::hint::inference_precision(type),
                                              ov::hint::execution_mode(exact ? ov::hint::ExecutionMode::ACCURACY
                                                                             : ov::hint::ExecutionMode::PERFORMANCE),
                                              ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                              ov::hint::enable_cpu_pinning(false),
                                              ov::inference_num_threads(threads),
                                              {"CPU_RUNTIME_CACHE_CAPACITY", kept_primitives}});
            if (compiled_.get_property(ov::hint::inference_precision) != type) {
                throw ArtifactError(path_ + ": OpenVINO would run it in another arithmetic than " +
                                    type.get_type_name() + "; take another variant");
            }
        } catch (const Error&) {
            throw;
        } catch (const std::exception& error) {
            throw ArtifactError(path_ + ": OpenVINO cannot load it: " + reason(error));
        }
    }

    void run(const Batch& batch, const std::vector<Wanted>& wanted) override {
        const Turns::Turn turn(turns_);
        const std::size_t rows = batch.shape.front();
        try {
            ov::InferRequest request = requests_.take([this] { return compiled_.create_infer_request(); });
            // inputs are read where they lie, and never written
            request.set_tensor(input_.name, ov::Tensor(type(), ov::Shape(batch.shape),
                                                       const_cast<void*>(batch.data)));  // NOLINT
            request.infer();
            for (const Wanted& one : wanted) {
                const ov::Tensor answer = request.get_tensor(one.name);
                const ov::Shape shape = one.width == 0 ? ov::Shape{rows} : ov::Shape{rows, one.width};
                if (answer.get_element_type() != ov::element::f32 || answer.get_shape() != shape) {
                    throw EngineError(path_ + ": answers '" + one.name + "' in another shape than its facts say");
                }
                std::copy_n(answer.data<const float>(), answer.get_size(), one.to);
            }
            requests_.give(std::move(request));
        } catch (const Error&) {
            throw;
        } catch (const std::exception& error) {  // the request may be broken, so it is not given back
            throw EngineError(path_ + ": OpenVINO cannot answer this input: " + reason(error));
        }
    }

    [[nodiscard]] std::string describe() const override {
        return std::string("openvino ") + ov::get_openvino_version().buildNumber + ", " +
               std::to_string(compiled_.get_property(ov::inference_num_threads)) + " threads, computes in " +
               compiled_.get_property(ov::hint::inference_precision).get_type_name();
    }

  private:
    [[nodiscard]] ov::element::Type type() const { return input_.ids ? ov::element::i64 : ov::element::u8; }

    void require_input(const ov::Model& model) const {
        std::vector<ov::Dimension> sides{-1};
        sides.insert(sides.end(), input_.sides.begin(), input_.sides.end());
        const bool fits = model.inputs().size() == 1 && model.input().get_names().count(input_.name) == 1 &&
                          model.input().get_element_type() == type() &&
                          model.input().get_partial_shape().compatible(ov::PartialShape(sides));
        if (!fits) {
            refuse_input(path_, input_);
        }
    }

    void require_output(const ov::Model& model, const Output& expected) const {
        for (const ov::Output<const ov::Node>& output : model.outputs()) {
            if (output.get_names().count(expected.name) == 0) {
                continue;
            }
            const ov::PartialShape wanted = expected.width == 0
                                                ? ov::PartialShape{-1}
                                                : ov::PartialShape{-1, static_cast<std::int64_t>(expected.width)};
            if (output.get_element_type() != ov::element::f32 || !output.get_partial_shape().compatible(wanted)) {
                refuse_output(path_, expected, "another shape or type");
            }
            return;
        }
        refuse_output(path_, expected, "no such output");
    }

    std::string path_;
    Input input_;
    ov::CompiledModel compiled_;
    Turns turns_;
    Lent<ov::InferRequest> requests_;
};

}  // namespace

std::unique_ptr<Engine> open_openvino(const Graph& graph, const Input& input, const std::vector<Output>& outputs,
                                      int threads) {
    return std::make_unique<OpenVino>(graph, input, outputs, threads);
}

}  // namespace invariclip
