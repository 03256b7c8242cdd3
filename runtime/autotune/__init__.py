"""The search for what is fastest on this machine among what was proved: `invariclip tune`."""

from invariclip.autotune.tuner import Settings, Tuned, tune

__all__ = ["Settings", "Tuned", "tune"]
