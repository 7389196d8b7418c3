"""The comparison's own parts: the literal loop, sampling without SKAM's second part, the divergence, the report."""

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.comparison.answers import EvaluationSet, by_policy, divergence
from benchmarks.comparison.jobs import Job, run_all, run_job, setting_of
from benchmarks.models import DEMO
from benchmarks.proxy_rlhf import literal, report
from benchmarks.proxy_rlhf.ablations import RepeatingPolicy
from benchmarks.proxy_rlhf.decodings import GRID
from benchmarks.proxy_rlhf.plan import (
    BEST_OF,
    DIRECT_LOSSES,
    DIRECT_PAIRS,
    DIRECT_ROUNDS,
    REWARDS,
    SKAM,
    all_jobs,
)
from proxy.acceptance import Candidates
from proxy.network import ProxyNetwork
from training.conversations import Conversations
from training.models import end_ids, load_model
from training.policy import Decoding, Policy, default_config
from training.rollout import generate
from training.run_marker import MARKER

TEXTS = ("Is my dog worth keeping?", "I have 30 pounds for my rose. Is that enough?", "Hi")


@pytest.fixture(scope="module")
def evaluation() -> EvaluationSet:
    model, tokenizer = load_model(str(DEMO / "model"))
    chats = Conversations(tokenizer)
    prompts = [chats.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS * 8]
    ends = end_ids(model, tokenizer)
    return EvaluationSet(model.eval(), tokenizer, ends, list(TEXTS * 8), prompts)


def indifferent_proxy(model: torch.nn.Module, accept_logit: float, limit: int) -> ProxyNetwork:
    config = default_config(model, width=8, max_rejections=limit, accept_bias=accept_logit)
    network = ProxyNetwork(config)
    torch.nn.init.zeros_(network.score.weight)
    return network


@pytest.mark.parametrize(("accept_logit", "limit"), [(0.0, 8), (-1.0, 3), (-4.0, 16)])
def test_the_literal_loop_samples_as_one_pass_sampling_does(
    evaluation: EvaluationSet, accept_logit: float, limit: int
) -> None:
    """With the same accept logit for every candidate the two give equal results in float32."""
    one_pass_rollout = generate(
        Policy(evaluation.model, indifferent_proxy(evaluation.model, accept_logit, limit)),
        evaluation.prompts,
        Decoding(max_new_tokens=24),
        end_ids=evaluation.end_ids,
        seeds=count(5),
    )
    network = literal.LiteralNetwork(256, 16, accept_logit)
    torch.nn.init.zeros_(network.policy[-1].weight)
    literal_rollout = literal.generate(
        evaluation.model,
        network,
        evaluation.prompts,
        Decoding(max_new_tokens=24),
        end_ids=evaluation.end_ids,
        seeds=count(5),
        max_candidates=16,
        max_rejections=limit,
    )
    assert literal_rollout.responses == one_pass_rollout.responses
    assert literal_rollout.counts == one_pass_rollout.counts
    assert literal_rollout.counts.rejected > 20
    decisions = [
        sorted(zip(d.episodes.tolist(), d.token_ids.tolist(), d.accepted.tolist(), strict=True))
        for d in (literal_rollout.decisions, one_pass_rollout.decisions)
    ]
    assert decisions[0] == decisions[1]


def test_the_literal_proxy_reads_the_state_after_the_candidate(evaluation: EvaluationSet) -> None:
    torch.manual_seed(0)
    network = literal.LiteralNetwork(256, 16, 0.0)
    prompts, decoding = evaluation.prompts[:3], Decoding(max_new_tokens=6)
    rollout = literal.generate(
        evaluation.model, network, prompts, decoding, end_ids=(), seeds=count(), max_candidates=16, max_rejections=8
    )  # fmt: skip
    decisions = rollout.decisions
    with torch.no_grad():
        for episode, (prompt, response) in enumerate(zip(prompts, rollout.responses, strict=True)):
            hidden = evaluation.model.model(torch.tensor([prompt + response])).last_hidden_state[0]
            response_ids = set(response)
            rows = [
                i
                for i in range(len(decisions.token_ids))
                if decisions.episodes[i] == episode and decisions.accepted[i]
            ]
            assert rows and {int(decisions.token_ids[i]) for i in rows} <= response_ids
            for i in rows:
                positions = [
                    p for p in range(len(response)) if response[p] == decisions.token_ids[i]
                ]
                smallest_error = min(
                    (hidden[len(prompt) + p] - decisions.hidden[i]).abs().max().item()
                    for p in positions
                )
                assert smallest_error < 1e-3


