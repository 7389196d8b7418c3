"""Speculative decoding: drafts change neither the law nor, with a seed, the tokens, the counts and the traces."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from scipy.stats import chi2_contingency

from proxy.checkpoint import identify, save
from proxy.engine.drafts import DraftRows
from proxy.network import ProxyConfig, ProxyNetwork

# --- the rows ---


def emitted_one_by_one(
    counts: list[int], tokens: list[int], drafts: list[int], size: int
) -> list[list[int]]:
    output, first = [], 0
    for count in counts:
        row = []
        for i in range(first, first + count):
            row.append(tokens[i])
            if tokens[i] != drafts[i]:
                break
        output.append(row + [-1] * (size - len(row)))
        first += count
    return output


def test_tokens_are_emitted_up_to_the_first_that_is_not_the_draft():
    rng = torch.Generator().manual_seed(0)
    lengths = Counter()
    for _ in range(200):
        counts = (torch.randint(4, (5,), generator=rng) + 1).tolist()
        rows = DraftRows.of(counts, torch.device("cpu"))
        tokens = torch.randint(2, (sum(counts),), generator=rng)
        drafts = torch.randint(-1, 2, (sum(counts),), generator=rng)
        drafts[torch.tensor(counts).cumsum(0) - 1] = -1
        expected = emitted_one_by_one(counts, tokens.tolist(), drafts.tolist(), 6)
        assert rows.emitted(tokens, drafts, 6).tolist() == expected
        is_rejected = rows.is_rejected(tokens, drafts)
        assert (~is_rejected).sum() == sum(token >= 0 for row in expected for token in row)
        lengths.update(sum(token >= 0 for token in row) for row in expected)
    assert {*lengths} == {1, 2, 3, 4}


def test_the_rows_of_a_step():
    rows = DraftRows.of([3, 1, 2], torch.device("cpu"))
    assert rows.expand(["a", "b", "c"]) == ["a", "a", "a", "b", "c", "c"]
    assert rows.requests.tolist() == [0, 0, 0, 1, 2, 2]
    assert rows.first_rows.tolist() == [0, 0, 0, 3, 4, 4]
    assert rows.offsets.tolist() == [0, 1, 2, 0, 0, 1]
    assert rows.requests_of([0, 1, 2, 4, 5]) == [0, 2]
    # 10 tokens are known of the first and two drafted; the last entry is padding.
    positions = rows.positions(torch.tensor([12, 7, 5, 99], dtype=torch.int32))
    assert positions.tolist() == [10, 11, 12, 7, 4, 5] and positions.dtype == torch.int32


# --- vLLM's V1 model runner in real engines ---

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
WORKER = "proxy.worker.ProxyCPUWorker"
PROMPTS = ["the cat the cat", "on the mat sat on the", "hat", "a dog a dog a dog", "on", "cat sat"]
STOPS = list(range(40, 120))


@pytest.fixture(scope="module")
def checkpoints(model_dir, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("proxies")
    configs: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"max_candidates": 6, "max_rejections": 2, "temperature": 0.8},
        "three": {"max_candidates": 8},  # beside "one", which is of the same temperature
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "vocab_size": 288, "accept_bias": 0.0}
        network = ProxyNetwork(ProxyConfig(**sizes | config))
        torch.nn.init.normal_(network.score.weight, std=1.5)
        save(root / name, network, base=identify(str(model_dir)), training={})
    return {name: str(root / name) for name in configs}


@pytest.fixture(scope="module")
def without_drafts(make_llm, checkpoints):
    return load(make_llm(worker_cls=WORKER), checkpoints)


@pytest.fixture(scope="module")
def with_drafts(make_llm, checkpoints):
    return load(make_llm(worker_cls=WORKER, speculative_config=NGRAM), checkpoints)


def load(llm: Any, checkpoints: dict[str, str]) -> Any:
    for name, directory in checkpoints.items():
        llm.collective_rpc("load_proxy", args=(name, directory))
    return llm


def params(proxy: str | None = None, *, trace: bool = False, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    if proxy is not None:
        proxies = dict.fromkeys(proxy.split("+"), 1.0)
        chosen = {"proxies": proxies} if len(proxies) > 1 else {"proxy": proxy}
        kwargs["extra_args"] = {"alignment": chosen | {"trace": trace}}
    return SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | kwargs))


def generate(llm: Any, sampling: list[Any], prompts: Any = None) -> list[Any]:
    prompts = prompts or [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    return llm.generate(prompts, sampling, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def taken(llm: Any, method: str, outputs: list[Any]) -> list[Any]:
    """What the worker has of these requests, in their order, without the engine's ids."""
    ids = [output.request_id for output in outputs]
    (answer,) = llm.collective_rpc(method, args=(ids,))
    by_number = {(int(key.split("-")[0].split("_")[-1]), key): x for key, x in answer.items()}
    return [by_number[key] for key in sorted(by_number)]


