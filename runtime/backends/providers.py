"""ONNX Runtime's execution providers of a GPU: whether one is there, its options, and what it leaves to others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import onnxruntime

from invariclip.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CPU = "CPUExecutionProvider"
WORK = frozenset(
    {
        "Attention", "Conv", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "Gemm", "LayerNormalization",
        "MatMul", "MatMulInteger", "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "SkipLayerNormalization",
        "Softmax",
    }
)  # fmt: skip
"""What must not run on the CPU beside a GPU; arithmetic of shapes may, and ONNX Runtime puts it there on purpose."""
# TensorFloat-32 has 11 bits: float32 means float32 here, as everywhere in this project
DEFAULTS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "do_copy_in_default_stream": "1",
    },
    "TensorrtExecutionProvider": {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"},
    "NvTensorRTRTXExecutionProvider": {},
}
GRAPHS = {
    "CUDAExecutionProvider": "enable_cuda_graph",
    "TensorrtExecutionProvider": "trt_cuda_graph_enable",
    "NvTensorRTRTXExecutionProvider": "enable_cuda_graph",
}
"""What each provider calls the capture of its work."""
_CACHES = {
    "TensorrtExecutionProvider": ("trt_engine_cache_path", "trt_timing_cache_path"),
    "NvTensorRTRTXExecutionProvider": ("nv_runtime_cache_path",),
}


def require_provider(provider: str) -> None:
    """Makes sure that this ONNX Runtime was built with a provider.

    Raises:
        DeviceError: It was not.
    """
    there = onnxruntime.get_available_providers()
    if provider in there:
        return
    mend = 'pip install "invariclip[gpu]"'
    if _is_installed("onnxruntime-gpu") and _is_installed("onnxruntime"):
        # both packages write the same folder, and the CPU one came last
        mend = "pip uninstall onnxruntime onnxruntime-gpu, then install onnxruntime-gpu alone"
    raise DeviceError(
        f"ONNX Runtime {onnxruntime.__version__} has no {provider}; available: {', '.join(there)}; {mend} "
        "(docs/gpu.md says which package brings which provider)"
    )


def nodes_elsewhere(session: Any, provider: str) -> dict[str, int] | None:
    """Operators that another provider than the one asked for runs, and how many of each; None where nobody can tell.

    Args:
        session: Opened with `session.record_ep_graph_assignment_info`.
        provider: The one asked for.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older releases
        return None
    found: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider:
            for node in part.get_nodes():
                found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def provider_options(provider: str, path: Path, given: Mapping[str, str] | None) -> dict[str, str]:
    """A provider's options: ours, then the caller's over them. Everything is text, as ONNX Runtime wants it.

    Engines and timings that a provider builds by itself are kept in `engines/` beside the graph.

    Args:
        provider: Its name.
        path: The graph.
        given: The caller's.
    """
    caches = {name: str(path.parent / "engines") for name in _CACHES.get(provider, ())}
    return {**DEFAULTS[provider], **caches, GRAPHS[provider]: "1", **{k: str(v) for k, v in (given or {}).items()}}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
