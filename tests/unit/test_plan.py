"""Plans: what a policy does, without what is around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
    set_skip_existing,
)
from tensordict.nn import ProbabilisticTensorDictModule as Sampler
from tensordict.nn import ProbabilisticTensorDictSequential as SamplerSequential
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, distributions, nn

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.plan import CheckedPlan, Plan, Runner, plan_function, plan_policy

COUNT = 3
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _as_in_a_pass() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def batch(**more: Any) -> TensorDict:
    return TensorDict({"observation": torch.randn(COUNT, 4), **more}, batch_size=[COUNT])


def linear(in_key: Any = "observation", out_key: Any = "action", width: int = 2, **options: Any) -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, width), in_keys=[in_key], out_keys=[out_key], **options)


def normal(**options: Any) -> SamplerSequential:
    net = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
    sampler = Sampler(["loc", "scale"], ["action"], distribution_class=distributions.Normal, **options)
    return SamplerSequential(TensorDictModule(net, ["observation"], ["loc", "scale"]), sampler)


def categorical(**options: Any) -> SamplerSequential:
    sampler = Sampler(["logits"], ["action"], distribution_class=distributions.Categorical, **options)
    return SamplerSequential(linear(out_key="logits"), sampler)


def sequence() -> TensorDictSequential:
    first = TensorDictModule(nn.Linear(4, 4), ["observation"], ["hidden"])
    heads = TensorDictModule(lambda hidden: (hidden[:, :2], hidden.sum(-1)), ["hidden"], ["action", "value"])
    return TensorDictSequential(first, TensorDictSequential({"heads": heads}))


def nested() -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(nn.Linear(4, 4), [("agents", "observation")], [("agents", "hidden")]),
        TensorDictModule(nn.Linear(4, 2), [("agents", "hidden")], [("agents", "action")]),
        TensorDictModule(lambda hidden: hidden.mean((-1, -2)), [("agents", "hidden")], [("team", "deep", "value")]),
    )


def agents() -> TensorDict:
    inner = TensorDict({"observation": torch.randn(COUNT, 5, 4)}, batch_size=[COUNT, 5])
    return batch(agents=inner)


class Twofold(nn.Module):
    """Two outputs, one of which depends on random numbers."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return observation + torch.rand_like(observation), observation


def state_of(td: TensorDictBase) -> dict[Any, Any]:
    return {key: value.clone() for key, value in td.items(include_nested=True, leaves_only=True)}


def assert_same(one: TensorDictBase, other: TensorDictBase) -> None:
    assert one.batch_size == other.batch_size
    assert one.device == other.device
    ours, theirs = state_of(one), state_of(other)
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, equal_nan=True)


def planned(model: Runner) -> Plan:
    plan = plan_policy(model)
    assert plan is not None
    return plan


POLICIES: dict[str, Callable[[], tuple[Any, TensorDict]]] = {
    "one module": lambda: (linear(), batch()),
    "with a device": lambda: (linear(), batch().to("cpu")),
    "with entries that it does not read": lambda: (linear(), batch(other=torch.zeros(COUNT), text="text")),
    "an entry written anew": lambda: (linear(out_key="observation"), batch()),
    "an output that is not kept": lambda: (TensorDictModule(Twofold(), ["observation"], ["_", "action"]), batch()),
    "a function": lambda: (TensorDictModule(torch.tanh, ["observation"], ["action"]), batch()),
    "a module that returns a dictionary": lambda: (
        TensorDictModule(lambda observation: {"b": observation, "a": observation + 1}, ["observation"], ["a", "b"]),
        batch(),
    ),
    "a sequence in a sequence": lambda: (sequence(), batch()),
    "nested keys": lambda: (nested(), agents()),
    "a sampler alone": lambda: (
        Sampler(["logits"], ["action"], distribution_class=distributions.Categorical),
        TensorDict({"logits": torch.randn(COUNT, 2)}, batch_size=[COUNT]),
    ),
    "normal": lambda: (normal(), batch()),
    "normal with log-probability": lambda: (normal(return_log_prob=True), batch()),
    "normal, random by default": lambda: (normal(default_interaction_type=InteractionType.RANDOM), batch()),
    "normal with a generator of its own": lambda: (
        normal(default_interaction_type=InteractionType.RANDOM, generator=GENERATOR),
        batch(),
    ),
    "categorical": lambda: (categorical(), batch()),
    "a sampler in the middle": lambda: (TensorDictSequential(categorical(), linear(out_key="value", width=1)), batch()),
    "a part that takes TensorDicts": lambda: (
        TensorDictSequential(linear(), lambda td: td.set("twice", 2 * td["action"]), linear("observation", "value")),
        batch(),
    ),
    "dropout": lambda: (
        TensorDictModule(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), ["observation"], ["action"]),
        batch(),
    ),
}


