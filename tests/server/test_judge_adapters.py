"""Judges beside the LLM: LoRAs, a probe, other servers. Their verdicts on a real server, against transformers."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from judge.principles import Principle, write_principles
from judge.prompts import Question, judge_prompt_ids, label_ids, response_ids
from judge.tournament import replay
from proxy.checkpoint import BaseModelId, CheckpointError, identify
from proxy.probe import PROBE_FILE, save_weight
from proxy.reward_file import ProbeInfo, RewardFile
from server.judge_adapters import AdapterError, JudgeKind, enable_adapters, read_adapters
from server.openapi_examples import ERRORS
from tests.server.conftest import (
    API_KEY,
    DEMO,
    MODEL,
    WAIT_SECONDS,
    Server,
    free_port,
    proxy_flags,
    running,
    serving,
)
from tests.training.models import frozen_of
from training.reward_loading import load_reward
from training.rewards import Sample

BASE = identify(str(DEMO / "model"))
CONFIG = AutoConfig.from_pretrained(DEMO / "model")
HIDDEN_SIZE, LAYERS, END_IDS = CONFIG.hidden_size, CONFIG.num_hidden_layers, [CONFIG.eos_token_id]
MANNERS = Principle(system="Choose the more polite.")


def make_adapter(directory: Path, kind: str, rank: int = 4, base: BaseModelId = BASE) -> PeftModel:
    """A random LoRA with a strong effect, saved as the training commands save theirs."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter *= 0.6
    adapted.save_pretrained(directory)
    reward = {"kind": kind, "beta": 3.0, "base": base.model_dump()}
    (directory / "reward.json").write_text(json.dumps(reward))
    return adapted.eval()


def make_probe(directory: Path, layer: int = LAYERS) -> None:
    """A random probe whose scores of the responses below are some units apart."""
    directory.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weight(directory, 0.3 * torch.randn(HIDDEN_SIZE))
    info = ProbeInfo(layer=layer, num_layers=LAYERS, end_ids=END_IDS, training={})
    RewardFile(kind="probe", base=BASE, probe=info).write(directory)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    for name, kind, rank in (("pairwise", "judge", 4), ("likelihood", "implicit", 8)):
        make_adapter(root / name, kind, rank)
    make_probe(root / "probe")
    write_principles(root / "pairwise" / "principles.json", {"manners": MANNERS})
    return {path.name: path for path in root.iterdir()}


def test_what_a_directory_says(judges: dict[str, Path]) -> None:
    adapters = read_adapters([judges["pairwise"], judges["likelihood"]], BASE)
    assert set(adapters) == {"pairwise", "likelihood"}
    assert adapters["pairwise"].principles == {"manners": MANNERS}
    assert (adapters["likelihood"].beta, adapters["likelihood"].rank) == (3.0, 8)
    assert adapters["pairwise"].lora_id != adapters["likelihood"].lora_id
    (probe,) = read_adapters([judges["probe"]], BASE).values()
    assert (probe.kind, probe.rank, probe.end_ids) == ("probe", 0, END_IDS)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (Namespace(enable_lora=False, max_loras=1, max_lora_rank=16), (True, 2, 8)),
        (Namespace(enable_lora=True, max_loras=2, max_lora_rank=64), (True, 4, 64)),
        (Namespace(enable_lora=True, max_loras=1, max_lora_rank=1), (True, 3, 8)),
    ],
)
def test_room_for_the_judges(
    judges: dict[str, Path], args: Namespace, expected: tuple[bool, int, int]
) -> None:
    enable_adapters(args, read_adapters([*judges.values()], BASE))
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == expected


def test_a_probe_needs_no_lora(judges: dict[str, Path]) -> None:
    args = Namespace(enable_lora=False, max_loras=1, max_lora_rank=16)
    enable_adapters(args, read_adapters([judges["probe"]], BASE))
    assert not args.enable_lora


