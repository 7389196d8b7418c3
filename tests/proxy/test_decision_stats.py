"""Counts that are aggregated later equal those of a loop that counts every step at once; traces."""

import math
import random
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from prometheus_client import REGISTRY

import proxy.engine.decision_stats
import proxy.engine.traces
import proxy.request
from proxy.acceptance import Decision
from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import BatchPlan, make_plan
from proxy.engine.decision_stats import DecisionStats
from proxy.engine.hook import Step, sample_proxied_rows
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.request_tracker import Batch, RequestTracker
from proxy.engine.rows import ProxiedRows
from tests.proxy.proxies import H, V, add_proxy, different_proxies, random_network

CPU = torch.device("cpu")
EOS = 1


class Requests:
    """A worker's requests, a tracker, and the counts of a simple loop."""

    def __init__(self, seed: int, **kwargs: Any) -> None:
        self.random = random.Random(seed)
        self.pool = ProxyPool()
        self.proxies = {p.served.name: p.served for p in different_proxies(self.pool)}
        self.tracker = RequestTracker(CPU, **kwargs)
        self.params: dict[str, Any] = {}  # of every live request
        self.preempted: dict[str, Any] = {}  # which the runner has dropped for now
        self.counts: dict[str, list[int]] = {}  # tokens, proposed, forced
        self.totals = {name: [0, 0, 0] for name in self.proxies}
        self.ended: set[str] = set()
        self.num_arrived = 0

    def arrive(self) -> None:
        req_id = f"r{self.num_arrived}"
        self.num_arrived += 1
        name = self.random.choice([*self.proxies, None])
        self.params[req_id] = SimpleNamespace(
            extra_args={"alignment": {"proxy": name}},
            stop_token_ids=self.random.choice([[], [2], [2, 3]]),
            eos_token_id=self.random.choice([EOS, None]),
            max_tokens=self.random.choice([None, 8, 40]),
            seed=None,
        )
        if name is not None:
            self.counts[req_id] = [0, 0, 0]

    def proxy_of(self, req_id: str) -> str | None:
        return self.params[req_id].extra_args["alignment"]["proxy"]

    def plan(self, req_ids: list[str]) -> BatchPlan:
        batch = Batch(
            req_ids=req_ids,
            params_of=self.params.__getitem__,
            live=self.params.keys(),
        )
        proxy_by_key = {(name, None): proxy for name, proxy in self.proxies.items()}
        return self.tracker.plan_of(req_ids) or self.tracker.plan(
            batch,
            self.pool,
            lambda *key: proxy_by_key.get(key),
            shadows=[*self.proxies.values()][: self.random.random() < 0.5],
        )

    def step(self, req_ids: list[str]) -> None:
        """A request has a row for each token that was drafted, and one more."""
        if self.random.random() < 0.5:
            req_ids = [req_id for req_id in req_ids for _ in range(self.random.randint(1, 3))]
        rows = self.plan(req_ids).proxied
        if rows is None:
            return
        ids = [req_ids[row] for row in rows.rows]
        token_ids = [self.random.randrange(1, 30) for _ in ids]
        proposed = [self.random.randrange(9) for _ in ids]
        forced = [self.random.random() < 0.3 for _ in ids]
        discarded = [self.random.random() < 0.1 for _ in ids]
        decision = Decision(torch.tensor([[0] * len(ids), token_ids, proposed, forced]))
        mask = torch.tensor(discarded) if any(discarded) else None
        self.tracker.stats.record(rows, decision, mask)
        for req_id, *decided_values in zip(
            ids, token_ids, proposed, forced, discarded, strict=True
        ):
            self.count(req_id, *decided_values)

    def count(
        self, req_id: str, token_id: int, proposed: int, forced: bool, discarded: bool
    ) -> None:
        if discarded or req_id in self.ended or req_id not in self.counts:
            return
        name = self.proxy_of(req_id)
        assert name is not None
        for counts in (self.counts[req_id], self.totals[name]):
            counts[0] += 1
            counts[1] += proposed
            counts[2] += forced
        params = self.params[req_id]
        ends = token_id in (*params.stop_token_ids, params.eos_token_id)
        if ends or self.counts[req_id][0] == params.max_tokens:
            self.ended.add(req_id)

    def expect(self, req_ids: list[str]) -> dict[str, dict[str, Any]]:
        """What `take` must return for these requests. Their later tokens do not count."""
        known = [req_id for req_id in req_ids if req_id in self.counts]
        return {req_id: as_counts(*self.counts.pop(req_id)) for req_id in known}


