"""`ExportConfig`: everything that says how an artifact is made and what it must keep, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.artifact.fidelity import require_level
from invariclip.backends import DEFAULT_BACKEND, require_backend
from invariclip.errors import InputError
from invariclip.export.graphs.front import require_form
from invariclip.export.graphs.rewrites.plan import chosen
from invariclip.export.quantization.variants import require_kinds
from invariclip.export.verification.figures import EXACT, THRESHOLDS
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES, check_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.export.graphs.front import FrontForm
    from invariclip.export.verification.figures import Thresholds


@dataclass(frozen=True)
class ExportConfig:
    """How an artifact is made and what it must keep.

    Attributes:
        classes: Class names to bake into the image graph.
        templates: Prompt templates of the classes; None takes those that the learned templates were trained beside,
            or the default.
        images: Files and folders to verify on; None takes the bundled ones.
        thresholds: Bounds of the float32 graphs.
        backends: Engines that have to keep the contract, see `backends.BACKENDS`.
        without_rewrites: Exact rewrites to leave out, see `graphs.rewrites.plan`.
        pixels_in_graph: Put a front before the image tower that takes uint8 images of any size: `resize` (ONNX's
            Resize, for ONNX Runtime) or `matmul` (two products, which TensorRT builds); None leaves that to the host.
        projection_as_input: Leave the projection as a matrix that may be exchanged at any run.
        fast_pixels: Check the fast pixel mode against the exact one, so that it can be asked for at run time.
        variants: Further variants beside float32, see `quantization.variants.KINDS`; one that fails is left out with a
            warning.
        fidelity: The level that variants and the fast pixel mode have to reach.
        variant_thresholds: Bounds in place of that level's own, or None.
        calibration_images: Files and folders to calibrate variants on; None takes bundled images that the contract
            does not look at.
        threads: The engines' threads; None takes what this process may use.
    """

    classes: Sequence[str] = ()
    templates: Sequence[str] | None = None
    images: Sequence[str | Path] | None = None
    thresholds: Thresholds = EXACT
    backends: Sequence[str] = (DEFAULT_BACKEND,)
    without_rewrites: Sequence[str] = ()
    pixels_in_graph: FrontForm | None = None
    projection_as_input: bool = False
    fast_pixels: bool = False
    variants: Sequence[str] = ()
    fidelity: Fidelity = "fast"
    variant_thresholds: Thresholds | None = None
    calibration_images: Sequence[str | Path] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks what can be told without the model, before minutes of work.

        Raises:
            InputError: An engine, rewrite, form, variant or level is not known, options exclude each other, or classes
                or templates are bad.
            MissingExtraError: An engine is not installed.
        """
        for name in self.backends:
            require_backend(name)
        chosen(self.without_rewrites)
        require_kinds(self.variants)
        require_level(self.fidelity)
        if self.pixels_in_graph is not None:
            require_form(self.pixels_in_graph)
            if self.variants:
                raise InputError("variants take images prepared by the host: leave --pixels-in-graph or --variant out")
        if self.classes:
            check_prompts(self.classes, self.templates or DEFAULT_TEMPLATES)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Names of the exact rewrites that are applied."""
        return chosen(self.without_rewrites)

    @property
    def variant_bounds(self) -> Thresholds:
        """What variants and the fast pixel mode must keep."""
        return self.variant_thresholds or THRESHOLDS[self.fidelity]
