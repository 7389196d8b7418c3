"""What one step does to its rows, and what it reports: without an engine."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import proxy.engine.batch_plan
import proxy.engine.decision_stats
import proxy.engine.rows
import proxy.engine.scoring
import proxy.network
from proxy.acceptance import Decision
from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import make_plan
from proxy.engine.decision_stats import DecisionStats
from proxy.engine.hook import Step, sample_proxied_rows, score_shadows
from proxy.engine.pool import ProxyPool
from proxy.noise import noise_key, seeded_noise
from tests.proxy.proxies import (
    EMBEDDINGS,
    H,
    Proxy,
    V,
    add_proxy,
    constant_network,
    different_proxies,
)
from tests.proxy.references import (
    Outcome,
    Setting,
    accept_logits_of,
    greedy_outcome,
    sorted_nucleus,
)

CPU = torch.device("cpu")


class Recorder:
    """Stands in for the statistics and keeps what is recorded."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Decision, Any, Any]] = []
        self.shadows: list[tuple[str, list[bool], list[bool]]] = []

    def record(self, *step: Any) -> None:
        self.steps.append(step)

    def record_seconds(self, seconds: float) -> None:
        assert seconds > 0

    def record_shadow(self, proxy: Any, scored: torch.Tensor, changed: torch.Tensor) -> None:
        self.shadows.append((proxy.name, scored.tolist(), changed.tolist()))


def step_of(
    pool: ProxyPool,
    assignments: list[Assignment],
    stats: Any,
    *,
    hidden: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    discarded: list[bool] | None = None,
    shadows: list[Proxy] = [],  # noqa: B006
) -> Step:
    rows = len(assignments)
    ids = [f"r{row}" for row in range(rows)]
    return Step(
        plan=make_plan(ids, assignments, pool, CPU, shadows=[shadow.served for shadow in shadows]),
        hidden=torch.randn(rows, H) if hidden is None else hidden,
        positions=torch.arange(rows, dtype=torch.int32) if positions is None else positions,
        discarded=None if discarded is None else torch.tensor(discarded),
        stats=stats,
    )


def replay(
    proxy: Proxy, setting: Setting, logits: np.ndarray, hidden: torch.Tensor, noise: torch.Tensor
) -> Outcome:
    """One row by the paper's loop, in double precision, with this noise [2, V]."""
    token_ids, p = sorted_nucleus(logits, setting)
    scores = accept_logits_of(
        proxy.network, hidden, EMBEDDINGS, token_ids, [math.log(x) for x in p]
    )
    accept = [(1 + math.exp(-score)) ** -setting.strength for score in scores]
    if setting.temperature == 0:
        slot, proposed, forced = greedy_outcome(p, accept, setting.max_rejections)
        return token_ids[slot], proposed, forced
    race_noise, accept_noise = noise[:, token_ids].double().tolist()
    power = setting.trained_temperature / setting.temperature
    order = sorted(range(len(p)), key=lambda slot: race_noise[slot] / p[slot] ** power)
    for proposed, slot in enumerate(order[: setting.max_rejections]):
        if math.exp(-accept_noise[slot]) <= accept[slot] or len(p) == 1:
            return token_ids[slot], proposed + 1, False
    return token_ids[0], min(len(p), setting.max_rejections), True


def random_setting(rng: np.random.Generator, proxy: Proxy) -> Setting:
    config = proxy.served.config
    return Setting(
        trained_temperature=config.temperature,
        trained_top_k=config.top_k,
        trained_top_p=config.top_p,
        temperature=float(rng.choice([0.0, 1.0, 0.6, 1.7])),
        top_k=int(rng.choice([0, 1, 3, 7])),
        top_p=float(rng.choice([1.0, 0.9, 0.5])),
        strength=float(rng.choice([1.0, 0.3, 4.0])),
        max_rejections=int(rng.choice([0, 1, 2, 8])),
        max_candidates=min(config.max_candidates, V),
    )


