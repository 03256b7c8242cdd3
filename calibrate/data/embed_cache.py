"""Embeddings on disk, by key, so that a second run computes nothing and a kill costs little.

They lie in small files `CACHE/<space>/<digest>.safetensors`, each written whole. `<space>` names checkpoint, pixels and
encoder version; a row's key names the file's content and what was done to it. Interventions that do not apply to a
image are kept likewise, with the reason, as `<digest>.declined.json`. Nothing is ever changed in place, so runs may
share a cache, and a damaged file costs only its own rows.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from invariclip.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAX_DECLINED_BYTES = 1 << 20
"""Of a file of declined interventions: ten times what one of as many as `embed.PART` takes."""


class Declined(str):
    """Why an intervention was left out on an image that is good in itself."""

    __slots__ = ()


class Store:
    """Rows and declined interventions by key, and the files that keep them."""

    def __init__(self, cache: Path | None, space: str, width: int) -> None:
        """Reads what is kept.

        Args:
            cache: The folder that spaces lie in; None keeps nothing.
            space: All that an embedding depends on beside its key: checkpoint, pixels, version.
            width: D.
        """
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.declined: dict[bytes, Declined] = {}
        self.folder = cache / hashlib.sha256(space.encode()).hexdigest()[:16] if cache else None
        if self.folder and self.folder.is_dir():
            for part in sorted(self.folder.glob("*.safetensors")):
                self._read(part, width)
            for part in sorted(self.folder.glob("*.declined.json")):
                self._read_declined(part)

    def _read(self, part: Path, width: int) -> None:
        try:
            tensors = load_file(part)
            keys, vectors = tensors["keys"], tensors["vectors"]
        except (SafetensorError, KeyError, OSError):
            return  # its rows are made again
        if keys.shape == (len(vectors), 32) and vectors.shape[1:] == (width,):
            self.rows.update(zip(map(bytes, keys), vectors, strict=True))

    def _read_declined(self, part: Path) -> None:
        try:
            if part.stat().st_size > MAX_DECLINED_BYTES:
                return
            found = json.loads(part.read_text(encoding="utf-8"))
            declined = {bytes.fromhex(key): Declined(reason) for key, reason in found.items()}
        except (ValueError, AttributeError, TypeError, OSError):
            return  # they are tried again
        self.declined.update(declined)

    def add(self, rows: dict[bytes, NDArray[np.float32]], declined: dict[bytes, Declined]) -> None:
        """Keeps rows and reasons, on disk first."""
        if self.folder and rows:
            keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)
            content = save({"keys": keys, "vectors": np.stack(list(rows.values()))})
            write_atomically(self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors", content)
        if self.folder and declined:
            text = json.dumps({key.hex(): reason for key, reason in declined.items()}, ensure_ascii=False).encode()
            write_atomically(self.folder / f"{hashlib.sha256(text).hexdigest()[:32]}.declined.json", text)
        self.rows.update(rows)
        self.declined.update(declined)
