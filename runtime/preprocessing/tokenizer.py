"""Text to token ids without torch, equal to open_clip's tokenizers, from one `tokenizer.json`.

The file says how a text falls into pieces; `TextSpec` says what stands around them, how long the whole may be and what
fills the rest. That is enough for open_clip's own vocabulary and for those of SigLIP, RoBERTa and their like.
"""

from __future__ import annotations

import html
import re
import string
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import tokenizers

from invariclip.errors import ArtifactError, InputError, TruncatedTextWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MAX_CONTEXT = 65536
"""Ids per text that a manifest may ask for: rows are allocated before they are filled."""
_MAX_FILE = 256 * 2**20
"""Bytes of a `tokenizer.json`; the largest published ones have 35 MB."""

T = TypeVar("T")

_HALF = re.compile("[\ud800-\udfff]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HEARD: ContextVar[dict[str, str] | None] = ContextVar("cut texts", default=None)


@contextmanager
def hearing_cuts() -> Iterator[dict[str, str]]:
    """Collects texts that are cut in this thread, with what would be warned of, in place of the warnings.

    Python's own way of catching warnings is shared by all threads: a server could not tell whose text was cut.
    """
    heard: dict[str, str] = {}
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)


@dataclass(frozen=True)
class TextSpec:
    """How a text tower wants its token ids.

    A row is `start_token_ids`, the text's own ids, `end_token_ids`, then padding up to `context_length`. A text that
    does not fit loses its last ids (or its first, see `cut_side`); the ids around it stay.

    Attributes:
        context_length: Ids per text, everything included.
        start_token_ids: Stand before every text: start-of-text, `<s>`, or nothing.
        end_token_ids: Stand after every text, also after one that was cut: end-of-text, `</s>`, or nothing.
        pad_token_id: Fills the rest.
        clean: open_clip's cleaning before tokenizing: `lower`, `canonicalize` or `whitespace`; or `verbatim`,
            where `tokenizer.json` does it all, as transformers' do.
        pad_side: Where the padding lies.
        cut_side: Which end of a long text goes.
        last_token_id: Stands at the very end of a row, behind the padding (open_clip's mode `clips`), or None.
        zeroed_token_id: Becomes 0 wherever it stands (open_clip's `strip_sep_token`), or None.
    """

    context_length: int
    start_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    clean: Literal["lower", "canonicalize", "whitespace", "verbatim"] = "lower"
    pad_side: Literal["right", "left"] = "right"
    cut_side: Literal["right", "left"] = "right"
    last_token_id: int | None = None
    zeroed_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuses what the tokenizer could not honour, also when it comes from a manifest.

        Raises:
            ArtifactError: A field is outside its range.
        """
        if type(self.context_length) is not int or not 2 <= self.context_length <= MAX_CONTEXT:
            raise ArtifactError(f"context_length {self.context_length} is not from 2 to {MAX_CONTEXT}")
        if self.clean not in _CLEANERS:
            raise ArtifactError(f"clean {self.clean!r} is not known; available: {', '.join(_CLEANERS)}")
        for side in (self.pad_side, self.cut_side):
            if side not in ("right", "left"):
                raise ArtifactError(f"a side of the text is right or left, not {side!r}")
        optional = [token for token in (self.last_token_id, self.zeroed_token_id) if token is not None]
        ids = (*self.start_token_ids, *self.end_token_ids, self.pad_token_id, *optional)
        if any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
            raise ArtifactError(f"token ids are whole numbers from 0 to 2^31, not {list(ids)}")
        if self.room < 1:
            raise ArtifactError(
                f"context_length {self.context_length} leaves no room for text beside the special tokens {list(ids)}"
            )

    @property
    def room(self) -> int:
        """Ids of the text itself that fit."""
        around = len(self.start_token_ids) + len(self.end_token_ids) + (self.last_token_id is not None)
        return self.context_length - around

    def to_json(self) -> dict[str, Any]:
        """The spec as the manifest stores it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Tokenizer:
    """Texts to int64 ids: cleaning as open_clip does it, pieces by the tokenizers library, rows as `TextSpec` says."""

    def __init__(self, model_json: str, spec: TextSpec) -> None:
        """Builds from the content of a `tokenizer.json`.

        Raises:
            ArtifactError: It is not one, or answers by chance.
        """
        self._tokenizer = asked(lambda: tokenizers.Tokenizer.from_str(model_json))
        if getattr(self._tokenizer.model, "dropout", None):
            raise ArtifactError("tokenizer.json leaves merges out by chance (dropout), so a text has no ids of its own")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.model_json = model_json
        self.spec = spec

    @classmethod
    def from_file(cls, path: Path, spec: TextSpec) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            ArtifactError: It is missing, too large or not one.
        """
        return cls(read_tokenizer_json(path), spec)

    def __call__(self, texts: str | Sequence[str], prefix: Sequence[int] = ()) -> NDArray[np.int64]:
        """Ids of each text, padded to the context.

        A text that does not fit is cut, the special tokens around it staying as in open_clip, with a warning.

        Args:
            texts: One or several.
            prefix: Ids that stand before every text's own, behind the special tokens, and are never cut: those of a
                learned template (`semantics.context_ids`).

        Returns:
            int64 [N, context_length].

        Raises:
            InputError: Something in `texts` is not a string or not Unicode, or the prefix leaves no room for a text.
            ArtifactError: The tokenizers library cannot use the file after all.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        for text in given:
            if not isinstance(text, str):
                raise InputError(f"texts must be strings, not {type(text).__name__}")
            if _HALF.search(text):
                raise InputError(f"texts must be Unicode: {text!r:.60} holds half a character")
        spec, room = self.spec, self.spec.room - len(prefix)
        if room < 1:
            raise InputError(
                f"{len(prefix)} ids before a text leave it no room in context_length {spec.context_length}"
            )
        rows = np.full((len(given), spec.context_length), spec.pad_token_id, dtype=np.int64)
        cleaned = [_CLEANERS[spec.clean](text) for text in given]
        encodings = asked(lambda: self._tokenizer.encode_batch(cleaned, add_special_tokens=False))
        for number, encoding in enumerate(encodings):
            ids = encoding.ids
            if len(ids) > room:
                message = (
                    f"text of {len(ids) + spec.context_length - room} tokens cut to context_length "
                    f"{spec.context_length}: {given[number][:60]!r}"
                )
                heard = _HEARD.get()
                if heard is None:
                    warnings.warn(message, TruncatedTextWarning, stacklevel=2)
                else:
                    heard[given[number]] = message
                ids = ids[:room] if spec.cut_side == "right" else ids[-room:]
            self._place(rows[number], [*spec.start_token_ids, *prefix, *ids, *spec.end_token_ids])
        if spec.zeroed_token_id is not None:
            rows[rows == spec.zeroed_token_id] = 0
        return rows

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text takes, special tokens included and padding not, after it was cut to the context."""
        cleaned = [_CLEANERS[self.spec.clean](text) for text in texts]
        around = self.spec.context_length - self.spec.room
        encoded = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
        return [min(len(encoding.ids), self.spec.room) + around for encoding in encoded]

    def _place(self, row: NDArray[np.int64], tokens: list[int]) -> None:
        if self.spec.last_token_id is not None:
            row[-1] = self.spec.last_token_id
            row = row[:-1]
        start = 0 if self.spec.pad_side == "right" else len(row) - len(tokens)
        row[start : start + len(tokens)] = tokens


def asked(question: Callable[[], T]) -> T:
    """What the tokenizers library answers.

    Raises:
        ArtifactError: It raises: a bare Exception, or, where its Rust code panics, what is not even one.
    """
    try:
        return question()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"not a tokenizer.json that the tokenizers library can use ({reason})") from error


def read_tokenizer_json(path: Path) -> str:
    """The content of a `tokenizer.json`.

    Raises:
        ArtifactError: It is missing, too large or not text.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise ArtifactError(f"{path}: {size} bytes are too many for a tokenizer.json; the bound is {_MAX_FILE}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def _whitespace(text: str) -> str:
    fixed = _repaired(text)
    return " ".join(fixed.split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    fixed = _repaired(text).strip()
    return " ".join(fixed.replace("_", " ").translate(_PUNCTUATION).lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": _lower,
    "canonicalize": _canonicalize,
    "whitespace": _whitespace,
    "verbatim": str,
}


def _repaired(text: str) -> str:
    # Imported here: a fifth of what importing the predictor costs, and no image needs it
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))
