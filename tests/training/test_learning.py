"""What a server learns from verdicts: fits to made-up positions, in which one half of the vocabulary is preferred."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from proxy.checkpoint import BaseModelId, load
from proxy.learned import KEPT, prune, rows_of, save_version, versions
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions
from training import learning
from training.learning import Outcome, Trial, learn, too_few
from training.positions import Response
from training.verdicts import Verdict

K, VOCAB, HIDDEN, NUM_POSITIONS = 4, 16, 8, 5
BASE = BaseModelId(name="llm", fingerprint="0" * 64)
CONFIG = ProxyConfig(hidden_size=HIDDEN, vocab_size=VOCAB, max_candidates=K, max_rejections=K)


def make_verdicts(count: int, first: int = 0, caller: str = "alice") -> list[Verdict]:
    """Verdicts on as many prompts, the newest first; the better response has low tokens, the worse one high ones."""

    def response(number: int, start: int) -> Response:
        generator = torch.Generator().manual_seed(2 * number + start)
        tokens = start + torch.randint(VOCAB // 2, (NUM_POSITIONS,), generator=generator)
        return Response([number], tokens.tolist())

    numbers = range(first, first + count)[::-1]
    return [Verdict(i, caller, response(i, 0), response(i, VOCAB // 2)) for i in numbers]


def reverse_verdicts(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The opposite verdicts, of another caller."""
    return [
        Verdict(10_000 + verdict.row, "bob", verdict.worse, verdict.better) for verdict in verdicts
    ]


