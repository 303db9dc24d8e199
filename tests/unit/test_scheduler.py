"""What is learned of callers and passes, and for what batches are held back. All times are virtual."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from aioinfer import BatchingRule, DispatchReason, LearnedRule, LeaveWhenFree
from aioinfer.batching import BatchLimits, BatchScheduler, Caller, Hold, PassCost, Review, Situation

PASS = 0.01


@dataclass
class Asking:
    """A request, as a scheduler sees it."""

    caller: Caller | None = field(default_factory=Caller)
    rows: int = 1


class Server:
    """A scheduler, and the clock of a model whose passes all take as long."""

    def __init__(self, rule: BatchingRule | None = None, timeout: float = 1.0) -> None:
        self.scheduler = BatchScheduler(BatchLimits(64, 1, timeout), rule or LearnedRule())
        self.now = 1.0
        self.since: float | None = None  # requests are pending

    def serve(self, *requests: Asking) -> None:
        """Run a pass over these requests."""
        submitted_at = [request.caller.asked_at if request.caller else self.now for request in requests]
        self.scheduler.on_batch(requests)
        self.since = None
        self.now += PASS
        self.scheduler.on_pass(sum(request.rows for request in requests), PASS)
        self.scheduler.on_replies(requests, submitted_at, self.now)

    def come_back(self, *requests: Asking, after: float = 0.001) -> None:
        """Let their callers ask again, so long after now."""
        self.now += after
        for request in requests:
            if request.caller is not None:
                request.caller.asked_at = self.now

    def decide(self, pending: int) -> DispatchReason | Hold:
        """Decide when so many are pending, since the first time that this is asked after a pass."""
        self.since = self.since or self.now
        return self.scheduler.decide(now=self.now, pending=pending, oldest=self.since, free_since=self.since)

    def meet(self, *requests: Asking, times: int = 20) -> None:
        """Serve these requests together so many times."""
        for _ in range(times):
            self.come_back(*requests)
            self.serve(*requests)


def test_a_batch_is_held_back_until_an_expected_caller_has_come() -> None:
    server, one, other = Server(), Asking(), Asking()
    server.meet(one, other)
    server.come_back(one, after=0.0008)
    hold = server.decide(1)
    assert isinstance(hold, Hold)
    assert hold.rows == 1
    assert 0 < hold.seconds < 0.001
    server.come_back(other, after=0.0002)
    assert server.decide(2) is DispatchReason.GATHERED


def test_a_caller_that_does_not_come_back_is_waited_for_once() -> None:
    server, one, other = Server(), Asking(), Asking()
    server.meet(one, other)
    server.come_back(one)
    waited = 0.0
    while isinstance(hold := server.decide(1), Hold):
        waited += hold.seconds
        server.now += hold.seconds
    assert hold is DispatchReason.OVERDUE
    assert waited < PASS / 2
    server.serve(one)
    server.come_back(one)
    assert server.decide(1) is DispatchReason.IDLE


def test_a_caller_that_comes_back_after_all_is_expected_again() -> None:
    server, one, other = Server(), Asking(), Asking()
    server.meet(one, other)
    server.come_back(one, after=1.0)
    assert not isinstance(server.decide(1), Hold)
    server.meet(one, other)
    server.come_back(one)
    assert isinstance(server.decide(1), Hold)


@pytest.mark.parametrize("think_time", [0.0001, 0.003, 0.5])
def test_a_lone_caller_never_waits(think_time: float) -> None:
    server, one = Server(), Asking()
    for _ in range(300):
        server.come_back(one, after=think_time)
        assert server.decide(1) is DispatchReason.IDLE
        server.serve(one)


def test_a_caller_that_has_asked_again_is_not_waited_for() -> None:
    """It gave up a request that the model works on: that one's reply says nothing about where it is."""
    server, one, other = Server(), Asking(), Asking()
    server.meet(one, other)
    server.come_back(one)
    server.scheduler.on_batch([one])
    assert one.caller is not None
    given_up, one.caller.asked_at = one.caller.asked_at, server.now + PASS / 2
    server.now += PASS
    server.scheduler.on_replies([one], [given_up], server.now)
    assert other.caller is not None
    other.caller.missed_at = other.caller.answered_at  # it went away
    assert server.decide(1) is DispatchReason.IDLE


