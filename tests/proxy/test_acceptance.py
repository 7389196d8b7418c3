"""Accept/reject sampling against two independent references: a sequential loop, and exact enumeration.

Every random test below compares counts by exact tests (binomial, or Fisher's for two samples),
Bonferroni-corrected over all of a test's comparisons: each raises a false alarm with probability
below 1e-6, and seeds are fixed.
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact, kstest, pearsonr

from proxy.acceptance import (
    Candidates,
    Decision,
    accept_mask,
    arrival_times,
    decide,
    nucleus,
    proposed_mask,
)
from proxy.noise import draw_noise, noise_key, seeded_noise
from tests.proxy.references import (
    FALSE_ALARM,
    Outcome,
    assert_follows,
    enumerate_outcomes,
    sample_by_loop,
)


def candidates_of(logits: list[float] | torch.Tensor) -> Candidates:
    """Candidates with these logits and token ids 100, 101...; most probable first."""
    values = torch.as_tensor(logits, dtype=torch.float32).reshape(1, -1)
    return Candidates(100 + torch.arange(values.shape[1])[None], values.log_softmax(-1))


def repeat(candidates: Candidates, rows: int) -> Candidates:
    return Candidates(*(column.expand(rows, -1) for column in candidates))


def decide_often(
    candidates: Candidates,
    accept_logits: torch.Tensor,  # [K]
    *,
    rows: int,
    strength: float = 1.0,
    max_rejections: int = 8,
    sharpness: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
) -> Decision:
    torch.manual_seed(seed)
    num_candidates = candidates.token_ids.shape[1]
    return decide(
        repeat(candidates, rows),
        accept_logits.expand(rows, -1),
        draw_noise(rows, num_candidates, "cpu"),
        strength=torch.full((rows,), strength),
        max_rejections=torch.full((rows,), max_rejections),
        sharpness=torch.full((rows,), sharpness),
        greedy=torch.full((rows,), greedy),
    )


def outcomes(decision: Decision) -> Counter[Outcome]:
    return Counter(
        zip(
            decision.slots.tolist(),
            decision.num_proposed.tolist(),
            decision.forced.tolist(),
            strict=True,
        )
    )


def random_cases() -> Iterator[tuple[list[float], list[float], float, int]]:
    """(logits, accept logits, strength, max_rejections): extremes first, then random ones."""
    rng = np.random.default_rng(7)
    yield [1.0, 0.0, -1.0], [0.5, -0.5, 0.0], 1.0, 0
    yield [1.0, 0.0, -1.0], [0.5, -0.5, 0.0], 0.0, 8
    yield [1.0, 0.0, -1.0], [-40.0, -40.0, -40.0], 1.0, 8  # all rejected
    yield [1.0, 0.0, -1.0], [-40.0, -40.0, -40.0], 1.0, 2
    yield [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], 1.0, 3  # ties
    yield [0.0], [-40.0], 1.0, 8  # a single candidate
    yield [0.0], [-40.0], 1.0, 0
    yield [2.0, 1.0, -math.inf], [-1.0, 0.0, 40.0], 1.0, 8  # one outside the nucleus
    for size in (2, 3, 4, 5):
        for _ in range(3):
            logits = sorted(rng.normal(0, 1.5, size), reverse=True)
            yield (
                [float(x) for x in logits],
                [float(x) for x in rng.normal(0, 1.5, size)],
                float(rng.choice([0.5, 1.0, 2.5])),
                int(rng.integers(1, size + 2)),
            )


CASES = list(random_cases())


def probabilities(
    logits: list[float], accept_logits: list[float], strength: float
) -> tuple[list[float], list[float]]:
    """p and a^strength in double precision, without the code under test."""
    weights = [math.exp(x) for x in logits]
    p = [w / sum(weights) for w in weights]
    a = [(1 / (1 + math.exp(-x))) ** strength for x in accept_logits]
    return p, a


@pytest.mark.parametrize(("logits", "accept_logits", "strength", "max_rejections"), CASES)
def test_decide_follows_the_enumerated_law(logits, accept_logits, strength, max_rejections):
    decision = decide_often(
        candidates_of(logits),
        torch.tensor(accept_logits),
        rows=50_000,
        strength=strength,
        max_rejections=max_rejections,
    )
    distribution = enumerate_outcomes(
        *probabilities(logits, accept_logits, strength), max_rejections
    )
    assert sum(distribution.values()) == pytest.approx(1.0)
    assert_follows(outcomes(decision), distribution, tests=len(CASES))
    assert (decision.token_ids == 100 + decision.slots).all()


def test_the_references_agree():
    """The enumeration, which the other test relies on, against the literal loop."""
    rng = np.random.default_rng(1)
    for logits, accept_logits, strength, max_rejections in CASES[:10]:
        p, a = probabilities(logits, accept_logits, strength)
        counts = Counter(sample_by_loop(p, a, max_rejections, rng) for _ in range(2000))
        assert_follows(counts, enumerate_outcomes(p, a, max_rejections), tests=10)


def test_decide_follows_the_sequential_loop_for_sixteen_candidates():
    """Too many orders to enumerate: two samples, compared outcome by outcome."""
    rng = np.random.default_rng(2)
    logits = [float(x) for x in sorted(rng.normal(0, 2, 16), reverse=True)]
    accept_logits = [float(x) for x in rng.normal(-1, 2, 16)]
    p, a = probabilities(logits, accept_logits, 1.5)
    loop_counts = Counter(sample_by_loop(p, a, 5, rng) for _ in range(15_000))
    vectorised_counts = outcomes(
        decide_often(
            candidates_of(logits),
            torch.tensor(accept_logits),
            rows=15_000,
            strength=1.5,
            max_rejections=5,
            seed=3,
        )
    )
    observed = sorted(loop_counts | vectorised_counts)
    assert any(forced for _, _, forced in observed)
    for outcome in observed:
        table = [
            [loop_counts[outcome], 15_000 - loop_counts[outcome]],
            [vectorised_counts[outcome], 15_000 - vectorised_counts[outcome]],
        ]
        assert fisher_exact(table).pvalue > FALSE_ALARM / len(observed), (outcome, table)


@pytest.mark.parametrize("sharpness", [0.5, 1 / 0.7, 10.0])
@pytest.mark.parametrize(("logits", "accept_logits", "strength", "max_rejections"), CASES[4:])
def test_temperature_sharpens_what_is_proposed_and_not_what_is_accepted(
    logits, accept_logits, strength, max_rejections, sharpness
):
    decision = decide_often(
        candidates_of(logits),
        torch.tensor(accept_logits),
        rows=20_000,
        strength=strength,
        max_rejections=max_rejections,
        sharpness=sharpness,
    )
    p, a = probabilities(logits, accept_logits, strength)
    powers = [x**sharpness for x in p]
    distribution = enumerate_outcomes([x / sum(powers) for x in powers], a, max_rejections)
    assert_follows(outcomes(decision), distribution, tests=3 * len(CASES))


def test_the_temperature_of_the_training_changes_no_bit():
    torch.manual_seed(8)
    candidates = nucleus(torch.randn(300, 50) * 2, 8, top_p=torch.rand(300))
    args = candidates, torch.randn(300, 8), draw_noise(300, 8, "cpu")
    settings = {"strength": None, "max_rejections": torch.full((300,), 4)}
    with_sharpness_one = decide(*args, **settings, sharpness=torch.ones(300))
    assert torch.equal(with_sharpness_one.columns, decide(*args, **settings).columns)


def test_strength_zero_is_the_frozen_llm():
    decision = decide_often(
        candidates_of([2.0, 1.0, 0.0]), torch.full((3,), -50.0), rows=50_000, strength=0.0
    )
    weights = [math.exp(2), math.exp(1), 1.0]
    distribution = {(slot, 1, False): w / sum(weights) for slot, w in enumerate(weights)}
    assert_follows(outcomes(decision), distribution)


@pytest.mark.parametrize(
    ("accept_logits", "strength", "max_rejections", "expected"),
    [
        # log p minus the first's: 0, -1, -2; log a: -0.31 at 1, -1.31 at -1, -0.05 at 3
        ([1.0, 1.0, 1.0], 1.0, 8, (0, 1, False)),
        ([-0.5, 1.0, 1.0], 1.0, 8, (0, 1, False)),  # -0.97 > -1.31
        ([-1.5, 1.0, 1.0], 1.0, 8, (1, 2, False)),  # -1.70 < -1.31
        ([-4.0, -4.0, 3.0], 1.0, 8, (2, 3, False)),  # -4.02, -5.02, -2.05
        ([-4.0, -4.0, 3.0], 1.0, 2, (0, 1, False)),  # only two are considered
        ([-9.0, -9.0, -9.0], 1.0, 8, (0, 1, False)),
        ([-4.0, 3.0, 3.0], 1.0, 1, (0, 1, False)),
        ([-4.0, 3.0, 3.0], 1.0, 0, (0, 0, True)),
        ([-4.0, 3.0, 3.0], 0.0, 8, (0, 1, False)),  # strength 0 is the frozen LLM
        ([-1.0, 3.0, 1.0], 0.5, 8, (0, 1, False)),  # -0.66 > -1.02
        ([-1.0, 3.0, 1.0], 3.0, 8, (1, 2, False)),  # -3.94 < -1.15
    ],
)
def test_greedy_rows_take_the_best_of_probability_and_acceptance(
    accept_logits, strength, max_rejections, expected
):
    for seed in range(3):
        decision = decide_often(
            candidates_of([3.0, 2.0, 1.0]),
            torch.tensor(accept_logits),
            rows=4,
            strength=strength,
            max_rejections=max_rejections,
            greedy=True,
            seed=seed,
        )
        assert outcomes(decision) == {expected: 4}


def test_rows_are_independent_of_their_neighbours():
    """Rows of a mixed batch are decided as they are alone, given the same noise."""
    torch.manual_seed(4)
    logits = torch.randn(32, 50) * 2
    top_k = torch.randint(1, 17, (32,))
    candidates = nucleus(logits, 8, top_k=top_k, top_p=torch.rand(32))
    accept_logits = torch.randn(32, 8)
    noise = draw_noise(32, 8, "cpu")
    settings = {
        "strength": torch.rand(32) * 2,
        "sharpness": torch.rand(32) * 2,
        "max_rejections": torch.randint(0, 9, (32,)),
        "greedy": torch.rand(32) < 0.3,
    }
    batch = decide(candidates, accept_logits, noise, **settings)
    for row in range(32):
        row_slice = slice(row, row + 1)
        single = decide(
            Candidates(*(x[row_slice] for x in candidates)),
            accept_logits[row_slice],
            noise[row_slice],
            **{name: value[row_slice] for name, value in settings.items()},
        )
        assert torch.equal(batch.columns[:, row_slice], single.columns)


def test_proposed_mask_marks_what_the_counts_count():
    torch.manual_seed(5)
    candidates = nucleus(torch.randn(500, 50) * 2, 8, top_p=torch.rand(500))
    accept_logits = torch.randn(500, 8) - 1
    noise = draw_noise(500, 8, "cpu")
    greedy = torch.rand(500) < 0.3
    strength, sharpness = torch.ones(500), torch.rand(500) * 3
    limits = torch.randint(0, 6, (500,))
    settings = {"strength": strength, "max_rejections": limits, "greedy": greedy}
    decision = decide(candidates, accept_logits, noise, sharpness=sharpness, **settings)
    times = arrival_times(candidates, noise[:, 0], sharpness=sharpness, greedy=greedy)
    mask = proposed_mask(times, decision)
    accepts = accept_mask(candidates, accept_logits, noise[:, 1], **settings)
    emitted = torch.nn.functional.one_hot(decision.slots, 8).bool()
    assert torch.equal(mask.sum(-1), decision.num_proposed)
    assert not (mask & (candidates.logprobs == -math.inf)).any()
    # Exactly the emitted slot of an unforced row was accepted among those proposed.
    assert torch.equal(mask & accepts, emitted & ~decision.forced[:, None])
    assert decision.forced.any() and not decision.forced.all()


def test_seeded_noise_depends_on_seed_position_and_token_alone():
    keys = torch.tensor([noise_key(seed) for seed in (11, 12, 11, -3)])
    positions = torch.tensor([40, 40, 41, 40])
    token_ids = torch.tensor([[7, 0, 900_000, 33]]).repeat(4, 1)
    batch = seeded_noise(keys, positions, token_ids)
    assert torch.equal(batch[:1], seeded_noise(keys[:1], positions[:1].int(), token_ids[:1]))
    # Neither more candidates nor another order of them changes what a token draws.
    wider_ids = torch.cat((torch.arange(100, 120).repeat(4, 1), token_ids.flip(-1)), dim=-1)
    assert torch.equal(batch, seeded_noise(keys, positions, wider_ids)[:, :, 20:].flip(-1))
    assert len(batch.unique()) == batch.numel()


def test_seeded_noise_is_splitmix64():
    """Against the published algorithm in plain Python integers: counter in, finaliser, -log(u)."""

    def mix(bits: int) -> int:
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) % 2**64
        return bits ^ bits >> 31

    # The generator's first outputs from state 1234567, as published with its reference code.
    gamma = 0x9E3779B97F4A7C15
    assert [mix((1234567 + i * gamma) % 2**64) for i in (1, 2)] == [
        6457827717110365317,
        3203168211198807973,
    ]
    seed, position, token_ids = 2**63 + 5, 300, [0, 5, 151_935]
    noise = seeded_noise(
        torch.tensor([noise_key(seed)]), torch.tensor([position]), torch.tensor([token_ids])
    )
    for kind in (0, 1):
        for slot, token_id in enumerate(token_ids):
            counter = mix((seed + gamma) % 2**64) + position * 0xD1342543DE82EF95
            bits = mix((counter + (2 * token_id + kind + 1) * gamma) % 2**64)
            expected = -math.log(((bits >> 11) + 0.5) / 2**53)
            assert noise[0, kind, slot].item() == pytest.approx(expected, rel=1e-6)


def test_seeded_noise_is_exponential_and_uncorrelated():
    """Kolmogorov-Smirnov and correlations over neighbouring seeds, positions and tokens."""
    keys = torch.tensor([noise_key(seed) for seed in range(300)]).repeat_interleave(40)
    token_ids = torch.arange(16).expand(12_000, -1)
    noise = seeded_noise(keys, torch.arange(40).repeat(300), token_ids).double()
    flat = noise.flatten(1)  # [12000, 32]
    p_values = [kstest(flat[:, column].numpy(), "expon").pvalue for column in range(32)]
    assert min(p_values) > FALSE_ALARM / 32
    series = [
        (flat[:, 0], flat[:, 1]),  # race and race of the next token
        (noise[:, 0, 0], noise[:, 1, 0]),  # race and acceptance
        (flat[:-1, 5], flat[1:, 5]),  # position and the next
        (flat[:-40, 5], flat[40:, 5]),  # seed and the next
    ]
    for first, second in series:
        assert pearsonr(first.numpy(), second.numpy()).pvalue > FALSE_ALARM / len(series)


def test_nucleus_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()[:, [2, 0, 3, 1]]
    unlimited = nucleus(logits, 16)
    assert unlimited.token_ids.tolist() == [[1, 3, 0, 2]]
    assert unlimited.logprobs.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05])
    by_top_k = nucleus(logits, 16, top_k=torch.tensor([2]))
    assert by_top_k.logprobs.exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    # 0.5 + 0.3 < 0.85, so the third stays; after top-k 2 the mass before the second is 0.625.
    by_top_p = nucleus(logits, 16, top_p=torch.tensor([0.85]))
    assert by_top_p.logprobs.exp()[0].tolist() == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0])
    by_both = nucleus(logits, 16, top_k=torch.tensor([2]), top_p=torch.tensor([0.6]))
    assert by_both.logprobs.exp()[0].tolist() == pytest.approx([1, 0, 0, 0])
    # Without top-k, p = 0.6 keeps two: the order of top-k and top-p matters.
    assert (nucleus(logits, 16, top_p=torch.tensor([0.6])).logprobs > -math.inf).sum() == 2
    # p = 0 still leaves the most probable token; a constraint's -inf is never a candidate.
    assert (nucleus(logits, 16, top_p=torch.tensor([0.0])).logprobs > -math.inf).sum() == 1
    logits[0, 1] = -math.inf
    assert nucleus(logits, 2).logprobs.exp()[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    # A token banned by a bias of -100 stays out even if no other is left.
    banned = nucleus(torch.tensor([[3.0, -97.0, -98.0, 2.0]]), 16).logprobs[0]
    assert (banned > -math.inf).tolist() == [True, True, False, False]


@pytest.mark.parametrize("top_p", [None, 0.5])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_row_where_nothing_is_allowed_has_one_candidate(top_k, top_p):
    logits = torch.full((2, 40), -math.inf)
    logits[1, 7] = 1.0
    candidates = nucleus(
        logits,
        4,
        None if top_k is None else torch.full((2,), top_k),
        None if top_p is None else torch.full((2,), top_p),
        temperature=torch.tensor([0.5, 0.5]),
    )
    assert candidates.token_ids[:, 0].tolist() == [0, 7]
    assert candidates.logprobs.tolist() == [[0.0] + [-math.inf] * 3] * 2


@pytest.mark.parametrize("tied", [False, True])
def test_nucleus_is_vllms(tied):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    torch.manual_seed(6)
    rows, vocab_size, max_candidates = 400, 200, 24
    logits = torch.randn(rows, vocab_size) * 4
    top_k = torch.randint(1, max_candidates + 1, (rows,))
    top_k[::4] = vocab_size  # off
    top_p = torch.rand(rows)
    top_p[::3] = 1.0  # off
    settings = [(top_k, None), (None, top_p), (top_k, top_p)]
    if tied:  # which of several tied tokens top-p keeps depends on the sort
        logits = logits.round()
        top_k.clamp_(max=8)
        settings = [(top_k, None)]
    for k, p in settings:
        expected = apply_top_k_top_p_pytorch(logits.clone(), k, p, allow_cpu_sync=True)
        sizes = (expected > -math.inf).sum(-1)
        fits = sizes <= max_candidates
        assert fits.sum() > rows // 2
        actual = nucleus(logits, max_candidates, top_k=k, top_p=p)
        dense = torch.full_like(logits, -math.inf).scatter(-1, actual.token_ids, actual.logprobs)
        torch.testing.assert_close(dense[fits], expected.log_softmax(-1)[fits])
        # Where vLLM keeps more than K, `nucleus` keeps the K most probable of them.
        assert ((actual.logprobs > -math.inf).sum(-1)[~fits] == max_candidates).all()


def test_small_vocabulary_and_fewer_candidates_than_asked_for():
    candidates = nucleus(torch.randn(3, 5), 16)
    assert candidates.token_ids.shape == (3, 5)
    decision = decide(
        candidates,
        torch.zeros(3, 5),
        draw_noise(3, 5, "cpu"),
        strength=torch.ones(3),
        max_rejections=torch.full((3,), 8),
        greedy=torch.zeros(3, dtype=torch.bool),
    )
    assert decision.token_ids.shape == (3,)


def test_nothing_reads_a_tensor_on_the_host():
    """Meta tensors hold no values: any read of one, such as a device sync, would raise."""
    with torch.device("meta"):
        candidates = nucleus(
            torch.empty(4, 100),
            8,
            top_k=torch.empty(4, dtype=torch.int32),
            top_p=torch.empty(4),
        )
        noise = draw_noise(4, 8, "meta")
        greedy = torch.empty(4, dtype=torch.bool)
        decision = decide(
            candidates,
            torch.empty(4, 8),
            noise,
            strength=torch.empty(4),
            max_rejections=torch.empty(4, dtype=torch.int64),
            sharpness=torch.empty(4),
            greedy=greedy,
        )
        keys, positions = torch.empty(2, 4, dtype=torch.int64)
        seeded_noise(keys, positions, candidates.token_ids)
        mask = proposed_mask(arrival_times(candidates, noise[:, 0], greedy=greedy), decision)
    assert [tuple(x.shape) for x in (decision.columns, mask)] == [(4, 4), (4, 8)]
    assert decision.token_ids.dtype == decision.slots.dtype == torch.int64
