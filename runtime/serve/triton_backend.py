"""An artifact behind Triton's Python backend: encoded images, pixels or texts to the tensors that `serve` answers with.

`invariclip triton` writes the model repository whose `model.py` imports this. Triton makes an object of the class in a
process of its own for each instance, and gives it the requests that it put together.
"""

from __future__ import annotations

import json
import mmap
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from invariclip.artifact.folder import read_manifest
from invariclip.errors import ArtifactError, InputError, InvariclipError
from invariclip.loading import load
from invariclip.serve.batcher import BatcherStoppedError, QueueFullError
from invariclip.serve.limits import Limits, RefusedError
from invariclip.serve.requests import checked_texts
from invariclip.serve.service import Batching, EncodedImage, Service
from invariclip.serve.tensors import BYTES, EMBEDDING, INPUTS, available_outputs, image_output, number_output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from invariclip.serve.service import ImageScores, TextRow
    from invariclip.serve.tensors import OutputTensor
    from invariclip.serve.tickets import Ticket

ARTIFACT, SPACE, VARIANT, ENGINE, THREADS = "artifact", "space_id", "variant", "engine", "threads"
"""Parameters of the model's configuration: the artifact's folder beside model.py, and how it is opened."""


class TritonQuestion(NamedTuple):
    """What a request asks: images or texts, the outputs that it wants, and the ticket of its images or texts."""

    outputs: tuple[str, ...]
    images: Ticket[ImageScores] | None = None
    texts: Ticket[TextRow] | None = None


