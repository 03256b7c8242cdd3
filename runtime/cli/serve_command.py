"""`invariclip serve`."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from invariclip.artifact.fidelity import LEVELS
from invariclip.artifact.signature import REQUIRED
from invariclip.cli.options import (
    BACKEND,
    OTHER_PROJECTION,
    PIXEL_MODE,
    SIGNED,
    SITE,
    THREADS,
    UNCERTAINTY_OPTION,
    class_names,
    number_or_word,
    prompt_templates,
    zero_shot_options,
)
from invariclip.cli.ray_options import ray_options, require_options_of
from invariclip.errors import InputError, MissingExtraError
from invariclip.profile import OBJECTIVES
from invariclip.results import CALIBRATED
from invariclip.serve.access_log import AccessLog
from invariclip.serve.connections import ConnectionLimits, affordable
from invariclip.serve.keys import read_keys
from invariclip.serve.limits import MIB, Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.opening import ServiceOptions, named_artifacts, open_service
from invariclip.serve.origins import checked_origins, names_of
from invariclip.serve.repository import MAX_MODELS, ModelRepository, require_loadable
from invariclip.serve.server import Hangups, listening, run
from invariclip.serve.service import Batching, Processors
from invariclip.serve.sites import LiveSiteOptions
from invariclip.serve.tracing import open_spans

if TYPE_CHECKING:
    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.results import AbstainAbove, UncertaintyKind
    from invariclip.serve.service import Service

_MOST = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("artifacts", metavar="[NAME=]ARTIFACT...", nargs=-1, required=True, type=click.Path())
@SIGNED
@click.option("--model-root", "model_roots", multiple=True, type=click.Path(path_type=Path),
              help="A folder of artifacts, NAME.icm each, that may be loaded at run time; repeatable.")  # fmt: skip
@click.option("--max-models", type=_MOST, default=MAX_MODELS, show_default=True,
              help="Models loaded at a time; one more while one is exchanged.")  # fmt: skip
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 accepts other machines."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535),
    help="Port of the Open Inference Protocol over gRPC; 0 takes a free one [default: no gRPC].",
)  # fmt: skip
@zero_shot_options
@OTHER_PROJECTION
@SITE
@click.option("--sites", type=click.Path(path_type=Path),
              help="A folder of sites, NAME.safetensors each, that requests name in the field site.")  # fmt: skip
@click.option("--adapt", is_flag=True, help="Measure the sites that requests name, from the images of the requests.")
@click.option("--max-sites", type=_MOST, default=LiveSiteOptions.most, show_default=True,
              help="Sites measured at a time; every API key has an equal share.")  # fmt: skip
@click.option("--adapt-log", type=click.Path(path_type=Path),
              help="Folder to log the embeddings of each measured site to, for `adapt --replay`.")  # fmt: skip
@click.option(
    "--adapt-log-mib",
    type=_MOST,
    default=LiveSiteOptions.log_bytes // MIB,
    show_default=True,
    help="Limit for one site.",
)
@click.option(
    "--abstain-above", metavar="U", callback=number_or_word,
    help=f"Give no label where the uncertainty is above this, from 0 to 1, or {CALIBRATED}; a request may say else.",
)  # fmt: skip
@UNCERTAINTY_OPTION
@click.option("--variant", help="One that the artifact lists [default: as `predict` chooses].")
@click.option("--fidelity", type=click.Choice(LEVELS), help="A level that the variant must have been proved at.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="Which profile of `tune` to use.")
@PIXEL_MODE
@BACKEND
@THREADS
@click.option("--decode-threads", type=_MOST, help="Threads that decode [default: what this process may use].")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=Batching.max_batch, show_default=True,
              help="Images per run of the engine, rounded down to a power of two.")  # fmt: skip
@click.option("--max-wait-ms", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="How long an image waits for a batch to fill while the engine is free.")  # fmt: skip
@click.option("--queue", type=_MOST, default=Limits.queue, show_default=True, help="Images that may wait in the queue.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=Limits.seconds, show_default=True,
              help="Seconds allowed for a request, from its headers to its answer.")  # fmt: skip
@click.option("--grace", type=_MOST, default=10, show_default=True,
              help="Seconds after SIGTERM to finish accepted requests.")  # fmt: skip
@click.option(
    "--max-body-mib", type=_MOST, default=Limits.body // MIB, show_default=True, help="Limit for one request."
)
@click.option("--max-images", type=_MOST, default=Limits.images, show_default=True, help="Limit for one request.")
@click.option("--max-pixels", type=_MOST, default=Limits.pixels, show_default=True, help="Limit for one image.")
@click.option("--max-request-pixels", type=_MOST, default=Limits.request_pixels, show_default=True,
              help="Limit for all images of one request, decoded and resized.")  # fmt: skip
@click.option("--max-answer-mib", type=_MOST, default=Limits.answer // MIB, show_default=True,
              help="Limit for one answer in JSON.")  # fmt: skip
@click.option("--max-texts", type=_MOST, default=Limits.texts, show_default=True, help="Limit for one request.")
@click.option("--max-classes", type=_MOST, default=Limits.classes, show_default=True, help="Limit for one request.")
@click.option("--max-templates", type=_MOST, default=Limits.templates, show_default=True, help="Limit for one request.")
@click.option("--class-sets", type=_MOST, default=Limits.class_sets, show_default=True,
              help="Class sets from requests that are kept.")  # fmt: skip
@click.option("--max-connections", type=_MOST,
              help=f"Limit at a time [default: {ConnectionLimits.most}, or what `ulimit -n` allows].")  # fmt: skip
@click.option("--idle-timeout", type=_SECONDS, default=ConnectionLimits.idle, show_default=True,
              help="Seconds that a connection without a request is kept.")  # fmt: skip
@click.option("--stall-timeout", type=_SECONDS, default=ConnectionLimits.stall, show_default=True,
              help="Seconds for a request's headers, for more of its body, and for a client to read on.")  # fmt: skip
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True,
    help="A name that this server is called by, besides its address: NAME, *.NAME or *; repeatable.",
)  # fmt: skip
@click.option(
    "--cors-origin", "cors_origins", multiple=True, help="An origin whose pages may send requests (CORS); repeatable."
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="Require one of the API keys in this file, one per line."
)
@click.option(
    "--admin-key-file", type=click.Path(path_type=Path),
    help="Let those who have one of the keys in this file load and unload models, one per line.",
)  # fmt: skip
@click.option("--access-log", metavar="PATH|-", help="File for a JSON line of each request; - for standard error.")
@ray_options
@click.pass_context
def serve(
    ctx: click.Context,
    artifacts: tuple[str, ...], model_roots: tuple[Path, ...], max_models: int, host: str, port: int,
    grpc_port: int | None, classes: str | None, classes_file: Path | None, templates: tuple[str, ...],
    templates_file: Path | None, template_name: str | None, projection: Path | None, site: Path | None,
    sites: Path | None, adapt: bool, max_sites: int, adapt_log: Path | None, adapt_log_mib: int,
    abstain_above: AbstainAbove, uncertainty: UncertaintyKind | None, variant: str | None, fidelity: str | None,
    objective: str | None, pixel_mode: PixelMode, backend: str | None, threads: int | None,
    decode_threads: int | None, max_batch: int, max_wait_ms: float, queue: int, timeout: float, grace: int,
    max_body_mib: int, max_images: int, max_pixels: int, max_request_pixels: int, max_answer_mib: int, max_texts: int,
    max_classes: int, max_templates: int, class_sets: int, max_connections: int | None, idle_timeout: float,
    stall_timeout: float, allowed_hosts: tuple[str, ...], cors_origins: tuple[str, ...], api_key_file: Path | None,
    admin_key_file: Path | None, access_log: str | None, engine: str, replicas: tuple[int, int] | None,
    ray_address: str | None,
) -> int:  # fmt: skip
    """Answer over HTTP: classify and embed, in batches of many clients' requests. SIGTERM ends it."""
    require_options_of(engine, ctx)
    limits = Limits(
        body=max_body_mib * MIB, bodies=max(Limits.bodies, max_body_mib * MIB), images=max_images,
        pixels=max_pixels, texts=max_texts, classes=max_classes, templates=max_templates, class_sets=class_sets,
        queue=queue, seconds=timeout, request_pixels=max_request_pixels, answer=max_answer_mib * MIB,
    )  # fmt: skip
    keys = () if api_key_file is None else read_keys(api_key_file)
    admin_keys = () if admin_key_file is None else read_keys(admin_key_file)
    if set(keys) & set(admin_keys):
        raise InputError(f"{admin_key_file}: one of its keys is in {api_key_file} too; an admin key is one of its own")
    if adapt_log is not None and not adapt:
        raise InputError("--adapt-log keeps what --adapt measures; name both")
    folders = named_artifacts(artifacts)
    running = LiveSiteOptions(max_sites, log=adapt_log, log_bytes=adapt_log_mib * MIB) if adapt else None
    options = ServiceOptions(
        variant, backend, threads, fidelity, objective, pixel_mode, os.environ.get(REQUIRED), projection,
        class_names(classes, classes_file), prompt_templates(templates, templates_file, template_name), site, sites,
        running, len(folders) > 1 or bool(model_roots), abstain_above, uncertainty, max(1, len(keys)), limits,
        Batching(max_batch, max_wait_ms / 1000, decode_threads),
    )  # fmt: skip
    hosts, origins = names_of(host, allowed_hosts), checked_origins(cors_origins)
    if engine == "ray":
        from invariclip.serve.ray_application import RayOptions, ReplicaOptions, run_on_ray

        return run_on_ray(
            ReplicaOptions(
                *next(iter(folders.items())), options, api_key_file, origins, hosts, access_log=access_log is not None
            ).settled(),
            RayOptions(host, port, replicas or (1, 1), ray_address, grace),
            what=artifacts[0],
        )
    connections = ConnectionLimits(affordable(max_connections), idle_timeout, stall_timeout)
    if grpc_port is not None:
        if grpc_port == port != 0:
            raise InputError(f"--port and --grpc-port are both {port}; give each its own")
        require_grpc(host, grpc_port)
    sock = listening(host, port)
    metrics, hangups, spans = Metrics(), Hangups(), open_spans()
    ctx.call_on_close(hangups.close)
    logged = None if access_log is None else AccessLog(None if access_log == "-" else Path(access_log), metrics)
    require_loadable(len(folders), model_roots, max_models)
    processors = Processors(decode_threads)

    def opened(name: str, folder: Path) -> Service:
        return open_service(options, name, folder, metrics, processors)

    models = ServedModels([opened(*one) for one in folders.items()], several=options.several)
    logging.basicConfig(format="invariclip: %(asctime)s %(levelname)s %(message)s")
    repository = ModelRepository(models, opened, folders, roots=model_roots, most=max_models)
    engines = [f"({one.service.model.variant} on {one.service.model.backend})" for one in models.loaded]
    what = ", ".join(f"{given} {engine}" for given, engine in zip(artifacts, engines, strict=True))
    return run(models, metrics, sock, what=what, grace=grace, api_keys=keys, cors_origins=origins, hosts=hosts,
               limits=connections, grpc=None if grpc_port is None else (host, grpc_port), access_log=logged,
               spans=spans, repository=repository, admin_keys=admin_keys, hangups=hangups)  # fmt: skip


def require_grpc(host: str, port: int) -> None:
    """Makes sure, before anything is loaded, that gRPC can be served.

    Raises:
        MissingExtraError: Its library is not installed.
        InputError: The address cannot be had.
    """
    try:
        import_module("invariclip.serve.inference_grpc")
    except ImportError as error:
        raise MissingExtraError(f'--grpc-port needs {error.name}: pip install "invariclip[grpc]"') from error
    listening(host, port, "--grpc-port").close()
