"""`invariclip licenses`: whose work is used under which licence, and the same as a CycloneDX bill of materials."""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from invariclip.cli.options import JSON
from invariclip.console import emit_json, say, table
from invariclip.errors import InputError
from invariclip.files import write_atomically
from invariclip.rooms import other_room

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECT = "invariclip"
UNSTATED = "not stated"
_UMBRELLAS = ("all", "dev", "docs")
_SHORT = 64
"""Characters of a licence's name at most: some packages put the whole text where its name belongs."""


@dataclass(frozen=True)
class Dependency:
    """An installed distribution.

    Attributes:
        name: As it calls itself.
        version: Its version.
        licence: From its metadata: an SPDX expression, else a name, else its classifiers, else `UNSTATED`.
        spdx: Whether `licence` is an SPDX expression.
        optional: Whether only an extra needs it.
        extras: Of those that do; `all`, `dev` and `docs` only where no other one does.
        requires: Canonical names of the installed distributions that it needs itself.
    """

    name: str
    version: str
    licence: str
    spdx: bool
    optional: bool
    extras: tuple[str, ...]
    requires: tuple[str, ...]


@click.command()
@click.option("--sbom", type=click.Path(path_type=Path), help="Write a CycloneDX 1.6 bill of materials (JSON).")
@JSON
def licenses(sbom: Path | None, as_json: bool) -> None:
    """Show the licences of invariclip, of bundled images and weights, and of installed dependencies."""
    project, dependencies = installed()
    if sbom is not None:
        write_atomically(sbom, json.dumps(bill_of_materials(project, dependencies), indent=2) + "\n")
    parts = [asdict(credit) for credit in other_room("licenses")()]
    if as_json:
        emit_json(
            {
                "project": {"name": project.name, "version": project.version, "licence": project.licence},
                "parts": parts,
                "dependencies": [
                    {key: value for key, value in asdict(one).items() if key != "spdx"} for one in dependencies
                ],
                "sbom": None if sbom is None else str(sbom),
            }
        )
        return
    say(f"{project.name} {project.version}: {project.licence}\n")
    for here, heading in ((True, "Bundled images and weights"), (False, "Fetched when it is first used")):
        rows = [[part["what"], part["licence"], part["authors"], part["source"]]
                for part in parts if part["fetched"] is not here]  # fmt: skip
        if rows:
            say(f"{heading}\n{table(['what', 'licence', 'authors', 'source'], rows)}\n")
    rows = [[one.name, one.version, one.licence, ", ".join(one.extras)] for one in dependencies]
    say(f"Installed dependencies\n{table(['package', 'version', 'licence', 'needed by the extras'], rows)}")
    if sbom is not None:
        say(f"\nCycloneDX 1.6 in {sbom}")


def installed() -> tuple[Dependency, list[Dependency]]:
    """This project, and the installed distributions that it needs, also through its extras; by name.

    Raises:
        InputError: It is run from its sources, without being installed.
    """
    try:
        project = distribution(PROJECT)
    except PackageNotFoundError as error:
        raise InputError(
            f"{PROJECT} is not installed here, so its dependencies are not known: pip install {PROJECT}"
        ) from error
    core = _closure(project, ())
    named = tuple(project.metadata.get_all("Provides-Extra") or ())
    whole = _closure(project, named)
    by_extra = {extra: set(_closure(project, (extra,))) for extra in named}
    listed = []
    for name, node in sorted(whole.items()):
        extras = [extra for extra in named if name in by_extra[extra] and name not in core]
        first = [extra for extra in extras if extra not in _UMBRELLAS]
        listed.append(_dependency(node, tuple(first or extras)))
    own = next(one for one in listed if canonicalize_name(one.name) == PROJECT)
    return own, [one for one in listed if one is not own]


def bill_of_materials(project: Dependency, dependencies: Sequence[Dependency]) -> dict[str, Any]:
    """A CycloneDX 1.6 document; the same installation gives the same one, with a time only by SOURCE_DATE_EPOCH.

    The format: ECMA-424, https://cyclonedx.org/docs/1.6/json/.
    """
    components = [_component(one, "library", scope="optional" if one.optional else "required") for one in dependencies]
    known: dict[str, str] = {canonicalize_name(one.name): _purl(one) for one in (project, *dependencies)}
    graph = [
        {"ref": _purl(one), "dependsOn": sorted(known[name] for name in one.requires)}
        for one in (project, *dependencies)
    ]
    body = {"components": components, "dependencies": graph}
    metadata: dict[str, Any] = {"component": _component(project, "application")}
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch.isascii() and epoch.isdecimal():
        metadata["timestamp"] = datetime.fromtimestamp(int(epoch), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([metadata, body], sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": metadata,
        **body,
    }


@dataclass
class _Node:
    """An installed distribution, and the canonical names of those that it needs."""

    package: Distribution
    needs: set[str]


def _closure(root: Distribution, extras: tuple[str, ...]) -> dict[str, _Node]:
    """What is installed of all that a distribution with these extras needs, and itself, by canonical name."""
    nodes: dict[str, _Node] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(root, extra) for extra in ("", *extras)]
    while todo:
        package, extra = todo.pop()
        name = canonicalize_name(package.metadata["Name"])
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        node = nodes.setdefault(name, _Node(package, set()))
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            with suppress(PackageNotFoundError):  # an extra that is not installed
                todo += [(distribution(requirement.name), wanted) for wanted in ("", *requirement.extras)]
                node.needs.add(canonicalize_name(requirement.name))
    return nodes


def _dependency(node: _Node, extras: tuple[str, ...]) -> Dependency:
    package, name = node.package, node.package.metadata["Name"]
    licence, spdx = _licence(package)
    needs = node.needs - {canonicalize_name(name)}
    return Dependency(name, package.version, licence, spdx, bool(extras), extras, tuple(sorted(needs)))


def _licence(package: Distribution) -> tuple[str, bool]:
    """What a distribution's metadata say, and whether it is an SPDX expression (core metadata 2.4)."""
    expression = _field(package, "License-Expression")
    if expression:
        return expression, True
    said = _field(package, "License")
    if said and len(said) <= _SHORT and "\n" not in said and said.upper() != "UNKNOWN":
        return said, False
    classifiers = package.metadata.get_all("Classifier") or ()
    names = [text.rpartition(" :: ")[2] for text in classifiers if re.match(r"License :: (?!OSI Approved$)", text)]
    return ", ".join(names) or UNSTATED, False


def _field(package: Distribution, name: str) -> str:
    return next(iter(package.metadata.get_all(name) or ()), "").strip()


def _component(one: Dependency, kind: str, **more: str) -> dict[str, Any]:
    if one.spdx:
        licences: list[dict[str, Any]] = [{"expression": one.licence}]
    else:
        licences = [] if one.licence == UNSTATED else [{"license": {"name": one.licence}}]
    stated = {"licenses": licences} if licences else {}
    return {
        "type": kind, "bom-ref": _purl(one), "name": one.name, "version": one.version, "purl": _purl(one),
        **more, **stated,
    }  # fmt: skip


def _purl(one: Dependency) -> str:
    """The package URL of a distribution of PyPI (https://github.com/package-url/purl-spec)."""
    return f"pkg:pypi/{canonicalize_name(one.name)}@{one.version.replace('+', '%2B')}"