@contextmanager
def emitted_lengths() -> Iterator[list[int]]:
    """Tokens that each request emitted in each step with drafts."""
    from proxy.engine.rejection_v1 import ProxyRejectionSampler

    lengths: list[int] = []
    original = ProxyRejectionSampler.forward

    def forward(self: Any, metadata: Any, *args: Any) -> Any:
        output = original(self, metadata, *args)
        emitted = (output.sampled_token_ids >= 0).sum(-1).tolist()
        lengths.extend(
            n for n, drafts in zip(emitted, metadata.num_draft_tokens, strict=True) if drafts
        )
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProxyRejectionSampler, "forward", forward)
        yield lengths


ALIGNED: list[tuple[str, dict[str, Any]]] = [
    ("one", {"seed": 1}),
    ("two", {"seed": 2, "temperature": 0.3}),
    ("one", {"temperature": 0.0}),
    ("two", {"seed": 3, "top_k": 3, "temperature": 0.5, "trace": True}),
    ("one", {"seed": 4, "top_p": 0.6, "trace": True}),
    ("one", {"seed": 5, "allowed_token_ids": [50, 51, 52], "max_tokens": 30}),
    ("two", {"seed": 6, "temperature": 0.2, "frequency_penalty": 0.4, "repetition_penalty": 1.1}),
    ("one", {"seed": 7, "temperature": 0.3, "logprobs": 3}),
    ("two", {"seed": 8, "temperature": 0.1, "n": 2}),
    ("one", {"seed": 9, "temperature": 0.2, "stop_token_ids": STOPS, "min_tokens": 9}),
    ("one", {"seed": 10, "allowed_token_ids": [50, 51], "stop_token_ids": [51], "trace": True}),
    ("one", {"seed": 11, "temperature": 0.2, "bad_words": ["the", " the", "e"]}),
    ("one+three", {"seed": 12}),
    ("one+three", {"seed": 13, "temperature": 0.3, "trace": True}),
]


def generate_alike(without_drafts: Any, with_drafts: Any, requests: Any) -> tuple[Any, Any]:
    """The outputs of both engines for the same requests, which must have the same tokens."""
    sampling = [params(proxy, **kwargs) for proxy, kwargs in requests]
    expected = generate(without_drafts, sampling)
    with emitted_lengths() as lengths:
        outputs = generate(with_drafts, sampling)
    assert tokens(outputs) == tokens(expected)
    assert Counter(lengths).keys() >= {1, 2, 3, 4}
    return expected, outputs


@pytest.mark.parametrize("alone", [False, True], ids=["all kinds", "logits untouched"])
def test_drafts_change_nothing_of_a_seeded_request(without_drafts, with_drafts, alone):
    """The kinds beside each other go through vLLM's stages; without any work for these they are skipped."""
    requests = ALIGNED[:3] if alone else ALIGNED
    expected, outputs = generate_alike(without_drafts, with_drafts, requests)
    for method in ("take_traces", "take_alignment_counts"):
        entries, expected_entries = (
            taken(llm, method, of)
            for llm, of in ((with_drafts, outputs), (without_drafts, expected))
        )
        assert len(entries) == len(expected_entries)
        if method == "take_alignment_counts":
            samples = [name for name, kwargs in requests for _ in range(kwargs.get("n", 1))]
            assert [entry["proxy"] for entry in entries] == [
                "+".join(sorted(name.split("+"))) for name in samples
            ]
        for entry, expected_entry in zip(entries, expected_entries, strict=True):
            if method == "take_traces":  # the probabilities are rounded otherwise
                entry, expected_entry = (
                    [(e["token_id"], e["forced"], len(e["rejected"])) for e in trace]
                    for trace in (entry, expected_entry)
                )
            assert entry == expected_entry
    if not alone:
        for entry, other in zip(
            outputs[7].outputs[0].logprobs, expected[7].outputs[0].logprobs, strict=True
        ):
            assert entry.keys() == other.keys()
            assert [x.logprob for x in entry.values()] == pytest.approx(
                [x.logprob for x in other.values()], abs=1e-4
            )


def test_a_draft_model_changes_nothing_either(make_llm, model_dir, checkpoints, without_drafts):
    """The LLM drafts for itself."""
    config = {"method": "draft_model", "model": str(model_dir), "num_speculative_tokens": 3}
    llm = load(make_llm(worker_cls=WORKER, speculative_config=config), checkpoints)
    requests = [*ALIGNED[:7], *ALIGNED[9:11]]
    expected, outputs = generate_alike(without_drafts, llm, requests)
    assert taken(llm, "take_alignment_counts", outputs) == taken(
        without_drafts, "take_alignment_counts", expected
    )