@pytest.mark.parametrize("mode", [None, InteractionType.RANDOM, InteractionType.MODE, InteractionType.MEAN])
@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_does_what_the_policy_does(name: str, mode: InteractionType | None) -> None:
    model, given = POLICIES[name]()
    plan = planned(model)
    state = torch.get_rng_state()
    GENERATOR.manual_seed(0)
    with set_interaction_type(mode):
        expected = model(given.clone())
        end = torch.get_rng_state()
        torch.set_rng_state(state)
        own_end = GENERATOR.get_state()
        GENERATOR.manual_seed(0)
        kept = given.clone()
        values = plan.read(given)
        assert values is not None
        assert plan.layout(values) is not None
        found = plan.run(values, given)
    assert isinstance(found, TensorDictBase)
    assert_same(found, expected)
    assert torch.equal(torch.get_rng_state(), end)
    assert torch.equal(GENERATOR.get_state(), own_end)
    assert_same(given, kept)


def test_functions_of_a_probabilistic_policy_see_its_default_mode() -> None:
    seen = []

    def look(observation: Tensor) -> Tensor:
        seen.append(interaction_type())
        return observation

    sampler = Sampler(["logits"], ["action"], distribution_class=distributions.Categorical)
    model = SamplerSequential(TensorDictModule(look, ["observation"], ["logits"]), sampler)
    plan = planned(model)
    with set_interaction_type(None):
        model(batch())
        plan(batch())
    with set_interaction_type(InteractionType.MODE):
        plan(batch())
    assert seen == [InteractionType.DETERMINISTIC, InteractionType.DETERMINISTIC, InteractionType.MODE]


class OwnForward(TensorDictModule):
    def forward(self, tensordict: TensorDictBase, **options: Any) -> Any:
        return super().forward(tensordict, **options)


class OwnWriting(TensorDictModule):
    def _write_to_tensordict(self, tensordict: TensorDictBase, *args: Any, **options: Any) -> TensorDictBase:
        return tensordict


def patched(name: str) -> TensorDictModule:
    model = linear()
    setattr(model, name, getattr(model, name))
    return model


def hooked(register: str) -> TensorDictModule:
    model = linear()
    getattr(model, register)(lambda *_: None)
    return model