def as_counts(tokens: int, proposed: int, forced: int) -> dict[str, int]:
    accepted = tokens - forced
    return {
        "proposed": proposed,
        "accepted": accepted,
        "rejected": proposed - accepted,
        "forced": forced,
    }


def without_names(answer: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    names = ("proxy", "version")
    return {
        req_id: {k: v for k, v in counts.items() if k not in names}
        for req_id, counts in answer.items()
    }


def value_of(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"assent_{name}_total", labels) or 0.0


METRICS = ["tokens_aligned", "candidates_proposed", "candidates_rejected", "candidates_forced"]


@pytest.mark.parametrize(("seed", "aggregate_steps"), [(0, 1), (1, 64), (2, 5), (3, 10**5)])
def test_counting_later_is_counting_at_once(seed, aggregate_steps, monkeypatch):
    """Requests come, stop, are preempted (dropped by the runner or not), and go, in any order."""
    monkeypatch.setattr(proxy.engine.decision_stats, "_AGGREGATE_STEPS", aggregate_steps)
    initial = {(m, p): value_of(m, proxy=p, version="v1") for m in METRICS for p in "abcd"}
    requests = Requests(seed, capacity=40)
    rng = requests.random
    num_answers = 0
    waiting = set[str]()  # were preempted, and are not scheduled yet
    for _ in range(300):
        if len(requests.params) < 12 and rng.random() < 0.4:
            requests.arrive()
        running_ids = [req_id for req_id in requests.params if req_id in requests.counts]
        if rng.random() < 0.1 and running_ids:  # the runner drops one for now
            req_id = rng.choice(running_ids)
            requests.preempted[req_id] = requests.params.pop(req_id)
        if rng.random() < 0.2 and requests.preempted:
            req_id = rng.choice(list(requests.preempted))
            requests.params[req_id] = requests.preempted.pop(req_id)
            waiting.add(req_id)
        scheduled = [req_id for req_id in requests.params if rng.random() < 0.9]
        rng.shuffle(scheduled)
        for _ in range(rng.choice([1, 1, 4, 20])):
            if scheduled:
                requests.step(scheduled)
        waiting -= {*scheduled}
        request_ids = []
        for req_id in list(requests.params):
            if rng.random() < 0.05:  # it has finished, or its counts are taken while it runs
                request_ids.append(req_id)
                if req_id in waiting or rng.random() < 0.5:
                    del requests.params[req_id]
        if request_ids:
            answer = requests.tracker.take(request_ids)
            # A request that was never scheduled is not known.
            assert all(
                not any(requests.counts.get(req_id, []))
                for req_id in request_ids
                if req_id not in answer
            )
            assert without_names(answer) == requests.expect(list(answer))
            num_answers += len(answer)
    assert num_answers > 30
    remaining = list(requests.counts)
    expected = {
        req_id: counts
        for req_id, counts in requests.expect(remaining).items()
        if any(counts.values())
    }
    actual = without_names(requests.tracker.take(remaining))
    assert {req_id: counts for req_id, counts in actual.items() if any(counts.values())} == expected
    requests.tracker.stats.flush_metrics()
    for name, counts in requests.totals.items():
        total = as_counts(*counts)
        values = [counts[0], total["proposed"], total["rejected"], total["forced"]]
        for metric, value in zip(METRICS, values, strict=True):
            increase = value_of(metric, proxy=name, version="v1") - initial[metric, name]
            assert increase == value


def make_decision(token_ids: list[int], proposed: int = 3, forced: bool = False) -> Decision:
    rows = len(token_ids)
    return Decision(torch.tensor([[0] * rows, token_ids, [proposed] * rows, [forced] * rows]))


class Clock:
    """A `time.monotonic`, in seconds, that the test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(proxy.engine.decision_stats, "time", clock)
    return clock


def rows_of(name: str, *, version: str = "v1") -> ProxiedRows:
    pool = ProxyPool()
    served = add_proxy(pool, name, random_network(1), version).served
    assignments = [Assignment(f"r{row}", served, stop_ids=(EOS,)) for row in range(2)]
    rows = make_plan(
        [assignment.req_id for assignment in assignments], assignments, pool, CPU, shadows=()
    )
    assert rows.proxied is not None
    return rows.proxied


def counts_of(rows: ProxiedRows) -> list[list[int]]:
    """Tokens, proposed and forced of each request."""
    counts = [assignment.counts for assignment in rows.assignments]
    return [[count.tokens, count.proposed, count.forced] for count in counts]


def test_metrics_are_brought_up_to_date_now_and_then(clock, monkeypatch):
    """After 64 steps, but no more often than once in a second: reading waits for the device."""
    stats = DecisionStats(CPU, reports=True)
    rows = rows_of("flushed", version="0123456789ab")

    def tokens() -> float:
        return value_of("tokens_aligned", proxy="flushed", version="0123456789ab")

    for _ in range(64):
        stats.record(rows, make_decision([7, 7]), None)
    assert tokens() == 0
    clock.seconds += 1.5
    for _ in range(63):
        stats.record(rows, make_decision([7, 7], proposed=2, forced=True), None)
    assert tokens() == 0
    stats.record(rows, make_decision([7, 7], proposed=2, forced=True), None)
    labels = {"proxy": "flushed", "version": "0123456789ab"}
    stats.flush_metrics()  # nothing twice
    assert tokens() == 256
    assert value_of("candidates_proposed", **labels) == 128 * 3 + 128 * 2
    assert value_of("candidates_rejected", **labels) == 128 * 2 + 128 * 2
    assert value_of("candidates_forced", **labels) == 128


def test_metrics_of_shadows(clock):
    stats = DecisionStats(CPU, reports=True)
    shadow = ServedProxy("ghost", "v7", random_network(1).config)
    for _ in range(3):
        scored = torch.tensor([True, True, False])
        stats.record_shadow(shadow, scored, torch.tensor([True, False, True]))
    labels = {"proxy": "ghost", "version": "v7"}
    assert value_of("shadow_tokens", **labels) == 0
    stats.flush_metrics()
    stats.flush_metrics()
    assert value_of("shadow_tokens", **labels) == 6
    assert value_of("shadow_changed", **labels) == 3
    clock.seconds += 1.5
    stats.record_shadow(shadow, torch.tensor([True]), torch.tensor([False]))
    assert value_of("shadow_tokens", **labels) == 7


@pytest.mark.parametrize(("reports", "steps"), [(True, 2), (False, 0)])
def test_what_the_hook_took(reports, steps):
    initial = value_of("hook_steps"), value_of("hook_seconds")
    stats = DecisionStats(CPU, reports=reports)
    for _ in range(2):
        stats.record_seconds(0.25)
    stats.flush_metrics()
    stats.flush_metrics()  # nothing twice
    assert value_of("hook_steps") - initial[0] == steps
    assert value_of("hook_seconds") - initial[1] == pytest.approx(0.25 * steps)


def test_a_history_that_does_not_report_keeps_nothing():
    stats = DecisionStats(CPU, reports=False)
    rows = rows_of("silent")
    stats.record(rows, make_decision([7, 7]), None)
    stats.record_shadow(rows.assignments[0].proxy, torch.tensor([True]), torch.tensor([True]))
    stats.aggregate()
    assert counts_of(rows) == [[0, 0, 0]] * 2
    stats.flush_metrics()
    assert value_of("tokens_aligned", proxy="silent", version="v1") == 0
    assert value_of("shadow_tokens", proxy="silent", version="v1") == 0


def test_counts_are_those_of_each_request_up_to_its_end():
    """Whether the end is in this aggregation or in an earlier one. A closed request gets no more counts."""
    stats = DecisionStats(CPU, reports=True)
    rows = rows_of("closed")
    first, second = rows.assignments
    stats.record(rows, make_decision([7, EOS]), None)
    stats.record(rows, make_decision([7, 7]), None)
    stats.aggregate()
    assert counts_of(rows) == [[2, 6, 0], [1, 3, 0]]
    assert (first.counts.closed, second.counts.closed) == (False, True)
    stats.record(rows, make_decision([7, 7]), None)
    stats.aggregate()
    assert counts_of(rows) == [[3, 9, 0], [1, 3, 0]]
    first.counts.closed = True
    stats.record(rows, make_decision([7, 7]), None)
    stats.aggregate()
    assert counts_of(rows) == [[3, 9, 0], [1, 3, 0]]


class SlowCopy:
    """Stands in for a copy from an accelerator. It arrives when the test says so."""

    waited: ClassVar[list["SlowCopy"]]

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.arrived = False

    def is_done(self) -> bool:
        return self.arrived

    def numpy(self) -> Any:
        if not self.arrived:
            self.waited.append(self)
        return self.tensor.numpy()


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> list[SlowCopy]:
    """The copies of an accelerator's steps, in their order."""
    copies: list[SlowCopy] = []

    def make(tensor: torch.Tensor) -> SlowCopy:
        copies.append(SlowCopy(tensor))
        return copies[-1]

    SlowCopy.waited = []
    monkeypatch.setattr(proxy.engine.decision_stats, "HostCopy", make)
    return copies


def test_an_accelerators_steps_are_waited_for_only_where_needed(slow_copies):
    """Steps that have arrived are aggregated; of the others only those up to the last step of the given requests."""
    stats = DecisionStats(torch.device("cuda"), reports=True)
    old, new = rows_of("old"), rows_of("new")
    for _ in range(3):
        stats.record(old, make_decision([7, 7]), None)
    stats.record(new, make_decision([7, 7]), torch.tensor([True, False]))
    stats.record(new, make_decision([7, 7]), None)
    slow_copies[0].arrived = True
    stats.aggregate([])
    assert (counts_of(old), counts_of(new)) == ([[1, 3, 0]] * 2, [[0, 0, 0]] * 2)
    assert SlowCopy.waited == []
    stats.aggregate([old.assignments[1].counts])
    assert (counts_of(old), counts_of(new)) == ([[3, 9, 0]] * 2, [[0, 0, 0]] * 2)
    assert SlowCopy.waited == slow_copies[1:3]
    stats.aggregate()
    assert counts_of(new) == [[1, 3, 0], [2, 6, 0]]
    assert SlowCopy.waited == slow_copies[1:]


def test_a_step_waits_for_no_copy(slow_copies, monkeypatch):
    """Not even when it aggregates: it leaves the steps that have not arrived."""
    monkeypatch.setattr(proxy.engine.decision_stats, "_AGGREGATE_STEPS", 3)
    stats = DecisionStats(torch.device("cuda"), reports=True)
    rows = rows_of("waiting")
    for arrived in (True, True, False, False, True):
        stats.record(rows, make_decision([7, 7]), None)
        slow_copies[-1].arrived = arrived
    assert SlowCopy.waited == [] and counts_of(rows) == [[2, 6, 0]] * 2
    stats.aggregate()
    assert counts_of(rows) == [[5, 15, 0]] * 2


def test_the_steps_after_the_end_of_a_request_are_not_waited_for(slow_copies):
    stats = DecisionStats(torch.device("cuda"), reports=True)
    rows = rows_of("ended")
    stats.record(rows, make_decision([EOS, 7]), None)
    stats.record(rows, make_decision([7, 7]), None)
    slow_copies[0].arrived = True
    stats.aggregate([rows.assignments[0].counts])
    assert SlowCopy.waited == [] and counts_of(rows)[0] == [1, 3, 0]
    stats.aggregate([rows.assignments[1].counts])
    assert SlowCopy.waited == slow_copies[1:] and counts_of(rows) == [[1, 3, 0], [2, 6, 0]]


# --- traces ---


class TracedBatch:
    """Steps of one batch with the real sampling, and the traces that they should leave."""

    def __init__(self, assignments: list[Assignment], pool: ProxyPool) -> None:
        self.pool = pool
        self.plan = make_plan(
            [assignment.req_id for assignment in assignments], assignments, pool, CPU, shadows=()
        )
        self.stats = DecisionStats(CPU, reports=True)

    def step(self, num: int = 1, discarded: list[bool] | None = None) -> list[list[dict[str, Any]]]:
        """The entries of every row, step by step."""
        expected = []
        rows = self.plan.proxied
        assert rows is not None and rows.any_traced
        for _ in range(num):
            logits, hidden = torch.randn(len(rows.rows), V) * 3, torch.randn(len(rows.rows), H)
            recorded: list[Any] = []
            recorder = SimpleNamespace(
                record=lambda *step: recorded.append(step),  # noqa: B023
                record_seconds=self.stats.record_seconds,
            )
            mask = None if discarded is None else torch.tensor(discarded)
            positions = torch.randint(1000, (len(rows.rows),))
            sample_proxied_rows(
                Step(self.plan, hidden, positions, mask, recorder),
                logits,
                temperature_applied=False,
            )
            self.stats.record(*recorded[0])
            _, _, _, (candidates, accept_logits, noise) = recorded[0]
            expected.append(
                [
                    self.entry(
                        assignment, *(tensor[row] for tensor in (*candidates, accept_logits, noise))
                    )
                    for row, assignment in enumerate(rows.assignments)
                ]
            )
        return expected

    def entry(
        self, assignment: Assignment, token_ids: Any, logprobs: Any, scores: Any, noise: Any
    ) -> Any:
        """One position by the paper's loop."""
        p = [math.exp(x) for x in logprobs.tolist()]
        accept = [(1 + math.exp(-x)) ** -assignment.strength for x in scores.tolist()]
        race_noise, accept_noise = noise.double().tolist()
        order = [slot for slot in range(len(p)) if p[slot] > 0]
        best = max(
            order[: assignment.max_rejections] or [0], key=lambda slot: p[slot] * accept[slot]
        )
        if not assignment.is_greedy:
            order.sort(key=lambda slot: race_noise[slot] / p[slot] ** assignment.sharpness)

        def candidate(slot: int, *, is_scored: bool = True) -> dict[str, Any]:
            return {
                "token_id": token_ids[slot].item(),
                "probability": pytest.approx(p[slot], rel=1e-4),
                "accept_probability": pytest.approx(accept[slot], rel=1e-4) if is_scored else None,
            }

        rejected: list[int] = []
        for slot in order[: assignment.max_rejections]:
            is_accepted = (
                slot == best
                if assignment.is_greedy
                else math.exp(-accept_noise[slot]) <= accept[slot]
            )
            if is_accepted or len(order) == 1:
                emitted, forced = slot, False
                break
            rejected.append(slot)
        else:
            emitted, forced = 0, True
        is_scored = len(order) > 1 and (not forced or emitted in rejected)
        entry = candidate(emitted, is_scored=is_scored)
        return entry | {"forced": forced, "rejected": [candidate(slot) for slot in rejected]}


def traced_assignments(pool: ProxyPool, **settings: Any) -> list[Assignment]:
    a, b, c, _ = different_proxies(pool)
    settings = {"top_k": 4} | settings
    return [
        Assignment("t0", a.served, 1.0, 3, traced=True, **settings),
        Assignment("t1", b.served, 0.5, 1, traced=True, temperature=0.7, **settings),
        Assignment("quiet", c.served, 1.0, 3, **settings),
        Assignment("t2", c.served, 3.0, 0, traced=True, **settings),
        Assignment("t3", a.served, 1.2, 8, traced=True, temperature=0.0, **settings),
    ]


def take_trace(stats: DecisionStats, req_id: str) -> list[dict[str, Any]]:
    stats.aggregate()
    return stats.traces.take(req_id)


def test_a_trace_says_what_the_loop_would_have_done():
    """Order of proposal, probabilities, accept probabilities with the strength, and which tokens were forced."""
    torch.manual_seed(3)
    pool = ProxyPool()
    batch = TracedBatch(traced_assignments(pool), pool)
    first = batch.step(300)
    actual = {name: take_trace(batch.stats, name) for name in ("t0", "t1", "t2", "t3", "quiet")}
    for row, name in ((0, "t0"), (1, "t1"), (3, "t2"), (4, "t3")):
        assert actual[name] == [step[row] for step in first]
    assert actual["quiet"] == []
    forced = {name: sum(entry["forced"] for entry in actual[name]) for name in ("t0", "t1")}
    assert all(5 < count < 295 for count in forced.values())
    assert not any(entry["forced"] for entry in actual["t3"])  # greedy: the best is taken
    assert all(entry["forced"] and not entry["rejected"] for entry in actual["t2"])
    assert {entry["accept_probability"] for entry in actual["t2"]} == {None}
    # Forced although it was rejected; forced without having been scored.
    was_scored = {
        entry["accept_probability"] is not None for entry in actual["t0"] if entry["forced"]
    }
    assert was_scored == {True, False}
    assert {len(entry["rejected"]) for entry in actual["t3"]} >= {0, 1}
    # Entries that were taken are gone. The next call returns the later ones.
    assert take_trace(batch.stats, "t0") == []
    second = batch.step(3)
    assert take_trace(batch.stats, "t0") == [step[0] for step in second]


def test_a_trace_adds_up_to_the_counts():
    torch.manual_seed(1)
    pool = ProxyPool()
    assignments = traced_assignments(pool)
    batch = TracedBatch(assignments, pool)
    batch.step(50)
    for assignment in assignments:
        if assignment.traced:
            entries = take_trace(batch.stats, assignment.req_id)
            counts = assignment.counts
            assert counts.tokens == len(entries) == 50
            assert counts.forced == sum(entry["forced"] for entry in entries)
            rejected = sum(len(entry["rejected"]) for entry in entries)
            assert counts.proposed - (counts.tokens - counts.forced) == rejected
            assert len({entry["token_id"] for entry in entries}) > 10


def test_unfinished_prefills_and_what_comes_after_the_end_are_not_traced():
    torch.manual_seed(2)
    pool = ProxyPool()
    # Every token ends the request.
    assignments = traced_assignments(pool, stop_ids=tuple(range(V)))
    batch = TracedBatch(assignments, pool)
    batch.step(2, discarded=[True, False, False, False, False])
    expected = batch.step(2)
    assert take_trace(batch.stats, "t0") == [expected[0][0]]
    batch.step(2)
    assert take_trace(batch.stats, "t0") == []
    assert len(take_trace(batch.stats, "t1")) == 1


def test_a_trace_ends_at_its_limit(monkeypatch):
    """In one go or in pieces: the first 4096 tokens (20 here), and none after them."""
    assert proxy.request.TRACE_TOKENS == 4096
    monkeypatch.setattr(proxy.engine.traces, "TRACE_TOKENS", 20)
    torch.manual_seed(3)
    pool = ProxyPool()
    batch = TracedBatch(traced_assignments(pool), pool)
    expected = batch.step(10)
    assert take_trace(batch.stats, "t0") == [step[0] for step in expected]
    expected += (second := batch.step(9))
    assert take_trace(batch.stats, "t0") == [step[0] for step in second]
    expected += (third := batch.step(5))
    assert take_trace(batch.stats, "t0") == [third[0][0]]
    assert take_trace(batch.stats, "t1") == [step[1] for step in expected[:20]]
    batch.step(5)
    assert take_trace(batch.stats, "t0") == take_trace(batch.stats, "t1") == []
    batch.stats.traces.forget("t1")
    batch.step(5)  # as if its id had come again
    assert len(take_trace(batch.stats, "t1")) == 5


def test_traces_that_nobody_takes_are_bounded(monkeypatch):
    """The oldest trace is dropped, with its later entries: a trace has no holes."""
    monkeypatch.setattr(proxy.engine.traces, "TRACED_REQUESTS", 2)
    torch.manual_seed(4)
    pool = ProxyPool()
    a, *_ = different_proxies(pool)
    assignments = [
        Assignment(f"t{number}", a.served, max_rejections=8, traced=True) for number in (1, 2, 3)
    ]
    batch = TracedBatch(assignments, pool)
    batch.step(4)
    assert take_trace(batch.stats, "t1") == []
    assert [len(take_trace(batch.stats, name)) for name in ("t2", "t3")] == [4, 4]
    later_batch = TracedBatch(assignments[:2], pool)
    later_batch.stats = batch.stats
    later_batch.step(4)
    assert [len(take_trace(batch.stats, name)) for name in ("t1", "t2")] == [0, 4]
