"""Compiled models: compiled for every bucket before the server is ready, and never while it serves."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.nn.distributions import Delta
from torch import nn

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    ModelError,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ThreadingTransport,
)
from aioinfer.interaction_type import interaction_type, requests_carry
from aioinfer.testing import double, request, request_of
from aioinfer.testing.callers import is_double
from tests.hosted import make_double
from tests.limits import HANG
from tests.transports import process_slots

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # what inductor imports
]


class Backend:
    """A backend of ``torch.compile`` that counts, and waits at a gate."""

    def __init__(self) -> None:
        self.count = 0
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, graph: Any, example_inputs: Any) -> Callable[..., Any]:
        self.count += 1
        self.entered.set()
        assert self.gate.wait(HANG)
        return graph.forward  # type: ignore[no-any-return]


class Shifted(TensorDictModule):
    """It can't be planned, and reads the exploration mode."""

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        td = super().forward(td)
        return td.set("action", td["action"] + 100.0) if interaction_type() is InteractionType.RANDOM else td


def scaled(factor: float, kind: type[TensorDictModule] = TensorDictModule) -> TensorDictModule:
    """``action`` is the sum of the ``observation``, times the factor."""
    layer = nn.Linear(3, 1, bias=False)
    nn.init.constant_(layer.weight, factor)
    return kind(layer, in_keys=["observation"], out_keys=["action"])


def together(server: InferenceServer, *values: float) -> list[float]:
    """The actions for observations of these values, which share a forward pass."""
    with server.paused():
        futures: list[Future[TensorDictBase]] = [server.client().submit(request(value)) for value in values]
    return [future.result(HANG)["action"].item() for future in futures]


@pytest.mark.parametrize(("kind", "sizes"), [(TensorDictModule, range(1, 13)), (Shifted, (4, 12))])
@pytest.mark.parametrize("swap", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_nothing_is_compiled_while_the_server_serves(
    kind: type[TensorDictModule], sizes: Sequence[int], swap: bool
) -> None:
    backend = Backend()
    server = InferenceServer(
        scaled(1.0, kind),
        ThreadingTransport(),
        max_batch_size=12,
        compile={"backend": backend},
        bucket_sizes=sizes,
        request_spec=request(0),
        swap_weights=swap,
    )
    for _ in range(2):  # it may be started again
        with server:
            compiled = backend.count
            assert compiled > 8, "no more than torch compiles by default"
            for factor in (1.0, 2.0, 3.0):
                server.update_weights(scaled(factor, kind))
                for count in range(1, 13):
                    assert together(server, *range(count)) == [3 * factor * value for value in range(count)]
            several = server.client()(request_of(*range(30)), HANG)
            assert several["action"][:, 0].tolist() == [9.0 * value for value in range(30)]
            for mode in InteractionType:
                with requests_carry(mode):
                    shift = 100.0 if kind is Shifted and mode is InteractionType.RANDOM else 0.0
                    assert together(server, 1, 2, 3) == [9 + shift, 18 + shift, 27 + shift]
            other = TensorDict({"observation": torch.ones(3)}, device="cpu")
            assert asyncio.run(ask(server, other)) == [9.0] * 7
            assert server.client()(observation=np.ones(3, np.float32))["action"].item() == 9
            assert backend.count == compiled


async def ask(server: InferenceServer, td: TensorDictBase) -> list[float]:
    client = server.async_client()
    return [reply["action"].item() for reply in await asyncio.gather(*[client(td, HANG) for _ in range(7)])]


def test_a_function_of_tensors_is_compiled() -> None:
    backend = Backend()
    server = InferenceServer(
        lambda observation: (observation * 2, observation.sum(-1)),
        ThreadingTransport(),
        in_keys=["observation"],
        out_keys=["action", "value"],
        compile={"backend": backend},
        max_batch_size=4,
        request_spec=request(0),
    )
    with server:
        compiled = backend.count
        assert compiled == 3
        for rows in ([1], [1, 2, 3], [4, 3, 2, 1]):
            reply = server.client()(request_of(*rows), HANG)
            assert reply["action"][:, 0].tolist() == [2 * row for row in rows]
            assert reply["value"].tolist() == [3 * row for row in rows]
        assert backend.count == compiled


def test_nothing_is_compiled_for_what_a_first_pass_leaves_behind() -> None:
    backend = Backend()
    network = TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["param"])
    sampler = ProbabilisticTensorDictModule(in_keys=["param"], out_keys=["action"], distribution_class=Delta)
    server = InferenceServer(
        ProbabilisticTensorDictSequential(network, sampler),
        ThreadingTransport(),
        plan=False,
        compile={"backend": backend},
        max_batch_size=2,
        bucket_sizes=[2],
        request_spec=request(0),
    )
    with server:
        compiled = backend.count
        together(server, 1, 2)
        assert backend.count == compiled