@pytest.mark.parametrize("temperature_applied", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_a_mixed_batch_decides_row_by_row_as_the_loop_does(temperature_applied, traced):
    """Random settings, proxies and rows without a proxy; equal tokens, counts and forced flags.

    Without a trace a CPU runs the compiled loop, with one the tensor functions.
    """
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    pool = ProxyPool()
    proxies = different_proxies(pool)
    outcomes: list[Outcome] = []
    for _ in range(12):
        row_proxies = [proxies[i] if i < 4 else None for i in rng.integers(5, size=17)]
        settings = [random_setting(rng, proxy or proxies[0]) for proxy in row_proxies]
        assignments = [
            Assignment(
                f"r{row}",
                proxy and proxy.served,
                strength=setting.strength,
                max_rejections=setting.max_rejections,
                temperature=setting.temperature,
                # vLLM switches top-k and top-p off for greedy rows.
                top_k=setting.top_k if setting.temperature else 0,
                top_p=setting.top_p if setting.temperature else 1.0,
                key=noise_key(100 + row),
                is_seeded=True,
                traced=traced,
            )
            for row, (proxy, setting) in enumerate(zip(row_proxies, settings, strict=True))
        ]
        stats = Recorder()
        positions = torch.from_numpy(rng.integers(1, 500, size=17, dtype=np.int32))
        step = step_of(pool, assignments, stats, positions=positions)
        logits = torch.randn(17, V) * 2
        scale = torch.tensor([assignment.divisor for assignment in assignments])
        scaled = logits / scale.unsqueeze(-1) if temperature_applied else logits
        sample_proxied_rows(step, scaled, temperature_applied=temperature_applied)
        ((rows, decision, _, _),) = stats.steps
        actual = zip(*decision.columns[1:].tolist(), strict=True)
        for row, outcome in zip(rows.rows, actual, strict=True):
            proxy = row_proxies[row]
            assert proxy is not None
            key = torch.tensor([noise_key(100 + row)])
            noise = seeded_noise(key, positions[row : row + 1].long(), torch.arange(V)[None])[0]
            args = settings[row], logits[row].numpy(), step.hidden[row], noise
            assert outcome == replay(proxy, *args), settings[row]
            outcomes.append(outcome)
    forced = [outcome for outcome in outcomes if outcome[2]]
    assert len(outcomes) > 100 and 20 < len(forced) < len(outcomes) - 20


def test_the_answer_is_what_is_recorded():
    pool = ProxyPool()
    a, b, *_ = different_proxies(pool)
    assignments = [
        Assignment("r0", a.served, max_rejections=3),
        Assignment("r1"),
        Assignment("r2", b.served, max_rejections=3),
    ]
    stats = Recorder()
    step = step_of(pool, assignments, stats, discarded=[False, False, True])
    token_ids = sample_proxied_rows(step, torch.randn(3, V), temperature_applied=False)
    ((rows, decision, discarded, tracing),) = stats.steps
    assert rows is step.plan.proxied
    assert torch.equal(token_ids, decision.token_ids) and token_ids.shape == (2,)
    assert discarded.tolist() == [False, True]
    assert tracing is None


def test_a_trace_is_kept_only_where_one_is_wanted():
    pool = ProxyPool()
    a, *_ = different_proxies(pool)
    assignments = [Assignment("r0", a.served), Assignment("r1", a.served, traced=True)]
    stats = Recorder()
    sample_proxied_rows(
        step_of(pool, assignments, stats), torch.randn(2, V), temperature_applied=False
    )
    ((_, _, discarded, tracing),) = stats.steps
    assert discarded is None
    candidates, accept_logits, noise = tracing
    assert candidates.token_ids.shape == accept_logits.shape == (2, 5)
    assert noise.shape == (2, 2, 5)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 48])
