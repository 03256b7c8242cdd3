/* A program in C99 over the C interface.
 *
 *     answer-c ARTIFACT ENGINE WIDTH HEIGHT [SITE] < RGB bytes of any number of images
 *         writes float32: embeddings, probabilities, logits, uncertainty (where there are learned templates), and the
 *         embeddings again by invariclip_embed; and on standard error a line for each image: label, ranking
 *     answer-c --texts ARTIFACT ENGINE TEXT CLASS CLASS
 *         writes the text's embedding, and the two probabilities of a grey frame
 *     answer-c --abuse ARTIFACT ENGINE SITE
 *         every function with NULL and impossible arguments; says how many were refused as they should be
 */
#include <invariclip/invariclip.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int refused = 0;
static int wrong = 0;

static int said(const char* what) {
    fprintf(stderr, "%s: %s\n", what, invariclip_last_error());
    return 2;
}

/* A call that has to be refused, in one line. */
static void expect(invariclip_status status, invariclip_status wanted, const char* part, int line) {
    const char* message = invariclip_last_error();
    if (status == wanted && strstr(message, part) != NULL && strchr(message, '\n') == NULL) {
        ++refused;
    } else {
        ++wrong;
        fprintf(stderr, "line %d: %s: %s\n", line, invariclip_status_name(status), message);
    }
}
#define EXPECT(call, wanted, part) expect((call), INVARICLIP_##wanted, (part), __LINE__)

static unsigned char* input(size_t* count) {
    size_t room = 1 << 16;
    unsigned char* bytes = malloc(room);
    *count = 0;
    while (bytes != NULL) {
        const size_t got = fread(bytes + *count, 1, room - *count, stdin);
        if (got == 0) {
            break;
        }
        *count += got;
        if (*count == room) {
            unsigned char* more = realloc(bytes, room *= 2);
            if (more == NULL) {
                free(bytes);
            }
            bytes = more;
        }
    }
    return bytes;
}

static int answer(const char* artifact, const char* engine, size_t width, size_t height, const char* site) {
    invariclip_load_options options = {sizeof options, NULL, NULL, 1, 0};
    invariclip_facts facts = {sizeof facts, NULL, NULL, 0, 0, 0, 0, 0, NULL, NULL, 0};
    invariclip_answers answers = {sizeof answers, NULL, 0, NULL, 0, NULL, 0, NULL, 0};
    invariclip_model* model = NULL;
    invariclip_predictions* predictions = NULL;
    const size_t one = 1;
    size_t bytes;
    size_t place;
    size_t rank;
    options.engine = engine;
    if (invariclip_model_load(artifact, &options, &model) != INVARICLIP_OK) {
        return said("load");
    }
    if (site != NULL) {
        invariclip_model* adapted = NULL;
        if (invariclip_model_with_site(model, site, &adapted) != INVARICLIP_OK) {
            return said("site");
        }
        invariclip_model_free(model); /* what they share lives on */
        model = adapted;
    }
    if (invariclip_model_facts(model, &facts) != INVARICLIP_OK ||
        invariclip_model_warm_up(model, &one, 1) != INVARICLIP_OK) {
        return said("facts");
    }
    unsigned char* pixels = input(&bytes);
    const size_t count = bytes / (width * height * 3);
    invariclip_image* images = calloc(count + 1, sizeof *images);
    float* room = malloc((2 * facts.width + 2 * facts.class_count + 1) * count * sizeof(float));
    if (pixels == NULL || images == NULL || room == NULL) {
        return 3;
    }
    for (place = 0; place < count; ++place) {
        images[place].data = pixels + place * width * height * 3;
        images[place].width = width;
        images[place].height = height;
        images[place].order = INVARICLIP_RGB;
    }
    float* next = room;
    answers.embeddings = next;
    answers.embeddings_room = count * facts.width;
    next += answers.embeddings_room;
    answers.probabilities = next;
    answers.probabilities_room = count * facts.class_count;
    next += answers.probabilities_room;
    answers.logits = next;
    answers.logits_room = count * facts.class_count;
    next += answers.logits_room;
    if (invariclip_classify(model, images, count, NULL, &predictions) != INVARICLIP_OK) {
        return said("classify");
    }
    for (place = 0; place < invariclip_predictions_count(predictions); ++place) {
        invariclip_prediction best;
        best.size = sizeof best;
        if (invariclip_predictions_get(predictions, place, &best) != INVARICLIP_OK) {
            return said("get");
        }
        if (place == 0 && best.uncertainty == best.uncertainty) { /* a number */
            answers.uncertainty = next;
            answers.uncertainty_room = count;
            next += count;
        }
        fprintf(stderr, "%s", best.label == NULL ? "not sure" : best.label);
        for (rank = 0; rank < best.ranking_count; ++rank) {
            fprintf(stderr, "\t%s", best.ranking[rank].label);
        }
        fprintf(stderr, "\n");
    }
    if (invariclip_answer(model, images, count, 16, &answers) != INVARICLIP_OK ||
        invariclip_embed(model, images, count, 16, next, count * facts.width) != INVARICLIP_OK) {
        return said("answer");
    }
    next += count * facts.width;
    fwrite(room, sizeof(float), (size_t)(next - room), stdout);
    invariclip_predictions_free(predictions);
    invariclip_model_free(model);
    free(room);
    free(images);
    free(pixels);
    return 0;
}

