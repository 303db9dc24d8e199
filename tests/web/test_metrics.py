from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, MPTransport, ThreadingTransport, connect
from aioinfer.web import App, create_app
from tests.hosted import forked, make_policy
from tests.limits import HANG

DOCS = Path(__file__).parents[2] / "docs"
ROW = {"observation": [1.0, 2.0, 3.0, 4.0]}


def policy() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])


def asking(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=HANG, **options)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[InferenceServer, App, httpx.AsyncClient]]:
    async with InferenceServer(policy(), ThreadingTransport()) as server:
        app = create_app(server, **options)
        async with asking(app) as client:
            yield server, app, client


async def families(client: httpx.AsyncClient, path: str = "/metrics") -> dict[str, Metric]:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in parse(response.text)}


def value(family: Metric, suffix: str = "", **labels: str) -> float:
    (found,) = [one.value for one in family.samples if one.name == family.name + suffix and one.labels == labels]
    return found


async def until(condition: Callable[[dict[str, Metric]], bool], client: httpx.AsyncClient) -> dict[str, Metric]:
    async with asyncio.timeout(HANG):
        while not condition(metrics := await families(client)):  # noqa: ASYNC110 - nothing tells when it holds
            await asyncio.sleep(0.01)
    return metrics


async def test_what_callers_ask_is_counted() -> None:
    async with serving(name="walker") as (server, _, client):
        for _ in range(3):
            assert (await client.post("/act", json=ROW)).status_code == 200
        assert (await client.post("/act", content=b"{")).status_code == 400
        await server.async_client()(observation=torch.zeros(4))
        metrics = await families(client)
    requests = metrics["aioinfer_requests"]
    assert value(requests, "_total", protocol="act", outcome="ok") == 3
    assert value(requests, "_total", protocol="act", outcome="invalid") == 1
    assert value(metrics["aioinfer_request_seconds"], "_count") == 3
    assert value(metrics["aioinfer_message_bytes"], "_sum") == 3 * len(httpx.Request("POST", "/", json=ROW).content)
    assert value(metrics["aioinfer_server_requests"], "_total", outcome="ok") == 4
    assert value(metrics["aioinfer_items"], "_total") == 4
    assert value(metrics["aioinfer_batch_size"], "_sum") == 4
    assert value(metrics["aioinfer_queue_wait_seconds"], "_count") == 4
    assert value(metrics["aioinfer_queue_wait_seconds"], quantile="0.99") > 0
    passes = value(metrics["aioinfer_batch_size"], "_count")
    assert value(metrics["aioinfer_model_seconds"], "_count") == passes
    assert sum(sample.value for sample in metrics["aioinfer_batches"].samples) == passes
    assert value(metrics["aioinfer_weights_version"]) == 0
    assert value(metrics["aioinfer_up"]) == value(metrics["aioinfer_ready"]) == 1
    assert metrics["aioinfer_build_info"].samples[0].labels["policy"] == "walker"


async def test_names_follow_the_conventions_of_prometheus() -> None:
    async with serving() as (_, _, client):
        await client.post("/act", json=ROW)
        metrics = await families(client)
    assert len(metrics) > 20
    for name, family in metrics.items():
        assert re.fullmatch(r"aioinfer(_[a-z]+)+", name), name
        assert not re.search(r"_(ms|us|millis|milliseconds|microseconds|percent|total|count)$", name), name
        assert ("seconds" in name) == name.endswith("_seconds"), name
        assert family.documentation, name
        assert family.type in {"counter", "gauge", "histogram", "summary"}, name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total"}, name
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels <= {"protocol", "outcome", "reason", "quantile", "le", "version", "policy"}, name


async def test_buckets_begin_where_policies_are_fast_and_only_grow() -> None:
    async with serving() as (_, _, client):
        await client.post("/act", json=ROW)
        metrics = await families(client)
    for name, family in metrics.items():
        if family.type != "histogram":
            continue
        buckets = [sample for sample in family.samples if sample.name == f"{name}_bucket"]
        counts = [sample.value for sample in buckets]
        assert counts == sorted(counts)
        assert counts[-1] == value(family, "_count")
        if name.endswith("_seconds"):
            assert float(buckets[0].labels["le"]) == 50e-6


async def test_who_asks_for_openmetrics_gets_it() -> None:
    async with serving() as (_, _, client):
        await client.post("/act", json=ROW)
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        response = await client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert "aioinfer_requests" in {family.name for family in parse_openmetrics(response.text)}  # type: ignore[no-untyped-call]


async def test_counters_only_grow_whoever_resets_the_statistics() -> None:
    async with serving() as (server, _, client):
        await client.post("/act", json=ROW)
        before = await families(client)
        assert server.stats(reset=True).ok == 1
        await client.post("/act", json=ROW)
        after = await until(lambda found: value(found["aioinfer_items"], "_total") == 2, client)
        assert server.stats().ok == 1
    for name, family in before.items():
        if family.type in {"counter", "histogram"}:
            for sample in family.samples:
                (now,) = [
                    one.value for one in after[name].samples if (one.name, one.labels) == (sample.name, sample.labels)
                ]
                assert now >= sample.value, sample


async def test_apps_of_one_process_do_not_collide() -> None:
    async with serving() as (server, _, client):
        async with asking(create_app(server)) as other:
            await other.post("/act", json=ROW)
            assert value((await families(other))["aioinfer_requests"], "_total", protocol="act", outcome="ok") == 1
        assert not (await families(client))["aioinfer_requests"].samples


async def test_a_registry_of_the_program_gets_the_metrics() -> None:
    registry = CollectorRegistry()
    async with serving(registry=registry) as (server, _, client):
        await client.post("/act", json=ROW)
        for text in (generate_latest(registry), await asyncio.to_thread(generate_latest, registry)):
            found = {family.name: family for family in parse(text.decode())}
            assert value(found["aioinfer_items"], "_total") == 1
        with pytest.raises(ValueError, match="aioinfer_"):
            create_app(server, registry=registry)