def test_one_evaluation_a_step(num_rows, traced, monkeypatch):
    """However many rows and proxies there are: one pass over the hidden states, and one over candidates.

    The compiled loop scores single candidates, as they are proposed.
    """
    calls: Counter[str] = Counter()

    def count_calls(name: str) -> None:
        original = getattr(proxy.network, name)

        def counted(*args: Any) -> torch.Tensor:
            calls[name] += 1
            return original(*args)

        for module in (proxy.network, proxy.engine.scoring):
            monkeypatch.setattr(module, name, counted)

    count_calls("state_features")
    count_calls("accept_logits")
    project = proxy.engine.scoring.ProxyScorer.project
    monkeypatch.setattr(
        proxy.engine.scoring.ProxyScorer,
        "project",
        lambda *args: calls.update(["project"]) or project(*args),
    )
    pool = ProxyPool()
    proxies = different_proxies(pool)
    assignments = [
        Assignment("r", proxies[row % 4].served, traced=traced) for row in range(num_rows)
    ]
    step = step_of(pool, assignments, Recorder())
    sample_proxied_rows(step, torch.randn(num_rows, V), temperature_applied=False)
    assert calls == ({"state_features": 1, "accept_logits": 1} if traced else {"project": 1})


def test_nothing_reads_a_tensor_on_the_host(monkeypatch):
    """Meta tensors hold no values: any read of one, such as a device sync, would raise."""
    meta = torch.device("meta")

    def without_values(data: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype).to(meta)

    for module in (proxy.engine.rows, proxy.engine.batch_plan, proxy.engine.scoring):
        monkeypatch.setattr(module, "to_device", without_values)
    monkeypatch.setattr(proxy.engine.decision_stats, "HostCopy", lambda columns: columns)
    monkeypatch.setattr(proxy.engine.decision_stats, "time", SimpleNamespace(monotonic=lambda: 0.0))
    pool = ProxyPool()
    a, b, c, d = different_proxies(pool)
    pool.weights = type(pool.weights)(*(tensor.to(meta) for tensor in pool.weights or ()))  # type: ignore[misc]
    pool.tables = pool.tables.to(meta) if pool.tables is not None else None
    assignments = [
        Assignment("r0", a.served, 0.5, temperature=0.7, top_k=3, is_seeded=True, traced=True),
        Assignment("r1"),
        Assignment("r2", b.served, temperature=0.0),
        Assignment("r3", c.served),
    ]
    stats = DecisionStats(meta, reports=True)
    for batch in (assignments, assignments[:1], assignments[2:3] * 4):
        rows = len(batch)
        step = Step(
            plan=make_plan(
                [assignment.req_id for assignment in batch], batch, pool, meta, shadows=[d.served]
            ),
            hidden=torch.empty(rows, H, device=meta),
            positions=torch.empty(rows, dtype=torch.int32, device=meta),
            discarded=torch.empty(rows, dtype=torch.bool, device=meta),
            stats=stats,
        )
        logits = torch.empty(rows, V, device=meta)
        token_ids = sample_proxied_rows(step, logits, temperature_applied=False)
        assert token_ids.shape == (sum(assignment.proxy is not None for assignment in batch),)
        sampled = torch.empty(rows, dtype=torch.int64, device=meta)
        score_shadows(step, logits, sampled, temperature_applied=True)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the control
        token_ids.tolist()


# --- shadows ---

EMITTED = 2  # among these logits the third most probable token
LOGITS = torch.tensor([3.0, 2.0, 1.0] + [-math.inf] * (V - 3))


def score(
    shadow_bias: float,
    sampled: list[int],
    assignments: list[Assignment] | None = None,
    *,
    logits: torch.Tensor = LOGITS,
    discarded: list[bool] | None = None,
    **config: Any,
) -> tuple[list[bool], list[bool]]:
    """(scored, changed) of rows without a proxy with these logits and tokens, and a shadow with this accept bias."""
    pool = ProxyPool()
    shadow = add_proxy(pool, "shadow", constant_network(shadow_bias, **config))
    if assignments is None:
        assignments = [Assignment(f"r{row}") for row in range(len(sampled))]
    stats = Recorder()
    step = step_of(pool, assignments, stats, discarded=discarded, shadows=[shadow])
    rows = len(sampled)
    score_shadows(step, logits.expand(rows, -1), torch.tensor(sampled), temperature_applied=True)
    ((name, scored, changed),) = stats.shadows
    assert name == "shadow"
    return scored, changed


