// The C interface over the C++ one: handles, statuses, structs of any known size. Nothing is thrown through it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "invariclip/invariclip.h"
#include "invariclip/invariclip.hpp"

#define INVARICLIP_TEXT(number) #number
#define INVARICLIP_DOTTED(major, minor, patch) \
    INVARICLIP_TEXT(major) "." INVARICLIP_TEXT(minor) "." INVARICLIP_TEXT(patch)

namespace {

using invariclip::InputError;

// Of texts that live elsewhere, as C wants them.
std::vector<const char*> pointers(const std::vector<std::string>& texts) {
    std::vector<const char*> made(texts.size());
    std::transform(texts.begin(), texts.end(), made.begin(), [](const std::string& text) { return text.c_str(); });
    return made;
}

}  // namespace

struct invariclip_model {
    explicit invariclip_model(invariclip::Model taken)
        : model(std::move(taken)),
          description(model.describe()),
          classes(pointers(model.classes())),
          warnings(pointers(model.warnings())) {}

    invariclip::Model model;
    std::string description;
    std::vector<const char*> classes;
    std::vector<const char*> warnings;
};

struct invariclip_predictions {
    std::vector<invariclip::Prediction> predictions;
    std::vector<std::vector<invariclip_ranked_class>> rankings;
};

namespace {

// Set without asking for memory, so that its lack can be said too.
class LastError {
  public:
    void set(const char* message) noexcept {
        std::size_t length = std::min(std::strlen(message), sizeof text_ - 1);
        while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80U) {
            --length;  // never between the bytes of one character
        }
        std::memcpy(text_, message, length);
        text_[length] = '\0';
    }
    [[nodiscard]] const char* text() const noexcept { return text_; }

  private:
    char text_[4096] = "";
};

LastError& last_error() noexcept {
    thread_local LastError error;
    return error;
}

invariclip_status failed(invariclip_status status, const char* message) noexcept {
    last_error().set(message);
    return status;
}

template <typename Work>
invariclip_status guarded(Work work) noexcept {
    try {
        work();
        return INVARICLIP_OK;
    } catch (const invariclip::InputError& error) {
        return failed(INVARICLIP_INPUT_ERROR, error.what());
    } catch (const invariclip::ArtifactError& error) {
        return failed(INVARICLIP_ARTIFACT_ERROR, error.what());
    } catch (const invariclip::SiteError& error) {
        return failed(INVARICLIP_SITE_ERROR, error.what());
    } catch (const invariclip::EngineError& error) {
        return failed(INVARICLIP_ENGINE_ERROR, error.what());
    } catch (const std::bad_alloc&) {
        return failed(INVARICLIP_MEMORY_ERROR, "there is not enough memory for this call");
    } catch (const std::length_error&) {  // of a vector that no memory could hold
        return failed(INVARICLIP_MEMORY_ERROR, "there is not enough memory for this call");
    } catch (const std::exception& error) {
        return failed(INVARICLIP_INTERNAL_ERROR, error.what());
    } catch (...) {
        return failed(INVARICLIP_INTERNAL_ERROR, "an unknown exception");
    }
}

template <typename Pointer>
void require(Pointer pointer, const char* name) {
    if (pointer == nullptr) {
        throw InputError(std::string(name) + " is NULL");
    }
}

// A caller's struct as this library knows it: what it has not is 0, what is behind this one's end must be.
template <typename Struct>
Struct known(const Struct* given, const char* name) {
    Struct made{};
    if (given == nullptr) {
        return made;
    }
    const std::size_t size = given->size;
    const std::string called(name);
    if (size < sizeof size || size > std::size_t{1} << 16) {
        throw InputError(called + "->size is " + std::to_string(size) + "; set it to sizeof(" + called + ")");
    }
    const auto* bytes = reinterpret_cast<const char*>(given);
    if (std::any_of(bytes + std::min(size, sizeof made), bytes + size, [](char byte) { return byte != 0; })) {
        throw InputError(called + " asks for something that this version of the library does not know; it is " +
                         invariclip_version());
    }
    std::memcpy(&made, given, std::min(size, sizeof made));
    return made;
}

