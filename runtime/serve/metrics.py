"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from invariclip.serve.limits import REASONS
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from invariclip.model import Model
    from invariclip.serve.models import ServedModel, ServedModels
    from invariclip.serve.record import RequestRecord
    from invariclip.serve.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """A registry of its own: two servers in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # says nothing where there is no /proc
        self.requests = Counter(
            "invariclip_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "invariclip_request_seconds", "From a request's head to the end of its answer.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.dropped = Counter(
            "invariclip_connections_dropped",
            "Connections that the server closed, by reason (docs/serve.md).", ["reason"], registry=self.registry,
        )  # fmt: skip
        self._request_stages = Histogram(
            "invariclip_request_stage_seconds",
            "Of answered requests. queue: none of its items was worked on. class_set: it waited for classes that it "
            "brought. engine: runs that it was part of.",
            ["route", "stage"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "invariclip_requests_in_flight", "Requests that are not answered yet.", ["route"], registry=self.registry
        )
        self._refused = Counter(
            "invariclip_refused", "Requests that were not answered with what they asked for, by reason.", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in REASONS:
            self._refused.labels(reason)
        self._failed = Counter(
            "invariclip_images_failed", "Images with an error in their place, of requests that were answered in part.",
            registry=self.registry,
        )  # fmt: skip
        self.access_log_dropped = Counter(
            "invariclip_access_log_dropped", "Lines of the access log that were not written.", registry=self.registry
        )
        self._items = Counter("invariclip_items", "Items answered by the engine.", ["kind"], registry=self.registry)
        self._batches = Histogram(
            "invariclip_batch_size", "Items to a run of the engine.", ["kind"], buckets=BATCHES, registry=self.registry
        )
        self._stages = Histogram(
            "invariclip_stage_seconds",
            "decode: making one item ready. queue: ready, and waiting for the engine. engine: one batch.",
            ["kind", "stage"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip

    def over(self, record: RequestRecord) -> None:
        """Counts a request that was answered, or was not."""
        self.requests.labels(record.route, str(record.status)).inc()
        self.request_seconds.labels(record.route).observe(record.seconds)
        self._failed.inc(record.failed)
        if record.reason:
            self.refused_unread(record)
            return
        for stage in ("queue", "class_set", "engine") if any(record.items.values()) else ():
            seconds = record.stages[stage].seconds
            if seconds or stage != "class_set":
                self._request_stages.labels(record.route, stage).observe(seconds)

    def refused_unread(self, record: RequestRecord) -> None:
        """Counts a connection that was refused before a request was read."""
        self._refused.labels(record.reason if record.reason in REASONS else "other").inc()

    def watcher(self, kind: str) -> Stages:
        """What a batcher tells of items of a kind, `images` or `texts`."""
        return Stages(
            self._items.labels(kind),
            self._batches.labels(kind),
            *(self._stages.labels(kind, stage) for stage in ("decode", "queue", "engine")),
        )

    def watch(self, models: ServedModels) -> None:
        """Shows what is served, and how full its queues are."""
        self.registry.register(ModelMetrics(models))

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Shows how many connections are open."""
        Gauge("invariclip_connections", "Open connections.", registry=self.registry).set_function(count)

    def text(self) -> bytes:
        """All of it, in Prometheus' own format."""
        return generate_latest(self.registry)


