"""An artifact as a model repository of Triton: its graphs for the ONNX Runtime backend, and itself for the Python one.

    DIR/NAME/config.pbtxt, 1/model.py, 1/NAME.icm/      Python backend: encoded images, pixels or texts
    DIR/NAME_image/config.pbtxt, 1/model.onnx           ONNX Runtime backend: prepared pixels
    DIR/NAME_text/config.pbtxt, 1/model.onnx            ONNX Runtime backend: token ids

Each folder of a model has a sealed `invariclip.json`, by which it is known to be ours when it is written again, and
`labels.txt` where there are classes.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from invariclip.artifact.folder import checked_graph, checked_path, copy_artifact, read_manifest
from invariclip.artifact.manifest import LOGITS, MANIFEST, PROBABILITIES
from invariclip.backends import BACKENDS, DEFAULT_BACKEND
from invariclip.errors import ArtifactError, InputError
from invariclip.files import new_directory, require_writable, sha256_file, write_atomically
from invariclip.records import from_sealed_json, read_bounded, sealed_json
from invariclip.selection import SAFE_VARIANT
from invariclip.serve.tensors import BYTES, EMBEDDING, FP32, INPUTS, available_outputs
from invariclip.serve.triton_backend import ARTIFACT, ENGINE, SPACE, THREADS, VARIANT
from invariclip.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from invariclip.artifact.manifest import FileFacts, Manifest, Variant

GRAPHS, PYTHON = "onnxruntime", "python"
TRITON_BACKENDS = (PYTHON, GRAPHS)
"""Triton's names of the backends that models are written for."""
RECORD, LABELS, VERSION = "invariclip.json", "labels.txt", "1"
NAMED = "name"
"""The parameter by which all models of an artifact are known to belong together."""
_RECORD_SCHEMA = 1
_RECORD_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TYPES = {
    "tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32",
    "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16",
}  # fmt: skip
_OF_PROTOCOL = {BYTES: "TYPE_STRING", "UINT8": "TYPE_UINT8", FP32: "TYPE_FP32"}
MODEL = '''"""Written by `invariclip triton` {version}: the artifact beside this file, behind Triton's Python backend.

The Python that Triton starts for it needs the package: pip install invariclip
"""

from invariclip.serve.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Literal(str):
    """A word that the text format writes without quotes: an enumerator, or a boolean."""

    __slots__ = ()


class GraphTensor(NamedTuple):
    """An input or output of a graph: its name, ONNX Runtime's type, and its shape, where a free size is a text."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class TritonConfig:
    """What Triton is told of every model.

    Attributes:
        models: The backends to write models for, of `TRITON_BACKENDS`.
        name: Of the Python model, and before `_image` and `_text`; None takes that of the artifact's folder.
        variant: One that the artifact lists; None takes float32.
        engine: What the Python model opens it in, one of `backends.BACKENDS`.
        max_batch: Items that Triton puts together at most; 0 leaves that off, and shapes are those of `serve`.
        max_wait: Seconds that an item may wait for others.
        instances: Of each model.
        threads: Of each instance; None leaves it to the engine.
    """

    models: tuple[str, ...] = TRITON_BACKENDS
    name: str | None = None
    variant: str | None = None
    engine: str = DEFAULT_BACKEND
    max_batch: int = 16
    max_wait: float = 0.0
    instances: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuses what Triton does not take.

        Raises:
            InputError: A field is out of range, or no backend or engine has the name.
        """
        wrong = [one for one in self.models if one not in TRITON_BACKENDS]
        if wrong or not self.models:
            raise InputError(f"no models are written for {wrong or 'nothing'}; available: {', '.join(TRITON_BACKENDS)}")
        if self.engine not in BACKENDS:
            raise InputError(f"no engine of the CPU is called {self.engine!r:.60}; available: {', '.join(BACKENDS)}")
        if not 0 <= self.max_batch <= 1024 or self.instances < 1 or not 0 <= self.max_wait < 1000:
            raise InputError(
                "a batch has 0 to 1024 items, a model at least one instance, and an item waits 0 to 1000 s; not "
                f"{self.max_batch}, {self.instances} and {self.max_wait:g}"
            )
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputError(f"a model's name has letters, digits, '_', '-' and '.', not {self.name!r:.60}")


def write_repository(
    artifact: str | os.PathLike[str], out: str | os.PathLike[str], config: TritonConfig | None = None
) -> list[str]:
    """Writes an artifact's models into a model repository; other models in it stay.

    Args:
        artifact: The artifact; it stays as it is.
        out: The repository. Models that were written from an artifact of this name before are replaced.
        config: What Triton is told.

    Returns:
        The names of the models.

    Raises:
        ArtifactError: `artifact` is not one, or a file of it is missing or changed.
        InputError: The repository holds a model of that name that is not ours, it cannot be written, or the variant
            was not proved in the engine that would run it.
    """
    source, target, config = Path(artifact), Path(out), config or TritonConfig()
    manifest = read_manifest(source)
    name = config.name or source.resolve().stem
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r:.60} is no name that Triton takes; give one with --name")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: lies in the artifact, which stays as it is; name another output")
    chosen = config.variant or (SAFE_VARIANT if SAFE_VARIANT in manifest.variants else next(iter(manifest.variants)))
    if chosen not in manifest.variants:
        raise InputError(f"{source}: no variant {chosen!r:.60}; available: {', '.join(manifest.variants)}")
    _require_labels(manifest.classes)
    models = list(_models(source, manifest, name, chosen, config))
    stale = _ours(target, name)
    strange = [model.name for model in models if (target / model.name).exists() and model.name not in stale]
    if strange:
        raise InputError(
            f"{target / strange[0]}: is there, and was not written from an artifact called {name}; give --name, or "
            "name another output"
        )
    require_writable(target)
    written = [model.name for model in models]
    with new_directory(target, owned=lambda folder: {*_ours(folder, name), *written}) as folder:
        for model in models:
            model.write(folder / model.name)
    return written


@dataclass(frozen=True)
class TritonModel:
    """One model of the repository.

    Attributes:
        name: Its name, and its folder's.
        config: Of `ModelConfig`: fields to their values.
        facts: What is sealed in its record.
        classes: Its labels; none where there are no classes.
        source: The artifact.
        graph: The graph that Triton runs; None for the Python model, which reads the artifact.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, str]
    classes: tuple[str, ...]
    source: Path
    graph: FileFacts | None

    def write(self, folder: Path) -> None:
        """Writes its folder.

        Raises:
            ArtifactError: A file of the artifact is missing or changed.
        """
        version = folder / VERSION
        version.mkdir(parents=True)
        if self.graph is None:
            write_atomically(version / "model.py", MODEL.format(version=__version__))
            copy_artifact(self.source, version / self.facts[ARTIFACT])
        else:
            _copy_graph(self.source, self.graph, version)
        if self.classes:
            write_atomically(folder / LABELS, "".join(f"{name}\n" for name in self.classes))
        write_atomically(folder / "config.pbtxt", text_format(self.config))
        plain = {"schema_version": _RECORD_SCHEMA, "model": self.name, "facts": self.facts}
        write_atomically(folder / RECORD, sealed_json(plain))


def text_format(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format.

    Args:
        message: Fields to numbers, texts, `Literal`s, messages, or lists of these.
        indent: Before every line.
    """
    lines = []
    for field, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                inside = text_format(one, f"{indent}  ")
                lines.append(f"{indent}{field} {{\n{inside}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Literal) or not isinstance(value, str):
        return str(value)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in value.encode())
    return f'"{"".join(plain)}"'


def _models(source: Path, manifest: Manifest, name: str, variant: str, config: TritonConfig) -> Iterator[TritonModel]:
    """The models to write.

    Raises:
        ArtifactError: A graph is missing or changed.
        InputError: The variant was not proved in the engine that would run it.
    """
    facts = _facts(source, manifest, name, variant)
    own = manifest.variants[variant]
    if PYTHON in config.models:
        _require_proved(source, manifest, variant, config.engine)
        yield _python_model(source, manifest, name, facts, config)
    if GRAPHS in config.models:
        _require_proved(source, manifest, variant, DEFAULT_BACKEND)
        _require_plain(source, variant, own)
        for tower, graph in (("image", own.image), ("text", own.text)):
            yield _graph_model(source, manifest, f"{name}_{tower}", graph, facts, config)


def _facts(source: Path, manifest: Manifest, name: str, variant: str) -> dict[str, str]:
    """What the configuration says of the artifact: its parameters."""
    return {
        NAMED: name,
        VARIANT: variant,
        SPACE: manifest.space_id,
        "invariclip_version": __version__,
        "model": manifest.model.name,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "manifest_sha256": sha256_file(source / MANIFEST),
        **({} if manifest.projection is None else {"projection_sha256": manifest.projection.sha256}),
        **({} if manifest.site is None else {"site_sha256": manifest.site.sha256}),
        **({} if manifest.cdc is None else {"cdc_sha256": manifest.cdc.sha256}),
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "logit_scale": repr(manifest.model.logit_scale),
        "pixels": json.dumps(manifest.pixels.to_json(), sort_keys=True),
        "text": json.dumps(manifest.text.to_json(), sort_keys=True),
    }


def _python_model(
    source: Path, manifest: Manifest, name: str, facts: dict[str, str], config: TritonConfig
) -> TritonModel:
    batched = config.max_batch > 0
    widths = {EMBEDDING: manifest.width, LOGITS: len(manifest.classes), PROBABILITIES: len(manifest.classes)}
    inputs = [
        {"name": one, **_typed(_OF_PROTOCOL[datatype], shape, batched=batched), "optional": Literal("true")}
        for one, (datatype, shape) in INPUTS.items()
    ]
    outputs = []
    for one in available_outputs(manifest.classes, of_texts=False):
        numbers = one in widths
        shape = (-1, widths[one]) if numbers else (-1,)
        outputs.append({"name": one, **_typed("TYPE_FP32" if numbers else "TYPE_STRING", shape, batched=batched)})
    threads = {} if config.threads is None else {THREADS: str(config.threads)}
    own = {**facts, ARTIFACT: f"{name}.icm", ENGINE: config.engine, **threads}
    said = _config(name, PYTHON, inputs, outputs, own, config, max_batch=config.max_batch)
    return TritonModel(name, said, own, manifest.classes, source, None)


def _graph_model(
    source: Path, manifest: Manifest, name: str, graph: FileFacts, facts: dict[str, str], config: TritonConfig
) -> TritonModel:
    inputs, outputs = _graph_tensors(source, graph, manifest)
    batched = config.max_batch > 0 and all(isinstance(one.shape[0], str) for one in (*inputs, *outputs))
    own = {**facts, "graph": graph.path, "graph_sha256": graph.sha256}
    threads = {} if config.threads is None else {"intra_op_thread_count": str(config.threads)}
    taken, given = ([_graph_tensor(one, batched=batched) for one in some] for some in (inputs, outputs))
    said = _config(name, GRAPHS, taken, given, {**own, **threads}, config, max_batch=config.max_batch if batched else 0)
    labelled = any("label_filename" in one for one in said["output"])
    return TritonModel(name, said, own, manifest.classes if labelled else (), source, graph)


def _config(
    name: str, backend: str, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]],
    facts: Mapping[str, str], config: TritonConfig, *, max_batch: int,
) -> dict[str, Any]:  # fmt: skip
    """Fields of `ModelConfig`, in the order in which they are written."""
    labels = {"label_filename": LABELS}
    outputs = [{**one, **labels} if one["name"] in (LOGITS, PROBABILITIES) else one for one in outputs]
    delay = {"max_queue_delay_microseconds": round(config.max_wait * 1e6)}
    return {
        "name": name,
        "backend": backend,
        "max_batch_size": max_batch,
        "input": list(inputs),
        "output": outputs,
        # the figures that the variant was listed with are the CPU's
        "instance_group": [{"count": config.instances, "kind": Literal("KIND_CPU")}],
        **({"dynamic_batching": delay} if max_batch else {}),
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in facts.items()],
    }


def _typed(data_type: str, shape: Sequence[int], *, batched: bool) -> dict[str, Any]:
    """Type and size of a tensor; Triton leaves out the first dimension where it batches, and wants another one then."""
    return {"data_type": Literal(data_type), "dims": (list(shape[1:]) or [1]) if batched else list(shape)}


def _graph_tensor(tensor: GraphTensor, *, batched: bool) -> dict[str, Any]:
    if tensor.type not in _TYPES:
        raise InputError(f"Triton is not told of tensors of ONNX Runtime's type {tensor.type} ({tensor.name})")
    shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
    said = {"name": tensor.name, **_typed(_TYPES[tensor.type], shape, batched=batched)}
    return {**said, "reshape": {}} if batched and len(shape) == 1 else said


def _graph_tensors(source: Path, graph: FileFacts, manifest: Manifest) -> tuple[list[GraphTensor], list[GraphTensor]]:
    """What a graph takes and gives, by ONNX Runtime, which is what Triton's backend is.

    Raises:
        ArtifactError: The graph is missing or changed, or cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with checked_graph(source, graph, manifest) as path:
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class for each reason
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it ({error}); export again") from error
    taken, given = (
        [GraphTensor(one.name, one.type, tuple(one.shape)) for one in some]
        for some in (session.get_inputs(), session.get_outputs())
    )
    return taken, given


def _require_proved(source: Path, manifest: Manifest, variant: str, engine: str) -> None:
    """Refuses a variant that was never compared with PyTorch in the engine that would run it.

    Raises:
        InputError: It was not.
    """
    proved = manifest.variants[variant].parity
    if engine not in proved:
        raise InputError(
            f"{source}: {variant} was not proved on {engine}; it was on {', '.join(proved) or 'none'}: name another "
            "--variant or --backend, or leave a backend out with --models"
        )


def _require_plain(source: Path, variant: str, own: Variant) -> None:
    """Refuses a variant whose speed is asked of the engine, which Triton's ONNX Runtime backend is not asked for.

    Raises:
        InputError: It is one.
    """
    asked = sorted({own.compute, own.text_compute} - {"float32"})
    if asked:
        raise InputError(
            f"{source}: {variant} computes in {', '.join(asked)}, which Triton's ONNX Runtime backend cannot be asked "
            f"for; name another --variant, or give --models {PYTHON}"
        )


def _require_labels(classes: Sequence[str]) -> None:
    """Refuses classes that a file of labels, one a line, cannot hold.

    Raises:
        InputError: A name has a line break.
    """
    broken = [name for name in classes if len(name.splitlines()) != 1]
    if broken:
        raise InputError(f"the class {broken[0]!r:.60} has a line break, which Triton's file of labels cannot hold")


def _ours(repository: Path, name: str) -> set[str]:
    """Folders of a repository that were written from an artifact of this name."""
    found = set()
    for path in repository.glob(f"*/{RECORD}"):
        try:
            content = read_bounded(path, "a record of a model", _RECORD_BYTES, InputError)
            plain = from_sealed_json(content, path, "a record of a model", _RECORD_SCHEMA, "write again", InputError)
        except InputError:  # somebody else's, or changed by hand: not ours to replace
            continue
        facts = plain.get("facts")
        if isinstance(facts, dict) and facts.get(NAMED) == name and plain.get("model") == path.parent.name:
            found.add(path.parent.name)
    return found


def _copy_graph(source: Path, graph: FileFacts, version: Path) -> None:
    """Copies a graph as `model.onnx`; the file of weights beside it keeps its name, which the graph says.

    Raises:
        ArtifactError: A file is missing or changed.
    """
    path, data = checked_path(source, graph), f"{graph.path}.data"
    shutil.copyfile(path, version / "model.onnx")
    if graph.data_sha256 is not None:
        shutil.copyfile(source / data, version / data)
    copied = {"model.onnx": graph.sha256, **({} if graph.data_sha256 is None else {data: graph.data_sha256})}
    spoilt = [name for name, digest in copied.items() if sha256_file(version / name) != digest]
    if spoilt:
        raise ArtifactError(f"{version / spoilt[0]}: was not copied as it is; is the disk full?")
