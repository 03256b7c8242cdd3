"""Lower precisions of a finished graph: int8 calibrated on interventional pictures, and float16 weights."""
