"""When two values are the same: types, numbers and bits, not what Python's == makes of them."""

import numpy as np


def same_json(one, other):
    """Whether two values of JSON's types are the same; a whole number may be read as a float."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or (isinstance(one, float) != isinstance(other, float) and _float(one) == _float(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_json, one, other))
    return type(one) is type(other) and one == other


def _float(number):
    try:
        return float(number)
    except OverflowError:
        return None


def same_array(one, other):
    """Whether two arrays have the same dtype, shape and bits."""
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
