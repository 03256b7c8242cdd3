"""Text to token ids without torch, equal to open_clip's tokenizer, from one `tokenizer.json`."""

from __future__ import annotations

import html
import string
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import ftfy
import numpy as np
import tokenizers

from invariclip.errors import ArtifactError, InputError, TruncatedTextWarning

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextSpec:
    """How a text tower wants its token ids.

    Attributes:
        context_length: Ids per text, start and end included.
        sot_token_id: Start-of-text id, or None where the tower has none.
        eot_token_id: End-of-text id; also stands last in a text that was cut.
        pad_token_id: Fills the rest.
        clean: open_clip's cleaning before tokenizing: `lower`, `canonicalize` or `whitespace`.
    """

    context_length: int
    sot_token_id: int | None
    eot_token_id: int
    pad_token_id: int = 0
    clean: Literal["lower", "canonicalize", "whitespace"] = "lower"

    def __post_init__(self) -> None:
        """Refuses what the tokenizer could not honour, also when it comes from a manifest.

        Raises:
            ArtifactError: A field is outside its range.
        """
        if not 2 <= self.context_length <= 65536:
            raise ArtifactError(f"context_length {self.context_length} is not from 2 to 65536")
        if self.clean not in ("lower", "canonicalize", "whitespace"):
            raise ArtifactError(f"clean {self.clean!r} is not known; available: lower, canonicalize, whitespace")

    def to_json(self) -> dict[str, Any]:
        """The spec as the manifest stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TextSpec:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: A field is missing, unknown or out of range.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise ArtifactError(f"the manifest's text is not understood: {error}") from error


class Tokenizer:
    """Texts to int64 ids; cleaning as open_clip does it, byte-pair encoding by the tokenizers library."""

    def __init__(self, model_json: str, spec: TextSpec) -> None:
        """Builds from the content of a `tokenizer.json`.

        Raises:
            ArtifactError: It is not one.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model_json)
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"tokenizer.json is not understood by the tokenizers library: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.model_json = model_json
        self.spec = spec

    @classmethod
    def from_file(cls, path: Path, spec: TextSpec) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            ArtifactError: It is missing or not one.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), spec)
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error})") from error

    def __call__(self, texts: str | Sequence[str]) -> NDArray[np.int64]:
        """Ids of each text, padded to the context.

        A text that does not fit is cut, its last id being end-of-text as in open_clip, with a warning.

        Returns:
            int64 [N, context_length].

        Raises:
            InputError: Something in `texts` is not a string.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        for text in given:
            if not isinstance(text, str):
                raise InputError(f"texts must be strings, not {type(text).__name__}")
        ids = np.full((len(given), self.spec.context_length), self.spec.pad_token_id, dtype=np.int64)
        start = [] if self.spec.sot_token_id is None else [self.spec.sot_token_id]
        cleaned = [_CLEANERS[self.spec.clean](text) for text in given]
        for row, encoding in enumerate(self._tokenizer.encode_batch(cleaned, add_special_tokens=False)):
            tokens = [*start, *encoding.ids, self.spec.eot_token_id]
            if len(tokens) > self.spec.context_length:
                warnings.warn(
                    f"text of {len(tokens)} tokens cut to context_length {len(ids[row])}: {given[row][:60]!r}",
                    TruncatedTextWarning,
                    stacklevel=2,
                )
                tokens = [*tokens[: self.spec.context_length - 1], self.spec.eot_token_id]
            ids[row, : len(tokens)] = tokens
        return ids


def _whitespace(text: str) -> str:
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(fixed.split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(fixed.replace("_", " ").translate(_PUNCTUATION).lower().split())


_CLEANERS = {"lower": _lower, "canonicalize": _canonicalize, "whitespace": _whitespace}