def test_nothing_is_compiled_for_images_whose_channels_come_last() -> None:
    backend = Backend()
    server = InferenceServer(
        nn.Conv2d(3, 2, 3),
        ThreadingTransport(),
        in_keys=["pixels"],
        out_keys=["action"],
        compile={"backend": backend},
        max_batch_size=2,
        request_spec=TensorDict({"pixels": torch.zeros(3, 4, 4)}),
    )
    with server:
        compiled = backend.count
        for count in (1, 2, 3):
            pixels = torch.ones(count, 4, 4, 3).permute(0, 3, 1, 2)
            server.client()(TensorDict({"pixels": pixels}, [count]), HANG)
        assert backend.count == compiled


def test_a_model_that_only_needs_few_sizes_gets_them_and_the_replies_have_no_padding() -> None:
    sizes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        sizes.append(len(td))
        return double(td)

    with InferenceServer(
        model, ThreadingTransport(), max_batch_size=6, bucket_sizes=[4, 8], request_spec=request(0)
    ) as server:
        assert sizes[0] == 8
        assert set(sizes) == {4, 8}
        sizes.clear()
        with server.paused():
            futures = [server.client().submit(request(value)) for value in range(9)]
        for value, future in enumerate(futures):
            assert is_double(future.result(HANG), value)
        assert sizes == [8, 4]
        assert server.stats().mean_batch_size == 4.5


INDUCTOR = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler for inductor"
)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize("swap", [False, True])
def test_compiled_code_sees_new_weights(backend: str, swap: bool) -> None:
    options: dict[str, Any] = {"backend": backend}
    if backend == "inductor":
        options["options"] = {"compile_threads": 1}
    server = InferenceServer(
        scaled(1.0),
        ThreadingTransport(),
        bucket_sizes=[4],
        max_batch_size=4,
        compile=options,
        request_spec=request(0),
        swap_weights=swap,
    )
    with server:
        for factor in (1.0, 2.0, 3.0):
            server.update_weights(scaled(factor))
            for values in ([1], [1, 2, 3], [4, 3, 2, 1]):
                assert together(server, *values) == pytest.approx([3 * factor * value for value in values])


def test_processes_with_slots_need_no_request_spec() -> None:
    transport = process_slots()
    with InferenceServer(double, transport, compile={"backend": "eager"}, max_batch_size=4):
        assert is_double(transport.client()(request(3), HANG), 3)
    options: dict[str, Any] = {"compile": {"backend": "eager"}, "max_batch_size": 4}
    with ProcessInferenceServer(make_double, process_slots(), ctx="fork", **options) as server:
        assert is_double(server.client()(request(3), HANG), 3)
    ProcessInferenceServer(make_double, process_slots(), compile={}).shutdown()


# -- the start and the end ---------------------------------------------------------------------------------