def test_a_shadow_that_accepts_all_changes_nothing():
    assert score(1e4, [0, 1, 2]) == ([True] * 3, [False] * 3)


def test_a_shadow_that_rejects_all_would_emit_the_most_probable():
    assert score(-1e4, [0, 1, 2]) == ([True] * 3, [False, True, True])


def test_a_shadow_without_rejections_would_emit_the_most_probable():
    assert score(1e4, [0, 1, 2], max_rejections=0) == ([True] * 3, [False, True, True])


def test_a_shadow_scores_the_emitted_token_first():
    """The only rejection that is allowed is used for the emitted token."""
    assert score(-1e4, [1] * 50, max_rejections=1) == ([True] * 50, [True] * 50)
    assert score(1e4, [1] * 50, max_rejections=1) == ([True] * 50, [False] * 50)


def test_a_single_candidate_is_nobodys_choice():
    assert score(-1e4, [0], [Assignment("r0", top_k=1)]) == ([True], [False])


@pytest.mark.parametrize(("emitted", "changed"), [(0, False), (EMITTED, True)])
def test_a_shadow_of_a_greedy_row_uses_no_noise(emitted, changed):
    """It accepts all candidates equally, so that the most probable one is the best."""
    greedy = [Assignment(f"r{row}", temperature=0.0) for row in range(60)]
    assert score(-0.01, [emitted] * 60, greedy) == ([True] * 60, [changed] * 60)


def test_a_shadow_has_the_nucleus_of_its_own_temperature():
    """The rows were divided by 0.25, which left the third token 2e-4; the shadow's top-p lets it in, at 0.09."""
    rows = [Assignment("r0", temperature=0.25, top_p=0.95)]
    assert score(1e4, [EMITTED], rows, logits=LOGITS / 0.25) == ([True], [False])
    assert score(1e4, [EMITTED], rows, logits=LOGITS / 0.25, temperature=0.25)[0] == [False]


def test_a_shadow_of_other_rows_uses_noise():
    """A change takes a rejection, then the acceptance of one of the other two: 1/2 x 3/4 of 2000 = 750.

    By Hoeffding's inequality the count is 150 or more away with probability below 1e-9.
    """
    torch.manual_seed(0)
    scored, changed = score(0.0, [0] * 2000)
    assert all(scored)
    assert abs(sum(changed) - 750) < 150


def test_rows_that_no_shadow_scores():
    """Unfinished prefills, requests that are exempt, and tokens that are none of its candidates."""
    assignments = [Assignment("r0"), Assignment("r1", shadowed=False), Assignment("r2")]
    scored, _ = score(-1e4, [1, 1, 1], assignments, discarded=[True, False, False])
    assert scored == [False, True]  # r0 and r2
    scored, _ = score(-1e4, [0, 1, 2, 30], max_candidates=2)
    assert scored == [True, True, False, False]


def test_no_shadow_is_asked_where_all_rows_are_exempt():
    pool = ProxyPool()
    shadow = add_proxy(pool, "shadow", constant_network(0.0))
    stats = Recorder()
    step = step_of(pool, [Assignment("r0", shadowed=False)], stats, shadows=[shadow])
    score_shadows(step, LOGITS[None], torch.tensor([0]), temperature_applied=True)
    assert stats.shadows == []


def test_every_shadow_scores_every_row():
    pool = ProxyPool()
    shadows = [
        add_proxy(pool, "yes", constant_network(1e4)),
        add_proxy(pool, "no", constant_network(-1e4, width=3)),
    ]
    acting = add_proxy(pool, "acting", constant_network(0.0, width=9))
    stats = Recorder()
    assignments = [Assignment("r0"), Assignment("r1", acting.served, max_rejections=4)]
    step = step_of(pool, assignments, stats, shadows=shadows)
    score_shadows(step, LOGITS.expand(2, -1), torch.tensor([1, 0]), temperature_applied=True)
    assert stats.shadows == [
        ("yes", [True, True], [False, False]),
        ("no", [True, True], [True, False]),
    ]
