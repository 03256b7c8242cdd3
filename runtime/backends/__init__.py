"""One file per inference engine. Each offers a class with `run`, `describe` and nothing else to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Backend(Protocol):
    """A loaded graph that answers."""

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None). Safe to call from several threads at once."""

    def describe(self) -> dict[str, Any]:
        """What really runs: engine, version, execution provider, threads."""