def test_callers_that_come_back_at_any_time_are_not_watched() -> None:
    """There may be many of them, and a look at each of them before each batch takes long."""
    seen: list[Situation] = []

    class Watching(LeaveWhenFree):
        always_asked = True

        def hold(self, situation: Situation) -> Hold | None:
            seen.append(situation)
            return None

    server, regular, other = Server(Watching()), Asking(), Asking()
    for i in range(200):
        server.come_back(regular, after=PASS / 10)
        if i % 7 == 0:
            server.come_back(other, after=0.0)
        server.serve(regular, *[other] * (i % 7 == 0))
        if i % 28 == 0:
            server.now += 20 * PASS
    server.decide(1)
    assert other.caller not in seen[-1].away


def test_strangers_are_not_waited_for() -> None:
    server = Server()
    for _ in range(100):
        server.come_back()
        assert server.decide(2) is DispatchReason.IDLE
        server.serve(Asking(None), Asking(None))


def test_nobody_waits_for_a_caller_that_thinks_for_longer_than_a_pass() -> None:
    server, one, other = Server(), Asking(), Asking()
    for _ in range(20):
        server.come_back(one, other, after=5 * PASS)
        server.serve(one, other)
    server.come_back(one)
    assert server.decide(1) is DispatchReason.IDLE


def test_a_hold_ends_when_the_batch_timeout_has_passed() -> None:
    server, one, other = Server(timeout=0.002), Asking(), Asking()
    for _ in range(20):
        server.come_back(one, other, after=0.004)
        server.serve(one, other)
    free_since = server.now
    server.come_back(one, after=0.001)
    oldest = server.now

    def decide() -> DispatchReason | Hold:
        return server.scheduler.decide(now=server.now, pending=1, oldest=oldest, free_since=free_since)

    hold = decide()
    assert isinstance(hold, Hold)
    assert hold.seconds == pytest.approx(0.001)
    server.now += hold.seconds
    assert decide() is DispatchReason.TIMEOUT


def test_without_a_batch_timeout_nothing_is_held_back() -> None:
    server, one, other = Server(timeout=0.0), Asking(), Asking()
    server.meet(one, other)
    server.come_back(one)
    assert server.decide(1) is DispatchReason.IDLE


def test_a_caller_of_many_rows_counts_with_all_of_them() -> None:
    server, one, other = Server(), Asking(rows=16), Asking(rows=16)
    server.meet(one, other)
    server.come_back(one, after=0.0008)
    hold = server.decide(16)
    assert isinstance(hold, Hold)
    assert hold.rows == 16


def test_the_cost_of_a_pass_is_learned_by_size() -> None:
    cost = PassCost()
    for rows in (1, 2, 4, 8) * 10:
        cost.add(rows, 0.001 + 0.002 * rows)
    assert cost(8) == pytest.approx(0.017)
    assert cost(16) == pytest.approx(0.033)
    for _ in range(20):
        cost.add(4, 1.0)  # as if it was disturbed, and then always
    assert cost(4) > 0.1
    assert set(cost.seen()) == {1, 2, 4, 8}


def test_passes_that_warm_the_model_up_are_forgotten() -> None:
    cost = PassCost()
    for rows in (1, 4, 1, 1, 1):
        cost.add(rows, 5.0 if cost(rows) == 0 else PASS)
    assert cost.seen()[1] == pytest.approx(PASS)
    for _ in range(1000):
        cost.add(1, PASS)
    assert cost(2) == pytest.approx(PASS, rel=0.1)  # though no pass of 4 rows was seen again


def test_the_cost_of_so_many_sizes_at_most_is_known() -> None:
    cost = PassCost()
    for rows in range(1, 5000):
        cost.add(rows, rows * 1e-6)
    assert len(cost.seen()) < 200
    assert max(cost.seen()) == 4999
    assert cost(5000) == pytest.approx(0.005)


