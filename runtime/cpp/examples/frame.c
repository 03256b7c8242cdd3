/* One frame from memory, in C; examples/frame.cpp is the same in C++. */
#include <invariclip/invariclip.h>
#include <stdio.h>
#include <string.h>

int main(int count, char** arguments) {
    static unsigned char frame[480 * 640 * 3];
    const invariclip_image image = {frame, 640, 480, 0, INVARICLIP_BGR, 0};
    invariclip_model* model = NULL;
    invariclip_predictions* predictions = NULL;
    invariclip_prediction best;
    int failed = 1;
    if (count != 2) {
        fprintf(stderr, "usage: invariclip-frame-c ARTIFACT\n");
        return 2;
    }
    memset(frame, 127, sizeof frame);
    best.size = sizeof best;
    if (invariclip_model_load(arguments[1], NULL, &model) == INVARICLIP_OK &&
        invariclip_classify(model, &image, 1, NULL, &predictions) == INVARICLIP_OK &&
        invariclip_predictions_get(predictions, 0, &best) == INVARICLIP_OK) {
        printf("%s %g\n", best.label == NULL ? "not sure" : best.label, best.probability);
        failed = 0;
    } else {
        fprintf(stderr, "%s\n", invariclip_last_error());
    }
    invariclip_predictions_free(predictions);
    invariclip_model_free(model);
    return failed == 0 ? 0 : 2;
}
