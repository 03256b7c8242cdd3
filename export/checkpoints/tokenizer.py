"""A checkpoint's tokenizer as one `tokenizer.json` and a `TextSpec`: open_clip's own `vocabulary`, or the model's file.

A model's file is a `tokenizer.json` with files beside it, as open_clip's `HFTokenizer` reads them. The tokenizers
library reads `tokenizer.json` by itself; what `transformers` adds comes from `tokenizer_config.json` and
`special_tokens_map.json`: which token pads and where, which end is cut. All of it becomes a `TextSpec`, so that
serving needs the one library and no more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import tokenizers

from invariclip.errors import ArtifactError, CheckpointError
from invariclip.export.checkpoints.vocabulary import CONTEXT_LENGTH, VOCABULARY, bundled_tokenizer
from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer, asked, read_tokenizer_json
from invariclip.records import parse_json, read_json, to_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
Side = Literal["right", "left"]

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Beside it, optional; what the later one says counts."""
_OTHER_FORMATS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.json", "vocab.txt")
_USUAL = {
    "pad": ("<pad>", "[PAD]"),
    "sep": ("</s>", "[SEP]"),
    "cls": ("<s>", "[CLS]"),
    "bos": ("<s>",),
    "eos": ("</s>",),
}
"""What `transformers` takes for a token that no file names: its classes' defaults."""
_OWN_ENDS = ("Gemma", "Llama")
_PROBES = ("a", "two words", "A photo of a cat, on paper.", "3")
_MAX_SETTINGS = 64 * 2**20
_CLASS_CLEANING = {
    "SiglipTokenizer": (
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": r"[!-/:-@\[-`{-~]"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ),
    "Siglip2Tokenizer": ({"type": "Lowercase"},),
}
"""What these classes of transformers do to a text in Python, as normalizers of the library; doing it twice is fine."""


@dataclass(frozen=True)
class TextSettings:
    """What this package reads from an open_clip `text_cfg`; the rest is open_clip's to check."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    hf_model_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class AddedToken:
    """A token in `added_tokens_decoder`; None where the file does not say."""

    content: str
    lstrip: bool | None = None
    rstrip: bool | None = None
    normalized: bool | None = None
    single_word: bool | None = None


@dataclass(frozen=True)
class TokenizerSettings:
    """What this package reads of the files beside a `tokenizer.json`; None where they do not say."""

    tokenizer_class: str | None = None
    do_lower_case: bool | None = None
    split_special_tokens: bool | None = None
    padding_side: str | None = None
    truncation_side: str | None = None
    pad_token: str | None = None
    sep_token: str | None = None
    cls_token: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None


def tokenizer_of(
    text_cfg: dict[str, Any],
    name: str,
    *,
    given: Path | None = None,
    folder: Path | None = None,
    tower: dict[str, Any] | None = None,
) -> Tokenizer:
    """The runtime tokenizer of a model.

    The config decides, never the model's name: open_clip's own vocabulary unless it names another tokenizer, has a
    Hugging Face text tower, or fewer embeddings than that vocabulary has tokens.

    Args:
        text_cfg: The `text_cfg` of the model's open_clip config.
        name: What to call the model in an error.
        given: A `tokenizer.json` or its folder, which then counts whatever the config says.
        folder: The model's own folder, where its `tokenizer.json` may lie.
        tower: `config.json` of a Hugging Face text tower: its `vocab_size` and `pad_token_id` are checked.

    Returns:
        A tokenizer equal to `open_clip.get_tokenizer`'s.

    Raises:
        CheckpointError: The tokenizer is needed and missing, damaged, does not fit the text tower, or has options that
            are not supported.
    """
    require_text_settings(text_cfg, f"{name}: its text_cfg")
    wanted = str(text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or "")
    own = folder / TOKENIZER_FILE if folder is not None and (folder / TOKENIZER_FILE).is_file() else None
    fits = int(text_cfg.get("vocab_size", VOCABULARY)) >= VOCABULARY
    if given is None and not wanted and (fits or own is None):
        return bundled_tokenizer(text_cfg, name)
    path = own if given is None else (given / TOKENIZER_FILE if given.is_dir() else given)
    if path is None or not path.is_file():
        raise CheckpointError(_missing(name, wanted, given or folder))
    return hub_tokenizer(path, text_cfg, name, tower)


def require_text_settings(text_cfg: Any, where: str) -> None:
    """Makes sure that a `text_cfg` has the types that this package relies on.

    Raises:
        CheckpointError: A field has another one.
    """
    known = {one.name for one in fields(TextSettings)}
    plain = {key: value for key, value in text_cfg.items() if key in known} if isinstance(text_cfg, dict) else text_cfg
    to_record(TextSettings, plain, where, error=CheckpointError)


def hub_tokenizer(path: Path, text_cfg: dict[str, Any], name: str, tower: dict[str, Any] | None = None) -> Tokenizer:
    """A tokenizer from a `tokenizer.json` and the settings beside it, equal to open_clip's `HFTokenizer`.

    Args:
        path: The `tokenizer.json`.
        text_cfg: `context_length`, `tokenizer_mode` and `tokenizer_kwargs` (`clean`, `strip_sep_token`) say the rest.
        name: What to call the model in an error.
        tower: See `tokenizer_of`.

    Raises:
        CheckpointError: See `tokenizer_of`.
    """
    settings = _settings(path)
    content = _content_of(
        path, settings, as_transformers=(text_cfg.get("tokenizer_kwargs") or {}).get("clean") == "verbatim"
    )
    library = _asked(lambda: tokenizers.Tokenizer.from_str(content), path)
    padding, truncation = library.padding or {}, library.truncation or {}
    library.no_padding()
    library.no_truncation()
    _check_added(library, settings, path)
    try:
        spec = TextSpec(
            context_length=int(text_cfg.get("context_length", CONTEXT_LENGTH)),
            pad_token_id=_special(library, settings, "pad", path, padding.get("pad_token")),
            pad_side=cast("Side", settings.padding_side or padding.get("direction", "right")),
            cut_side=cast("Side", settings.truncation_side or truncation.get("direction", "right")),
            **(_around(library, settings, path) | _options(library, settings, text_cfg, path, name)),
        )
        _check_fit(library, spec, text_cfg, tower or {}, path, name)
        return Tokenizer(content, spec)
    except ArtifactError as error:
        raise CheckpointError(f"{path}: does not suit {name} ({error})") from error


def _asked(question: Callable[[], T], path: Path) -> T:
    """What the tokenizers library answers.

    Raises:
        CheckpointError: It raises.
    """
    try:
        return asked(question)
    except ArtifactError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _content_of(path: Path, settings: TokenizerSettings, *, as_transformers: bool) -> str:
    """The text of a `tokenizer.json`, checked for what the library takes and then panics on.

    Args:
        path: The file.
        settings: Those beside it.
        as_transformers: Add the cleaning that the class in transformers does before the library is asked.

    Raises:
        CheckpointError: It is missing, no JSON object, or its post-processor names tokens that it does not define.
    """
    try:
        content = read_tokenizer_json(path)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    plain = parse_json(content, str(path), error=CheckpointError)
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: not a tokenizer.json: must hold a JSON object")
    undefined = sorted(_undefined(plain.get("post_processor")))
    if undefined:
        raise CheckpointError(
            f"{path}: its post_processor names tokens that its special_tokens do not define: "
            f"{', '.join(undefined)!s:.100}; save it anew with transformers' save_pretrained"
        )
    cleaning = _CLASS_CLEANING.get((settings.tokenizer_class or "").removesuffix("Fast")) if as_transformers else None
    if cleaning and settings.do_lower_case is not False:
        own = [plain["normalizer"]] if plain.get("normalizer") else []
        plain["normalizer"] = {"type": "Sequence", "normalizers": [*cleaning, *own]}
        return json.dumps(plain, ensure_ascii=False)
    return content


def _undefined(processor: Any) -> set[str]:
    """Tokens that a post-processor's templates name and its `special_tokens` do not."""
    if not isinstance(processor, dict):
        return set()
    inner = processor.get("processors")
    names = set().union(*map(_undefined, inner)) if isinstance(inner, list) else set()
    known = processor.get("special_tokens")
    for template in (processor.get("single"), processor.get("pair")):
        for piece in template if isinstance(template, list) else ():
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(special, dict) and not (isinstance(known, dict) and special.get("id") in known):
                names.add(str(special.get("id")))
    return names


def _missing(name: str, wanted: str, searched: Path | None) -> str:
    """What is missing and how to give it."""
    others = [] if searched is None else [other for other in _OTHER_FORMATS if (searched / other).is_file()]
    if others:
        return (
            f"{searched}: holds {others[0]} but no {TOKENIZER_FILE}; write one with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    where = f"no {TOKENIZER_FILE} in {searched}" if searched is not None else f"its {TOKENIZER_FILE} is missing"
    hint = f" or --tokenizer hf-hub:{wanted}" if "/" in wanted else ""
    return (
        f"{name}: {where}, and its tokenizer{f' ({wanted})' if wanted else ''} is not open_clip's own; "
        f"pass --tokenizer DIR, a folder with {TOKENIZER_FILE} and tokenizer_config.json{hint}"
    )


def _settings(path: Path) -> TokenizerSettings:
    """What the files beside a `tokenizer.json` say."""
    plain: dict[str, Any] = {}
    for file in (path.with_name(other) for other in SETTINGS_FILES):
        if file.is_file():
            plain.update(read_json(file, "a tokenizer's settings", max_bytes=_MAX_SETTINGS, error=CheckpointError))
    known = {one.name for one in fields(TokenizerSettings)}
    stored = {key: value for key, value in plain.items() if key in known}
    for key in [key for key in stored if key.endswith("_token") and not key.startswith("add_")]:
        stored[key] = _content(stored[key])
    for number, token in _items(stored.get("added_tokens_decoder")):
        stored["added_tokens_decoder"][number] = {"content": token} if isinstance(token, str) else _flags(token)
    settings = to_record(TokenizerSettings, stored, f"{path}: the settings beside it", error=CheckpointError)
    if settings.split_special_tokens:
        raise CheckpointError(f"{path.parent}: split_special_tokens is not supported; only tokenizers without it are")
    return settings


def _items(plain: Any) -> list[tuple[Any, Any]]:
    return list(plain.items()) if isinstance(plain, dict) else []


def _flags(token: Any) -> Any:
    known = {one.name for one in fields(AddedToken)}
    return {key: value for key, value in token.items() if key in known} if isinstance(token, dict) else token


def _content(token: Any) -> Any:
    """A token as settings write it: its text, or a dictionary with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _special(library: Any, settings: TokenizerSettings, kind: str, path: Path, embedded: str | None = None) -> int:
    """Id of the token that pads, starts, ends, ...: as the settings name it, else as `transformers` calls it."""
    named = getattr(settings, f"{kind}_token") or embedded
    tokens = (named,) if named else _USUAL[kind]
    for token in tokens:
        number = library.token_to_id(token)
        if number is not None:
            return int(number)
    raise CheckpointError(
        f'{path}: has no {kind} token ({" or ".join(tokens)}); name it in tokenizer_config.json as "{kind}_token"'
    )


def _around(library: Any, settings: TokenizerSettings, path: Path) -> dict[str, tuple[int, ...]]:
    """The ids before and after every text: what tokenizer.json adds, read off a few texts."""
    pairs = _asked(
        lambda: [(library.encode(probe, add_special_tokens=False).ids, library.encode(probe).ids) for probe in _PROBES],
        path,
    )
    inner, whole = pairs[0]
    for place in range(len(whole) - len(inner) + 1):
        start, end = tuple(whole[:place]), tuple(whole[place + len(inner) :])
        if all([*start, *plain, *end] == full for plain, full in pairs):
            _check_ends(library, settings, path, {"bos": start, "eos": end})
            return {"start_token_ids": start, "end_token_ids": end}
    raise CheckpointError(f"{path}: its post_processor does more than add ids before and after a text; not supported")


def _check_ends(library: Any, settings: TokenizerSettings, path: Path, ends: dict[str, tuple[int, ...]]) -> None:
    """Refuses settings that contradict the file: for these classes transformers 4 goes by them, 5 by the file."""
    if not (settings.tokenizer_class or "").startswith(_OWN_ENDS):
        return
    for kind, ids in ends.items():
        wanted = getattr(settings, f"add_{kind}_token")
        if wanted is not None and bool(wanted) != (_special(library, settings, kind, path) in ids):
            raise CheckpointError(
                f"{path}: tokenizer_config.json says add_{kind}_token {wanted}, its post_processor does otherwise; "
                "save both anew with transformers' save_pretrained"
            )


def _options(
    library: Any, settings: TokenizerSettings, text_cfg: dict[str, Any], path: Path, name: str
) -> dict[str, Any]:
    """What `tokenizer_kwargs` and `tokenizer_mode` of an open_clip config change."""
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    options: dict[str, Any] = {"clean": kwargs.pop("clean", "whitespace")}
    if kwargs.pop("strip_sep_token", False):
        options["zeroed_token_id"] = _special(library, settings, "sep", path)
    mode = text_cfg.get("tokenizer_mode") or ""
    if any(kwargs.values()) or mode not in ("", "clips"):
        raise CheckpointError(
            f"{name}: tokenizer_mode {mode!r} with tokenizer_kwargs {text_cfg.get('tokenizer_kwargs')} is not "
            "supported, only `clips` with `clean` and `strip_sep_token`"
        )
    if mode == "clips":  # its own start and end, and a class token behind the padding
        options["start_token_ids"] = (_special(library, settings, "bos", path),)
        options["end_token_ids"] = (_special(library, settings, "eos", path),)
        options["last_token_id"] = _special(library, settings, "cls", path)
    return options


def _check_added(library: Any, settings: TokenizerSettings, path: Path) -> None:
    """Refuses tokens that tokenizer_config.json adds or changes: `transformers` would, the library alone would not."""
    own = library.get_added_tokens_decoder()
    for number, token in (settings.added_tokens_decoder or {}).items():
        same = own.get(int(number)) if number.isascii() and number.isdigit() else None
        flags = {key: value for key, value in asdict(token).items() if key != "content" and value is not None}
        if (
            same is None
            or same.content != token.content
            or any(value != getattr(same, flag) for flag, value in flags.items())
        ):
            raise CheckpointError(
                f"{path}: tokenizer_config.json has the token {token.content!r} (id {number}) otherwise than "
                f"{TOKENIZER_FILE}; save both anew with transformers' save_pretrained"
            )


def _check_fit(
    library: Any, spec: TextSpec, text_cfg: dict[str, Any], tower: dict[str, Any], path: Path, name: str
) -> None:
    """Refuses a tokenizer whose ids the text tower would not understand: no error would come, only wrong answers."""
    size = tower.get("vocab_size") or text_cfg.get("vocab_size", VOCABULARY)
    highest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= int(size):
        raise CheckpointError(
            f"{path}: has ids up to {highest}, the text tower of {name} knows {size} tokens; it is another model's"
        )
    masked = tower.get("pad_token_id")
    if masked is not None and masked != spec.pad_token_id:
        raise CheckpointError(
            f"{path}: pads with {spec.pad_token_id}, but the text tower of {name} masks {masked} (pad_token_id of its "
            "config.json); it is another model's, or its pad_token is missing in tokenizer_config.json"
        )
    if text_cfg.get("embed_cls") and text_cfg.get("pad_id", 0) != spec.pad_token_id:
        raise CheckpointError(
            f"{path}: pads with {spec.pad_token_id}, but the text tower of {name} masks {text_cfg.get('pad_id', 0)}"
        )
    if text_cfg.get("pool_type") == "eos" and text_cfg.get("eos_id", 2) not in spec.end_token_ids:
        raise CheckpointError(
            f"{path}: ends a text with {list(spec.end_token_ids)}, but {name} looks for {text_cfg.get('eos_id', 2)} "
            "(eos_id)"
        )