def repeating_policy(
    evaluation: EvaluationSet, logits: torch.Tensor, limit: int
) -> RepeatingPolicy:
    policy = RepeatingPolicy(evaluation.model, indifferent_proxy(evaluation.model, 0.0, limit))
    policy.accept_logits = lambda hidden, candidates: logits  # type: ignore[method-assign]
    return policy


def test_sampling_with_repeats(evaluation: EvaluationSet) -> None:
    """The figures are computed by hand: p = 1/2, 1/2; a = 1/2, 1; at most 2 rejections.

    Frequencies of 40,000 draws lie within 5 standard errors: a false-alarm rate of 6e-7 a check.
    """
    logits = torch.tensor([[0.0, 80.0]])
    candidates = Candidates(torch.tensor([[7, 9]]), torch.tensor([[0.5, 0.5]]).log())
    policy = repeating_policy(evaluation, logits, limit=2)
    expected = torch.tensor([[6 / 16, 10 / 16]], dtype=torch.float64)
    torch.testing.assert_close(policy.emission(candidates, logits, Decoding()), expected)
    rows = 40_000
    batch = Candidates(*(column.expand(rows, -1) for column in candidates))
    torch.manual_seed(0)
    decision, proposals = policy.decide(
        batch,
        logits.expand(rows, -1),
        lambda ids: torch.rand(ids.shape[0], 2, ids.shape[1]),
        Decoding(),
    )
    frequency = (decision.token_ids == 7).float().mean().item()
    assert abs(frequency - 6 / 16) < 5 * math.sqrt(6 / 16 * 10 / 16 / rows)
    # One candidate is proposed with probability 3/4, else two; forced with probability 1/16.
    mean_proposed = decision.num_proposed.float().mean().item()
    assert abs(mean_proposed - 1.25) < 5 * math.sqrt(3 / 16 / rows)
    assert abs(decision.forced.float().mean().item() - 1 / 16) < 5 * math.sqrt(15 / 256 / rows)
    assert len(proposals.rows) == int(decision.num_proposed.sum())
    assert int(proposals.accepted.sum()) == rows - int(decision.forced.sum())


def test_a_single_candidate_is_taken_without_asking(evaluation: EvaluationSet) -> None:
    policy = repeating_policy(evaluation, torch.tensor([[-80.0, -80.0]]), limit=2)
    candidates = Candidates(torch.tensor([[7, 9]]), torch.tensor([[0.0, -torch.inf]]))
    emission = policy.emission(candidates, torch.tensor([[-80.0, -80.0]]), Decoding())
    assert emission.tolist() == [[1.0, 0.0]]


def test_divergence_is_nothing_without_a_cut_and_the_surprise_of_greedy_tokens(
    evaluation: EvaluationSet,
) -> None:
    uncut, greedy = Decoding(top_k=0, top_p=1.0, max_new_tokens=8), Decoding(temperature=0)
    rollout = by_policy(evaluation, Policy(evaluation.model), uncut)(evaluation.prompts, count())
    assert divergence(evaluation, rollout.responses, Policy(evaluation.model), uncut)[
        0
    ] == pytest.approx(0, abs=1e-4)
    (response,) = by_policy(evaluation, Policy(evaluation.model), greedy)(
        evaluation.prompts[:1], count()
    ).responses
    ids = torch.tensor([evaluation.prompts[0] + response])
    with torch.no_grad():
        logprobs = evaluation.model(ids).logits.log_softmax(-1)[
            0, len(evaluation.prompts[0]) - 1 : -1
        ]
    surprise = -sum(logprobs[t, token].item() for t, token in enumerate(response))
    single_prompt = EvaluationSet(
        evaluation.model,
        evaluation.tokenizer,
        evaluation.end_ids,
        evaluation.texts,
        evaluation.prompts[:1] * 2,
    )
    measured, _ = divergence(single_prompt, [response, response], Policy(evaluation.model), greedy)
    assert measured == pytest.approx(surprise, rel=1e-4)