def read_positions(responses: Sequence[Response]) -> Positions:
    """The candidates of a position: the response's token, one more of its half, and two of the other half."""
    generator = torch.Generator().manual_seed(0)
    total = NUM_POSITIONS * len(responses)
    chosen_ids = torch.tensor([response.response for response in responses]).flatten()
    opposite_ids = (chosen_ids + VOCAB // 2) % VOCAB
    token_ids = torch.stack(
        (chosen_ids, opposite_ids, (chosen_ids + 1) % VOCAB, (opposite_ids + 1) % VOCAB), -1
    )
    logprobs = torch.randn(total, K, generator=generator).log_softmax(-1)
    logprobs, order = logprobs.sort(descending=True)
    counts = torch.full((len(responses),), NUM_POSITIONS)
    return Positions(
        torch.randn(total, HIDDEN, generator=generator),
        token_ids.gather(-1, order).int(),
        logprobs,
        (order == 0).int().argmax(-1),
        counts,
        counts,
        torch.zeros_like(counts),
    )


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def learner(embeddings: torch.Tensor, tmp_path: Path) -> Iterator["Learner"]:
    yield Learner(embeddings, tmp_path)


class Learner:
    def __init__(self, embeddings: torch.Tensor, root: Path) -> None:
        self.embeddings, self.root = embeddings, root

    def learn(self, verdicts: Sequence[Verdict], live: str | None = None) -> Outcome:
        trial = Trial(verdicts, CONFIG, self.embeddings, read_positions, Accelerator(cpu=True))
        path = self.root / live if live is not None else None
        return learn(verdicts, trial, path, BASE, self.root, {"learned": "ours"})


def test_a_version_of_verdicts_that_agree(learner: Learner) -> None:
    verdicts = make_verdicts(40)
    outcome = learner.learn(verdicts)
    assert outcome.version is not None, outcome
    assert outcome.accuracy is not None and outcome.accuracy[0] > 0.9
    assert (outcome.verdicts, outcome.prompts, outcome.callers) == (40, 40, 1)
    path = learner.root / outcome.version
    checkpoint = load(path, base=BASE)
    assert checkpoint.version == outcome.version
    assert checkpoint.training["verdicts"] == 40 and checkpoint.training["learned"] == "ours"
    assert rows_of(path) == {verdict.row: "alice" for verdict in verdicts}
    # What was preferred has become likelier.
    trial = Trial(verdicts, CONFIG, learner.embeddings, read_positions, Accelerator(cpu=True))
    assert trial.is_right(checkpoint.network, range(40)).mean() > 0.9
    assert trial.kl(checkpoint.network, range(40)) == pytest.approx(outcome.kl)


def test_verdicts_that_contradict_each_other_teach_nothing(learner: Learner) -> None:
    verdicts = make_verdicts(30)
    outcome = learner.learn([*reverse_verdicts(verdicts), *verdicts])
    assert outcome.version is None
    # Each pair is ordered correctly for one of the two.
    assert outcome.accuracy is not None and outcome.accuracy[0] == 0.5
    assert outcome.callers == 2
    assert not versions(learner.root)


class ScriptedTrial(Trial):
    """A trial whose fits have given results: it tests the rules, without training."""

    def __init__(
        self,
        verdicts: Sequence[Verdict],
        *,
        right: float = 0.9,
        kl: float = 0.1,
        of_live: float = 0.5,
    ) -> None:
        """
        Args:
            right, of_live: shares of verdicts that a fit and the live version order rightly.
            kl: nats a token at the usual β; it falls as 1 / β.
        """
        self.count, self.right, self.of_live, self.kl_at_first = len(verdicts), right, of_live, kl
        self.positions = read_positions([verdict.better for verdict in verdicts])
        self.fits: list[tuple[int, float]] = []  # how many verdicts, and β

    def fit(self, numbers: Sequence[int], beta: float = learning.BETA) -> ProxyNetwork:
        self.fits.append((len(numbers), beta))
        return ProxyNetwork(CONFIG.model_copy(update={"width": 16}))

    def is_right(self, network: ProxyNetwork, numbers: Sequence[int]) -> torch.Tensor:
        share = self.right if network.config.width == 16 else self.of_live
        return (torch.tensor(numbers) < share * self.count).double()

    def kl(self, network: ProxyNetwork, numbers: Sequence[int]) -> float:
        return self.kl_at_first * learning.BETA / self.fits[-1][1]


def learn_scripted(
    root: Path, verdicts: Sequence[Verdict], live: Path | None, **options: float
) -> Outcome:
    return learn(verdicts, ScriptedTrial(verdicts, **options), live, BASE, root, {})


def live_version(root: Path, rows: range) -> Path:
    network = ProxyNetwork(CONFIG.model_copy(update={"width": 32}))
    callers = dict.fromkeys(rows, "alice")
    return root / save_version(root, network, callers, base=BASE, training={})


@pytest.mark.parametrize(("right", "serves"), [(0.5, False), (0.6, False), (0.64, True)])
def test_a_version_has_to_beat_chance(tmp_path: Path, right: float, serves: bool) -> None:
    """With 50 verdicts by 1.64 standard errors, which is 61.6 %."""
    outcome = learn_scripted(tmp_path, make_verdicts(50), None, right=right)
    assert outcome.accuracy is not None and outcome.accuracy[0] == pytest.approx(right)
    assert (outcome.version is not None) == serves


@pytest.mark.parametrize(("right", "serves"), [(0.7, False), (0.8, True), (0.9, True)])
def test_it_is_compared_with_the_live_version_on_what_neither_has_seen(
    tmp_path: Path, right: float, serves: bool
) -> None:
    live = live_version(tmp_path, range(20))
    # The newest come first: 80 that the live version has not seen, and 20 that it has.
    outcome = learn_scripted(tmp_path, make_verdicts(100), live, right=right, of_live=0.8)
    assert outcome.gain is not None
    assert outcome.gain[0] == pytest.approx((right - 0.8) * 100 / 80 if right < 0.8 else 0)
    assert (outcome.version is not None) == serves


def test_nothing_new_to_the_live_version_changes_nothing(tmp_path: Path) -> None:
    live = live_version(tmp_path, range(100))
    outcome = learn_scripted(tmp_path, make_verdicts(100), live)
    assert outcome.version is None and "new to the live version" in outcome.reason


@pytest.mark.parametrize(("kl", "beta"), [(0.4, 0.3), (0.9, 0.6), (1.9, 1.2), (9.0, None)])
def test_beta_is_doubled_until_the_kl_is_within_bounds(
    tmp_path: Path, kl: float, beta: float | None
) -> None:
    outcome = learn_scripted(tmp_path, make_verdicts(100), None, kl=kl)
    assert (outcome.version is not None) == (beta is not None)
    if beta is None:
        assert "nats a token" in outcome.reason
    else:
        assert outcome.beta == pytest.approx(beta)
        assert outcome.kl is not None and outcome.kl <= learning.MOST_KL


def test_few_are_all_learned_from_and_of_many_a_tenth_is_set_aside(tmp_path: Path) -> None:
    few_trial, many_trial = (ScriptedTrial(make_verdicts(count)) for count in (50, learning.MANY))
    for trial in (few_trial, many_trial):
        learn(make_verdicts(trial.count), trial, None, BASE, tmp_path, {})
    assert [count for count, _ in few_trial.fits] == [37, 37, 38, 38, 50]
    ((count, _),) = many_trial.fits
    assert 0.8 * learning.MANY < count < learning.MANY
    assert sorted(len(rows_of(path)) for path in versions(tmp_path)) == [50, count]


def first_positions(positions: Positions, count: int) -> Positions:
    return positions._replace(
        hidden=positions.hidden[:count],
        token_ids=positions.token_ids[:count],
        logprobs=positions.logprobs[:count],
        slots=positions.slots[:count],
    )


def test_responses_that_leave_no_choice_teach_nothing(
    tmp_path: Path, embeddings: torch.Tensor
) -> None:
    def read_nothing(responses: Sequence[Response]) -> Positions:
        positions = read_positions(responses)
        return first_positions(positions, 0)._replace(counts=torch.zeros_like(positions.counts))

    verdicts = make_verdicts(40)
    trial = Trial(verdicts, CONFIG, embeddings, read_nothing, Accelerator(cpu=True))
    outcome = learn(verdicts, trial, None, BASE, tmp_path, {})
    assert outcome.version is None and "nothing to choose" in outcome.reason


def test_some_responses_may_leave_no_choice(tmp_path: Path, embeddings: torch.Tensor) -> None:
    """Even whole batches of them."""

    def read_some(responses: Sequence[Response]) -> Positions:
        positions = read_positions(responses)
        counts = torch.zeros_like(positions.counts)
        counts[:2] = NUM_POSITIONS
        return first_positions(positions, 2 * NUM_POSITIONS)._replace(counts=counts)

    verdicts = make_verdicts(40)
    trial = Trial(verdicts, CONFIG, embeddings, read_some, Accelerator(cpu=True))
    network = trial.fit(range(40))
    assert trial.is_right(network, range(40)).sum() <= 1  # without a choice both are equal
    assert math.isfinite(trial.kl(network, range(40)))


def test_too_few_verdicts_or_prompts() -> None:
    assert not too_few(make_verdicts(10))
    assert too_few(make_verdicts(9)) == "9 verdicts on 9 prompts: it takes 10 on 5"
    one_prompt = [Verdict(i, "alice", Response([0], [i]), Response([0], [99])) for i in range(50)]
    assert too_few(one_prompt) == "50 verdicts on 1 prompts: it takes 10 on 5"


def test_old_versions_go_but_for_the_live_one(tmp_path: Path) -> None:
    names = []
    for number in range(KEPT + 2):
        network = ProxyNetwork(CONFIG)
        names.append(save_version(tmp_path, network, {number: None}, base=BASE, training={}))
        os.utime(tmp_path / names[-1], (number, number))
    prune(tmp_path, tmp_path / names[0])
    assert {path.name for path in versions(tmp_path)} == {names[0], *names[-KEPT:]}
