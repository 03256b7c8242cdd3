"""One frame from memory, in Python without the package, over the C interface: frame.py LIBRARY ARTIFACT."""

import ctypes as c
import sys


class Image(c.Structure):
    _fields_ = (
        ("data", c.c_char_p), ("width", c.c_size_t), ("height", c.c_size_t), ("stride", c.c_size_t),
        ("order", c.c_int32), ("reserved", c.c_int32),
    )  # fmt: skip


class Prediction(c.Structure):
    """As much of the struct as is used here: `size` says so."""

    _fields_ = (("size", c.c_size_t), ("label", c.c_char_p), ("index", c.c_size_t), ("probability", c.c_float))


library = c.CDLL(sys.argv[1])
library.invariclip_last_error.restype = c.c_char_p
image = Image(b"\x7f" * (480 * 640 * 3), 640, 480, 0, 2, 0)
model, predictions, best = c.c_void_p(), c.c_void_p(), Prediction(c.sizeof(Prediction))
if (
    library.invariclip_model_load(sys.argv[2].encode(), None, c.byref(model))
    or library.invariclip_classify(model, c.byref(image), c.c_size_t(1), None, c.byref(predictions))
    or library.invariclip_predictions_get(predictions, c.c_size_t(0), c.byref(best))
):
    sys.exit(library.invariclip_last_error().decode())
sys.stdout.write(f"{(best.label or b'not sure').decode()} {best.probability}\n")
library.invariclip_predictions_free(predictions)
library.invariclip_model_free(model)
