/* invariclip's C interface: classify and embed images with an exported artifact, from any language that calls C.
 *
 *     invariclip_model *model;
 *     if (invariclip_model_load("mine.icm", NULL, &model) != INVARICLIP_OK) {
 *         fprintf(stderr, "%s\n", invariclip_last_error());
 *         return 2;
 *     }
 *     invariclip_image frame = {bytes, 640, 480, 0, INVARICLIP_BGR, 0};
 *     invariclip_predictions *predictions;
 *     invariclip_prediction best;
 *     best.size = sizeof best;
 *     if (invariclip_classify(model, &frame, 1, NULL, &predictions) == INVARICLIP_OK) {
 *         invariclip_predictions_get(predictions, 0, &best);
 *         printf("%s %f\n", best.label ? best.label : "not sure", best.probability);
 *         invariclip_predictions_free(predictions);
 *     }
 *     invariclip_model_free(model);
 *
 * - A function that can fail returns a status. What it was to write is then unchanged, and invariclip_last_error() says
 *   in one line what went wrong and how to fix it. No exception leaves the library, and a NULL that is not allowed is
 *   an error.
 * - Structs that may grow begin with `size`, which the caller sets to the sizeof of the struct that it was compiled
 *   with; all other members are 0 for what is usual. One that is larger than this library knows is taken where the
 *   rest is 0.
 * - A model may be used from many threads at once. It must outlive what was read of it; predictions stand on their own.
 * - Texts are UTF-8 and end with a 0 byte.
 */
#ifndef INVARICLIP_H
#define INVARICLIP_H

#include <stddef.h>
#include <stdint.h>

#define INVARICLIP_VERSION_MAJOR 0
#define INVARICLIP_VERSION_MINOR 2
#define INVARICLIP_VERSION_PATCH 0
/* Of this interface, and of the shared library's name: it goes up when programs must be compiled again. */
#define INVARICLIP_ABI 1

#if defined(_WIN32) && defined(INVARICLIP_C_BUILD)
#define INVARICLIP_API __declspec(dllexport)
#elif defined(_WIN32)
#define INVARICLIP_API __declspec(dllimport)
#elif defined(__GNUC__)
#define INVARICLIP_API __attribute__((visibility("default")))
#else
#define INVARICLIP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The library's own version, "0.2.0", and its INVARICLIP_ABI. */
INVARICLIP_API const char* invariclip_version(void);
INVARICLIP_API int32_t invariclip_abi(void);
/* The engines that were compiled in, in order of preference, with ", " between them. */
INVARICLIP_API const char* invariclip_engines(void);

typedef int32_t invariclip_status;
enum {
    INVARICLIP_OK = 0,
    INVARICLIP_INPUT_ERROR = 1,    /* an argument, an image or a name that was given cannot be used */
    INVARICLIP_ARTIFACT_ERROR = 2, /* the artifact is incomplete, damaged, unsafe or of an unknown schema */
    INVARICLIP_SITE_ERROR = 3,     /* the site is damaged, or was measured in another space */
    INVARICLIP_ENGINE_ERROR = 4,   /* the engine is not compiled in, cannot load the graph, or failed at work */
    INVARICLIP_MEMORY_ERROR = 5,   /* memory was refused */
    INVARICLIP_INTERNAL_ERROR = 6  /* anything else: a mistake of this library, or of one below it */
};
/* "InputError" and the like; "unknown status" of any other number. */
INVARICLIP_API const char* invariclip_status_name(invariclip_status status);
/* Of the last call in this thread that failed, or ""; valid until the next call that fails. */
INVARICLIP_API const char* invariclip_last_error(void);

typedef struct invariclip_model invariclip_model;
typedef struct invariclip_predictions invariclip_predictions;

/* How the bytes of a pixel follow one another. */
enum { INVARICLIP_GREY = 0, INVARICLIP_RGB = 1, INVARICLIP_BGR = 2, INVARICLIP_RGBA = 3, INVARICLIP_BGRA = 4 };

/* 8-bit pixels somewhere in memory, which stay the caller's own. This struct does not grow. */
typedef struct invariclip_image {
    const uint8_t* data;
    size_t width;
    size_t height;
    size_t stride; /* bytes from one row to the next; 0: rows follow one another without a gap */
    int32_t order;
    int32_t reserved; /* 0 */
} invariclip_image;

typedef struct invariclip_load_options {
    size_t size;
    const char* engine;  /* "onnxruntime" or "openvino"; NULL: the first compiled in that the artifact was proved on */
    const char* variant; /* one of the manifest's; NULL: float32 */
    int32_t threads;     /* of the engine; 0: what the affinity mask and the control groups allow */
    int32_t unverified;  /* not 0: the graph's files are not held against the digests of their manifest */
} invariclip_load_options;

/* `path`: a folder name.icm, or an image.onnx alone. `options` may be NULL. */
INVARICLIP_API invariclip_status invariclip_model_load(const char* path, const invariclip_load_options* options,
                                                       invariclip_model** model);
/* The same artifact for images of one place, as `invariclip adapt` measured it; the engine is shared. */
INVARICLIP_API invariclip_status invariclip_model_with_site(const invariclip_model* model, const char* site_path,
                                                            invariclip_model** adapted);
