#include "class_bank.hpp"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "protobuf.hpp"

namespace invariclip {
namespace {

using namespace protobuf;

constexpr const char* bank_name = "class_bank";
constexpr const char* half_name = "class_bank_float16";
constexpr std::uint64_t max_text = 4096;  // more than any name or place that is looked at
constexpr std::uint64_t most_dims = 8;
// Fields of ModelProto, GraphProto and TensorProto, and values of two of them
constexpr std::uint64_t model_graph = 7;
constexpr std::uint64_t graph_initializer = 5;
constexpr std::uint64_t tensor_dims = 1;
constexpr std::uint64_t tensor_type = 2;
constexpr std::uint64_t tensor_name = 8;
constexpr std::uint64_t tensor_raw = 9;
constexpr std::uint64_t tensor_external = 13;
constexpr std::uint64_t tensor_location = 14;
constexpr std::uint64_t type_float = 1;
constexpr std::uint64_t type_float16 = 10;
constexpr std::uint64_t location_external = 1;

constexpr std::uint64_t bytes_field(std::uint64_t number) { return number << 3 | 2; }
constexpr std::uint64_t number_field(std::uint64_t number) { return number << 3; }

// A tensor as far as it is needed: where its numbers lie, not they.
struct Tensor {
    std::string name;
    std::vector<std::uint64_t> dims;
    std::uint64_t type = 0;
    bool external = false;
    std::string location;  // of external ones, a file beside the graph's
    std::uint64_t begin = 0;
    std::uint64_t bytes = 0;
};

std::string text_of(FileBytes& bytes) {
    const std::uint64_t length = *varint(bytes, false);
    if (length > max_text) {
        refuse("a name is longer than any");
    }
    return bytes.take(length);
}

std::uint64_t whole_number(std::string_view text) {
    std::uint64_t value = 0;
    if (text.empty() || text.size() > 18) {
        refuse("a place of weights is no number");
    }
    for (const char digit : text) {
        if (digit < '0' || digit > '9') {
            refuse("a place of weights is no number");
        }
        value = value * 10 + static_cast<std::uint64_t>(digit - '0');
    }
    return value;
}

void add_dim(Tensor& tensor, std::uint64_t dim) {
    if (tensor.dims.size() == most_dims) {
        refuse("a tensor has too many dimensions");
    }
    tensor.dims.push_back(dim);
}

Tensor tensor_of(FileBytes& bytes) {
    Tensor tensor;
    while (const std::optional<std::uint64_t> field = varint(bytes, true)) {
        switch (*field) {
            case bytes_field(tensor_name): tensor.name = text_of(bytes); break;
            case number_field(tensor_dims): add_dim(tensor, *varint(bytes, false)); break;
            case number_field(tensor_type): tensor.type = *varint(bytes, false); break;
            case number_field(tensor_location): tensor.external = *varint(bytes, false) == location_external; break;
            case bytes_field(tensor_dims): {
                FileBytes packed(bytes, *varint(bytes, false));
                while (const std::optional<std::uint64_t> dim = varint(packed, true)) {
                    add_dim(tensor, *dim);
                }
                break;
            }
            case bytes_field(tensor_raw): {
                tensor.bytes = *varint(bytes, false);
                tensor.begin = static_cast<std::uint64_t>(bytes.place());
                bytes.skip(tensor.bytes);
                break;
            }
            case bytes_field(tensor_external): {
                const std::string given = text_of(bytes);
                const auto [key, value] = entry_of(given);
                if (key == "location") {
                    tensor.location = std::string(value);
                } else if (key == "offset") {
                    tensor.begin = whole_number(value);
                } else if (key == "length") {
                    tensor.bytes = whole_number(value);
                }
                break;
            }
            default: skip_field(bytes, static_cast<unsigned>(*field & 7U));
        }
    }
    return tensor;
}

std::optional<Tensor> bank_of(FileBytes& graph) {
    while (const std::optional<std::uint64_t> field = varint(graph, true)) {
        if (*field != bytes_field(graph_initializer)) {
            skip_field(graph, static_cast<unsigned>(*field & 7U));
            continue;
        }
        FileBytes inside(graph, *varint(graph, false));
        Tensor tensor = tensor_of(inside);
        if (tensor.name == bank_name || tensor.name == half_name) {
            return tensor;
        }
    }
    return std::nullopt;
}

std::optional<Tensor> find_bank(std::istream& file) {
    FileBytes model(file);
    while (const std::optional<std::uint64_t> field = varint(model, true)) {
        if (*field != bytes_field(model_graph)) {
            skip_field(model, static_cast<unsigned>(*field & 7U));
            continue;
        }
        FileBytes graph(model, *varint(model, false));
        if (std::optional<Tensor> found = bank_of(graph)) {
            return found;
        }
    }
    return std::nullopt;
}

float from_half(std::uint32_t bits) {
    const std::uint32_t exponent = bits >> 10 & 0x1FU;
    const auto fraction = static_cast<float>(bits & 0x3FFU);
    const float size = exponent == 0      ? std::ldexp(fraction, -24)
                       : exponent == 0x1F ? std::numeric_limits<float>::quiet_NaN()  // or infinite: of no use either
                                          : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
    return (bits & 0x8000U) != 0 ? -size : size;
}

// Little-endian numbers, whatever this machine's own order.
std::vector<float> numbers_of(const std::string& raw, std::size_t each) {
    std::vector<float> numbers(raw.size() / each);
    const auto* from = reinterpret_cast<const std::uint8_t*>(raw.data());
    for (float& number : numbers) {
        std::uint32_t bits = 0;
        for (std::size_t byte = 0; byte < each; ++byte) {
            bits |= std::uint32_t{*from++} << 8 * byte;
        }
        if (each == 2) {
            number = from_half(bits);
        } else {
            std::memcpy(&number, &bits, sizeof number);
        }
        if (!std::isfinite(number)) {
            throw ArtifactError("its class embeddings hold values that are not finite; export again");
        }
    }
    return numbers;
}

std::string raw_of(std::istream& file, std::uint64_t begin, std::size_t bytes) {
    FileBytes all(file);
    all.skip(begin);
    return all.take(bytes);
}

}  // namespace

std::vector<float> read_class_bank(std::istream& file, const std::string& path, std::size_t width,
                                   std::size_t classes) {
    const std::optional<Tensor> found = find_bank(file);
    const bool half = found && found->type == type_float16;
    if (!found || !(half || found->type == type_float)) {
        throw ArtifactError(
            "holds no class embeddings of float32 or float16, which a site's classes are answered from; open another "
            "variant, or export again");
    }
    const std::size_t each = half ? 2 : 4;
    const bool fits = found->dims == std::vector<std::uint64_t>{width, classes};
    if (!fits || found->bytes != width * classes * each) {
        throw ArtifactError("its class embeddings are not [" + std::to_string(width) + ", " + std::to_string(classes) +
                            "], as its facts say; export again");
    }
    if (!found->external) {
        return numbers_of(raw_of(file, found->begin, found->bytes), each);
    }
    const std::string data = path + ".data";  // the only file beside it whose digest an artifact knows
    if (std::filesystem::path(data).filename().string() != found->location) {
        throw ArtifactError("its class embeddings lie in another file than its weights; export again");
    }
    std::ifstream beside(data, std::ios::binary);
    if (!beside) {
        throw ArtifactError("its weights cannot be read from " + data);
    }
    return numbers_of(raw_of(beside, found->begin, found->bytes), each);
}

}  // namespace invariclip