class TritonPythonModel:
    """What Triton's Python backend asks of a model; the methods' names are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the artifact that lies beside model.py, and warms it up.

        Args:
            args: Of Triton: `model_config` as JSON, `model_repository`, `model_version` and others.

        Raises:
            ArtifactError: The artifact is damaged, or is not the one that the configuration was written for.
            InputError: Triton's Python backend does not know this numpy.
        """
        require_numpy()
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"], said[ARTIFACT])
        space = read_manifest(folder).space_id
        if space != said[SPACE]:
            raise ArtifactError(
                f"{folder}: is of the space {space}, and config.pbtxt of {said[SPACE]}; write the repository again "
                "with `invariclip triton`"
            )
        # An image's size has bounds of ours; Python would keep a record of every size that Pillow warns of
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        threads = int(said[THREADS]) if said.get(THREADS) else None
        model = load(folder, variant=said[VARIANT], backend=said[ENGINE], threads=threads)
        self._batched = int(config["max_batch_size"]) > 0
        most = max(int(config["max_batch_size"]), Limits.images)
        limits = Limits(images=most, queue=max(Limits.queue, most))
        self._service = Service(model, limits, Batching(int(config["max_batch_size"]) or Batching.max_batch))
        self._service.warm_up()
        self._triton: Any = import_module("triton_python_backend_utils")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests; one that cannot be answered has an error in its place, and the others their answers.

        Args:
            requests: Triton's `InferenceRequest`.

        Returns:
            Triton's `InferenceResponse`, one for each.
        """
        deadline = time.monotonic() + self._service.limits.seconds
        # all are in the queue before the first is waited for, so that they are answered in one batch
        asked = [self._or_error(self._asked, request, deadline) for request in requests]
        return [self._or_error(self._answer, one) if isinstance(one, TritonQuestion) else one for one in asked]

    def finalize(self) -> None:
        """Ends the threads."""
        self._service.close()

    def _asked(self, request: Any, deadline: float) -> TritonQuestion:
        given = [(name, self._triton.get_input_tensor_by_name(request, name)) for name in INPUTS]
        given = [(name, tensor) for name, tensor in given if tensor is not None]
        if len(given) != 1:
            names = ", ".join(name for name, _ in given) or "none"
            raise InputError(f"give one of the inputs {', '.join(INPUTS)}, not {len(given)} ({names})")
        if "site" in json.loads(request.parameters() or "{}"):
            raise InputError(
                "the parameter site is not taken behind Triton; bake the site into the artifact with "
                "`adapt -o NAME.icm`"
            )
        [(name, tensor)] = given
        values = tensor.as_numpy()
        values = values.ravel() if INPUTS[name][0] == BYTES else values
        wanted = tuple(request.requested_output_names())
        available = available_outputs(self._service.model.classes, of_texts=name == "texts")
        outputs = tuple(one for one in available if one in wanted)  # Triton names all where a request names none
        if not outputs:
            raise InputError(f"there is no output {', '.join(wanted)} of {name}; available: {', '.join(available)}")
        limits = self._service.limits
        if name == "texts":
            limits.require(len(values), "texts", limits.texts)
            texts = checked_texts(_decoded(values), "texts", limits, limits.texts)
            return TritonQuestion(outputs, texts=self._service.texts.submit(texts, deadline=deadline))
        if not len(values):
            raise InputError(f"the input {name} is empty")
        limits.require(len(values), "images", limits.images)
        images = [EncodedImage(str(place), value) for place, value in enumerate(values)]
        self._service.require_bearable(images)
        of_classes = outputs != (EMBEDDING,)
        items = [(image, of_classes) for image in images]
        return TritonQuestion(outputs, images=self._service.images.submit(items, deadline=deadline))

    def _answer(self, asked: TritonQuestion) -> Any:
        if asked.texts is not None:
            read = asked.texts.future.result()
            tensors = [number_output(EMBEDDING, np.stack([row.embedding for row in read]))]
        else:
            assert asked.images is not None  # noqa: S101 - one of the two
            rows = asked.images.future.result()
            tensors = [image_output(name, rows, self._service) for name in asked.outputs]
        return self._triton.InferenceResponse([self._tensor(one) for one in tensors])

    def _tensor(self, output: OutputTensor) -> Any:
        values = output.values
        if isinstance(values, list):
            elements = np.array(values, dtype=np.object_)
            return self._triton.Tensor(output.name, elements.reshape(-1, 1) if self._batched else elements)
        return self._triton.Tensor(output.name, np.ascontiguousarray(values))

    def _or_error(self, work: Callable[..., Any], *given: Any) -> Any:
        """What work gives, or the response that says why it gives nothing."""
        kinds = self._triton.TritonError
        try:
            return work(*given)
        except (QueueFullError, BatcherStoppedError) as error:
            said, kind = str(error), kinds.UNAVAILABLE
        except (InputError, RefusedError) as error:
            said, kind = str(error), kinds.INVALID_ARG
        except InvariclipError as error:
            said, kind = str(error), kinds.INTERNAL
        except Exception as error:
            self._triton.Logger.log_error(f"invariclip: {type(error).__name__}: {error}")
            said, kind = "the server failed; its log says why", kinds.INTERNAL
        return self._triton.InferenceResponse(error=self._triton.TritonError(said, kind))


def require_numpy(program: Path = Path("/proc/self/exe")) -> None:
    """Makes sure that the program that runs this reads numpy's arrays as they are.

    Triton's Python backend was built with a pybind11 before 2.12 up to some release; that one takes arrays of numpy 2
    for others than they are, and the model would answer with wrong numbers. A later one holds the name of numpy 2's
    own package.

    Args:
        program: The program; where there is no such file, nothing is known and nothing is refused.

    Raises:
        InputError: It does not know numpy 2, which is what is installed.
    """
    if int(np.__version__.partition(".")[0]) < 2 or not program.is_file():
        return
    with program.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"numpy.core") >= 0 and content.find(b"numpy._core") < 0:
            raise InputError(
                f"this Triton's Python backend was built for numpy 1 and would misread numpy {np.__version__}: "
                'pip install "numpy<2" into the Python that it starts'
            )


def _decoded(values: Sequence[bytes]) -> list[str]:
    texts = []
    for place, value in enumerate(values):
        try:
            texts.append(bytes(value).decode())
        except UnicodeDecodeError as error:
            raise InputError(f"text {place}: not UTF-8 ({error})") from error
    return texts