def test_divergence_of_a_proxy_that_accepts_everything_is_the_frozen_one_s(
    evaluation: EvaluationSet,
) -> None:
    decoding = Decoding(max_new_tokens=12)
    policy = Policy(evaluation.model, indifferent_proxy(evaluation.model, 60.0, 8))
    responses = by_policy(evaluation, policy, decoding)(evaluation.prompts, count()).responses
    proxied = divergence(evaluation, responses, policy, decoding)
    frozen = divergence(evaluation, responses, Policy(evaluation.model), decoding)
    assert proxied[0] == pytest.approx(frozen[0], rel=1e-3)
    assert 0 < frozen[0] < 0.06 * 12  # at most −log 0.95 a position, with top-k a little more


@pytest.mark.slow  # trains
def test_a_job_leaves_the_figures_of_its_rows(tmp_path: Path) -> None:
    """Three jobs, at the smallest size."""
    setting = setting_of(DEMO / "model", tmp_path, scale=0.005)
    jobs = {job.name: job for job in all_jobs((0,))}
    assert {need for job in jobs.values() for need in job.needs} <= jobs.keys()
    for i, win_rate in enumerate((0.5, 0.7, 0.6)):
        directory = setting.directory(f"proxy-search/{i}/0")
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(json.dumps({"row": {"win_rate": win_rate}}))
    scaled = replace(setting, scale=0.2)
    for name in ("world", "frozen/0", "proxy-self-judge/0"):
        run_job(scaled, jobs[name])
    result = setting.result("proxy-self-judge/0")
    assert result["updates"] == len(result["curve"]) == 4  # a fifth of the 20 of the best search
    row = result["row"]
    assert row["prompts"] == 8 and 0 <= row["win_rate"] <= 1 and row["kl"] > 0
    rows = setting.result("frozen/0")["rows"]
    assert set(rows) == {"frozen, again", "top-p 0.8", "top-p 0.6", "greedy"}
    for name in ("decoding-search/frozen-LLM/0", "decoding/frozen-LLM/0"):
        run_job(scaled, jobs[name])
    search_rows = setting.result("decoding-search/frozen-LLM/0")["rows"]
    assert [row["temperature"] for row in search_rows] == [
        decoding.temperature for decoding in GRID
    ]
    chosen = setting.result("decoding/frozen-LLM/0")["decoding"]
    best = max(search_rows, key=lambda row: row["win_rate"])
    assert chosen == {name: best[name] for name in chosen}


def test_a_job_that_was_killed_begins_again(tmp_path: Path) -> None:
    """Whether it was killed while it trained, or after training and before it wrote its result."""
    setting = setting_of(DEMO / "model", tmp_path, 0.001)
    job = next(job for job in all_jobs((0,)) if job.name == "world")
    run_job(setting, job)
    result, marker = (setting.directory("world") / name for name in ("result.json", MARKER))
    preferences = (setting.directory("world") / "preferences.jsonl").read_bytes()
    for finished in ("true", "false"):
        result.unlink()
        marker.write_text(marker.read_text().replace('"finished": true', f'"finished": {finished}'))
        (setting.directory("world") / "preferences.jsonl").write_bytes(b"cut sh")
        run_job(setting, job)
        assert result.exists()
        assert (setting.directory("world") / "preferences.jsonl").read_bytes() == preferences