def test_a_draft_beyond_the_end_is_not_counted(with_drafts):
    """max_tokens and a stop token cut a step's tokens."""
    sampling = [
        params("one", seed=i, allowed_token_ids=[50, 51], **kwargs)
        for i in range(8)
        for kwargs in ({"max_tokens": 5}, {"max_tokens": 6}, {"stop_token_ids": [51]})
    ]
    outputs = generate(with_drafts, sampling)
    for output, counts in zip(
        outputs, taken(with_drafts, "take_alignment_counts", outputs), strict=True
    ):
        assert counts["accepted"] + counts["forced"] == len(output.outputs[0].token_ids)


UNPROXIED = [
    {"temperature": 0.0},
    {"seed": 1, "temperature": 0.3},
    {"seed": 2, "temperature": 0.5, "top_k": 3},
    {"seed": 3, "top_p": 0.5, "logprobs": 2},
    {"seed": 4, "allowed_token_ids": [50, 51], "frequency_penalty": 0.2},
]


def test_requests_without_a_proxy_get_vllms_verification_in_any_batch(with_drafts):
    """The same tokens beside requests with a proxy as without any proxy in the batch."""
    sampling = [params(**kwargs) for kwargs in UNPROXIED]
    expected = generate(with_drafts, sampling)
    mixed = [s for i, own in enumerate(sampling) for s in (own, params("one", seed=i))]
    prompts = [text for i in range(len(sampling)) for text in (PROMPTS[i], "the cat")]
    with emitted_lengths() as lengths:
        outputs = generate(with_drafts, mixed, prompts)[::2]
    assert tokens(outputs) == tokens(expected)
    assert max(lengths) == 4
    for output, other in zip(outputs, expected, strict=True):
        logprobs, others = (x.outputs[0].logprobs or [] for x in (output, other))
        assert [e.keys() for e in logprobs] == [e.keys() for e in others]


def test_the_frozen_llm_has_the_same_law_with_drafts(without_drafts, with_drafts):
    """Pairs of tokens, of which the second was drafted: their counts on both engines.

    vLLM's own CPU build would divide the logits of a draft by whatever was in memory. One test; it
    raises a false alarm with probability 1e-7.
    """
    prompt = {"prompt_token_ids": [5, 50, 51, 52, 53, 50, 52, 51, 53, 54, 50]}
    kwargs = {"temperature": 0.7, "top_k": 4, "max_tokens": 2}
    allowed = [50, 51, 52, 53, 54]
    observed = []
    for llm in (without_drafts, with_drafts):
        sampling = [params(seed=i, allowed_token_ids=allowed, **kwargs) for i in range(1500)]
        pairs = Counter(tuple(t) for (t,) in tokens(generate(llm, sampling, [prompt] * 1500)))
        observed.append([pairs[pair] for pair in itertools.product(allowed, repeat=2)])
    table = torch.tensor(observed)
    table = table[:, table.sum(0) >= 10]
    assert table.sum() > 0.95 * 3000 and table.shape[1] > 6
    assert chi2_contingency(table.numpy()).pvalue > 1e-7


def test_labels_are_read_beside_drafts(without_drafts, with_drafts):
    """As a judge reads them: vLLM's own rejection sampler has no logprobs of given tokens."""
    label = params(temperature=0.0, max_tokens=1, logprob_token_ids=[60, 61])
    for neighbour in (params("one", temperature=0.0), params(temperature=0.0)):
        values = []
        for llm in (without_drafts, with_drafts):
            # It arrives while drafts are under way.
            engine = llm.llm_engine
            engine.add_request("long", "the cat the cat", neighbour)
            for _ in range(14):
                engine.step()
            engine.add_request("label", "a dog", label)
            done = {}
            with emitted_lengths() as lengths:
                while engine.has_unfinished_requests():
                    done |= {o.request_id: o for o in engine.step() if o.finished}
            (entry,) = done["label"].outputs[0].logprobs
            values.append([entry[token].logprob for token in (60, 61)])
        assert lengths and values[1] == pytest.approx(values[0], abs=1e-4)


def test_a_shadow_scores_what_is_emitted(checkpoints, with_drafts):
    """No token twice and none that was rejected. Of the frozen LLM's some are outside the shadow's nucleus."""
    (eye,) = with_drafts.collective_rpc("load_proxy", args=("eye", checkpoints["two"], True))
    try:
        sampling = [params("one", seed=1, temperature=0.3), params(seed=2, temperature=0.3)]
        generate(with_drafts, sampling)
        with_drafts.collective_rpc("flush_metrics")
        labels = {"proxy": "eye", "version": eye["version"]}
        scored = REGISTRY.get_sample_value("assent_shadow_tokens_total", labels)
        assert scored is not None and 30 < scored <= 48
    finally:
        with_drafts.collective_rpc("unload_proxy", args=("eye",))