async def test_a_server_of_another_program_tells_only_what_the_app_knows() -> None:
    async with InferenceServer(policy(), MPTransport()) as server:
        transport = server.transport
        assert isinstance(transport, MPTransport)
        remote = await asyncio.to_thread(connect, transport.address)
        async with remote, asking(create_app(remote)) as client:
            assert (await client.post("/act", json=ROW)).status_code == 200
            metrics = await families(client)
            stats = (await client.get("/stats")).json()
    assert value(metrics["aioinfer_requests"], "_total", protocol="act", outcome="ok") == 1
    assert not {"aioinfer_up", "aioinfer_items", "aioinfer_queue_depth"} & set(metrics)
    assert (stats["server"], stats["health"], stats["policy_version"]) == (None, None, None)
    assert stats["ready"]


async def test_a_client_is_served_without_the_figures_of_its_server() -> None:
    server = InferenceServer(policy(), ThreadingTransport())
    async with server, asking(create_app(server.async_client())) as client:
        assert (await client.post("/act", json=ROW)).status_code == 200
        metrics = await families(client)
    assert value(metrics["aioinfer_ready"]) == 1
    assert not {"aioinfer_up", "aioinfer_items"} & set(metrics)


async def test_a_process_that_hangs_is_told_and_not_waited_for() -> None:
    async with forked(make_policy) as server:
        assert server.pid is not None
        registry = CollectorRegistry()
        async with asking(create_app(server, registry=registry)) as client:
            elsewhere = (await asyncio.to_thread(generate_latest, registry)).decode()
            up = await until(lambda found: value(found["aioinfer_up"]) == 1, client)
            assert value(up["aioinfer_weights_version"]) == 0
            os.kill(server.pid, signal.SIGSTOP)
            try:
                silent = await until(lambda found: value(found["aioinfer_up"]) == 0, client)
                stats = (await client.get("/stats")).json()
                silent_elsewhere = (await asyncio.to_thread(generate_latest, registry)).decode()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            again = await until(lambda found: value(found["aioinfer_up"]) == 1, client)
            os.kill(server.pid, signal.SIGKILL)
            dead = await until(lambda found: value(found["aioinfer_up"]) == 0, client)
    assert "aioinfer_up 1.0" in elsewhere
    assert "aioinfer_up 0.0" in silent_elsewhere
    assert "aioinfer_items" not in silent
    assert value(silent["aioinfer_ready"]) == 0
    assert (stats["server"], stats["ready"]) == (None, False)
    assert "does not answer" in stats["reason"]
    assert value(again["aioinfer_ready"]) == 1
    assert "aioinfer_requests" in dead


def names_in_expressions(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = set(re.findall(r"aioinfer_\w+", value.get("expr", "")))
        return own.union(*(names_in_expressions(one) for one in value.values()))
    return set().union(*(names_in_expressions(one) for one in value)) if isinstance(value, list) else set()


async def test_the_dashboard_shows_metrics_that_there_are() -> None:
    async with serving() as (_, _, client):
        await client.post("/act", json=ROW)
        text = (await client.get("/metrics")).text
    there = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    there |= {sample.name for family in parse(text) for sample in family.samples}
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    shown = names_in_expressions(dashboard)
    assert len(shown) > 10
    assert shown <= there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


async def test_requests_under_way_are_seen() -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait(td: TensorDictBase) -> TensorDictBase:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(HANG)
        return td.set("action", td["observation"])

    async with InferenceServer(wait, ThreadingTransport()) as server, asking(create_app(server)) as client:
        asked = asyncio.create_task(client.post("/act", json=ROW))
        await until(lambda found: value(found["aioinfer_inflight_requests"]) == 1, client)
        gate.set()
        assert (await asked).status_code == 200
        await until(lambda found: value(found["aioinfer_inflight_requests"]) == 0, client)


async def test_an_app_that_is_drained_is_not_ready() -> None:
    async with serving() as (_, app, client):
        assert await app.drain(HANG)
        metrics = await families(client)
        stats = (await client.get("/stats")).json()
    assert (value(metrics["aioinfer_ready"]), value(metrics["aioinfer_up"])) == (0, 1)
    assert (stats["ready"], stats["reason"]) == (False, "the server is shutting down")


async def test_an_event_loop_that_is_blocked_is_seen() -> None:
    async with serving() as (_, _, client):
        async with asyncio.timeout(HANG):
            while (await client.get("/stats")).json()["event_loop_lag_seconds"] < 0.1:
                time.sleep(0.25)  # noqa: ASYNC251 - it blocks the loop
                await asyncio.sleep(0)
        metrics = await families(client)
    assert value(metrics["aioinfer_event_loop_lag_seconds"], "_sum") >= 0.1


async def test_callers_without_a_token_are_counted_and_get_no_figures() -> None:
    async with serving(tokens=["right"]) as (_, _, client):
        for path in ("/metrics", "/stats"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
        client.headers["authorization"] = "Bearer right"
        metrics = await families(client)
        stats = (await client.get("/stats")).json()
    assert value(metrics["aioinfer_refused_callers"], "_total", reason="token") == 4
    assert stats["front"]["refused_callers"] == {"token": 4}


async def test_every_metric_is_described() -> None:
    described = set(re.findall(r"`(aioinfer_\w+)[`{]", (DOCS / "howto" / "watch.md").read_text()))
    async with serving() as (_, _, client):
        text = (await client.get("/metrics")).text
    there = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert described - {"aioinfer_trainer_connected"} == there  # no trainer is expected here
