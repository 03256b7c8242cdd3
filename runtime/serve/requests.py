"""What a request asks, from its query and its body; nothing is guessed, and no field is ignored."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import msgspec

from invariclip.errors import InputError
from invariclip.preprocessing.prompts import TEMPLATE_SETS, check_prompts, template_set
from invariclip.records import parse_json
from invariclip.results import CALIBRATED, UNCERTAINTY_KINDS, UncertaintyKind
from invariclip.serve.json_size import holds_more_values
from invariclip.serve.limits import BadRequestError, RefusedError
from invariclip.serve.service import EncodedImage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from invariclip.results import AbstainAbove
    from invariclip.serve.limits import Limits

Pairs: TypeAlias = "Iterable[tuple[str, str]]"

DEFAULT_TOP, MAX_TOP = 3, 999_999_999
LISTS = ("images", "classes", "templates", "texts")
"""Fields that hold lists, also as JSON in the text of a query or form."""
_LIST, _LIST_OF_TEXTS = re.compile(r"\s*\["), re.compile(r'\s*\[\s*"')
_DIGITS = re.compile(r"[0-9]{1,9}")
UNSAID = object()
"""In place of `abstain_above` where a request does not say it: null says never to abstain."""


@dataclass(frozen=True)
class NamedImage:
    """An image in JSON: base64, also as a data URL, and what answers call it."""

    data: str
    name: str = ""


ImagesField: TypeAlias = str | NamedImage | list[str | NamedImage]
"""In JSON. A text is base64."""


@dataclass(frozen=True)
class ClassifyFields:
    """Fields of a question to `/v1/classify`, with their types in JSON.

    Attributes:
        images: What to classify.
        classes: Class names; a single text is cut at its commas.
        templates: Prompts with one {}, or the name of a set of them.
        abstain_above: From 0 to 1, `calibrated`, or null for never; unsaid, what the server was started with.
        uncertainty: Which one is told and abstained by.
        top: How many classes are ranked.
        site: The site that the images are from; null for none, unsaid for the server's.
        partial: Whether the other images are answered where one cannot be read.
        model: The name of the model that answers; unsaid, the server's first.
    """

    images: ImagesField
    classes: str | list[str] | None = None
    templates: str | list[str] | None = None
    abstain_above: Annotated[float, msgspec.Meta(ge=0, le=1)] | str | None = None
    uncertainty: UncertaintyKind | None = None
    top: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOP)] | Annotated[str, msgspec.Meta(pattern="^[0-9]{1,9}$")] = (
        DEFAULT_TOP
    )
    site: str | None = None
    partial: bool | Literal["true", "false"] = False
    model: str | None = None


@dataclass(frozen=True)
class EmbedFields:
    """Fields of a question to `/v1/embed`, with their types in JSON.

    Attributes:
        images: What to embed.
        texts: In their place.
        site: The site that the images are from; null for none, unsaid for the server's.
        partial: Whether the other images are answered where one cannot be read.
        model: The name of the model that answers; unsaid, the server's first.
    """

    images: ImagesField | None = None
    texts: str | list[str] | None = None
    site: str | None = None
    partial: bool | Literal["true", "false"] = False
    model: str | None = None


CLASSIFY_FIELDS = tuple(field.name for field in fields(ClassifyFields))
EMBED_FIELDS = tuple(field.name for field in fields(EmbedFields))


@dataclass(frozen=True)
class Body:
    """A request's body, taken apart.

    Attributes:
        fields: By name, texts or lists of a query or form, or JSON's values.
        images: Those that came as bytes; JSON's are still in `fields`.
    """

    fields: Mapping[str, Any]
    images: tuple[EncodedImage, ...] = ()

    @property
    def heavy(self) -> bool:
        """Whether it has base64, of which many images would hold up everybody else."""
        return "images" in self.fields


@dataclass(frozen=True)
class Classify:
    """A question to `/v1/classify`; None takes the server's own.

    Attributes:
        images: What to classify.
        classes: Class names.
        templates: Prompts.
        abstain_above: A number, `calibrated`, None for never, or `UNSAID`.
        uncertainty: Which one is told and abstained by.
        top: How many classes are ranked.
        site: The place that the images are from; "" for none, None for the server's.
        partial: Whether the other images are answered where one cannot be read.
        model: The name of the model that answers.
    """

    images: tuple[EncodedImage, ...]
    classes: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    abstain_above: AbstainAbove | object
    uncertainty: UncertaintyKind | None
    top: int
    site: str | None
    partial: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Embed:
    """A question to `/v1/embed`: images, or texts; `site`, `partial` and `model` as in `Classify`."""

    images: tuple[EncodedImage, ...]
    texts: tuple[str, ...]
    site: str | None
    partial: bool = field(default=False, kw_only=True)
    model: str | None = field(default=None, kw_only=True)


def from_pairs(pairs: Pairs, limits: Limits) -> dict[str, Any]:
    """Fields of a query or a form: a value as a text, a JSON list or a repeated field as a list.

    Raises:
        InputError: A JSON list is damaged, or stands beside other values.
        RefusedError: It has too many values.
    """
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: _from_form(name, values, limits) for name, values in found.items()}


def _from_form(name: str, values: list[str], limits: Limits) -> Any:
    """One field's values; a text that begins as a JSON list is one, and names may then have commas."""
    if name in LISTS and any(map(_LIST.match, values)):
        if len(values) > 1:
            raise InputError(
                f"{name} is given as a JSON list and once more; put all into one list, or repeat {name} with one text"
            )
        if holds_more_values(values[0].encode("utf-8", "replace"), limits.json_values):
            raise RefusedError(413, f"{name} has too many values; up to {limits.json_values:,} are read")
        try:
            return parse_json(values[0], name)
        except InputError:
            if _LIST_OF_TEXTS.match(values[0]):
                raise
    return values[0] if len(values) == 1 else values  # such as the one class `[UNK]`