/* The same artifact with other classes, put into each of the templates, which have one {} for them; no template: the
 * artifact's own, or "a photo of a {}.". The engine is shared. */
INVARICLIP_API invariclip_status invariclip_model_with_classes(const invariclip_model* model,
                                                               const char* const* classes, size_t class_count,
                                                               const char* const* templates, size_t template_count,
                                                               invariclip_model** other);
/* NULL is allowed. */
INVARICLIP_API void invariclip_model_free(invariclip_model* model);

/* What a model says of itself; texts and lists live as long as the model. */
typedef struct invariclip_facts {
    size_t size;
    const char* space_id; /* compare embeddings only where it is equal */
    const char* const* classes;
    size_t class_count;
    size_t width;        /* of embeddings */
    size_t image_height; /* of the pixels that the tower sees */
    size_t image_width;
    double abstain_above; /* what it was calibrated to, or NaN */
    const char* description;
    const char* const* warnings; /* say, that the artifact was never proved on this engine */
    size_t warning_count;
} invariclip_facts;
INVARICLIP_API invariclip_status invariclip_model_facts(const invariclip_model* model, invariclip_facts* facts);

/* Answers blank images, so that the first real ones of these batch sizes need not wait for the engine. */
INVARICLIP_API invariclip_status invariclip_model_warm_up(const invariclip_model* model, const size_t* batch_sizes,
                                                          size_t count);

/* When to give no label. */
enum { INVARICLIP_ABSTAIN_NEVER = 0, INVARICLIP_ABSTAIN_ABOVE = 1, INVARICLIP_ABSTAIN_CALIBRATED = 2 };

typedef struct invariclip_classify_options {
    size_t size;
    size_t top_k;         /* classes in a ranking; 0: 5 */
    size_t batch_size;    /* images to a run; 0: 16 */
    int32_t abstain;      /* INVARICLIP_ABSTAIN_... */
    int32_t reserved;     /* 0 */
    double abstain_above; /* an uncertainty from 0 to 1, of INVARICLIP_ABSTAIN_ABOVE */
} invariclip_classify_options;

/* `options` may be NULL. */
INVARICLIP_API invariclip_status invariclip_classify(const invariclip_model* model, const invariclip_image* images,
                                                     size_t count, const invariclip_classify_options* options,
                                                     invariclip_predictions** predictions);

/* A class with its probability. This struct does not grow. */
typedef struct invariclip_ranked_class {
    const char* label;
    float probability;
    float reserved;
} invariclip_ranked_class;

/* What an image was taken for; texts and lists live as long as the predictions. */
typedef struct invariclip_prediction {
    size_t size;
    const char* label; /* NULL where the model abstains */
    size_t index;      /* of the most probable class */
    float probability; /* of the most probable class */
    float uncertainty; /* 0 sure, 1 no evidence; NaN without learned templates */
    int32_t abstained; /* 1 or 0 */
    int32_t reserved;
    const invariclip_ranked_class* ranking; /* best first */
    size_t ranking_count;
    const float* probabilities; /* of every class, in the order of invariclip_facts.classes */
    size_t class_count;
} invariclip_prediction;

/* 0 of NULL. */
INVARICLIP_API size_t invariclip_predictions_count(const invariclip_predictions* predictions);
INVARICLIP_API invariclip_status invariclip_predictions_get(const invariclip_predictions* predictions, size_t place,
                                                            invariclip_prediction* prediction);
/* NULL is allowed. */
INVARICLIP_API void invariclip_predictions_free(invariclip_predictions* predictions);

/* Unit embeddings [count, width] of float32. `room`: how many floats fit, at least count * width. `batch_size` 0: 16.
 */
INVARICLIP_API invariclip_status invariclip_embed(const invariclip_model* model, const invariclip_image* images,
                                                  size_t count, size_t batch_size, float* embeddings, size_t room);

/* Unit embeddings [count, width] of texts. `cut`, where it is not NULL, is how many texts were cut to the tower's
 * context. */
INVARICLIP_API invariclip_status invariclip_embed_texts(const invariclip_model* model, const char* const* texts,
                                                        size_t count, size_t batch_size, float* embeddings, size_t room,
                                                        size_t* cut);

/* Where answers go: each a buffer with room for so many floats, or NULL and 0 where it is not wanted. */
typedef struct invariclip_answers {
    size_t size;
    float* embeddings; /* [count, width] */
    size_t embeddings_room;
    float* probabilities; /* [count, class_count] */
    size_t probabilities_room;
    float* logits; /* [count, class_count] */
    size_t logits_room;
    float* uncertainty; /* [count]; wanted of an artifact without learned templates it is an error */
    size_t uncertainty_room;
} invariclip_answers;
/* Everything that the graph says, in one pass. The struct is only read; its buffers are written. */
INVARICLIP_API invariclip_status invariclip_answer(const invariclip_model* model, const invariclip_image* images,
                                                   size_t count, size_t batch_size, const invariclip_answers* answers);

/* What the tower sees of an image: RGB [image_height, image_width, 3], equal to Pillow's pixels. `room` in bytes. */
INVARICLIP_API invariclip_status invariclip_pixels(const invariclip_model* model, const invariclip_image* image,
                                                   uint8_t* pixels, size_t room);

#ifdef __cplusplus
}
#endif

#endif