@pytest.mark.parametrize("asked_at", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_a_time_that_cannot_be_is_not_learned(asked_at: float) -> None:
    """Another process writes the times of its requests."""
    server, one, other = Server(), Asking(), Asking()
    server.meet(one, other)
    think_time = other.caller.think_time if other.caller else 0.0
    assert other.caller is not None
    other.caller.asked_at = asked_at
    server.serve(one, other)
    assert other.caller.think_time == pytest.approx(think_time, rel=0.01)


class Timer(BatchingRule):
    """Wait 5 ms for a batch of four, whoever comes."""

    def __init__(self) -> None:
        self.reviews: list[Review] = []

    def hold(self, situation: Situation) -> Hold | None:
        return Hold(4 - situation.pending, situation.oldest + 0.005 - situation.now) if situation.pending < 4 else None

    def review(self, review: Review) -> None:
        self.reviews.append(review)


def test_a_rule_of_the_users_decides_within_the_limits() -> None:
    rule = Timer()
    server, one = Server(rule), Asking()
    hold = server.decide(1)
    assert isinstance(hold, Hold)
    assert hold.rows == 3
    assert hold.seconds == pytest.approx(0.005)
    assert server.decide(4) is DispatchReason.GATHERED
    server.meet(one, times=100)
    assert rule.reviews
    assert rule.reviews[-1].callers == (one.caller,)
    assert rule.reviews[-1].latency == pytest.approx(PASS)


def test_failing_batches_bring_no_reviews() -> None:
    rule = Timer()
    server, one = Server(rule), Asking()
    for _ in range(50):
        server.scheduler.on_batch([one])
        server.scheduler.on_replies([one], [server.now], server.now)
    assert not rule.reviews


@pytest.mark.parametrize(("rate", "takes_turns"), [(500.0, True), (1500.0, False)])
def test_callers_take_turns_only_in_batches_that_are_enough_for_all_requests(rate: float, takes_turns: bool) -> None:
    callers = [Caller() for _ in range(8)]
    for caller in callers:
        caller.think_time = 0.0001
    cost = PassCost()
    for rows in range(1, 9):
        for _ in range(10):
            cost.add(rows, 0.001 + 0.001 * rows)
    rule, bounds = LearnedRule(), set()
    for _ in range(10):
        rule.review(Review(callers, 0.02, rate, 64, cost))
        bounds.add(rule.batch_size)
    assert (bounds != {None}) is takes_turns


def test_a_batch_of_all_callers_is_not_held_back_for_one_that_thinks_long() -> None:
    callers = [Caller() for _ in range(8)]
    for caller in callers:
        caller.think_time = 0.0001
    cost = PassCost()
    for rows in range(1, 9):
        for _ in range(10):
            cost.add(rows, PASS)
    rule = LearnedRule()
    for _ in range(10):
        rule.review(Review(callers, 2 * PASS, 100.0, 64, cost))
    slow = Caller()
    slow.answered_at, slow.think_time = 1.0, 5.0
    for caller, held in ((callers[0], True), (slow, False)):
        caller.answered_at = 1.0
        situation = Situation(1.0, 7, 1.0, 1.0, 64, [caller], cost)
        assert (rule.hold(situation) is not None) is held


def test_a_rule_may_bound_the_next_batch() -> None:
    server = Server(LeaveWhenFree())
    assert server.scheduler.batch_size == 64
    for chosen, size in ((16, 16), (100, 64), (0, 1)):
        server.scheduler.rule.batch_size = chosen
        assert server.scheduler.batch_size == size


@pytest.mark.parametrize("hold", [Hold(0, 1.0), Hold(3, 0.0), Hold(3, -1.0), Hold(3, float("nan"))])
def test_a_hold_for_nothing_or_for_no_time_is_none(hold: Hold) -> None:
    class Odd(Timer):
        def hold(self, situation: Situation) -> Hold | None:
            return hold

    assert Server(Odd()).decide(1) is DispatchReason.IDLE


@pytest.mark.parametrize("hold", [True, 0.001, (1, 0.001), Hold("2", 1.0), Hold(1, None)])  # type: ignore[arg-type]
def test_rubbish_of_a_rule_lets_the_batch_leave_and_is_said_once(hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Timer):
        batch_size = "many"  # type: ignore[assignment]

        def hold(self, situation: Situation) -> Hold | None:
            return hold

    server = Server(Odd())
    assert server.decide(1) is DispatchReason.IDLE
    assert server.scheduler.batch_size == 64
    assert len(caplog.records) == 1


def test_a_hold_of_requests_that_were_cancelled_is_over() -> None:
    server = Server(Timer())
    assert isinstance(server.decide(1), Hold)
    server.now += 10.0
    server.since = None
    assert isinstance(server.decide(2), Hold)
    assert server.scheduler.held_since == server.now


def test_what_a_rule_raises_lets_the_batch_leave_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Timer):
        def hold(self, situation: Situation) -> Hold | None:
            raise ValueError("broken")

    server = Server(Broken())
    assert [server.decide(1) for _ in range(3)] == [DispatchReason.IDLE] * 3
    assert len(caplog.records) == 1
    assert "Broken" in caplog.text
