"""The comparison with peers: methods on the demo's LLM, wins and ratios by hand, the report, what is left out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.comparison.jobs import Job, run_job
from benchmarks.peers import environments, report, worlds
from benchmarks.peers.__main__ import main, prepare, setting_of
from benchmarks.peers.args import args
from benchmarks.peers.cards import MOST_DRAWS, SHORTEST, cards
from benchmarks.peers.decoders import Guide, Lab, Scale
from benchmarks.peers.genarm import accept_logits, decide_by, genarm
from benchmarks.peers.lab import as_prompts, load_frozen
from benchmarks.peers.plan import decoding_jobs, is_finished, serving_jobs
from benchmarks.peers.rows import decoding_rows, serving_rows
from benchmarks.peers.setting import N, Options, Setting
from proxy.acceptance import Candidates
from proxy.noise import noise_key, seeded_noise
from training.console import TrainingError
from training.policy import Decoding, Policy
from training.prompts import Prompt
from training.rewards import Sample
from training.rollout import generate

SHORT = Decoding(max_new_tokens=8)


def fewest_letters(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([-float(len(sample.text)) for sample in samples])


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    options = Options(work=tmp_path / "work", scale=0.01)
    return setting_of(options, "toy", {})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The demo's LLM, which guides itself, and a reward of short texts."""
    toy = setting_of(Options(work=tmp_path_factory.mktemp("lab")), "toy", {})
    frozen = load_frozen(replace(worlds.world_of(toy), decoding=SHORT))
    guide = Guide(frozen.model, lambda prompt: prompt.ids)
    scale = Scale(mean=0.0, std=1.0, goal=-20.0, entropy=1.0)
    return Lab(frozen, SHORT, fewest_letters, 2, None, guide, scale)


@pytest.fixture(scope="module")
def prompts(lab: Lab) -> list[Prompt]:
    texts = ("Can I open my kettle with a fork?", "Thank you for your help with my pony.")
    return as_prompts(lab.frozen, [[{"role": "user", "content": text}] for text in texts])


def text_of(lab: Lab, tokens: list[int]) -> str:
    return lab.frozen.tokenizer.decode(tokens, skip_special_tokens=True)


def test_args_without_weight_is_greedy(lab: Lab, prompts: list[Prompt]) -> None:
    greedy = generate(
        Policy(lab.frozen.model),
        [prompt.ids for prompt in prompts],
        replace(SHORT, temperature=0.0),
        end_ids=lab.frozen.end_ids,
        seeds=[0, 1],
    ).responses
    found = args(lab, k=4, weight=0.0)(prompts, 0)
    assert found.responses == greedy
    tokens = sum(map(len, greedy))
    assert found.llm_passes == tokens
    assert found.reward_passes == 2 * 4 * tokens  # two passes for each of four candidates
    # An implicit reward of 0 for all tokens, because the guide is the LLM itself.
    found = args(replace(lab, beta=0.1), k=4, weight=100.0)(prompts, 0)
    assert (found.responses, found.reward_passes) == (greedy, tokens)


def test_args_takes_the_continuation_of_highest_reward(lab: Lab, prompts: list[Prompt]) -> None:
    found = args(lab, k=4, weight=1e6)(prompts[:1], 0).responses[0]
    logits = lab.frozen.model(torch.tensor([prompts[0].ids])).logits[0, -1]
    lengths = {len(text_of(lab, [token])): token for token in logits.topk(4).indices.tolist()}
    assert len(text_of(lab, found[:1])) == min(lengths)