static int texts(const char* artifact, const char* engine, const char* text, const char* const* classes) {
    static unsigned char frame[50 * 40 * 3];
    static float room[4096];
    invariclip_load_options options = {sizeof options, NULL, NULL, 1, 0};
    invariclip_facts facts = {sizeof facts, NULL, NULL, 0, 0, 0, 0, 0, NULL, NULL, 0};
    invariclip_answers answers = {sizeof answers, NULL, 0, NULL, 0, NULL, 0, NULL, 0};
    const invariclip_image image = {frame, 50, 40, 0, INVARICLIP_RGB, 0};
    const char* const templates[] = {"a photo of a {}.", "{} in art"};
    invariclip_model* model = NULL;
    invariclip_model* other = NULL;
    size_t cut = 77;
    memset(frame, 127, sizeof frame);
    options.engine = engine;
    if (invariclip_model_load(artifact, &options, &model) != INVARICLIP_OK ||
        invariclip_model_facts(model, &facts) != INVARICLIP_OK ||
        invariclip_embed_texts(model, &text, 1, 0, room, 4096, &cut) != INVARICLIP_OK || cut != 0 ||
        invariclip_model_with_classes(model, classes, 2, templates, 2, &other) != INVARICLIP_OK) {
        return said("texts");
    }
    fwrite(room, sizeof(float), facts.width, stdout);
    answers.probabilities = room;
    answers.probabilities_room = 2;
    if (invariclip_answer(other, &image, 1, 0, &answers) != INVARICLIP_OK) {
        return said("answer");
    }
    fwrite(room, sizeof(float), 2, stdout);
    invariclip_model_free(other);
    invariclip_model_free(model);
    return 0;
}

/* A struct of a later version, which has something more behind its end. */
struct later {
    invariclip_load_options options;
    const char* more;
};