def test_an_error_of_the_warm_up_is_that_of_the_start() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if len(td) == 2:
            raise ArithmeticError("not for two")
        return double(td)

    server = InferenceServer(model, ThreadingTransport(), bucket_sizes=[1, 2, 64], request_spec=request(0))
    waiting = server.client().submit(request(1))
    with pytest.raises(ArithmeticError, match="not for two"):
        server.start()
    assert not server.is_alive
    assert isinstance(waiting.exception(HANG), ServerClosedError)


@pytest.mark.parametrize("kind", [StopIteration, SystemExit, GeneratorExit, CancelledError, asyncio.CancelledError])
def test_what_would_end_a_thread_or_a_loop_is_an_error_of_the_start_too(kind: type[BaseException]) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        raise kind

    async def astart() -> None:
        with pytest.raises(ModelError, match=kind.__name__):
            await server.__aenter__()

    server = InferenceServer(model, ThreadingTransport(), bucket_sizes=[64], request_spec=request(0))
    with pytest.raises(ModelError, match=kind.__name__) as raised:
        server.start()
    assert isinstance(raised.value.__cause__, kind)
    asyncio.run(asyncio.wait_for(astart(), HANG))
    assert not server.is_alive


def test_a_shutdown_while_the_model_is_compiled_ends_and_so_does_the_start() -> None:
    backend = Backend()
    backend.gate.clear()
    server = InferenceServer(
        scaled(1.0), ThreadingTransport(), compile={"backend": backend}, max_batch_size=4, request_spec=request(0)
    )
    waiting = server.client().submit(request(1))
    with ThreadPoolExecutor(1) as pool:
        try:
            starting = pool.submit(server.start)
            assert backend.entered.wait(HANG)
            assert not starting.done()
            health = server.health()
            assert (health.alive, health.ready, health.reason) == (True, False, "the server starts")
            server.shutdown(0.01)
            assert isinstance(waiting.exception(HANG), ServerClosedError)
            assert isinstance(starting.exception(HANG), ServerClosedError)
            assert server.is_alive  # until the compiler returns
        finally:
            backend.gate.set()
    server.shutdown(HANG)
    assert not server.is_alive
    assert backend.count == 1  # no other bucket was compiled meanwhile


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"compile": True}, {"bucket_sizes": [64]}, {"cuda_graphs": True, "device": "cuda"}])
def test_without_the_layout_of_requests_there_is_nothing_to_warm_up_with(option: dict[str, Any]) -> None:
    several: list[InferenceTransport] = [process_slots(), ThreadingTransport()]
    for transport in (ThreadingTransport(), several):
        with pytest.raises(ValueError, match="give request_spec, an example of one row"):
            InferenceServer(double, transport, **option)
    with pytest.raises(ValueError, match="give request_spec, an example of one row"):
        ProcessInferenceServer(make_double, MPTransport(), **option)
    odd = TensorDict({"observation": torch.ones(3), "name": NonTensorData("one")})
    with pytest.raises(ValueError, match='"name" is a NonTensor'):
        InferenceServer(double, ThreadingTransport(), request_spec=odd, **option)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no options": ({"compile": "inductor"}, TypeError, "compile must be a bool, or a dictionary"),
    "no option": ({"compile": {"backened": "eager"}}, TypeError, "backened"),
    "small buckets": ({"bucket_sizes": [1, 2]}, ValueError, "largest of bucket_sizes, 2, must be at least"),
    "no switch": ({"cuda_graphs": 1}, TypeError, "cuda_graphs must be True or False"),
    "no device": ({"cuda_graphs": True}, ValueError, "needs a CUDA device.*got device=None"),
    "moving weights": ({"cuda_graphs": True, "device": "cuda", "swap_weights": True}, ValueError, "swap_weights=False"),
}


@pytest.mark.parametrize("what", WRONG)
def test_options_that_cannot_be_are_refused_where_they_are_given(what: str) -> None:
    options, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        InferenceServer(scaled(1.0), ThreadingTransport(), request_spec=request(0), **options)
    with pytest.raises(kind, match=message):
        ProcessInferenceServer(make_double, MPTransport(), request_spec=request(0), **options)