def from_json(data: bytes, limits: Limits, more: int = 0) -> dict[str, Any]:
    """Fields of a JSON object.

    Args:
        data: The object.
        limits: What it may hold.
        more: Values beyond that, where images are lists of numbers.

    Raises:
        BadRequestError: It is none.
        RefusedError: It has too many values.
    """
    most = limits.json_values + more
    if holds_more_values(data, most):
        raise RefusedError(413, f"the body holds too many names and values in JSON; up to {most:,} are read")
    plain = parse_json(data, "the body", error=BadRequestError)
    if not isinstance(plain, dict):
        raise BadRequestError('the body must be a JSON object, such as {"images": ["<base64>"]}')
    return plain


def merged(query: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the query and of the body together.

    Raises:
        InputError: One is in both.
    """
    twice = sorted(set(query) & set(fields))
    if twice:
        raise InputError(f"{twice[0]} is given in the query and in the body; give it once")
    return {**query, **fields}


def classify(body: Body, limits: Limits) -> Classify:
    """Reads a question to `/v1/classify`.

    Raises:
        InputError: A field is unknown or of another type, or there is no image.
        RefusedError: There is too much of something.
    """
    fields = _known(body.fields, CLASSIFY_FIELDS)
    partial = _flag(fields, "partial")
    images = _images(body, limits, partial)
    if not images:
        raise InputError("no image; send one as the body, as multipart files, or as base64 in the field images")
    classes = _texts(fields.get("classes"), "classes", limits, limits.classes, split=True)
    templates = _templates(fields.get("templates"), limits)
    if classes is not None:
        limits.require(len(classes) * len(templates or ("",)), "prompts (classes times templates)", limits.prompts)
    if classes is not None or templates is not None:
        check_prompts(classes or ("class",), templates or ("{}",))
    top = _whole(fields.get("top", DEFAULT_TOP), "top")
    limit, kind = _threshold(fields.get("abstain_above", UNSAID)), _kind(fields.get("uncertainty"))
    return Classify(images, classes, templates, limit, kind, top, _site(fields), partial, _model(fields))


def embed(body: Body, limits: Limits) -> Embed:
    """Reads a question to `/v1/embed`.

    Raises:
        InputError: A field is unknown or of another type, or there are not either images or texts.
        RefusedError: There is too much of something.
    """
    fields = _known(body.fields, EMBED_FIELDS)
    partial = _flag(fields, "partial")
    images = _images(body, limits, partial)
    texts = _texts(fields.get("texts"), "texts", limits, limits.texts) or ()
    if bool(images) == bool(texts):
        raise InputError("give images, or texts, and not both")
    if texts and fields.get("site"):
        raise InputError("a site changes images' embeddings alone; leave the field site out for texts")
    if texts and partial:
        raise InputError("partial is for images, which may be unreadable; leave the field partial out for texts")
    return Embed(images, texts, _site(fields), partial=partial, model=_model(fields))


def _known(fields: Mapping[str, Any], known: tuple[str, ...]) -> Mapping[str, Any]:
    strange = sorted(set(fields) - set(known))
    if strange:
        raise InputError(f"no field is called {strange[0]!r:.60}; available: {', '.join(known)}")
    return fields


def _images(body: Body, limits: Limits, partial: bool) -> tuple[EncodedImage, ...]:
    given = body.fields.get("images")
    if given is None:
        limits.require(len(body.images), "images", limits.images)
        images = body.images
    else:
        listed = given if isinstance(given, list) else [given]
        limits.require(len(listed) + len(body.images), "images", limits.images)
        images = (*body.images, *(_from_base64(place, one, partial) for place, one in enumerate(listed)))
    for image in images:
        limits.require(len(image.name), "characters in an image's name", limits.characters)
        _require_unicode(image.name, "an image's name")
    return images


def _from_base64(place: int, given: Any, partial: bool) -> EncodedImage:
    """An image as a text, or as `{"name": ..., "data": ...}`; with `partial`, what is not base64 has its problem."""
    name: Any = str(place)
    if isinstance(given, dict):
        if not set(given) <= {"name", "data"}:
            raise InputError(f"image {place}: an object has the fields name and data")
        name, given = given.get("name", name), given.get("data")
    if not isinstance(name, str) or not isinstance(given, str):
        raise InputError(f'image {place}: give base64 as a text, or {{"name": text, "data": base64}}')
    if given.startswith("data:"):
        given = given.partition(",")[2]
    return decoded_image(place, name, given, partial=partial)


def decoded_image(place: int, name: str, given: str, *, partial: bool = False) -> EncodedImage:
    """An image from base64; with `partial`, what is none has its problem instead.

    Raises:
        InputError: It is not base64.
    """
    try:
        return EncodedImage(name, base64.b64decode("".join(given.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        if partial:
            return EncodedImage(name, b"", f"not base64 ({error})")
        raise InputError(f"image {place}: not base64 ({error})") from error


def _texts(given: Any, what: str, limits: Limits, limit: int, *, split: bool = False) -> tuple[str, ...] | None:
    """One text or a list of them. `split`: a single one is cut at its commas, as `--classes` is."""
    if given is None:
        return None
    if isinstance(given, str) and split:  # in JSON too a text may hold a list: it is one, and never cut at its commas
        given = _from_form(what, [given], limits)
    listed = given
    if isinstance(given, str):
        listed = [part.strip() for part in given.split(",") if part.strip()] if split else [given]
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise InputError(f"{what} must be a list of texts")
    return checked_texts(listed, what, limits, limit)


def checked_texts(listed: list[str], what: str, limits: Limits, limit: int) -> tuple[str, ...]:
    """Texts that are not too many, not too long, and Unicode.

    Raises:
        InputError: There is none, or one is not Unicode.
        RefusedError: They are too many or too long.
    """
    if not listed:
        raise InputError(f"{what} is empty; leave it out, or name some")
    limits.require(len(listed), what, limit)
    limits.require(max(map(len, listed)), f"characters in one of {what}", limits.characters)
    for one in listed:
        _require_unicode(one, what)
    return tuple(listed)


def _require_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} must be Unicode: {text!r:.60} holds half a character") from error


def _templates(given: Any, limits: Limits) -> tuple[str, ...] | None:
    """Prompts, or the name of a set of them."""
    if isinstance(given, str) and "{}" not in given:
        if given not in TEMPLATE_SETS:
            raise InputError(
                f"templates: {given!r:.60} must be a set name or a prompt containing exactly one {{}}; "
                f"available: {', '.join(TEMPLATE_SETS)}"
            )
        given = list(template_set(given))
    return _texts(given, "templates", limits, limits.templates)


def _site(fields: Mapping[str, Any]) -> str | None:
    if "site" not in fields:
        return None
    given = fields["site"]
    if given is not None and not isinstance(given, str):
        raise InputError(f"site must be one name, or null for none, not {given!r:.60}")
    return given or ""


def _model(fields: Mapping[str, Any]) -> str | None:
    given = fields.get("model")
    if given is not None and (not isinstance(given, str) or not given):
        raise InputError(f"model must be one name, not {given!r:.60}; GET /v1/models lists those that there are")
    return given


def _flag(fields: Mapping[str, Any], what: str) -> bool:
    given = fields.get(what, False)
    if isinstance(given, bool):
        return given
    if given in ("true", "false"):
        return bool(given == "true")
    raise InputError(f"{what} must be true or false, not {given!r:.60}")


def _whole(given: Any, what: str) -> int:
    number = int(given) if isinstance(given, str) and _DIGITS.fullmatch(given) else given
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_TOP:
        raise InputError(f"{what} must be a whole number from 1 to {MAX_TOP:,}, not {given!r:.60}")
    return number


def _kind(given: Any) -> UncertaintyKind | None:
    if given is None or given in UNCERTAINTY_KINDS:
        return cast("UncertaintyKind | None", given)
    raise InputError(f"uncertainty must be one of {', '.join(UNCERTAINTY_KINDS)}, not {given!r:.60}")


def _threshold(given: Any) -> AbstainAbove | object:
    if given is None or given is UNSAID:
        return UNSAID if given is UNSAID else None
    if given == CALIBRATED:
        return CALIBRATED
    if isinstance(given, str):
        try:
            return float(given)
        except ValueError:
            pass
    elif isinstance(given, int | float) and not isinstance(given, bool):
        return float(given) if abs(given) <= 1 else 2.0  # a huge whole number is no float; `threshold` says what is
    raise InputError(f"abstain_above must be a number from 0 to 1 or {CALIBRATED!r}, not {given!r:.60}")
