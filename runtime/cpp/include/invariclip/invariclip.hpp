// invariclip in C++: classify and embed images with an exported artifact, with the answers that Python gives.
//
// Open an artifact's folder or its image.onnx alone, and ask as often as you like, from as many threads as you like:
//
//     const auto model = invariclip::Model::load("mine.icm");
//     const invariclip::Image frame{mat.data, mat.cols, mat.rows, mat.step, invariclip::Order::bgr};
//     const auto answer = model.classify(frame).front();
//     std::cout << answer.label.value_or("not sure") << ' ' << answer.probability << '\n';
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace invariclip {

// Everything thrown on purpose: one line that says what went wrong and how to fix it.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// An image, a number or a name that the caller gave cannot be used.
class InputError : public Error {
  public:
    using Error::Error;
};

// An artifact is incomplete, damaged, unsafe or of an unknown schema.
class ArtifactError : public Error {
  public:
    using Error::Error;
};

// A site is damaged, impossible, or was measured in another embedding space.
class SiteError : public Error {
  public:
    using Error::Error;
};

// An engine is not compiled in, cannot load a graph, or failed at work.
class EngineError : public Error {
  public:
    using Error::Error;
};

// How the bytes of a pixel follow one another. Transparent ones are resized with alpha premultiplied, as Pillow does.
enum class Order { grey, rgb, bgr, rgba, bgra };

constexpr std::size_t channels_of(Order order) noexcept {
    return order == Order::grey ? 1 : order == Order::rgb || order == Order::bgr ? 3 : 4;
}

// Images above this are refused before anything is allocated for them.
constexpr std::size_t max_image_pixels = 200'000'000;

// Images that would have more pixels than this after the resize and before the crop are refused, as in Python.
constexpr std::size_t max_resized_pixels = 25'000'000;

// 8-bit pixels somewhere in memory, which stay the caller's own: a camera's frame, a cv::Mat.
struct Image {
    const std::uint8_t* data = nullptr;
    std::size_t width = 0;
    std::size_t height = 0;
    std::size_t stride = 0;  // bytes from one row to the next; 0: rows follow one another without a gap
    Order order = Order::rgb;

    Image() = default;
    template <typename Width, typename Height>
    Image(const std::uint8_t* pixels, Width columns, Height rows, std::size_t bytes_per_row = 0, Order of = Order::rgb)
        : data(pixels),
          width(columns < 0 ? 0 : static_cast<std::size_t>(columns)),
          height(rows < 0 ? 0 : static_cast<std::size_t>(rows)),
          stride(bytes_per_row),
          order(of) {}
};

// Some images, wherever they lie: a vector of them, a single one, a list in braces. For arguments: it owns nothing.
class Images {
  public:
    Images(const Image* first, std::size_t count) noexcept : first_(first), count_(count) {}
    // meant to be taken for one another, so not explicit
    Images(const Image& one) noexcept : Images(&one, 1) {}
    Images(const std::vector<Image>& many) noexcept : Images(many.data(), many.size()) {}
    Images(std::initializer_list<Image> many) noexcept : Images(many.begin(), many.size()) {}

    [[nodiscard]] std::size_t size() const noexcept { return count_; }
    [[nodiscard]] const Image* begin() const noexcept { return first_; }
    [[nodiscard]] const Image* end() const noexcept { return first_ + count_; }
    [[nodiscard]] const Image& operator[](std::size_t place) const noexcept { return first_[place]; }

  private:
    const Image* first_;
    std::size_t count_;
};

enum class Interpolation { bicubic, bilinear };
enum class ResizeMode { shortest, longest, squash };

// How a checkpoint wants its images; the names are the manifest's.
struct PixelSpec {
    std::size_t height = 224;  // image_size, from 1 to 4096 each
    std::size_t width = 224;
    Interpolation interpolation = Interpolation::bicubic;
    ResizeMode resize_mode = ResizeMode::shortest;
    std::uint8_t fill_color = 0;  // of the padding

    [[nodiscard]] std::size_t bytes() const noexcept { return height * width * 3; }
};

// Images as the tower sees them before normalisation, equal to Pillow's pixels bit by bit. Keeps its memory and the
// weights of the sizes that it met, so that a stream of frames allocates nothing. One thread at a time.
class Pixels {
  public:
    explicit Pixels(const PixelSpec& spec);  // throws InputError
    Pixels(Pixels&&) noexcept;
    Pixels& operator=(Pixels&&) noexcept;
    ~Pixels();

    // Writes RGB [height, width, 3] to `out`. Throws InputError.
    void fit(const Image& image, std::uint8_t* out);
    [[nodiscard]] const PixelSpec& spec() const;

  private:
    struct Work;
    [[nodiscard]] Work& work() const;  // throws InputError where it was moved from
    std::unique_ptr<Work> work_;
};

struct LoadOptions {
    // "onnxruntime" or "openvino"; empty: the first one compiled in that the artifact was proved on
    std::string engine;
    // One of the manifest's; empty: float32. A file opened alone has no variants
    std::string variant;
    // Of the engine; 0: what the affinity mask and the control groups allow
    int threads = 0;
    // Holds the graph's files against the digests of their manifest, which reads them once more while the engine loads.
    // Without it a damaged weight is answered with; their sizes are looked at all the same
    bool verify = true;
};

// When to give no label.
class Abstain {
  public:
    static Abstain never() noexcept { return {Kind::never, 0}; }
    // an uncertainty from 0 to 1
    static Abstain above(double uncertainty) noexcept { return {Kind::above, uncertainty}; }
    // what the artifact was calibrated to
    static Abstain calibrated() noexcept { return {Kind::calibrated, 0}; }

    enum class Kind { never, above, calibrated };
    [[nodiscard]] Kind kind() const noexcept { return kind_; }
    [[nodiscard]] double uncertainty() const noexcept { return uncertainty_; }

  private:
    Abstain(Kind kind, double uncertainty) noexcept : kind_(kind), uncertainty_(uncertainty) {}
    Kind kind_;
    double uncertainty_;
};

struct ClassifyOptions {
    std::size_t top_k = 5;
    std::size_t batch_size = 16;  // images to a run
    Abstain abstain = Abstain::never();
};

// A class with its probability, from 0 to 1.
struct RankedClass {
    std::string label;
    float probability = 0;
};

// What an image was taken for.
struct Prediction {
    std::optional<std::string> label;  // none where the model abstains
    std::size_t index = 0;             // of the most probable class
    float probability = 0;             // of the most probable class
    std::vector<RankedClass> ranking;  // the top_k classes, best first; of equally probable ones the larger logit
    std::vector<float> probabilities;  // of every class, in the order of Model::classes
    std::optional<float> uncertainty;  // 0 sure, 1 no evidence; only of learned templates
    bool abstained = false;
};

// Rows of floats.
struct Rows {
    std::size_t count = 0;
    std::size_t width = 0;
    std::vector<float> values;  // [count, width]

    [[nodiscard]] const float* row(std::size_t place) const noexcept { return values.data() + place * width; }
};

// Texts as ids, and which of them did not fit into the tower's context: those were cut.
struct Tokens {
    std::size_t count = 0;
    std::size_t width = 0;          // of a row: the tower's context
    std::vector<std::int64_t> ids;  // [count, width]
    std::vector<std::size_t> cut_texts;
};

// Unit embeddings of texts, and which of them were cut to the tower's context.
struct TextEmbeddings {
    Rows embeddings;
    std::vector<std::size_t> cut_texts;
};

// Everything that the graph says, in one pass.
struct Answers {
    Rows embeddings;
    Rows probabilities;
    Rows logits;  // τ · cos (+ b) of the hand-written template: they tell apart what float rounds to 0 or 1
    std::vector<float> uncertainty;  // empty of an artifact without learned templates
};

// A place (a camera, a light, a style) as `invariclip adapt -o NAME.safetensors` measured it: what its images share
// beside their contents, to be taken away from each of their embeddings. See Model::with_site.
class Site {
  public:
    // Reads a file of at most 16 MiB. Throws SiteError.
    static Site read(const std::string& path);
    // The same from the file's bytes.
    static Site parse(std::string_view bytes);

    [[nodiscard]] const std::string& name() const noexcept { return name_; }
    [[nodiscard]] const std::string& space_id() const noexcept { return space_id_; }  // where it was measured
    [[nodiscard]] std::size_t images() const noexcept { return images_; }             // that it was measured on
    [[nodiscard]] double kinds() const noexcept { return kinds_; }    // of things that they show, from 1
    [[nodiscard]] double weight() const noexcept { return weight_; }  // how much of the shift counts, from 0 to 1
    [[nodiscard]] const std::vector<float>& shift() const noexcept { return shift_; }
    [[nodiscard]] const std::string& sha256() const noexcept { return sha256_; }  // of space and shift, as in Python

    // Takes the shift away from a unit embedding of shift().size() floats, in place; its length is 1 again.
    void apply(float* embedding) const noexcept;

  private:
    Site() = default;
    std::string name_;
    std::string space_id_;
    std::size_t images_ = 0;
    double kinds_ = 1;
    double weight_ = 0;
    std::vector<float> shift_;
    std::string sha256_;
};

// A loaded artifact. Every const member may be called from several threads at once. One that was moved from throws
// InputError whatever is asked of it; it may be assigned to and destroyed.
class Model {
  public:
    // `path`: a folder name.icm, whose files are then checked against its manifest, or an image.onnx alone, which says
    // everything that is needed of itself. Throws InputError, ArtifactError, EngineError.
    static Model load(const std::string& path, const LoadOptions& options = {});
    Model(Model&&) noexcept;
    Model& operator=(Model&&) noexcept;
    ~Model();

    // The same artifact for images of one place: their embeddings lose the site's shift, and classes are answered from
    // what is left. The engine is shared, nothing is loaded again; a site that this model has already is replaced.
    // Throws SiteError where it was measured in another space, InputError where the artifact has learned templates or
    // a site in its graph, ArtifactError where its class embeddings cannot be read.
    [[nodiscard]] Model with_site(const Site& site) const;

    // The same artifact with other classes, which are embedded here and answered from embeddings: the engine is shared.
    // Each class is put into every template, which has one {} for it; without templates they are the artifact's own, or
    // "a photo of a {}.". Prompts that were cut are warned of. Throws InputError where a name or a template cannot be
    // used, or the artifact has learned templates, and what embed_texts throws.
    [[nodiscard]] Model with_classes(const std::vector<std::string>& classes,
                                     const std::vector<std::string>& templates = {}) const;

    // Texts in UTF-8, with the tokens that Python makes of them. Tokenizer and tower are opened at the first text.
    // Throw InputError where a text is no UTF-8 or was decoded wrongly, or the artifact is one graph alone;
    // ArtifactError where a file is damaged, or the tokenizer is of a kind that is not read here.
    [[nodiscard]] Tokens tokenize(const std::vector<std::string>& texts) const;
    [[nodiscard]] TextEmbeddings embed_texts(const std::vector<std::string>& texts, std::size_t batch_size = 64) const;

    // Throw InputError where an image or a number cannot be used, EngineError where the engine fails.
    [[nodiscard]] std::vector<Prediction> classify(Images images, const ClassifyOptions& options = {}) const;
    [[nodiscard]] Rows embed(Images images, std::size_t batch_size = 16) const;  // unit length
    [[nodiscard]] Answers answer(Images images, std::size_t batch_size = 16) const;

    // Answers blank images, so that the first real ones of these batch sizes need not wait for the engine.
    void warm_up(const std::vector<std::size_t>& batch_sizes = {1}) const;

    [[nodiscard]] const std::vector<std::string>& classes() const;
    [[nodiscard]] const std::string& space_id() const;  // compare embeddings only where it is equal
    [[nodiscard]] std::size_t width() const;            // of embeddings
    [[nodiscard]] const PixelSpec& pixels() const;
    [[nodiscard]] std::optional<double> calibrated_abstain_above() const;
    [[nodiscard]] const std::optional<Site>& site() const;  // of with_site
    [[nodiscard]] std::string describe() const;             // engine, version, threads, variant, site
    // What the caller ought to know: say, that the artifact was never proved on this engine.
    [[nodiscard]] const std::vector<std::string>& warnings() const;

  private:
    struct State;
    [[nodiscard]] const State& state() const;  // throws InputError where it was moved from
    explicit Model(std::unique_ptr<State> state) noexcept;
    std::unique_ptr<State> state_;
};

// The engines that this build knows, in order of preference.
std::vector<std::string> engines();

}  // namespace invariclip