// Writes as much of a struct as the caller has.
template <typename Struct>
void write(const Struct& from, Struct* to, const char* name) {
    const std::size_t size = to->size;
    if (size < sizeof size) {
        throw InputError(std::string(name) + "->size is " + std::to_string(size) + "; set it to sizeof(" + name + ")");
    }
    const std::size_t behind = sizeof size;
    if (size > behind) {
        std::memcpy(reinterpret_cast<char*>(to) + behind, reinterpret_cast<const char*>(&from) + behind,
                    std::min(size, sizeof from) - behind);
    }
}

std::vector<invariclip::Image> images_of(const invariclip_image* images, std::size_t count) {
    if (count > 0) {
        require(images, "images");
    }
    std::vector<invariclip::Image> made;
    for (std::size_t place = 0; place < count; ++place) {
        const invariclip_image& one = images[place];
        if (one.order < INVARICLIP_GREY || one.order > INVARICLIP_BGRA) {
            throw InputError("image " + std::to_string(place) + ": order " + std::to_string(one.order) +
                             " is not known; it is one of INVARICLIP_GREY, RGB, BGR, RGBA and BGRA, 0 to 4");
        }
        made.emplace_back(one.data, one.width, one.height, one.stride, static_cast<invariclip::Order>(one.order));
    }
    return made;
}

std::vector<std::string> texts_of(const char* const* texts, std::size_t count, const char* name) {
    if (count > 0) {
        require(texts, name);
    }
    std::vector<std::string> made;
    for (std::size_t place = 0; place < count; ++place) {
        if (texts[place] == nullptr) {
            throw InputError(std::string(name) + "[" + std::to_string(place) + "] is NULL");
        }
        made.emplace_back(texts[place]);
    }
    return made;
}

std::size_t batch_of(std::size_t batch_size) { return batch_size == 0 ? 16 : batch_size; }

// Copies rows to a buffer of the caller's, where there is one; require_room has looked at it.
void copy(const std::vector<float>& values, float* to) {
    if (to != nullptr) {
        std::copy(values.begin(), values.end(), to);
    }
}

// Before anything is computed.
void require_room(const float* to, std::size_t room, std::size_t count, std::size_t width, const char* name) {
    if (to != nullptr && (width != 0 && count > std::numeric_limits<std::size_t>::max() / sizeof(float) / width)) {
        throw InputError(std::string(name) + " of so many images fit into no memory");
    }
    if (to != nullptr && room < count * width) {
        throw InputError(std::string(name) + " has room for " + std::to_string(room) + " floats, and takes " +
                         std::to_string(count * width));
    }
}

invariclip::Abstain abstain_of(const invariclip_classify_options& given) {
    switch (given.abstain) {
        case INVARICLIP_ABSTAIN_NEVER: return invariclip::Abstain::never();
        case INVARICLIP_ABSTAIN_ABOVE: return invariclip::Abstain::above(given.abstain_above);
        case INVARICLIP_ABSTAIN_CALIBRATED: return invariclip::Abstain::calibrated();
        default:
            throw InputError("options->abstain " + std::to_string(given.abstain) +
                             " is not known; it is one of INVARICLIP_ABSTAIN_NEVER, ABOVE and CALIBRATED, 0 to 2");
    }
}

std::string text_of(const char* text) { return text == nullptr ? "" : text; }

}  // namespace

const char* invariclip_version(void) {
    return INVARICLIP_DOTTED(INVARICLIP_VERSION_MAJOR, INVARICLIP_VERSION_MINOR, INVARICLIP_VERSION_PATCH);
}

int32_t invariclip_abi(void) { return INVARICLIP_ABI; }

const char* invariclip_engines(void) {
#if defined(INVARICLIP_ONNXRUNTIME) && defined(INVARICLIP_OPENVINO)
    return "onnxruntime, openvino";
#elif defined(INVARICLIP_ONNXRUNTIME)
    return "onnxruntime";
#elif defined(INVARICLIP_OPENVINO)
    return "openvino";
#else
    return "";
#endif
}

