"""A training that can go on where it was stopped: everything it depends on, in one file that is never unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from invariclip.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

_FACTS = "invariclip.cdc.training"


@dataclass
class TrainingState:
    """Where a training stands, between two steps.

    Attributes:
        step: Steps done.
        tensors: What is learnt, by name: `context` [M, n, width], `log_scale` and `bias` [M + 1].
        best: The same at the best look so far.
        best_loss: Its validation loss.
        best_step: Its step.
        stale: Looks since then.
        curve: (step, validation loss) of every look.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    best_loss: float = float("inf")
    best_step: int = 0
    stale: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


def write_state(path: Path, key: str, state: TrainingState, moments: dict[str, torch.Tensor]) -> None:
    """Writes a state and the optimiser's moments, atomically.

    Args:
        path: The file.
        key: Digest of all that the training depends on.
        state: Where it stands.
        moments: See `optimiser_moments`.
    """
    tensors = {
        **{f"now.{name}": value for name, value in state.tensors.items()},
        **{f"best.{name}": value for name, value in state.best.items()},
        **{f"adam.{name}": value for name, value in moments.items()},
    }
    facts = {
        "key": key, "step": state.step, "best_loss": state.best_loss, "best_step": state.best_step,
        "stale": state.stale, "curve": state.curve,
    }  # fmt: skip
    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(plain, {_FACTS: json.dumps(facts)}))


def read_state(path: Path, key: str) -> tuple[TrainingState, dict[str, torch.Tensor]] | None:
    """What `write_state` wrote for the same key; None where there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})[_FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if facts["key"] != key:
            return None
        parts = {part: _part(tensors, part) for part in ("now", "best", "adam")}
        curve = [(int(step), float(loss)) for step, loss in facts["curve"]]
        state = TrainingState(
            facts["step"], parts["now"], parts["best"], facts["best_loss"], facts["best_step"], facts["stale"], curve
        )
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        return None  # it is trained again
    return state, parts["adam"]


def optimiser_moments(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's state by place and name."""
    held: dict[int, dict[str, torch.Tensor]] = optimiser.state_dict()["state"]
    return {f"{place}.{name}": torch.as_tensor(value) for place, own in held.items() for name, value in own.items()}


def restore_moments(optimiser: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimiser_moments` gave."""
    held: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        place, name = key.split(".", 1)
        held.setdefault(int(place), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": held})


def _part(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