def test_what_is_no_probe(judges: dict[str, Path], tmp_path: Path) -> None:
    other_base = BASE.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(AdapterError, match="was trained on"):
        read_adapters([judges["probe"]], other_base)
    make_probe(tmp_path, layer=LAYERS - 1)
    with pytest.raises(AdapterError, match=f"reads layer {LAYERS - 1}, and a server reads only"):
        read_adapters([tmp_path], BASE)
    make_probe(tmp_path)
    (tmp_path / PROBE_FILE).unlink()
    with pytest.raises(CheckpointError, match="is not the weights of a probe"):
        read_adapters([tmp_path], BASE)


def test_what_is_no_judge(judges: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no reward.json"):
        read_adapters([tmp_path], BASE)
    with pytest.raises(AdapterError, match="are both likelihood judges"):
        read_adapters([judges["likelihood"], judges["likelihood"]], BASE)
    other_base = BASE.model_copy(update={"fingerprint": "0" * 64, "name": "another"})
    with pytest.raises(
        AdapterError, match=f"was trained on .* but this is 'another' \\({'0' * 64}"
    ):
        read_adapters([judges["likelihood"]], other_base)
    (tmp_path / "reward.json").write_text((judges["likelihood"] / "reward.json").read_text())
    with pytest.raises(AdapterError, match="is not a LoRA: train the judge with --lora-rank"):
        read_adapters([tmp_path], BASE)
    lora = json.loads((judges["likelihood"] / "adapter_config.json").read_text())
    for change, message in (
        ({"target_modules": ["lm_head"]}, "changes the head or the embedding"),
        ({"modules_to_save": ["embed_tokens"]}, "changes the head or the embedding"),
        ({"r": 1000}, "rank 1000; vLLM's limit is 512"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(lora | change))
        with pytest.raises(AdapterError, match=message):
            read_adapters([tmp_path], BASE)


@pytest.fixture(scope="module")
def reward_port() -> int:
    """Where the reward model is served, while a test serves it."""
    return free_port()


MAX_JUDGMENTS = 24


@pytest.fixture(scope="module")
def http(
    judges: dict[str, Path], server: Server, reward_port: int, tmp_path_factory
) -> Iterator[httpx.Client]:
    """A server with a judge of each kind; its endpoint is the tests' own server."""
    directory = tmp_path_factory.mktemp("server")
    endpoint, reward, access = (directory / name for name in ("e.toml", "r.toml", "access.toml"))
    remote = 'kind = "{}"\nurl = "{}"\nmodel = "{}"\n'.format
    endpoint.write_text(
        remote("endpoint", f"{server.url}/v1", MODEL)
        + 'api_key_env = "THEIR_KEY"\ncontinue_final_message = true\n'
    )
    reward.write_text(remote("reward", f"http://127.0.0.1:{reward_port}", "scorer") + "beta = 2.0")
    access.write_text(f"[default]\nmax_judgments = {MAX_JUDGMENTS}\n")
    flags = ["--dtype", "float32", "--access", access, *proxy_flags()]
    flags += [f"--judge={path}" for path in (*judges.values(), endpoint)]
    flags += ["--judge", reward]
    environment = {"THEIR_KEY": API_KEY}
    with (
        serving(directory / "server.log", *flags, environment=environment) as judging_server,
        httpx.Client(base_url=judging_server.url, timeout=WAIT_SECONDS) as client,
    ):
        yield client
    assert API_KEY not in (directory / "server.log").read_text()


TURNS = [{"role": "user", "content": "I have 30 pounds for my rose. Is that enough?"}]
RESPONSES = [
    "Yes, 30 pounds is right for your rose.",
    "Not you again. Your rose needs about 35 pounds.",
    "Some money is enough for your rose. Let me know how it goes.",
]


@pytest.fixture(scope="module")
def scores(judges: dict[str, Path]) -> list[float]:
    """β log(π_lora / π_base) of each response, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    base_model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    lora_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32),
        judges["likelihood"],
    )
    values = []
    for response in RESPONSES:
        prompt, response_tokens = response_ids(tokenizer, TURNS, response)
        ids = torch.tensor([prompt + response_tokens])
        with torch.no_grad():
            sums = [
                model(ids)
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                .gather(-1, ids[0, len(prompt) :, None])
                .sum()
                .item()
                for model in (lora_model.eval(), base_model.eval())
            ]
        values.append(3.0 * (sums[0] - sums[1]))
    return values


def test_likelihood_verdicts_are_the_ratio(http: httpx.Client, scores: list[float]) -> None:
    assert max(scores) - min(scores) > 0.5
    pairs = [(0, 1), (1, 0), (0, 2), (1, 2)]
    body = {
        "kind": "likelihood",
        "pairs": [
            {"messages": TURNS, "response_a": RESPONSES[a], "response_b": RESPONSES[b]}
            for a, b in pairs
        ],
    }
    answer = http.post("/judge", json=body)
    assert answer.status_code == 200, answer.text
    for (a, b), verdict in zip(pairs, answer.json()["verdicts"], strict=True):
        expected = torch.tensor(scores[a] - scores[b]).sigmoid().item()
        assert verdict["orders"] == pytest.approx([expected, expected], abs=2e-3)
        assert list(verdict["principles"]) == ["likelihood"]
    # Three responses, each read twice, whatever the number of pairs.
    assert answer.json()["usage"]["completion_tokens"] == 6


def test_the_server_names_its_judges(http: httpx.Client) -> None:
    listed = http.get("/judge").raise_for_status().json()["data"]
    principles = {judge["kind"]: judge["principles"] for judge in listed}
    assert [*principles][:2] == ["pairwise", "proxy"]
    assert {*principles} == {*get_args(JudgeKind)}
    assert principles["pairwise"] == principles["endpoint"] == ["manners"]
    assert principles["probe"] == principles["proxy"] == []
    # `proxy` needs a name, and the server of `reward` is not up.
    for kind in {*principles} - {"proxy", "reward"}:
        body = {"prompt": "Hi.", "response_a": "Yes.", "response_b": "No.", "kind": kind}
        assert http.post("/judge", json=body).is_success, kind


def test_the_page_asks_the_judge_that_was_added(http: httpx.Client, open_page: Any) -> None:
    page = open_page(str(http.base_url).rstrip("/"), "best-of")
    page.get_by_label("Samples").select_option("2")
    page.get_by_label("Prompt").fill("How do I look after my freezer?")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Draw and judge").click()
    kinds = [judge["kind"] for judge in http.get("/judge").json()["data"]]
    judge = request.value.post_data_json["alignment"]["judge"]
    assert judge == {"strategy": "knock-out", "kind": kinds[2]}  # after the LLM itself and proxies
    page.locator(".winner").wait_for()
    page.locator(".match").click()
    assert page.locator(".match-details .bar").count() == 3
    assert page.get_by_role("button", name="Why?").is_hidden()


def test_ranking_by_likelihood(http: httpx.Client, scores: list[float]) -> None:
    body = {
        "messages": TURNS,
        "responses": RESPONSES,
        "kind": "likelihood",
        "strategy": "round-robin",
    }
    record = http.post("/judge/rank", json=body).raise_for_status().json()
    assert record["ranking"] == sorted(range(3), key=lambda i: -scores[i])
    assert replay(record) == record["ranking"]


@pytest.fixture(scope="module")
def probe_scores(judges: dict[str, Path]) -> list[float]:
    """The probe's score of each response, as a reward in training."""
    frozen = frozen_of(DEMO / "model")
    samples = [Sample([], "", *response_ids(frozen.tokenizer, TURNS, text)) for text in RESPONSES]
    return load_reward(str(judges["probe"]), frozen)(samples).tolist()


def test_a_probes_verdicts_are_those_of_the_trainings_reward(
    http: httpx.Client, probe_scores: list[float]
) -> None:
    assert max(probe_scores) - min(probe_scores) > 0.5
    pairs = [(0, 1), (1, 0), (0, 2), (1, 2)]
    body = {
        "kind": "probe",
        "pairs": [
            {"messages": TURNS, "response_a": RESPONSES[a], "response_b": RESPONSES[b]}
            for a, b in pairs
        ],
    }
    for _ in range(2):  # the second time, the prefix cache has it all
        answer = http.post("/judge", json=body).raise_for_status().json()
        for (a, b), verdict in zip(pairs, answer["verdicts"], strict=True):
            odds = torch.tensor(verdict["orders"], dtype=torch.float64).logit()
            assert odds.tolist() == pytest.approx(
                [probe_scores[a] - probe_scores[b]] * 2, rel=1e-3, abs=1e-3
            )
            assert list(verdict["principles"]) == ["probe"]
    assert answer["usage"]["completion_tokens"] == 3  # each response is read once
    metrics = http.get("/metrics").text
    assert 'assent_judge_flip_rate{judge="probe"} 0.0' in metrics


def test_ranking_by_a_probe(http: httpx.Client, probe_scores: list[float]) -> None:
    body = {"messages": TURNS, "responses": RESPONSES, "kind": "probe", "strategy": "round-robin"}
    record = http.post("/judge/rank", json=body).raise_for_status().json()
    assert record["ranking"] == sorted(range(3), key=lambda i: -probe_scores[i])
    assert replay(record) == record["ranking"]


def usage_of(prompts: list[int]) -> dict[str, int]:
    """Of judgments with prompts of these lengths."""
    total = sum(prompts)
    return {
        "prompt_tokens": total,
        "completion_tokens": len(prompts),
        "total_tokens": total + len(prompts),
    }


def test_the_pairwise_judge_is_its_lora_and_the_endpoint_another_llm(
    http: httpx.Client, judges: dict[str, Path]
) -> None:
    """By the LoRA's principles; and the LLM that answers stays the frozen one, which is the endpoint's too."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    base_model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    lora_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32),
        judges["pairwise"],
    ).eval()
    question = Question(TURNS, *RESPONSES[:2])
    a, b = label_ids(tokenizer, MANNERS)
    expected: dict[str, list[float]] = {"pairwise": [], "endpoint": []}
    for ordered_question in (question, question.swapped):
        ids = torch.tensor([judge_prompt_ids(tokenizer, ordered_question, MANNERS)])
        with torch.no_grad():
            lora_odds, base_odds = (
                model(ids).logits[0, -1, a] - model(ids).logits[0, -1, b]
                for model in (lora_model, base_model)
            )
        assert abs(lora_odds - base_odds) > 0.05
        sign = 1 if ordered_question is question else -1
        expected["pairwise"].append((sign * lora_odds).sigmoid().item())
        expected["endpoint"].append((sign * base_odds).sigmoid().item())
    body = {"messages": TURNS, "response_a": RESPONSES[0], "response_b": RESPONSES[1]}
    for kind, orders in expected.items():
        answer = http.post("/judge", json=body | {"kind": kind})
        assert answer.status_code == 200, answer.text
        verdict = answer.json()
        assert list(verdict["principles"]) == ["manners"]
        assert verdict["orders"] == pytest.approx(orders, abs=2e-3)
        assert verdict["usage"] == usage_of(2 * [len(ids[0])])


def test_an_endpoint_ranks_within_the_limits_of_a_caller(http: httpx.Client) -> None:
    body = {"messages": TURNS, "responses": RESPONSES, "kind": "endpoint", "seed": 1}
    record = http.post("/judge/rank", json=body).raise_for_status().json()
    assert record["usage"]["completion_tokens"] == 4 and replay(record) == record["ranking"]
    pair = {"messages": TURNS, "response_a": RESPONSES[0], "response_b": RESPONSES[1]}
    too_many = {"kind": "endpoint", "pairs": [pair] * (MAX_JUDGMENTS // 2 + 1)}
    answer = http.post("/judge", json=too_many)
    assert answer.status_code == 400 and "max_judgments: " in answer.text
    assert 'assent_judge_flip_rate{judge="endpoint"}' in http.get("/metrics").text


def test_a_reward_model_that_is_not_there(http: httpx.Client) -> None:
    body = {"messages": TURNS, "response_a": "a", "response_b": "b", "kind": "reward"}
    answer = http.post("/judge", json=body)
    assert answer.status_code == answer.json()["error"]["code"] == 502
    assert answer.json()["error"]["message"] == ERRORS["POST /judge"][502]
    alignment = {"best_of": 2, "judge": {"kind": "reward"}}
    # Two samples that differ: of equal ones nobody is asked.
    chat = {"model": MODEL, "messages": TURNS, "max_tokens": 24, "seed": 1, "alignment": alignment}
    answer = http.post("/v1/chat/completions", json=chat | {"stream": True})
    assert ERRORS["POST /judge"][502] in answer.text


@pytest.mark.slow  # starts a server of vLLM's
def test_a_reward_model_on_vllms_pooling_runner(
    http: httpx.Client, reward_port: int, tmp_path: Path
) -> None:
    scorer = AutoModelForSequenceClassification.from_pretrained(
        DEMO / "model", num_labels=1, dtype=torch.float32
    ).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        scorer.score.weight.normal_(std=0.05)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.save_pretrained(tmp_path / "scorer")
    lengths, rewards = [], []
    for response in RESPONSES:
        prompt, answer = response_ids(tokenizer, TURNS, response)
        ids = [*prompt, *answer]
        with torch.inference_mode():
            rewards.append(scorer(torch.tensor([ids])).logits.item())
        lengths.append(len(ids))
    assert max(rewards) - min(rewards) > 0.2
    command = (
        *("vllm.entrypoints.openai.api_server", "--model", tmp_path / "scorer"),
        *("--served-model-name", "scorer", "--runner", "pooling", "--dtype", "float32"),
        *("--port", reward_port, "--host", "127.0.0.1", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "200000000"),
    )
    with running(command, tmp_path / "log", reward_port):
        body = {"messages": TURNS, "responses": RESPONSES, "kind": "reward"}
        record = http.post("/judge/rank", json=body | {"strategy": "round-robin"})
        record = record.raise_for_status().json()
        assert record["ranking"] == sorted(range(3), key=lambda i: -rewards[i])
        assert replay(record) == record["ranking"]
        assert record["usage"] == usage_of(lengths) | {
            "completion_tokens": 0,
            "total_tokens": sum(lengths),
        }
        for comparison in record["rounds"][0]:
            a, b = comparison["pair"]
            expected = 1 / (1 + math.exp(-2.0 * (rewards[a] - rewards[b])))
            assert comparison["orders"]["reward"] == pytest.approx([expected] * 2, abs=2e-3)
        alignment = {"best_of": 2, "judge": {"kind": "reward"}}
        chat = {"model": MODEL, "messages": TURNS, "max_tokens": 8, "alignment": alignment}
        best = http.post("/v1/chat/completions", json=chat).raise_for_status().json()
        assert best["alignment"]["judge"]["kind"] == "reward"


@pytest.mark.parametrize("kind", ["likelihood", "probe"])
def test_best_of_by_scores_beside_plain_requests(http: httpx.Client, kind: str) -> None:
    def complete(**options):
        body = {"model": "assent-demo", "messages": TURNS, "max_tokens": 24, "seed": 3} | options
        return http.post("/v1/chat/completions", json=body).raise_for_status().json()

    answer = complete(n=4)
    best = complete(alignment={"best_of": 4, "judge": {"kind": kind}})
    record = best["alignment"]["judge"]
    assert (record["kind"], record["principles"]) == (kind, [])
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert best["choices"][0]["message"]["content"] == texts[record["winner"]]
    assert complete(n=4)["choices"] == answer["choices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "likelihood", "principles": ["manners"]}, "a likelihood judge has none"),
        ({"kind": "likelihood", "rationale": True}, "cannot say why"),
        ({"kind": "probe", "principles": ["manners"]}, "a probe judge has none"),
        ({"kind": "probe", "rationale": True}, "cannot say why"),
        ({"kind": "endpoint", "rationale": True}, "gives one letter, and cannot say why"),
        ({"kind": "endpoint", "principles": ["x"]}, "unknown principle 'x'; known are: manners"),
        ({"kind": "reward", "principles": ["manners"]}, "a reward judge has none"),
        ({"kind": "endpoint", "url": "http://127.0.0.1:1"}, "url: Extra inputs are not permitted"),
        ({"kind": "oracle"}, "kind"),
        ({"principles": ["overall"]}, "unknown principle 'overall'; known are: manners"),
    ],
)
def test_bad_requests(http: httpx.Client, change: dict[str, object], message: str) -> None:
    body = {"messages": TURNS, "response_a": "a", "response_b": "b"} | change
    answer = http.post("/judge", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