const char* invariclip_status_name(invariclip_status status) {
    switch (status) {
        case INVARICLIP_OK: return "OK";
        case INVARICLIP_INPUT_ERROR: return "InputError";
        case INVARICLIP_ARTIFACT_ERROR: return "ArtifactError";
        case INVARICLIP_SITE_ERROR: return "SiteError";
        case INVARICLIP_ENGINE_ERROR: return "EngineError";
        case INVARICLIP_MEMORY_ERROR: return "MemoryError";
        case INVARICLIP_INTERNAL_ERROR: return "InternalError";
        default: return "unknown status";
    }
}

const char* invariclip_last_error(void) { return last_error().text(); }

invariclip_status invariclip_model_load(const char* path, const invariclip_load_options* options,
                                        invariclip_model** model) {
    return guarded([&] {
        require(path, "path");
        require(model, "model");
        const invariclip_load_options given = known(options, "options");
        const invariclip::LoadOptions asked{text_of(given.engine), text_of(given.variant), given.threads,
                                            given.unverified == 0};
        *model = std::make_unique<invariclip_model>(invariclip::Model::load(path, asked)).release();
    });
}

invariclip_status invariclip_model_with_site(const invariclip_model* model, const char* site_path,
                                             invariclip_model** adapted) {
    return guarded([&] {
        require(model, "model");
        require(site_path, "site_path");
        require(adapted, "adapted");
        const invariclip::Site site = invariclip::Site::read(site_path);
        *adapted = std::make_unique<invariclip_model>(model->model.with_site(site)).release();
    });
}

invariclip_status invariclip_model_with_classes(const invariclip_model* model, const char* const* classes,
                                                size_t class_count, const char* const* templates, size_t template_count,
                                                invariclip_model** other) {
    return guarded([&] {
        require(model, "model");
        require(other, "other");
        const std::vector<std::string> names = texts_of(classes, class_count, "classes");
        const std::vector<std::string> prompts = texts_of(templates, template_count, "templates");
        *other = std::make_unique<invariclip_model>(model->model.with_classes(names, prompts)).release();
    });
}

void invariclip_model_free(invariclip_model* model) { delete model; }

invariclip_status invariclip_model_facts(const invariclip_model* model, invariclip_facts* facts) {
    return guarded([&] {
        require(model, "model");
        require(facts, "facts");
        const invariclip::Model& of = model->model;
        const invariclip_facts found{sizeof found,
                                     of.space_id().c_str(),
                                     model->classes.data(),
                                     model->classes.size(),
                                     of.width(),
                                     of.pixels().height,
                                     of.pixels().width,
                                     of.calibrated_abstain_above().value_or(std::nan("")),
                                     model->description.c_str(),
                                     model->warnings.data(),
                                     model->warnings.size()};
        write(found, facts, "facts");
    });
}

invariclip_status invariclip_model_warm_up(const invariclip_model* model, const size_t* batch_sizes, size_t count) {
    return guarded([&] {
        require(model, "model");
        if (count > 0) {
            require(batch_sizes, "batch_sizes");
        }
        model->model.warm_up(count == 0 ? std::vector<std::size_t>{}
                                        : std::vector<std::size_t>(batch_sizes, batch_sizes + count));
    });
}

invariclip_status invariclip_classify(const invariclip_model* model, const invariclip_image* images, size_t count,
                                      const invariclip_classify_options* options,
                                      invariclip_predictions** predictions) {
    return guarded([&] {
        require(model, "model");
        require(predictions, "predictions");
        const invariclip_classify_options given = known(options, "options");
        const std::vector<invariclip::Image> asked = images_of(images, count);
        invariclip::ClassifyOptions how;
        how.top_k = given.top_k == 0 ? how.top_k : given.top_k;
        how.batch_size = batch_of(given.batch_size);
        how.abstain = abstain_of(given);
        auto made = std::make_unique<invariclip_predictions>();
        made->predictions = model->model.classify(asked, how);
        for (const invariclip::Prediction& one : made->predictions) {
            std::vector<invariclip_ranked_class>& ranking = made->rankings.emplace_back();
            for (const invariclip::RankedClass& ranked : one.ranking) {
                ranking.push_back({ranked.label.c_str(), ranked.probability, 0});
            }
        }
        *predictions = made.release();
    });
}

