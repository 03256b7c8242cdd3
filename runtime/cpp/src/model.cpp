// Images to answers: prepared, run in buckets, ranked.
#include <algorithm>
#include <fstream>
#include <mutex>
#include <numeric>

#include "answers.hpp"
#include "batching.hpp"
#include "class_bank.hpp"
#include "engine.hpp"
#include "json.hpp"
#include "text_tower.hpp"
#include "threads.hpp"

namespace invariclip {
namespace {

constexpr std::size_t max_batch = 1024;
constexpr int max_threads = 4096;
constexpr const char* default_template = "a photo of a {}.";

std::string joined(const std::vector<std::string>& names) {
    return names.empty() ? "none"
                         : std::accumulate(names.begin() + 1, names.end(), names.front(),
                                           [](const std::string& a, const std::string& b) { return a + ", " + b; });
}

bool holds(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// The first engine that the graph was proved on, else the first that there is.
std::string chosen_engine(const std::string& asked, const std::vector<std::string>& proved) {
    const std::vector<std::string> known = engines();
    if (known.empty()) {
        throw EngineError("no engine was compiled in; build with OpenVINO or ONNX Runtime (docs/cpp.md)");
    }
    if (!asked.empty()) {
        if (!holds(known, asked)) {
            throw EngineError("no engine '" + asked + "' was compiled in; available: " + joined(known));
        }
        return asked;
    }
    const auto found = std::find_if(known.begin(), known.end(), [&](const auto& name) { return holds(proved, name); });
    return found == known.end() ? known.front() : *found;
}

void require_batch(std::size_t size, const char* of = "images") {
    if (size < 1 || size > max_batch) {
        throw InputError("a batch must be of 1 to " + std::to_string(max_batch) + ' ' + of + ", not " +
                         std::to_string(size));
    }
}

}  // namespace

// What is opened once: models of one artifact that differ in their site share it.
struct Opened {
    // What a call works in; lent to it, so that calls at the same time have one each and none allocates anew.
    struct Desk {
        Pixels pixels;
        std::vector<std::uint8_t> batch;
        std::vector<float> embeddings;
        std::vector<float> probabilities;
        std::vector<float> logits;
        std::vector<float> uncertainty;
    };

    std::string path;
    std::string manifest;
    std::string engine_name;
    int threads = 1;
    Facts facts;
    Graph graph;
    bool verify = true;
    std::unique_ptr<Engine> engine;
    Lent<std::unique_ptr<Desk>> desks;

    // The class embeddings, read when a site first needs them: the graph itself answers without.
    std::shared_ptr<const std::vector<float>> class_bank() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (bank_ == nullptr) {
            if (verify) {
                require_unchanged(graph);  // the file is read anew, and may not be what was loaded
            }
            std::ifstream file(graph.path, std::ios::binary);
            if (!file) {
                throw ArtifactError(graph.path + ": cannot be read");
            }
            try {
                bank_ = std::make_shared<const std::vector<float>>(
                    read_class_bank(file, graph.path, facts.width, facts.classes.size()));
            } catch (const ArtifactError& error) {
                throw ArtifactError(graph.path + ": " + error.what());
            }
        }
        return bank_;
    }

    // Tokenizer and tower, opened at the first text.
    const TextTower& texts() {
        const std::lock_guard<std::mutex> lock(text_mutex_);
        if (texts_ == nullptr) {
            if (manifest.empty()) {
                throw InputError(path + ": is one graph alone and has no text tower; open its folder");
            }
            texts_ = std::make_unique<const TextTower>(read_text_side(path, manifest, graph.variant), facts.width,
                                                       engine_name, threads, verify);
        }
        return *texts_;
    }

  private:
    std::mutex mutex_;
    std::shared_ptr<const std::vector<float>> bank_;
    std::mutex text_mutex_;
    std::unique_ptr<const TextTower> texts_;
};

struct Model::State {
    using Desk = Opened::Desk;

    std::shared_ptr<Opened> opened;
    std::optional<Site> site;
    std::vector<std::string> classes;
    // Where classes are not answered by the graph: it does not know others than its own, and what it says of those is
    // said of embeddings that have a site's shift still
    std::shared_ptr<const std::vector<float>> bank;
    std::vector<std::string> warnings;

    // Answers of all images in order; `with_classes`: probabilities and, where there is one, uncertainty too.
    Answers answer(Images images, std::size_t batch_size, bool with_classes) const {
        require_batch(batch_size);
        const Facts& facts = opened->facts;
        Answers all;
        all.embeddings.width = facts.width;
        all.probabilities.width = with_classes ? classes.size() : 0;
        all.logits.width = all.probabilities.width;
        all.embeddings.values.reserve(images.size() * facts.width);
        all.probabilities.values.reserve(images.size() * all.probabilities.width);
        all.logits.values.reserve(images.size() * all.logits.width);
        std::unique_ptr<Desk> desk =
            opened->desks.take([&] { return std::make_unique<Desk>(Desk{Pixels(facts.pixels), {}, {}, {}, {}, {}}); });
        try {
            for (std::size_t begin = 0; begin < images.size(); begin += batch_size) {
                const std::size_t count = std::min(batch_size, images.size() - begin);
                for (const Run& run : plan_runs(count)) {
                    one_run(Images(images.begin() + all.embeddings.count, run.rows), run.bucket, with_classes, *desk,
                            all);
                }
            }
        } catch (...) {
            opened->desks.give(std::move(desk));
            throw;
        }
        opened->desks.give(std::move(desk));
        return all;
    }

