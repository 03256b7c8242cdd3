"""Options of `serve --engine ray`, and which of the others cannot hold there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNT = re.compile(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?")
_ONE_PROCESS = "sites are measured inside one process, and requests of a site come to any replica"
_CONNECTIONS = "Ray's proxies hold the connections"
NOT_ON_RAY = {
    "grpc_port": "Ray's proxies pass on HTTP alone",
    **dict.fromkeys(("adapt", "max_sites", "adapt_log", "adapt_log_mib"), _ONE_PROCESS),
    **dict.fromkeys(("model_roots", "max_models", "admin_key_file"), "models are loaded inside one process"),
    **dict.fromkeys(("max_connections", "idle_timeout", "stall_timeout"), _CONNECTIONS),
}
"""Options of `serve`, and why they cannot hold."""
_RAY_ONLY = ("replicas", "ray_address")


def replica_counts(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """An option's value: N or MIN-MAX as two numbers.

    Raises:
        BadParameter: It is neither.
    """
    if value is None:
        return None
    found = _COUNT.fullmatch(value.strip())
    counts = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if counts[0] > counts[1]:
        raise click.BadParameter(f"{value!r:.40}: give a number of replicas, such as 4, or from to, such as 2-8")
    return counts


def ray_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options."""
    options = (
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                     help="ray serves from replicas on a Ray cluster; --threads are CPUs of each, 1 by default."),
        click.option("--replicas", metavar="N|MIN-MAX", callback=replica_counts,
                     help="Of --engine ray; from MIN to MAX Ray follows the requests [default: 1]."),
        click.option("--ray-address", help="An existing Ray cluster; a local one is started by default."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def require_options_of(engine: str, ctx: click.Context) -> None:
    """Refuses options that were given and would not hold.

    Raises:
        InputError: One was.
    """
    given = [
        param
        for param in ctx.command.params
        if param.name is not None and ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT
    ]
    for param in given:
        name = param.name or ""
        if engine == "ray" and name in NOT_ON_RAY:
            raise InputError(f"{param.opts[0]} is not for --engine ray: {NOT_ON_RAY[name]}; leave it out")
        if engine != "ray" and name in _RAY_ONLY:
            raise InputError(f"{param.opts[0]} is for --engine ray; name both")
    if engine == "ray" and len(ctx.params["artifacts"]) > 1:
        raise InputError("--engine ray serves one artifact: Ray's proxies choose a replica, not a model; name one")
    if engine == "ray" and ctx.params["port"] == 0:
        raise InputError("--port 0 is not for --engine ray: every machine's proxy takes the same port; name one")
    if engine == "ray" and ctx.params["access_log"] not in (None, "-"):
        raise InputError(
            "--access-log PATH is not for --engine ray: replicas on one machine would write to one file; "
            "--access-log - writes to each replica's log, which Ray keeps"
        )