size_t invariclip_predictions_count(const invariclip_predictions* predictions) {
    return predictions == nullptr ? 0 : predictions->predictions.size();
}

invariclip_status invariclip_predictions_get(const invariclip_predictions* predictions, size_t place,
                                             invariclip_prediction* prediction) {
    return guarded([&] {
        require(predictions, "predictions");
        require(prediction, "prediction");
        if (place >= predictions->predictions.size()) {
            throw InputError("there is no prediction " + std::to_string(place) + "; there are " +
                             std::to_string(predictions->predictions.size()));
        }
        const invariclip::Prediction& one = predictions->predictions[place];
        const std::vector<invariclip_ranked_class>& ranking = predictions->rankings[place];
        const invariclip_prediction found{sizeof found,
                                          one.label ? one.label->c_str() : nullptr,
                                          one.index,
                                          one.probability,
                                          one.uncertainty.value_or(std::numeric_limits<float>::quiet_NaN()),
                                          one.abstained ? 1 : 0,
                                          0,
                                          ranking.data(),
                                          ranking.size(),
                                          one.probabilities.data(),
                                          one.probabilities.size()};
        write(found, prediction, "prediction");
    });
}

void invariclip_predictions_free(invariclip_predictions* predictions) { delete predictions; }

invariclip_status invariclip_embed(const invariclip_model* model, const invariclip_image* images, size_t count,
                                   size_t batch_size, float* embeddings, size_t room) {
    return guarded([&] {
        require(model, "model");
        require(embeddings, "embeddings");
        require_room(embeddings, room, count, model->model.width(), "embeddings");
        copy(model->model.embed(images_of(images, count), batch_of(batch_size)).values, embeddings);
    });
}

invariclip_status invariclip_embed_texts(const invariclip_model* model, const char* const* texts, size_t count,
                                         size_t batch_size, float* embeddings, size_t room, size_t* cut) {
    return guarded([&] {
        require(model, "model");
        require(embeddings, "embeddings");
        require_room(embeddings, room, count, model->model.width(), "embeddings");
        const std::vector<std::string> given = texts_of(texts, count, "texts");
        const invariclip::TextEmbeddings found = model->model.embed_texts(given, batch_size == 0 ? 64 : batch_size);
        copy(found.embeddings.values, embeddings);
        if (cut != nullptr) {
            *cut = found.cut_texts.size();
        }
    });
}

invariclip_status invariclip_answer(const invariclip_model* model, const invariclip_image* images, size_t count,
                                    size_t batch_size, const invariclip_answers* answers) {
    return guarded([&] {
        require(model, "model");
        require(answers, "answers");
        const invariclip_answers to = known(answers, "answers");
        const std::size_t classes = model->model.classes().size();
        require_room(to.embeddings, to.embeddings_room, count, model->model.width(), "embeddings");
        require_room(to.probabilities, to.probabilities_room, count, classes, "probabilities");
        require_room(to.logits, to.logits_room, count, classes, "logits");
        require_room(to.uncertainty, to.uncertainty_room, count, 1, "uncertainty");
        const invariclip::Answers found = model->model.answer(images_of(images, count), batch_of(batch_size));
        if (to.uncertainty != nullptr && found.uncertainty.size() != count) {
            throw InputError("the artifact has no learned templates, so its answers have no uncertainty");
        }
        copy(found.embeddings.values, to.embeddings);
        copy(found.probabilities.values, to.probabilities);
        copy(found.logits.values, to.logits);
        copy(found.uncertainty, to.uncertainty);
    });
}

invariclip_status invariclip_pixels(const invariclip_model* model, const invariclip_image* image, uint8_t* pixels,
                                    size_t room) {
    return guarded([&] {
        require(model, "model");
        require(image, "image");
        require(pixels, "pixels");
        const invariclip::PixelSpec& spec = model->model.pixels();
        if (room < spec.bytes()) {
            throw InputError("pixels has room for " + std::to_string(room) + " bytes, and takes " +
                             std::to_string(spec.bytes()));
        }
        invariclip::Pixels(spec).fit(images_of(image, 1).front(), pixels);
    });
}