def test_cards_draws_once_where_everything_is_accepted(lab: Lab, prompts: list[Prompt]) -> None:
    easy = replace(lab, scale=replace(lab.scale, goal=-1e9))
    found = cards(easy)(prompts, 0)
    segments = found.reward_passes // 2
    assert len(prompts) <= segments <= sum(-(-len(r) // SHORTEST) for r in found.responses)
    assert found == cards(easy)(prompts, 0)  # by the seed alone


def test_cards_takes_the_best_of_its_draws_where_nothing_is_accepted(
    lab: Lab, prompts: list[Prompt]
) -> None:
    """With one segment a response, it is best of `MOST_DRAWS`."""
    hard = replace(lab, scale=replace(lab.scale, goal=1e9, entropy=1e9))
    found = cards(hard, alpha=1.0)(prompts, 0)
    assert found.reward_passes == 2 * MOST_DRAWS * len(prompts)
    easy = replace(hard, scale=replace(hard.scale, goal=-1e9))
    firsts = cards(easy, alpha=1.0)(prompts, 0).responses
    for best, first in zip(found.responses, firsts, strict=True):
        assert len(text_of(lab, best)) <= len(text_of(lab, first))


def test_genarm_by_an_equal_guide_is_the_llm_at_any_weight(lab: Lab, prompts: list[Prompt]) -> None:
    plain = genarm(lab, weight=0.0)(prompts, 3)
    assert genarm(lab, weight=2.0)(prompts, 3) == plain
    assert genarm(lab, weight=2.0, law="accept")(prompts, 3) == plain
    assert plain.llm_passes == plain.reward_passes == sum(map(len, plain.responses))


def test_the_law_of_genarm() -> None:
    """p = 0.7, 0.3 and ratios of 1 and 7: tilted to 1/4, 3/4. A frequency of 20,000 draws is further than 6 standard
    errors from it with a probability of 2e-9.
    """
    rows = 20_000
    candidates = Candidates(
        torch.tensor([[5, 9, 0]]).expand(rows, -1),
        torch.tensor([[0.7, 0.3, 0.0]]).log().expand(rows, -1),
    )
    tilt = torch.tensor([[1.0, 7.0, 100.0]]).log().expand(rows, -1)
    keys = torch.tensor([noise_key(i) for i in range(rows)])
    noise = seeded_noise(keys, torch.zeros_like(keys), candidates.token_ids)
    error = 6 / (2 * rows**0.5)
    tilted = decide_by(candidates, tilt, noise, "tilt")
    assert {*tilted.tolist()} == {5, 9}
    assert (tilted == 9).float().mean().item() == pytest.approx(0.75, abs=error)
    # The second is always accepted; the first, proposed with 0.7, in 1 of 7: 0.1 of all.
    accepted = decide_by(candidates, tilt, noise, "accept")
    assert (accepted == 9).float().mean().item() == pytest.approx(0.9, abs=error)


def test_accept_logits() -> None:
    probabilities = torch.tensor([1.0, 0.5, 1e-4])
    assert torch.allclose(accept_logits(probabilities.log()).sigmoid(), probabilities, atol=2e-6)


def test_wins_and_speed_by_hand() -> None:
    rate, error = report.wins([1.0, 3.0], [[0.0, 3.0], [1.0, 4.0]])  # 1 and 1/2; 1/2 and 0
    assert (rate, error) == (0.5, 0.25)
    one, many = report.speed((1, 4), [[1.0, 8.0], [3.0, 2.0]], [[2.0, 8.0], [2.0, 8.0]])
    assert one == {"clients": 1, "rounds": 2, "seconds": 2.0, "ratio": 1.0, "range": (0.5, 1.5)}
    assert many["ratio"] == 0.625


def test_what_is_not_installed_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(work=tmp_path / "work", optillm=tmp_path, peers=("optillm",))
    assert prepare(options) == {}
    assert "optillm: not in" in capsys.readouterr().err
    rows = serving_rows(setting_of(options, "toy", {}))
    assert "best-of" in rows and not any("optillm" in name or "its" in name for name in rows)
    assert "system" not in rows  # the toy world's answers need no wish


def test_chosen_rows(setting: Setting) -> None:
    few = replace(setting, rows=("proxy", "args"))
    assert {*serving_rows(few)} == {"proxy", "best-of"}  # the latter is what rows are timed against
    assert {*decoding_rows(few)} == {"args", "reward-best-of"}
    with pytest.raises(TrainingError, match="--rows bon: unknown; known are plain, "):
        serving_rows(replace(setting, rows=("bon",)))


def test_prompts(setting: Setting) -> None:
    chats = worlds.prompts_of(setting, 12)
    assert worlds.prompts_of(setting, 2, skip=10) == chats[10:]
    texts = [chat[0]["content"] for chat in chats]
    assert not {*texts} & {c[0]["content"] for c in worlds.validation_prompts(setting, 200)}


def test_the_report(setting: Setting, tmp_path: Path) -> None:
    """From invented results: one row answers well, the others say nothing."""
    setting = replace(setting, rows=("proxy", "args"), num_prompts=2)
    rude, good = "Go away.", "It was nice to talk about your pony."
    texts = {"proxy": [good] * 2, "args": [rude, good]}
    chats = [[{"role": "user", "content": "Thank you for your help with my pony."}]] * 2

    def nobody() -> Any:
        raise AssertionError("no engine is needed")

    names = ["oracle", "proxy", "best-of", "args", "reward-best-of"]
    for job in [*serving_jobs(setting, nobody), *decoding_jobs(setting)]:
        kind, _, name = job.name.rpartition("/")
        result: dict[str, Any] = {"mean": 0.0, "pairs": 100, "train_cpu_seconds": 12.3}
        if kind == "answers":
            result = {"texts": texts.get(name, [rude] * 2)}
            if name in ("baseline", "oracle"):
                result = {"texts": [[rude] * N] * 2}
            elif name in ("args", "reward-best-of"):
                result |= {"tokens": 5.0, "llm_passes": 1.0, "reward_passes": 20.0}
            else:
                result |= {"engine": {"prompt": 13, "completion": 16}}
                result |= {"reported": {"prompt": None, "completion": 16}}
        elif job.name == "fluency":
            result = {"rows": {row: [-1.0, -2.0] for row in names}}
        elif kind == "rounds":
            result = {"clients": [1, 16], "rows": {row: [[0.25, 0.5]] for row in names}}
        run_job(setting, Job(job.name, lambda *_, result=result: result))
        assert is_finished(setting, job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "prompts_of", lambda setting: chats)
        patch.setattr(environments, "megabytes", lambda directory: 5000.0)
        report.write([setting], {"its_hub": {"megabytes": 161.6, "place": "/x"}}, tmp_path)
    table = (tmp_path / "peers_table.md").read_text()
    assert "| **proxy** | 100.0 ± 0.0 % | 2 | 0.25 | 1.00 [1.00, 1.00] | 0.5 |" in table
    assert "| 13 / 16 | none / 16 | 8.0 | -1.50 ± 0.50 |" in table
    assert "| ARGS, k 10, w 1.5 | 75.0 ± 25.0 % | 2 | 1.00 | 20.00 |" in table
    assert "| its_hub |  | 162 |" in table and "need |  | 5000 |" in table
    assert "Their reward: 100 pairs, 12 CPU seconds of training." in table
    assert "The grader itself chooses among 8: 50.0 ± 0.0 %." in table
    figures = json.loads((tmp_path / "peers.json").read_text())
    assert "place" not in figures["setup"]["its_hub"]
    # A row that is added later is measured beside the others.
    more = serving_jobs(replace(setting, rows=("proxy", "plain")), nobody)
    assert not is_finished(setting, more[-1])


@pytest.mark.slow  # starts a server and trains a reward
def test_the_command(tmp_path: Path) -> None:
    """At the smallest size, without peers."""
    options = Options(
        worlds=("toy",), peers=(), work=tmp_path / "work", output=tmp_path, scale=0.005
    )
    main(options)
    rows = json.loads((tmp_path / "peers.json").read_text())["worlds"]["toy"]["rows"]
    assert rows["proxy"]["engine"] == rows["proxy"]["reported"]
    assert rows["best-of"]["engine"]["prompt"] > 10 * rows["plain"]["engine"]["prompt"]
    assert rows["args"]["reward_passes"] == rows["args"]["llm_passes"] == 1


@pytest.mark.slow  # starts two servers of SmolLM2 and trains a judge
def test_a_judge_is_trained_where_a_row_needs_it(tmp_path: Path) -> None:
    options = Options(
        worlds=("smollm2",),
        peers=(),
        rows=("probe-adaptive",),
        work=tmp_path / "work",
        output=tmp_path,
        scale=0.05,
    )
    main(options)
    assert (tmp_path / "work/smollm2/judge/probe/reward.json").exists()
    rows = json.loads((tmp_path / "peers.json").read_text())["worlds"]["smollm2"]["rows"]
    adaptive, judged = rows["probe-adaptive"]["engine"], rows["best-of"]["engine"]
    assert adaptive["prompt"] < judged["prompt"], "a probe reads each sample once"
