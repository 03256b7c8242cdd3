"""open_clip's own byte-pair vocabulary as a `tokenizer.json`.

Three things have to match: which characters form a word (open_clip's regular expression, here a `Split` that keeps the
matches), how a word falls into pieces (the same merges in the same order), and when `<start_of_text>` inside a text
counts as the special token. open_clip asks the last only of a whole word of its regular expression: in
`!!<end_of_text>` the word is `!!<`, and nothing special is left. The library's own special tokens would match anywhere,
so here the two are ordinary words, built by merges that come after all others and can apply to nothing else.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from invariclip.errors import CheckpointError
from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer

CONTEXT_LENGTH = 77
"""open_clip's context where the config names none."""
VOCABULARY = 49408
"""Tokens of open_clip's own vocabulary, and the size that its config takes where it names none."""
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_CLASSES = ((r"[\p{L}]", "+"), (r"[\p{N}]", ""), (r"[^\s\p{L}\p{N}]", "+"))
"""The rest of open_clip's regular expression: letters, one digit, anything else but space; and how they repeat."""
_MERGES = 49152 - 256 - 2
"""Lines of the vocabulary file that open_clip uses, after its first line."""
_END = "</w>"


def bundled_tokenizer(text_cfg: dict[str, Any], name: str) -> Tokenizer:
    """The runtime tokenizer of a model that takes open_clip's own vocabulary.

    Args:
        text_cfg: The `text_cfg` of the model's open_clip config.
        name: What to call the model in an error.

    Returns:
        A tokenizer equal to open_clip's `SimpleTokenizer`.

    Raises:
        CheckpointError: The tower has fewer embeddings than the vocabulary has tokens, or the tokenizer has random
            options.
    """
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "lower")
    if any(options.values()) or clean not in ("lower", "canonicalize", "whitespace"):
        raise CheckpointError(
            f"{name}: tokenizer_kwargs {text_cfg['tokenizer_kwargs']} are not supported, only `clean`"
        )
    words = _vocabulary()
    if int(text_cfg.get("vocab_size", VOCABULARY)) < VOCABULARY:
        raise CheckpointError(
            f"{name}: its text tower knows {text_cfg['vocab_size']} tokens, open_clip's vocabulary has {VOCABULARY}; "
            "it has a tokenizer of its own: pass --tokenizer DIR, a folder with its tokenizer.json"
        )
    spec = TextSpec(
        context_length=int(text_cfg.get("context_length", CONTEXT_LENGTH)),
        start_token_ids=(words[_SPECIAL[0] + _END],),
        end_token_ids=(words[_SPECIAL[1] + _END],),
        clean=clean,
    )
    return Tokenizer(tokenizer_json(), spec)


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    """The content of `tokenizer.json`, in the format of the tokenizers library."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    words, merges = dict(_vocabulary()), list(_merges())
    for special in _SPECIAL:
        _teach(special, words, merges)
    library = Library(models.BPE(vocab=words, merges=merges, end_of_word_suffix=_END, continuing_subword_prefix=""))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # keep what matches, drop what lies between: re.findall
            pre_tokenizers.Split(Regex(_words()), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return str(library.to_str())


def _words() -> str:
    """open_clip's regular expression, its character classes written out as code points.

    Unicode versions differ between the two regular expression engines, and Python's `regex` leaves some unassigned
    code points out of a class *and* its negation when it ignores case. Written out, a text falls into the same words.
    """
    import regex

    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    parts = [f"(?i:{'|'.join((*_SPECIAL, _CONTRACTIONS))})"]
    for pattern, repeat in _CLASSES:
        members = [ord(found) for found in regex.findall(pattern, everything, regex.IGNORECASE)]
        # code points of one run keep their distance from their place in the list
        runs = [[code for _, code in run] for _, run in groupby(enumerate(members), key=lambda item: item[1] - item[0])]
        parts.append("[" + "".join(f"\\x{{{run[0]:X}}}-\\x{{{run[-1]:X}}}" for run in runs) + "]" + repeat)
    return "|".join(parts)


def _teach(special: str, words: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Adds merges that join the pieces of a special token, left to right.

    The pieces are what the ordinary merges make of it. Both its `<` beside letters and letters beside its `>` occur in
    no other word of the regular expression, so the joins reach nothing else. The joined parts need ids; they lie
    above the vocabulary, and no text ends in one, because every join leads on to the next.
    """
    from tokenizers import models

    plain = models.BPE(vocab=words, merges=merges, end_of_word_suffix=_END, continuing_subword_prefix="")
    pieces = [token.value for token in plain.tokenize(special)]
    joined = pieces[0]
    for piece in pieces[1:]:
        merges.append((joined, piece))
        joined += piece
        words.setdefault(joined, len(words))


@lru_cache(maxsize=1)
def _merges() -> tuple[tuple[str, str], ...]:
    import open_clip.tokenizer

    path = Path(open_clip.tokenizer.default_bpe())
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: open_clip's vocabulary cannot be read ({error}); reinstall it") from error
    pairs = [line.split() for line in lines]
    return tuple((first, second) for first, second in pairs)


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    """Ids by piece, numbered as open_clip numbers them: bytes, bytes that end a word, merges, special tokens."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + _END for letter in letters), *(first + second for first, second in _merges())]
    pieces.extend(special + _END for special in _SPECIAL)
    return {piece: number for number, piece in enumerate(pieces)}
