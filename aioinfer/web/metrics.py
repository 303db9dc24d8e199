"""``GET /metrics``: counts and states for Prometheus, put together when it asks and not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from aioinfer.histogram import HistogramCounts
from aioinfer.stats import Health, Percentiles, ServerStats, StatsRecorder
from aioinfer.web.monitor import Monitor, Reading

__all__ = ["MetricsCollector", "metrics_routes"]

_PREFIX = "aioinfer_"


def metrics_routes(monitor: Monitor, registry: CollectorRegistry | None) -> list[BaseRoute]:
    """The route of ``/metrics``.

    Args:
        monitor: knows what there is to tell.
        registry: takes the metrics; by default one of its own.

    Raises:
        ValueError: the registry has such metrics already.
    """
    chosen = CollectorRegistry() if registry is None else registry
    chosen.register(MetricsCollector(monitor))

    async def metrics(request: Request) -> Response:
        await monitor.read()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(chosen), headers={"content-type": content_type})

    return [Route("/metrics", metrics)]


class MetricsCollector(Collector):
    """Makes metrics of what is counted anyway. Any thread may collect.

    Args:
        monitor: reads the counts.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._names = {"version": version("aioinfer"), "policy": monitor.front.name}

    def describe(self) -> Iterator[Metric]:
        """All metrics that there may be, so that a registry finds those that it has twice."""
        everything = StatsRecorder().snapshot(pending=0, trainer=False)
        reading = Reading(everything, Health(alive=True, ready=True), answers=True)
        yield from self._front(reading)
        yield from self._server(reading)

    def collect(self) -> Iterator[Metric]:
        reading = self._monitor.latest()
        yield from self._front(reading)
        yield from self._server(reading)

    def _front(self, reading: Reading) -> Iterator[Metric]:
        monitor, front = self._monitor, self._monitor.front
        stats = front.stats
        yield InfoMetricFamily(f"{_PREFIX}build", "The version of aioinfer, and the name of the policy.", self._names)
        yield _gauge("start_time_seconds", "When the app was made, in seconds since 1970.", monitor.started_at)
        yield _counters(
            "requests",
            "Requests over the network that have ended, by how they ended.",
            ("protocol", "outcome"),
            {(protocol, outcome): count for (protocol, outcome), count in dict(stats.requests).items()},
        )
        yield _gauge("inflight_requests", "Requests over the network that have not ended.", stats.inflight)
        yield _gauge("inflight_bytes", "Bytes of messages that are being served.", front.bytes_in_flight.bytes)
        yield _histogram(
            "request_seconds",
            "From the arrival of a request over the network to its reply, where it has one.",
            stats.request_seconds.counted(),
        )
        yield _histogram("message_bytes", "Bytes of requests over the network.", stats.message_bytes.counted())
        connections = GaugeMetricFamily(f"{_PREFIX}connections", "WebSockets that are open.", labels=["protocol"])
        for protocol, count in dict(stats.connections).items():
            connections.add_metric([protocol], count)
        yield connections
        yield _gauge("sessions", "Sessions that requests have named, and that are remembered.", len(front.sessions))
        yield _counters(
            "refused_callers",
            "Requests and handshakes that were refused for who asked, or because no more are taken.",
            ("reason",),
            {(reason,): count for reason, count in dict(stats.refused_callers).items()},
        )
        yield _histogram(
            "event_loop_lag_seconds",
            "How late timers of the event loop were that ring ten times a second while someone watches.",
            monitor.lag.seconds.counted(),
        )
        yield _gauge("ready", "1 if requests are served, as far as it is known.", not monitor.trouble(reading))

    def _server(self, reading: Reading) -> Iterator[Metric]:
        if reading.answers is not None:
            text = "1 if the server behind the app answers; otherwise what it knows is left out."
            yield _gauge("up", text, reading.answers)
        if reading.stats is not None:
            yield from _requests_of(reading.stats)
            yield from _passes_of(reading.stats)
            yield from _weights_of(reading.stats)


def _requests_of(stats: ServerStats) -> Iterator[Metric]:
    totals = stats.totals
    yield _counters(
        "server_requests",
        "Requests of all callers, over the network or not, by how they ended.",
        ("outcome",),
        {
            ("ok",): totals.ok,
            ("error",): totals.failed,
            ("cancelled",): totals.cancelled,
            ("rejected",): totals.rejected,
        },
    )
    yield _summary(
        "server_request_seconds",
        "From a request's way into the queue to its reply; quantiles over the latest thousands.",
        totals.queued_requests,
        totals.request,
        stats.request,
    )
    yield _summary(
        "queue_wait_seconds",
        "From a request's way into the queue until a batch took it; quantiles over the latest thousands.",
        totals.queued_requests,
        totals.queue_wait,
        stats.queue_wait,
    )
    yield _gauge("queue_depth", "Rows that wait for a batch.", stats.pending)
    yield _gauge("returning_callers", "Callers that ask again and again, as the server has learned.", stats.callers)


def _passes_of(stats: ServerStats) -> Iterator[Metric]:
    totals = stats.totals
    yield _counter("items", "Rows that forward passes were made of.", totals.rows)
    yield _counters(
        "batches",
        "Forward passes, by why the batch left when it did.",
        ("reason",),
        {(str(reason),): count for reason, count in totals.batches.items()},
    )
    yield _counter("failed_passes", "Forward passes that raised.", totals.failed_passes)
    yield _histogram("batch_size", "Rows of a forward pass.", totals.batch_sizes)
    yield _histogram("model_seconds", "One forward pass: collate, copies, model.", totals.forward)
    yield _summary(
        "batch_held_seconds",
        "For how long a batch was held back while the model was free; quantiles over the latest requests' batches.",
        totals.batch_sizes.count,
        totals.held,
        stats.held,
    )


def _weights_of(stats: ServerStats) -> Iterator[Metric]:
    yield _gauge("weights_version", "The version of the weights in use.", stats.policy_version)
    yield _counters(
        "weight_updates",
        "Updates of the weights.",
        ("outcome",),
        {("applied",): stats.totals.weight_updates, ("refused",): stats.totals.refused_updates},
    )
    if stats.trainer_connected is not None:
        yield _gauge("trainer_connected", "1 if a trainer that publishes weights is there.", stats.trainer_connected)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, text, value=value)


def _counters(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family


def _histogram(name: str, text: str, counted: HistogramCounts) -> Metric:
    bounds = [*map(floatToGoString, counted.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(counted.counts), strict=True))
    return HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=counted.sum)


def _summary(name: str, text: str, count: int, total: float, quantiles: Percentiles) -> Metric:
    family = SummaryMetricFamily(_PREFIX + name, text, count_value=count, sum_value=total)
    add = partial(family.add_sample, _PREFIX + name)
    for quantile, value in (("0.5", quantiles.p50), ("0.95", quantiles.p95), ("0.99", quantiles.p99)):
        add({"quantile": quantile}, value)
    return family