class ModelMetrics(Collector):
    """What is known of the models that are loaded: all together, and by name where there may be several."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Prometheus' families."""
        loaded = self._models.loaded
        services = [one.service for one in loaded]
        info = GaugeMetricFamily("invariclip_build_info", "What is served.", labels=list(_facts(None)))
        for facts in dict.fromkeys(tuple(_facts(service.model).values()) for service in services):
            info.add_metric(facts, 1)
        depth = GaugeMetricFamily("invariclip_queue_depth", "Items that no engine has taken yet.", labels=["kind"])
        depth.add_metric(["images"], sum(service.images.waiting for service in services))
        depth.add_metric(["texts"], sum(service.texts.waiting for service in services))
        kept = GaugeMetricFamily("invariclip_class_sets", "Class sets of requests that are kept.")
        kept.add_metric([], sum(service.class_sets.kept for service in services))
        made = GaugeMetricFamily("invariclip_class_sets_embedded", "Class sets embedded so far.")
        made.add_metric([], sum(service.class_sets.embedded for service in services))
        yield from (info, depth, kept, made)
        if self._models.several:
            yield from self._by_name(loaded)
        if any(service.sites.running is not None for service in services):
            yield from self._sites(services)

    def _by_name(self, loaded: tuple[ServedModel, ...]) -> Iterator[Metric]:
        info = GaugeMetricFamily("invariclip_model_info", "What is loaded.", labels=["name", *_facts(None)])
        busy = GaugeMetricFamily("invariclip_model_requests_in_flight", "Requests it answers now.", labels=["name"])
        depth = GaugeMetricFamily(
            "invariclip_model_queue_depth", "Items that its engine has not taken yet.", labels=["name", "kind"]
        )
        for one in loaded:
            name, service = one.service.name, one.service
            info.add_metric([name, *_facts(service.model).values()], 1)
            busy.add_metric([name], one.requests)
            depth.add_metric([name, "images"], service.images.waiting)
            depth.add_metric([name, "texts"], service.texts.waiting)
        yield from (info, busy, depth)

    def _sites(self, services: list[Service]) -> Iterator[Metric]:
        """What running sites know, by the number of their API key and their name; as many as there may be sites."""
        labels = ["key", "site", *(["name"] if self._models.several else [])]
        gauges = {
            name: GaugeMetricFamily(f"invariclip_site_{name}", text, labels=labels)
            for name, text in (
                ("images", "Images that count now."), ("kinds", "Kinds of things that they show."),
                ("weight", "How much of the shift is taken away."), ("shift", "Length of what is taken away."),
                ("drift", "How far the mean has moved since it was first told."), ("frozen", "1 where it is frozen."),
            )
        }  # fmt: skip
        seen = CounterMetricFamily("invariclip_site_seen", "Images shown.", labels=labels)
        changes = CounterMetricFamily("invariclip_site_changes", "Times that the place has changed.", labels=labels)
        rejected = CounterMetricFamily("invariclip_site_rejected", "Images not counted.", labels=[*labels, "reason"])
        running = [(key, live, service.name) for service in services for key, live in service.sites.live()]
        for key, live, name in running:
            facts, at = live.facts(), [str(key), live.name, *([name] if self._models.several else [])]
            for name, gauge in gauges.items():
                gauge.add_metric(at, float(facts[name]))
            seen.add_metric(at, facts["seen"])
            changes.add_metric(at, facts["changes"])
            for reason, count in facts["rejected"].items():
                rejected.add_metric([*at, reason], count)
        yield from (*gauges.values(), seen, changes, rejected)


def _facts(model: Model | None) -> dict[str, str]:
    """Labels of a model; of none, their names."""
    return {
        "version": __version__, "model": model.manifest.model.name if model else "",
        "variant": model.variant if model else "", "engine": model.backend if model else "",
        "space_id": model.space_id if model else "",
    }  # fmt: skip


class Stages:
    """A `batcher.Watcher` that counts."""

    def __init__(
        self, items: Counter, batches: Histogram, decode: Histogram, queue: Histogram, engine: Histogram
    ) -> None:
        self._items, self._batches = items, batches
        self._decode, self._queue, self._engine = decode, queue, engine

    def prepared(self, seconds: float) -> None:
        """An item was made ready."""
        self._decode.observe(seconds)

    def waited(self, seconds: float) -> None:
        """A ready item was taken by the engine."""
        self._queue.observe(seconds)

    def ran(self, rows: int, seconds: float) -> None:
        """The engine answered a batch."""
        self._items.inc(rows)
        self._batches.observe(rows)
        self._engine.observe(seconds)