def test_the_report(tmp_path: Path) -> None:
    """From invented results, seed 1 winning 10 points more often than seed 0."""
    setting = setting_of(DEMO / "model", tmp_path / "work", scale=1.0)
    for job in all_jobs((0, 1)):
        seed = job.name.rpartition("/")[2]
        row = {
            "win_rate": 0.7 if seed == "1" else 0.6,
            "win_rate_se": 0.03,
            "flaw_rates": {"manners": 0.25, "any": 0.5},
            "tokens_per_response": 12.5,
            "kl": 2.0,
            "kl_se": 0.1,
        }
        curve = [{"step": step, "reward": step / 2, "gold": 3 - step} for step in (1, 2, 3)]
        names = (
            "frozen, again",
            "top-p 0.8",
            "top-p 0.6",
            "greedy",
            *map("best of {}".format, BEST_OF),
        )
        search_rows = [row | {"win_rate": 0.1 * (i == 3)} for i in range(len(GRID))]
        is_search = job.name.startswith("decoding-search")
        result = {
            "row": row,
            "rows": search_rows if is_search else dict.fromkeys(names, row),
            "decoding": {"temperature": 0.3, "top_p": 0.8},
            "curve": curve,
            "parameters": 70_000,
            "updates": 60,
            "train_cpu_seconds": 100.4,
        }
        run_job(setting, Job(job.name, lambda *_, result=result: result))
    output = tmp_path / "docs"
    report.write(setting, (0, 1), output)
    table, _, searches = (output / "proxy_rlhf_table.md").read_text().partition("\n\n")
    # The demo's model has 3,535,616 parameters, actor and critic twice that; 0.03 / sqrt(2) = 0.021.
    assert (
        "| **Proxy-RLHF, one-pass**, implicit reward | 65.0% ± 2.1% | 60.0 70.0 | 70,000 (0.99%) | 60 | 100 |  "
        "| 2.00 ± 0.10 | 12.5 | 25.0% | 50.0% |"
    ) in table
    num_direct = 1 + len(DIRECT_PAIRS) + len(DIRECT_LOSSES) + len(DIRECT_ROUNDS) + 1
    num_others = 5 + 3 * len(REWARDS) + 2 + len(SKAM) + len(BEST_OF) + 1
    assert table.count("65.0%") == num_direct + num_others
    assert "| DPO | learning rate 3e-05, β 0.5 | 60.0% ± 3.0% | 2.00 | 100 |" in searches
    assert "| one-pass proxy | 10 updates | 65.0% ± 2.1% | 2.00 | 201 |" in searches
    assert len(json.loads((output / "proxy_rlhf.json").read_text())["by_seed"]) == table.count(
        "65.0%"
    )
    best_table, _, search_table = (output / "proxy_rlhf_decodings.md").read_text().partition("\n\n")
    assert "| full RLHF | T 0.3, top-p 0.8 | 65.0% ± 2.1% | 60.0 70.0 | 2.00 |" in best_table
    assert "| DPO | 0.0% | 0.0% | 0.0% | 10.0% | 0.0% |" in search_table
    for plot in ("proxy_rlhf.png", "reward_hacking.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the job that is left is begun, and one that fails is named with its log."""
    setting = setting_of(DEMO / "model", tmp_path, scale=0.005)
    jobs = all_jobs((0,))
    for job in jobs:
        if job.name != "threshold/0":
            setting.directory(job.name).mkdir(parents=True)
            (setting.directory(job.name) / "result.json").write_text("{}")
    monkeypatch.setattr(
        "sys.argv", ["", "--work", str(tmp_path), "--seeds", "0", "--scale", "0.005"]
    )
    with pytest.raises(SystemExit, match=r"threshold/0 failed: see .*threshold/0\.log"):
        run_all(setting, jobs, "benchmarks.proxy_rlhf", processes=2)
    # It needs the toy prompts, which do not exist.
    assert "prompts_test.jsonl: no such file" in (tmp_path / "threshold/0.log").read_text()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.log")] == [
        Path("threshold/0.log")
    ]
