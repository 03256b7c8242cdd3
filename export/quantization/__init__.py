"""Lower precisions of a finished graph: int8 calibrated on interventional images, and float16 weights."""
