"""Embeddings of texts that were seen before, found again by their token ids; the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DEFAULT_TEXT_CACHE = 10_000
"""Rows that are kept. One takes 4 bytes a component and 8 an id: 27 MB in all at width 512 and context 77."""
MAX_TEXT_CACHE = 10_000_000


class TextCache:
    """Rows by token ids, for one embedding space; safe to share between threads.

    A text's embedding depends by rounding alone on the texts that it is embedded with. What is kept is what the first
    batch gave, so an answer may differ from another history's, by no more than the contract's bound between a row alone
    and in a batch (`max_batch_diff`: 1e-5 a component in float32). Without a cache the same holds for the batch that
    a text happens to be in.
    """

    def __init__(self, limit: int = DEFAULT_TEXT_CACHE) -> None:
        """Starts empty.

        Args:
            limit: Rows that are kept at most; 0 keeps none.

        Raises:
            InputError: `limit` is below 0 or above `MAX_TEXT_CACHE`.
        """
        if not 0 <= limit <= MAX_TEXT_CACHE:
            raise InputError(f"text_cache is a number of rows from 0 (none) to {MAX_TEXT_CACHE:,}, not {limit}")
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(
        self, ids: NDArray[np.int64], embed: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Embeddings of texts; only those that are not kept, and each of them once, are embedded.

        Args:
            ids: int64 [N, L], N of 1 or more, rows as `Tokenizer` makes them.
            embed: ids [n, L] to embeddings float32 [n, d]; it runs without the lock.

        Returns:
            float32 [N, d], the caller's own.
        """
        if self.limit == 0:
            return embed(ids)
        keys = [row.tobytes() for row in ids]
        found: dict[bytes, NDArray[np.float32]] = {}
        missing: dict[bytes, int] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if key in self._rows:
                    self._rows.move_to_end(key)
                    found[key] = self._rows[key]
                else:
                    missing.setdefault(key, place)
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            fresh = embed(ids[list(missing.values())])
            with self._lock:
                for key, row in zip(missing, fresh, strict=True):
                    # Another thread may have been first; the row is copied, or it would keep its whole batch
                    found[key] = self._rows.setdefault(key, row.copy())
                    self._rows.move_to_end(key)
                while len(self._rows) > self.limit:
                    self._rows.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def describe(self) -> dict[str, int]:
        """Rows kept, how many may be, and texts that were found and not found."""
        with self._lock:
            return {"rows": len(self._rows), "limit": self.limit, "hits": self.hits, "misses": self.misses}