UNUSUAL: dict[str, Callable[[], Any]] = {
    "a function of TensorDicts": lambda: lambda td: td,
    "a forward of its own": lambda: OwnForward(nn.Linear(4, 2), ["observation"], ["action"]),
    "a way of its own to write": lambda: OwnWriting(nn.Linear(4, 2), ["observation"], ["action"]),
    "a patched forward": lambda: patched("forward"),
    "a patched call of the module": lambda: patched("_call_module"),
    "a hook": lambda: hooked("register_forward_hook"),
    "a hook before": lambda: hooked("register_forward_pre_hook"),
    "not in place": lambda: linear(inplace=False),
    "an empty copy": lambda: linear(inplace="empty"),
    "keyword arguments": lambda: TensorDictModule(nn.Linear(4, 2), {"input": "observation"}, ["action"]),
    "arguments by name": lambda: TensorDictModule(
        nn.Linear(4, 2), {"observation": "input"}, ["action"], out_to_in_map=False
    ),
    "a method": lambda: TensorDictModule(nn.Linear(4, 2), ["observation"], ["action"], method="forward"),
    "selected keys": lambda: TensorDictModule(Twofold(), ["observation"], ["a", "b"]).select_out_keys("a"),
    "selected keys of a sequence": lambda: sequence().select_out_keys("action"),
    "a sequence not in place": lambda: TensorDictSequential(linear(), inplace=False),
    "a tolerant sequence": lambda: TensorDictSequential(linear(), partial_tolerant=True),
    "several samplers": lambda: SamplerSequential(
        linear(out_key="logits"),
        Sampler(["logits"], ["a"], distribution_class=distributions.Categorical),
        Sampler(["logits"], ["b"], distribution_class=distributions.Categorical),
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_policy_has_no_plan(name: str) -> None:
    assert plan_policy(UNUSUAL[name]()) is None


def test_an_unusual_part_of_a_sequence_is_called_as_it_is() -> None:
    model = TensorDictSequential(linear(out_key="hidden", width=4), linear("hidden", "action", inplace="empty"))
    given = batch()
    assert_same(planned(model)(given), model(given.clone()))


def test_hooks_that_are_registered_later_run() -> None:
    net = nn.Linear(4, 2)
    inner = TensorDictModule(net, ["observation"], ["action"])
    model = TensorDictSequential(inner)
    checked = CheckedPlan(model, planned(model))
    checked(batch())
    ran: list[str] = []
    handles = [
        model.register_forward_hook(lambda *_: ran.append("outer")),
        inner.register_forward_pre_hook(lambda *_: ran.append("inner")),
        net.register_forward_hook(lambda *_: ran.append("module")),
        nn.modules.module.register_module_forward_hook(lambda one, *_: ran.append("all") if one is model else None),
    ]
    try:
        checked(batch())
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(ran) == ["all", "inner", "module", "outer"]


def test_a_module_that_is_replaced_later_is_used() -> None:
    inner = linear()
    model = TensorDictSequential(inner)
    checked = CheckedPlan(model, planned(model))
    checked(batch())
    inner.module = nn.Linear(4, 2)
    given = batch()
    assert_same(checked(given.clone()), model(given))


def test_what_exists_is_skipped_where_that_is_asked_for() -> None:
    model = linear()
    checked = CheckedPlan(model, planned(model))
    checked(batch(action=torch.zeros(COUNT, 2)))
    with set_skip_existing(True):
        assert not checked(batch(action=torch.zeros(COUNT, 2)))["action"].any()


# -- actors of torchrl ---------------------------------------------------------------------------------


def probabilistic_actor(**options: Any) -> Any:
    modules = pytest.importorskip("torchrl.modules")
    net = nn.Sequential(nn.Linear(4, 4), NormalParamExtractor())
    return modules.ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=modules.TanhNormal,
        default_interaction_type=InteractionType.RANDOM,
        **options,
    )


def value_actor() -> Any:
    modules = pytest.importorskip("torchrl.modules")
    return modules.QValueActor(nn.Linear(4, 3), in_keys=["observation"], action_space="one_hot")


def actor_and_critic() -> Any:
    modules = pytest.importorskip("torchrl.modules")
    return modules.ActorCriticWrapper(
        probabilistic_actor(return_log_prob=True), modules.ValueOperator(nn.Linear(4, 1), in_keys=["observation"])
    )


def shared_actor_and_critic() -> Any:
    modules = pytest.importorskip("torchrl.modules")
    common = modules.SafeModule(nn.Linear(4, 4), in_keys=["observation"], out_keys=["hidden"])
    head = modules.SafeModule(nn.Linear(4, 2), in_keys=["hidden"], out_keys=["action"])
    return modules.ActorValueOperator(common, head, modules.ValueOperator(nn.Linear(4, 1), in_keys=["hidden"]))


ACTORS: dict[str, Callable[[], Any]] = {
    "Actor": lambda: pytest.importorskip("torchrl.modules").Actor(nn.Linear(4, 2), in_keys=["observation"]),
    "ProbabilisticActor": probabilistic_actor,
    "ProbabilisticActor with log-probability": lambda: probabilistic_actor(return_log_prob=True),
    "QValueActor": value_actor,
    "ActorCriticWrapper": actor_and_critic,
    "ActorValueOperator": shared_actor_and_critic,
}


@pytest.mark.parametrize("mode", [None, InteractionType.RANDOM, InteractionType.DETERMINISTIC])
@pytest.mark.parametrize("name", ACTORS)
def test_actors_of_torchrl_are_planned(
    name: str, mode: InteractionType | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = ACTORS[name]()
    checked = CheckedPlan(model, planned(model))
    given = batch()
    with set_interaction_type(mode):
        state = torch.get_rng_state()
        expected = [model(given.clone()) for _ in range(3)]
        torch.set_rng_state(state)
        for one in expected:
            assert_same(checked(given.clone()), one)
    assert not caplog.records


def test_an_actor_of_torchrl_that_projects_its_actions_has_no_plan() -> None:
    modules, data = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")
    spec = data.Bounded(-1, 1, (2,))
    actor = modules.Actor(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"], spec=spec, safe=True)
    assert plan_policy(actor) is None


# -- compared with the policy --------------------------------------------------------------------------


class Calls(nn.Module):
    """Counts its calls, outside of what a plan looks at; what it returns from the second on depends on ``after``."""

    def __init__(self, after: Callable[[int, Tensor], Any] = lambda _, given: given) -> None:
        super().__init__()
        self.after = after
        self.counter = SimpleNamespace(count=0)

    @property
    def count(self) -> int:
        return int(self.counter.count)

    def forward(self, given: Tensor) -> Any:
        self.counter.count += 1
        return self.after(self.count, given)


def checked_calls(after: Callable[[int, Tensor], Any]) -> tuple[CheckedPlan, Calls]:
    calls = Calls(after)
    model = TensorDictModule(calls, ["observation"], ["action"])
    return CheckedPlan(model, planned(model)), calls


def test_a_policy_and_its_plan_both_run_for_the_first_batch_of_a_layout() -> None:
    checked, calls = checked_calls(lambda _, given: given)
    counts = []
    for given in (batch(), batch(other=torch.zeros(COUNT)), batch()[:2], batch().double(), batch().double()):
        checked(given)
        counts.append(calls.count)
    assert counts == [2, 3, 4, 6, 7]


def test_a_sampler_is_compared_in_each_mode() -> None:
    calls = Calls()
    sampler = Sampler(
        ["logits"],
        ["action"],
        distribution_class=distributions.Categorical,
        default_interaction_type=InteractionType.RANDOM,
    )
    model = SamplerSequential(TensorDictModule(calls, ["observation"], ["logits"]), sampler)
    checked = CheckedPlan(model, planned(model))
    counts = []
    for mode in (None, InteractionType.RANDOM, InteractionType.MODE, InteractionType.MODE, None):
        with set_interaction_type(mode):
            checked(batch())
        counts.append(calls.count)
    assert counts == [2, 4, 6, 7, 8]


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda count, given: given + count, '"action" is another one'),
        (lambda count, given: given if count < 2 else (given, given), "returned 2 outputs"),
        (lambda count, given: given if count < 2 else given[:1], "of shape"),
        (lambda count, given: given if count < 2 else 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_plan_that_differs_is_dropped(
    after: Callable[[int, Tensor], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    checked, calls = checked_calls(after)
    given = batch()
    with caplog.at_level(logging.WARNING, "aioinfer"):
        assert_same(checked(given.clone()), given.set("action", after(1, given["observation"])))
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "TensorDictModule" in caplog.text
    calls.after = lambda _, given: given
    checked(batch())
    assert calls.count == 3


def test_an_error_of_the_policy_says_nothing_about_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    checked, calls = checked_calls(lambda count, given: 1 / 0 if count in (1, 4) else given)
    with pytest.raises(ZeroDivisionError):
        checked(batch())
    assert calls.count == 1
    checked(batch())
    assert calls.count == 3
    with pytest.raises(ZeroDivisionError):  # by the plan: it must not be asked twice
        checked(batch())
    assert calls.count == 4
    checked(batch())
    assert calls.count == 5
    assert not caplog.records


class Stateful(nn.Module):
    """Returns how often it was called, as its own attributes say, each of another kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.number = 0
        self.tensor = torch.zeros(())
        self.items: list[None] = []

    def forward(self, given: Tensor) -> Tensor:
        if self.kind == "number":
            self.number += 1
        elif self.kind == "list":
            self.items.append(None)
        elif self.kind == "in place":
            self.tensor.add_(1)
        else:
            self.tensor = self.tensor + 1
        return given * 0 + self.number + self.tensor + len(self.items)


@pytest.mark.parametrize("is_method", [False, True])
@pytest.mark.parametrize("kind", ["number", "list", "in place", "tensor"])
def test_a_policy_with_a_state_of_its_own_is_never_run_twice_for_a_batch(kind: str, is_method: bool) -> None:
    policy = Stateful(kind)
    model = TensorDictModule(policy.forward if is_method else policy, ["observation"], ["action"])
    checked = CheckedPlan(model, planned(model))
    assert [int(checked(batch())["action"][0, 0]) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert checked.plan is None


def test_what_a_policy_sets_at_its_first_call_costs_it_no_plan() -> None:
    class Once(nn.Module):
        scale: Tensor | None = None

        def forward(self, given: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.ones(())
            return given * self.scale

    model = TensorDictModule(Once(), ["observation"], ["action"])
    checked = CheckedPlan(model, planned(model))
    for _ in range(5):
        checked(batch())
    assert checked.plan is not None


def test_a_function_that_is_replaced_while_it_serves_is_seen() -> None:
    model = TensorDictModule(lambda given: given * 2, ["observation"], ["action"])
    checked = CheckedPlan(model, planned(model))
    checked(given := batch())
    model.module = lambda given: given * 5
    assert torch.equal(checked(given)["action"], given["observation"] * 5)


def test_an_output_that_is_wrong_later_raises_what_the_policy_raises(caplog: pytest.LogCaptureFixture) -> None:
    checked, _ = checked_calls(lambda count, given: given if count < 3 else given[:1])
    checked(batch())
    with pytest.raises(RuntimeError, match=r"batch[ _]dimension"):
        checked(batch())
    assert not caplog.records


def test_nan_is_equal_to_nan(caplog: pytest.LogCaptureFixture) -> None:
    checked, calls = checked_calls(lambda _, given: given / 0 * 0)
    checked(batch())
    checked(batch())
    assert calls.count == 3
    assert not caplog.records


def test_buffers_and_generators_are_left_as_the_policy_left_them() -> None:
    def make() -> TensorDictModule:
        torch.manual_seed(1)
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
        return TensorDictModule(net, ["observation"], ["action"])

    given = batch()
    alone = make()
    torch.manual_seed(2)
    expected = [alone(given.clone()) for _ in range(3)]
    state = torch.get_rng_state()
    model = make()
    plan = planned(model)
    checked = CheckedPlan(model, plan)
    torch.manual_seed(2)
    for one in expected:
        assert_same(checked(given.clone()), one)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, alone.get_buffer(name))
    model.register_forward_hook(lambda *_: pytest.fail("the plan was dropped"))
    assert plan.read(given) is None


def test_a_sampler_is_dropped_only_when_it_has_differed_several_times(caplog: pytest.LogCaptureFixture) -> None:
    """Another thread may have drawn from the generator meanwhile."""
    checked, calls = checked_calls(lambda count, given: given + torch.rand(4) + (1 if count == 2 else 0))
    for _ in range(3):
        checked(batch())
    assert calls.count == 5
    assert not caplog.records
    checked, calls = checked_calls(lambda count, given: given + torch.rand(4) + count)
    for _ in range(5):
        checked(batch())
    assert calls.count == 8
    assert len(caplog.records) == 1


def test_a_request_that_lacks_what_a_policy_can_do_without_is_served_by_the_policy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = TensorDictModule(
        lambda given, goal=None: given if goal is None else given + goal, ["observation", "goal"], ["action"]
    )
    checked = CheckedPlan(model, planned(model))
    assert_same(checked(given := batch()), given.set("action", given["observation"]))
    checked(batch(goal=torch.ones(COUNT, 4)))
    assert_same(checked(given := batch()), given.set("action", given["observation"]))
    assert not caplog.records


def test_a_lazy_module_is_planned_once_it_has_its_shape(caplog: pytest.LogCaptureFixture) -> None:
    model = TensorDictModule(nn.LazyLinear(2), ["observation"], ["action"])
    checked = CheckedPlan(model, planned(model))
    given = batch()
    first = checked(given.clone())
    assert_same(checked(given.clone()), first)
    assert_same(checked(given.clone()), first)
    assert not caplog.records


# -- functions -----------------------------------------------------------------------------------------


def test_a_function_of_tensors_is_planned() -> None:
    given = batch()
    net = nn.Linear(4, 2)
    found = plan_function(net, ["observation"], ["action"])(given)
    assert_same(found, given.clone().set("action", net(given["observation"])))


@pytest.mark.parametrize(
    "function",
    [
        lambda given: (given, given + 1),
        lambda given: [given, given + 1],
        lambda given: {"b": given + 1, "a": given, "c": None},
        lambda given: TensorDict({"b": given + 1, "a": given}, batch_size=[COUNT]),
    ],
)
def test_a_function_may_return_several_tensors(function: Any) -> None:
    given = batch()
    found = plan_function(function, ["observation"], ["a", "b"])(given)
    expected = given.clone().update({"a": given["observation"], "b": given["observation"] + 1})
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda given: given, 'returned 1 outputs for out_keys ["a", "b"]'),
        (lambda given: (given, None), 'returned NoneType for "b"'),
        (lambda given: {"a": given}, 'returned no "b"'),
        (lambda given: (given, given.sum()), 'returned "b" of shape [] on cpu, expected [3, ...]'),
    ],
)
def test_what_a_function_returns_wrongly_is_an_error_by_name(function: Any, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        plan_function(function, ["observation"], ["a", "b"])(batch())
    assert reason in str(caught.value).replace("'", '"')


def test_an_entry_that_a_function_needs_is_missed_by_name() -> None:
    with pytest.raises(InvalidRequestError, match='no tensor "state"'):
        plan_function(torch.add, ["observation", "state"], ["action"])(batch())


# -- compiled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_functions_that_follow_each_other_are_joined(name: str) -> None:
    model, given = POLICIES[name]()
    joined = []

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        joined.append(function)
        return lambda *tensors: function(*tensors)

    plan = planned(model).compiled(compile)
    state = torch.get_rng_state()
    expected = model(given.clone()) if "generator" not in name else None
    torch.set_rng_state(state)
    found = plan(given)
    if expected is not None:
        assert_same(found.select(*sorted(found.keys())), expected.select(*sorted(expected.keys())))
    assert len(joined) == {"a sampler alone": 0, "a sampler in the middle": 2}.get(
        name, 2 if name == "a part that takes TensorDicts" else 1
    )