    void one_run(Images images, std::size_t bucket, bool with_classes, Desk& desk, Answers& all) const {
        const Facts& facts = opened->facts;
        const std::size_t bytes = facts.pixels.bytes();
        const std::size_t many = classes.size();
        desk.batch.resize(bucket * bytes);
        for (std::size_t row = 0; row < bucket; ++row) {
            std::uint8_t* to = desk.batch.data() + row * bytes;
            if (row < images.size()) {
                fit(images[row], all.embeddings.count + row, desk.pixels, to);
            } else {
                std::copy_n(to - bytes, bytes, to);
            }
        }
        desk.embeddings.resize(bucket * facts.width);
        std::vector<Wanted> wanted{{embedding_name, facts.width, desk.embeddings.data()}};
        if (with_classes) {
            desk.probabilities.resize(bucket * many);
            desk.logits.resize(bucket * many);
            if (!bank) {
                wanted.push_back({probabilities_name, many, desk.probabilities.data()});
                wanted.push_back({logits_name, many, desk.logits.data()});
            }
            if (facts.learned) {
                desk.uncertainty.resize(bucket);
                wanted.push_back({uncertainty_name, 0, desk.uncertainty.data()});
            }
        }
        opened->engine->run({desk.batch.data(), {bucket, facts.pixels.height, facts.pixels.width, 3}}, wanted);
        for (std::size_t row = 0; site && row < images.size(); ++row) {
            site->apply(desk.embeddings.data() + row * facts.width);
        }
        if (bank && with_classes) {
            class_probabilities(facts, *bank, many, desk.embeddings.data(), images.size(), desk.probabilities.data(),
                                desk.logits.data());
        }
        const auto append = [&](std::vector<float>& to, const std::vector<float>& from, std::size_t width) {
            to.insert(to.end(), from.begin(), from.begin() + static_cast<std::ptrdiff_t>(images.size() * width));
        };
        append(all.embeddings.values, desk.embeddings, facts.width);
        all.embeddings.count += images.size();
        if (with_classes) {
            append(all.probabilities.values, desk.probabilities, many);
            all.probabilities.count += images.size();
            append(all.logits.values, desk.logits, many);
            all.logits.count += images.size();
            if (facts.learned) {
                append(all.uncertainty, desk.uncertainty, 1);
            }
        }
    }

    static void fit(const Image& image, std::size_t place, Pixels& pixels, std::uint8_t* to) {
        try {
            pixels.fit(image, to);
        } catch (const InputError& error) {
            throw InputError("image " + std::to_string(place) + ": " + error.what());
        }
    }

