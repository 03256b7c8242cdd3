"""Style from another image: what is coarse in the Fourier amplitude is exchanged, the phase stays.

The phase holds where things are, the low amplitudes hold light, colour and contrast: Yang and Soatto, FDA (CVPR 2020,
arXiv 2004.05498) put another image's there; Xu et al., FACT (CVPR 2021, arXiv 2105.14075) mix the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from invariclip.preprocessing.interventions.base import DonorIntervention, Range, parameter
from invariclip.preprocessing.interventions.degrade import to_image

if TYPE_CHECKING:
    from PIL import Image

NO_PHASE = 1e-6
"""Amplitude, in levels, below which a frequency is rounding error and its phase means nothing."""


@dataclass(frozen=True)
class StyleExchange(DonorIntervention):
    """Low-frequency amplitudes mixed with a donor's, channel by channel.

    Attributes:
        strength: The donor's part in the mixture: 1 exchanges, as FDA does; FACT draws from 0 to 1.
        window: Which frequencies: up to this share of the shorter side, in periods over the image (FDA's β, 0.01 to
            0.09 there); 0.5 are all, as in FACT.
    """

    name: ClassVar[str] = "style-exchange"
    strength: Range = parameter((0.5, 1.0), 0, 1)
    window: Range = parameter((0.01, 0.05), 0, 0.5)

    def change_with(self, image: Image.Image, donor: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Levels beyond black and white are cut."""
        strength, window = rng.uniform(*self.strength), rng.uniform(*self.window)
        levels = np.asarray(image, dtype=np.float64)
        return to_image(mix_amplitudes(levels, np.asarray(donor, dtype=np.float64), strength, window))


def mix_amplitudes(levels: np.ndarray, donor: np.ndarray, strength: float, window: float) -> np.ndarray:
    """FACT's equation 4 within FDA's window, neither rounded nor cut.

    Args:
        levels: float64 [H, W, C].
        donor: The same shape.
        strength: The donor's part, 0 to 1.
        window: Frequencies up to floor(window · min(H, W)) periods, either way.

    Returns:
        The same shape.
    """
    height, width = levels.shape[:2]
    own, other = np.fft.rfft2(levels, axes=(0, 1)), np.abs(np.fft.rfft2(donor, axes=(0, 1)))
    amplitude = np.abs(own)
    most = int(window * min(height, width))
    down, across = np.abs(np.fft.fftfreq(height)) * height, np.fft.rfftfreq(width) * width
    # half a period of slack: frequencies are whole numbers up to rounding
    low = (down[:, None] < most + 0.5) & (across[None, :] < most + 0.5)
    taken = low[..., None] & (amplitude > NO_PHASE * height * width)
    mixed = (1 - strength) * amplitude + strength * other
    factor = np.where(taken, mixed / np.where(taken, amplitude, 1.0), 1.0)
    return np.asarray(np.fft.irfft2(own * factor, s=(height, width), axes=(0, 1)))
