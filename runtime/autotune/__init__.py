"""The search for what is fastest on this machine among what was proved: `invariclip tune`."""

from invariclip.autotune.tuner import Tuned, TuneSettings, tune

__all__ = ["TuneSettings", "Tuned", "tune"]