    void require_classes() const {
        if (classes.empty()) {
            throw InputError("the artifact has no classes; export it with --classes, or use with_classes or embed");
        }
    }
};

Model::Model(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

const Model::State& Model::state() const {
    if (state_ == nullptr) {
        throw InputError("this Model was moved from; use the one that it was moved to");
    }
    return *state_;
}

Model Model::load(const std::string& path, const LoadOptions& options) {
    if (options.threads < 0 || options.threads > max_threads) {
        throw InputError("threads must be from 1 to " + std::to_string(max_threads) +
                         ", or 0 for what the machine allows");
    }
    Artifact artifact = open_artifact(path, options.variant);
    auto opened = std::make_shared<Opened>();
    opened->facts = std::move(artifact.facts);
    opened->graph = std::move(artifact.graph);
    opened->verify = options.verify;
    const Graph& graph = opened->graph;
    const std::string engine = chosen_engine(options.engine, graph.proved);
    if (const auto missed = graph.missed.find(engine); missed != graph.missed.end()) {
        throw InputError(path + ": " + graph.variant + " broke the contract on " + engine + " when it was exported (" +
                         missed->second + "); it was proved on " + joined(graph.proved));
    }
    const int threads = options.threads == 0 ? available_threads() : options.threads;
    opened->path = path;
    opened->manifest = std::move(artifact.manifest);
    opened->engine_name = engine;
    opened->threads = threads;
    opened->engine =
        open_checked(engine, graph, image_input(opened->facts), outputs_of(opened->facts), threads, options.verify);
    auto state = std::make_unique<State>();
    if (!graph.variant.empty() && !holds(graph.proved, engine)) {
        state->warnings.push_back(path + ": was proved on " + joined(graph.proved) + ", not on " + engine +
                                  "; `invariclip verify --backend " + engine + "` tells whether it answers alike");
    }
    state->classes = opened->facts.classes;
    state->opened = std::move(opened);
    return Model(std::move(state));
}

Model Model::with_site(const Site& site) const {
    const Facts& facts = state().opened->facts;
    if (facts.learned) {
        throw InputError(
            "the artifact's learned templates and their uncertainty were fitted on images that were not adapted; "
            "adapt an artifact without --cdc");
    }
    if (facts.site) {
        throw InputError("the artifact is adapted to " + json::quoted(*facts.site) +
                         " already; take the one that it was made from");
    }
    if (site.space_id() != facts.space_id) {
        throw SiteError("the site " + json::quoted(site.name()) + " was measured in space " +
                        json::quoted(site.space_id()) + ", and the artifact answers in " +
                        json::quoted(facts.space_id) + ": measure it again with `invariclip adapt`");
    }
    if (site.shift().size() != facts.width) {
        throw SiteError("the site is of width " + std::to_string(site.shift().size()) +
                        ", the artifact's embeddings have " + std::to_string(facts.width));
    }
    auto made = std::make_unique<State>(state());
    made->site = site;
    if (!made->classes.empty() && !made->bank) {
        made->bank = made->opened->class_bank();
    }
    return Model(std::move(made));
}

Model Model::with_classes(const std::vector<std::string>& classes, const std::vector<std::string>& templates) const {
    const Facts& facts = state().opened->facts;
    if (facts.learned) {
        throw InputError(
            "the artifact has learned templates, which are not embedded here; give it other classes in Python");
    }
    const std::vector<std::string> usual =
        facts.templates.empty() ? std::vector<std::string>{default_template} : facts.templates;
    const std::vector<std::string>& prompts = templates.empty() ? usual : templates;
    require_prompts(classes, prompts);
    auto made = std::make_unique<State>(state());
    std::vector<std::string> cut;
    made->bank = std::make_shared<const std::vector<float>>(made->opened->texts().embed_classes(classes, prompts, cut));
    made->classes = classes;
    for (const std::string& prompt : cut) {
        made->warnings.push_back("a prompt is longer than the text tower's context and was cut: " +
                                 json::quoted(prompt));
    }
    return Model(std::move(made));
}

Tokens Model::tokenize(const std::vector<std::string>& texts) const {
    return state().opened->texts().tokenize(texts.data(), texts.size());
}

TextEmbeddings Model::embed_texts(const std::vector<std::string>& texts, std::size_t batch_size) const {
    require_batch(batch_size, "texts");
    return state().opened->texts().embed(texts, batch_size);
}

Answers Model::answer(Images images, std::size_t batch_size) const {
    state().require_classes();
    return state().answer(images, batch_size, true);
}

Rows Model::embed(Images images, std::size_t batch_size) const {
    return state().answer(images, batch_size, false).embeddings;
}

std::vector<Prediction> Model::classify(Images images, const ClassifyOptions& options) const {
    if (options.top_k < 1) {
        throw InputError("top_k must be at least 1");
    }
    const std::optional<double> limit = threshold(state().opened->facts, options.abstain);
    const Answers answers = answer(images, options.batch_size);
    std::vector<Prediction> made;
    made.reserve(images.size());
    for (std::size_t place = 0; place < images.size(); ++place) {
        made.push_back(
            ranked(answers.probabilities.row(place), answers.logits.row(place), state().classes, options.top_k));
        Prediction& one = made.back();
        if (state().opened->facts.learned) {
            one.uncertainty = answers.uncertainty[place];
        }
        // `not u <= limit`: an uncertainty that is no number is no reason to be sure
        one.abstained = limit && !(static_cast<double>(*one.uncertainty) <= *limit);
        if (!one.abstained) {
            one.label = state().classes[one.index];
        }
    }
    return made;
}

void Model::warm_up(const std::vector<std::size_t>& batch_sizes) const {
    const PixelSpec& spec = state().opened->facts.pixels;
    const std::vector<std::uint8_t> blank(spec.bytes());
    for (const std::size_t size : batch_sizes) {
        require_batch(size);
        const std::vector<Image> images(size, Image(blank.data(), spec.width, spec.height));
        state().answer(images, size, !state().classes.empty());
    }
}

const std::vector<std::string>& Model::classes() const { return state().classes; }
const std::string& Model::space_id() const { return state().opened->facts.space_id; }
std::size_t Model::width() const { return state().opened->facts.width; }
const PixelSpec& Model::pixels() const { return state().opened->facts.pixels; }
std::optional<double> Model::calibrated_abstain_above() const { return state().opened->facts.abstain_above; }
const std::vector<std::string>& Model::warnings() const { return state().warnings; }

const std::optional<Site>& Model::site() const { return state().site; }

std::string Model::describe() const {
    const std::string& variant = state().opened->graph.variant;
    const std::optional<Site>& site = state().site;
    return state().opened->engine->describe() + (variant.empty() ? "" : ", variant " + variant) +
           (site ? ", site " + json::quoted(site->name()) : "");
}

}  // namespace invariclip