static int abuse(const char* artifact, const char* engine, const char* site) {
    static unsigned char pixels[32 * 32 * 4];
    static float room[4096];
    invariclip_load_options options = {sizeof options, NULL, NULL, 1, 0};
    invariclip_classify_options how = {sizeof how, 0, 0, 0, 0, 0};
    invariclip_facts facts = {sizeof facts, NULL, NULL, 0, 0, 0, 0, 0, NULL, NULL, 0};
    invariclip_answers answers = {sizeof answers, NULL, 0, NULL, 0, NULL, 0, NULL, 0};
    invariclip_image image = {NULL, 32, 32, 0, INVARICLIP_RGB, 0};
    invariclip_prediction best;
    invariclip_model* model = NULL;
    invariclip_model* adapted = NULL;
    invariclip_predictions* predictions = NULL;
    const size_t none = 0;
    const char* name = "cat";
    const char* broken = "\xff";
    const char* absent = NULL;
    struct later later;
    memset(&later, 0, sizeof later);

    EXPECT(invariclip_model_load(NULL, NULL, &model), INPUT_ERROR, "path is NULL");
    EXPECT(invariclip_model_load(artifact, NULL, NULL), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_model_load("", NULL, &model), INPUT_ERROR, "no such file or folder");
    EXPECT(invariclip_model_load("absent.icm", NULL, &model), INPUT_ERROR, "absent.icm: no such file or folder");
    EXPECT(invariclip_model_load(site, NULL, &model), ARTIFACT_ERROR, "");
    options.size = 0;
    EXPECT(invariclip_model_load(artifact, &options, &model), INPUT_ERROR, "set it to sizeof(options)");
    options.size = (size_t)-1;
    EXPECT(invariclip_model_load(artifact, &options, &model), INPUT_ERROR, "set it to sizeof(options)");
    options.size = sizeof options;
    options.threads = -1;
    EXPECT(invariclip_model_load(artifact, &options, &model), INPUT_ERROR, "threads must be from 1");
    options.threads = INT_MAX;
    EXPECT(invariclip_model_load(artifact, &options, &model), INPUT_ERROR, "threads must be from 1");
    options.threads = 1;
    options.engine = "abacus";
    EXPECT(invariclip_model_load(artifact, &options, &model), ENGINE_ERROR, "no engine 'abacus' was compiled in");
    options.engine = engine;
    options.variant = "int4";
    EXPECT(invariclip_model_load(artifact, &options, &model), ARTIFACT_ERROR, "no variant 'int4'");
    later.options.size = sizeof later;
    later.more = "tomorrow";
    EXPECT(invariclip_model_load(artifact, &later.options, &model), INPUT_ERROR, "does not know");
    later.more = NULL;
    later.options.engine = engine;
    if (model != NULL || invariclip_model_load(artifact, &later.options, &model) != INVARICLIP_OK) {
        return said("load");
    }

    EXPECT(invariclip_model_facts(NULL, &facts), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_model_facts(model, NULL), INPUT_ERROR, "facts is NULL");
    facts.size = 3;
    EXPECT(invariclip_model_facts(model, &facts), INPUT_ERROR, "set it to sizeof(facts)");
    facts.size = sizeof facts.size + sizeof facts.space_id; /* of a version that knew no more */
    facts.width = 77;
    if (invariclip_model_facts(model, &facts) != INVARICLIP_OK || facts.space_id == NULL || facts.width != 77) {
        return said("facts");
    }

    EXPECT(invariclip_model_with_site(NULL, site, &adapted), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_model_with_site(model, NULL, &adapted), INPUT_ERROR, "site_path is NULL");
    EXPECT(invariclip_model_with_site(model, site, NULL), INPUT_ERROR, "adapted is NULL");
    EXPECT(invariclip_model_with_site(model, "absent.safetensors", &adapted), SITE_ERROR, "absent.safetensors");
    EXPECT(invariclip_model_with_site(model, artifact, &adapted), SITE_ERROR, "");

    EXPECT(invariclip_model_with_classes(NULL, &name, 1, NULL, 0, &adapted), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_model_with_classes(model, &name, 1, NULL, 0, NULL), INPUT_ERROR, "other is NULL");
    EXPECT(invariclip_model_with_classes(model, NULL, 1, NULL, 0, &adapted), INPUT_ERROR, "classes is NULL");
    EXPECT(invariclip_model_with_classes(model, &absent, 1, NULL, 0, &adapted), INPUT_ERROR, "classes[0] is NULL");
    EXPECT(invariclip_model_with_classes(model, &name, 1, NULL, 1, &adapted), INPUT_ERROR, "templates is NULL");
    EXPECT(invariclip_embed_texts(NULL, &name, 1, 0, room, 4096, NULL), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_embed_texts(model, NULL, 1, 0, room, 4096, NULL), INPUT_ERROR, "texts is NULL");
    EXPECT(invariclip_embed_texts(model, &absent, 1, 0, room, 4096, NULL), INPUT_ERROR, "texts[0] is NULL");
    EXPECT(invariclip_embed_texts(model, &name, 1, 0, NULL, 4096, NULL), INPUT_ERROR, "embeddings is NULL");
    EXPECT(invariclip_embed_texts(model, &name, 1, 0, room, 1, NULL), INPUT_ERROR, "has room for 1 floats");
    EXPECT(invariclip_embed_texts(model, &name, 1, 1025, room, 4096, NULL), INPUT_ERROR,
           "a batch must be of 1 to 1024");
    EXPECT(invariclip_embed_texts(model, &broken, 1, 0, room, 4096, NULL), INPUT_ERROR, "text 0: a text is not UTF-8");

    EXPECT(invariclip_model_warm_up(NULL, &none, 1), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_model_warm_up(model, NULL, 1), INPUT_ERROR, "batch_sizes is NULL");
    EXPECT(invariclip_model_warm_up(model, &none, 1), INPUT_ERROR, "a batch must be of 1 to 1024");

    EXPECT(invariclip_classify(NULL, &image, 1, NULL, &predictions), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_classify(model, NULL, 1, NULL, &predictions), INPUT_ERROR, "images is NULL");
    EXPECT(invariclip_classify(model, &image, 1, NULL, NULL), INPUT_ERROR, "predictions is NULL");
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR,
           "image 0: an image of 32x32 pixels has");
    image.data = pixels;
    image.order = 5;
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR, "image 0: order 5 is not known");
    image.order = -1;
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR, "image 0: order -1 is not known");
    image.order = INVARICLIP_BGRA;
    image.stride = 5;
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR, "rows are 5 bytes apart");
    image.stride = 0;
    image.width = (size_t)-1;
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR, "above the limit");
    image.width = 0;
    EXPECT(invariclip_classify(model, &image, 1, NULL, &predictions), INPUT_ERROR, "nothing to see");
    image.width = 32;
    how.size = 1;
    EXPECT(invariclip_classify(model, &image, 1, &how, &predictions), INPUT_ERROR, "set it to sizeof(options)");
    how.size = sizeof how;
    how.batch_size = 1025;
    EXPECT(invariclip_classify(model, &image, 1, &how, &predictions), INPUT_ERROR, "a batch must be of 1 to 1024");
    how.batch_size = 1;
    how.abstain = 3;
    EXPECT(invariclip_classify(model, &image, 1, &how, &predictions), INPUT_ERROR, "options->abstain 3 is not known");
    how.abstain = INVARICLIP_ABSTAIN_ABOVE;
    how.abstain_above = 7;
    EXPECT(invariclip_classify(model, &image, 1, &how, &predictions), INPUT_ERROR, "must be a number from 0 to 1");
    how.abstain = INVARICLIP_ABSTAIN_NEVER;
    how.top_k = (size_t)-1;
    if (predictions != NULL || invariclip_classify(model, &image, 1, &how, &predictions) != INVARICLIP_OK) {
        return said("classify");
    }

    best.size = 0;
    EXPECT(invariclip_predictions_get(NULL, 0, &best), INPUT_ERROR, "predictions is NULL");
    EXPECT(invariclip_predictions_get(predictions, 0, NULL), INPUT_ERROR, "prediction is NULL");
    EXPECT(invariclip_predictions_get(predictions, 1, &best), INPUT_ERROR, "there is no prediction 1; there are 1");
    EXPECT(invariclip_predictions_get(predictions, 0, &best), INPUT_ERROR, "set it to sizeof(prediction)");

    EXPECT(invariclip_embed(NULL, &image, 1, 0, room, 4096), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_embed(model, NULL, 1, 0, room, 4096), INPUT_ERROR, "images is NULL");
    EXPECT(invariclip_embed(model, &image, 1, 0, NULL, 4096), INPUT_ERROR, "embeddings is NULL");
    EXPECT(invariclip_embed(model, &image, 1, 0, room, 1), INPUT_ERROR, "embeddings has room for 1 floats, and takes");
    EXPECT(invariclip_embed(model, &image, (size_t)-1, 0, room, 1), INPUT_ERROR, "fit into no memory");

    EXPECT(invariclip_answer(NULL, &image, 1, 0, &answers), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_answer(model, NULL, 1, 0, &answers), INPUT_ERROR, "images is NULL");
    EXPECT(invariclip_answer(model, &image, 1, 0, NULL), INPUT_ERROR, "answers is NULL");
    answers.logits = room;
    EXPECT(invariclip_answer(model, &image, 1, 0, &answers), INPUT_ERROR, "logits has room for 0 floats");
    answers.size = 0;
    EXPECT(invariclip_answer(model, &image, 1, 0, &answers), INPUT_ERROR, "set it to sizeof(answers)");

    EXPECT(invariclip_pixels(NULL, &image, pixels, 1), INPUT_ERROR, "model is NULL");
    EXPECT(invariclip_pixels(model, NULL, pixels, 1), INPUT_ERROR, "image is NULL");
    EXPECT(invariclip_pixels(model, &image, NULL, 1), INPUT_ERROR, "pixels is NULL");
    EXPECT(invariclip_pixels(model, &image, pixels, 1), INPUT_ERROR, "pixels has room for 1 bytes");

    invariclip_predictions_free(predictions);
    invariclip_predictions_free(NULL);
    invariclip_model_free(model);
    invariclip_model_free(NULL);
    if (invariclip_predictions_count(NULL) != 0 || strcmp(invariclip_status_name(99), "unknown status") != 0) {
        ++wrong;
    }
    printf("%d refused, %d wrong\n", refused, wrong);
    return wrong != 0;
}

int main(int count, char** words) {
    if (count == 5 && strcmp(words[1], "--abuse") == 0) {
        return abuse(words[2], words[3], words[4]);
    }
    if (count == 7 && strcmp(words[1], "--texts") == 0) {
        return texts(words[2], words[3], words[4], (const char* const*)(words + 5));
    }
    if (count < 5 || count > 6 || atoi(words[3]) < 1 || atoi(words[4]) < 1) {
        return 2;
    }
    return answer(words[1], words[2], (size_t)atoi(words[3]), (size_t)atoi(words[4]), count == 6 ? words[5] : NULL);
}
