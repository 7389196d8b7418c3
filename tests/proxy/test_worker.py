"""The worker and its sampler inside real vLLM engines, against vLLM's own."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from torch.multiprocessing.reductions import StorageWeakRef

from proxy.checkpoint import BaseModelId, ProxyError, identify, save
from proxy.network import ProxyConfig, ProxyNetwork

EOS = 1
BOTH = {"two": 0.5, "one": 1.0}
PROMPTS = ["the cat", "a dog sat on the mat", "hat", "on that mat lay", "cat cat", "x"]
WORKER = "proxy.worker.ProxyCPUWorker"


def make_proxy(directory: Any, base: BaseModelId, seed: int, **config: Any) -> str:
    """A random proxy that rejects about half of the candidates."""
    torch.manual_seed(seed)
    network = ProxyNetwork(ProxyConfig(hidden_size=64, vocab_size=288, accept_bias=0.0, **config))
    torch.nn.init.normal_(network.score.weight, std=1.5)
    save(directory, network, base=base, training={"seed": seed})
    return str(directory)


@pytest.fixture(scope="module")
def base(model_dir):
    return identify(str(model_dir))


@pytest.fixture(scope="module")
def checkpoints(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("proxies")
    return {
        "one": make_proxy(root / "one", base, 1),
        "two": make_proxy(root / "two", base, 2, max_candidates=6, max_rejections=2),
    }


@pytest.fixture(scope="module")
def stock(make_llm):
    return make_llm()


@pytest.fixture(scope="module")
def proxied_llm(make_llm):
    return make_llm(worker_cls=WORKER)


@pytest.fixture
def proxied(proxied_llm, checkpoints):
    """The engine with both proxies loaded afresh and no other."""
    for entry in rpc(proxied_llm, "list_proxies"):
        rpc(proxied_llm, "unload_proxy", entry["name"], entry["version"])
    for name, directory in checkpoints.items():
        rpc(proxied_llm, "load_proxy", name, directory)
    return proxied_llm


def rpc(llm: Any, method: str, *args: Any) -> Any:
    (answer,) = llm.collective_rpc(method, args=args)
    return answer


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def params(proxy: str | None = None, **kwargs: Any) -> Any:
    """Sampling parameters, with the worker's fields among the extra arguments."""
    from vllm import SamplingParams

    fields = ("strength", "max_rejections", "version", "trace", "shadow", "proxies")
    alignment = {key: kwargs.pop(key) for key in fields if key in kwargs}
    if proxy is not None or alignment:
        kwargs["extra_args"] = {"alignment": {"proxy": proxy, **alignment}}
    return SamplingParams(**({"max_tokens": 16, "ignore_eos": True} | kwargs))


def generate(llm: Any, prompts: list[str], sampling: list[Any]) -> list[Any]:
    assert not getattr(llm, "broken", False), "an earlier test broke this engine"
    try:
        return llm.generate(prompts, sampling, use_tqdm=False)
    except Exception:  # its scheduler would wait for the lost step for ever
        llm.broken = True
        raise


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def counts_of(llm: Any, output: Any) -> dict[str, Any]:
    """The counts of a request with one sample, which must be there."""
    (counts,) = rpc(llm, "take_alignment_counts", [output.request_id]).values()
    return counts


WITHOUT_PROXY = [
    {"seed": 1},
    {"seed": 2, "top_p": 0.8},
    {"seed": 3, "top_k": 5, "temperature": 0.7},
    {"temperature": 0.0},
    {"seed": 4, "min_p": 0.05, "top_k": 30, "top_p": 0.95, "frequency_penalty": 0.5},
    {"seed": 5, "logprobs": 2, "temperature": 1.3, "stop_token_ids": [40, 41, 42]},
]


def test_without_a_proxy_the_tokens_are_vllms(stock, proxied):
    sampling = [params(**kwargs) for kwargs in WITHOUT_PROXY]
    assert tokens(generate(proxied, PROMPTS, sampling)) == tokens(
        generate(stock, PROMPTS, sampling)
    )


def test_strength_zero_is_vllm(stock, proxied):
    expected = generate(stock, PROMPTS, [params(**kwargs) for kwargs in WITHOUT_PROXY])
    sampling = [params("one", strength=0.0, **kwargs) for kwargs in WITHOUT_PROXY]
    outputs = generate(proxied, PROMPTS, sampling)
    assert tokens(outputs) == tokens(expected)
    assert rpc(proxied, "take_alignment_counts", [output.request_id for output in outputs]) == {}


@pytest.mark.parametrize("greedy_neighbours", [False, True])
def test_plain_rows_of_a_mixed_batch_are_vllms(stock, proxied, greedy_neighbours):
    """Proxied rows between them change nothing, in any mix."""
    temperature = 0.0 if greedy_neighbours else 1.0
    mixed_prompts = [text for prompt in PROMPTS for text in (prompt, "the dog")]
    neighbours = [
        params(
            ("one", "two")[i % 2], temperature=temperature, top_p=1.0 if greedy_neighbours else 0.9
        )
        for i in range(len(PROMPTS))
    ]
    mixed = [
        request
        for i, kwargs in enumerate(WITHOUT_PROXY)
        for request in (params(**kwargs), neighbours[i])
    ]
    unproxied = [
        request for kwargs in WITHOUT_PROXY for request in (params(**kwargs), params(seed=9))
    ]
    expected = tokens(generate(stock, mixed_prompts, unproxied))[::2]
    assert tokens(generate(proxied, mixed_prompts, mixed))[::2] == expected


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"seed": 6}])
def test_mixed_batches_of_one_kind(stock, proxied, kwargs):
    """All-greedy and all-random batches take other paths through vLLM's sampler."""
    sampling = [params("one", **kwargs), *(params(**kwargs) for _ in PROMPTS[1:])]
    expected = tokens(generate(stock, PROMPTS, [params(**kwargs) for _ in PROMPTS]))
    assert tokens(generate(proxied, PROMPTS, sampling))[1:] == expected[1:]


def test_a_proxy_changes_the_text_and_the_counts_add_up(stock, proxied):
    kinds = [{"seed": i, "top_p": 0.95} for i in range(3)] + [{"temperature": 0.0}] * 3
    outputs = generate(proxied, PROMPTS, [params("one", **kind) for kind in kinds])
    references = generate(stock, PROMPTS, [params(**kind) for kind in kinds])
    version = next(
        entry["version"] for entry in rpc(proxied, "list_proxies") if entry["name"] == "one"
    )
    for output, reference in zip(outputs, references, strict=True):
        counts = counts_of(proxied, output)
        assert tokens([output]) != tokens([reference])
        assert (counts["proxy"], counts["version"]) == ("one", version)
        assert counts["accepted"] + counts["forced"] == 16
        assert counts["proposed"] == counts["accepted"] + counts["rejected"]
        assert counts["rejected"] > 0
        assert rpc(proxied, "take_alignment_counts", [output.request_id]) == {}


def test_counts_stop_with_the_text(proxied):
    sampling = [params("one", seed=i, ignore_eos=False, max_tokens=60, logit_bias={EOS: 4.0})
                for i in range(len(PROMPTS))]  # fmt: skip
    outputs = generate(proxied, PROMPTS, sampling)
    lengths = [len(text) for text in tokens(outputs)]
    assert len(set(lengths)) > 1 and max(lengths) < 60
    for output, length in zip(outputs, lengths, strict=True):
        counts = counts_of(proxied, output)
        assert counts["accepted"] + counts["forced"] == length


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(proxied):
    kinds = [{"proxy": ("one", "two")[i % 2], "seed": 20 + i, "top_p": 0.9} for i in range(4)]
    sampling = [params(**kind) for kind in kinds] + [params(seed=3), params(seed=4, proxies=BOTH)]
    batch_texts = tokens(generate(proxied, PROMPTS, sampling))
    single_texts = [
        tokens(generate(proxied, [prompt], [request]))[0]
        for prompt, request in zip(PROMPTS, sampling, strict=True)
    ]
    assert batch_texts == single_texts
    greedy = [params("one", temperature=0.0), params(seed=1)]
    assert (
        tokens(generate(proxied, PROMPTS[:2], greedy))[0]
        == tokens(generate(proxied, PROMPTS[:1], greedy[:1]))[0]
    )


def test_several_samples_of_a_request(proxied):
    (output,) = generate(proxied, PROMPTS[:1], [params("one", n=3, seed=5)])
    texts = [list(sample.token_ids) for sample in output.outputs]
    assert len({tuple(text) for text in texts}) == 3
    # vLLM gives sample i the seed 5 + i.
    single_texts = [
        tokens(generate(proxied, PROMPTS[:1], [params("one", seed=5 + i)]))[0] for i in range(3)
    ]
    assert texts == single_texts
    counts = rpc(proxied, "take_alignment_counts", [output.request_id])
    assert sorted(req_id.split("_")[0] for req_id in counts) == ["0", "1", "2"]
    assert all(entry["accepted"] + entry["forced"] == 16 for entry in counts.values())


def test_logprobs_are_the_frozen_llms(proxied, model_dir):
    """Against transformers on the finished text."""
    from transformers import AutoModelForCausalLM

    (output,) = generate(proxied, PROMPTS[1:2], [params("one", seed=1, logprobs=3)])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = [*output.prompt_token_ids, *tokens([output])[0]]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i, (token, entry) in enumerate(
        zip(tokens([output])[0], output.outputs[0].logprobs, strict=True)
    ):
        position = expected[len(output.prompt_token_ids) - 1 + i]
        assert entry[token].logprob == pytest.approx(position[token].item(), abs=1e-3)
        assert entry[token].rank == 1 + (position > position[token]).sum()
        assert set(position.topk(3).indices.tolist()) <= set(entry)


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_processed_logprobs_of_a_mixed_batch(make_llm, checkpoints, mode):
    """At the first position, before the texts differ, every row has the values that vLLM reports."""
    sampling = [
        {"seed": 1, "top_p": 0.9, "logprobs": 4},
        {"seed": 2, "top_k": 7, "temperature": 0.6, "logprobs": 4},
        {"temperature": 0.0, "logprobs": 4},
        {"seed": 4, "logprobs": 4},
    ]
    llm = make_llm(worker_cls=WORKER, logprobs_mode=mode)
    rpc(llm, "load_proxy", "one", checkpoints["one"])
    reference = make_llm(logprobs_mode=mode)
    for kinds in (sampling, [sampling[2]] * 4):
        references = generate(
            reference, PROMPTS[:4], [params(max_tokens=1, **kwargs) for kwargs in kinds]
        )
        proxies = ["one", None, "one", None]
        mixed = generate(
            llm,
            PROMPTS[:4],
            [
                params(proxy, max_tokens=1, **kwargs)
                for proxy, kwargs in zip(proxies, kinds, strict=True)
            ],
        )
        for actual, expected_output in zip(mixed, references, strict=True):
            (actual_logprobs,), (expected_logprobs,) = (
                actual.outputs[0].logprobs,
                expected_output.outputs[0].logprobs,
            )
            top = {
                token: entry.logprob
                for token, entry in expected_logprobs.items()
                if entry.rank <= 4 and math.isfinite(entry.logprob)
            }
            assert {token: actual_logprobs[token].logprob for token in top} == pytest.approx(
                top, rel=1e-5, abs=1e-5
            )


def test_constraints_bind_the_proxy_too(proxied):
    rng = torch.Generator().manual_seed(0)
    token_ids = torch.randperm(288, generator=rng)[:12].tolist()
    logit_bias = {token: -100.0 for token in range(288) if token not in token_ids[:8]}
    sampling = [
        params("one", seed=1, allowed_token_ids=token_ids[:5]),
        params("one", seed=2, logit_bias=logit_bias, top_p=0.999),
        # All logits negative, and a huge penalty: no token comes twice.
        params(
            "one",
            seed=3,
            max_tokens=12,
            allowed_token_ids=token_ids,
            logit_bias=dict.fromkeys(token_ids, -50.0),
            repetition_penalty=1e6,
        ),
        params("one", seed=4, max_tokens=30, logit_bias={EOS: 100.0}, min_tokens=7,
               ignore_eos=False, top_p=0.5),
        params("one", temperature=0.0, allowed_token_ids=token_ids[5:6]),
        params("one", seed=5, min_p=1.0),
    ]  # fmt: skip
    outputs = generate(proxied, ["a b c d"] * 6, sampling)
    allowed, bias, penalty, min_tokens, single, _ = tokens(outputs)
    assert set(allowed) <= set(token_ids[:5]) and len(set(allowed)) > 1
    assert set(bias) <= set(token_ids[:8]) and len(set(bias)) > 1
    assert sorted(penalty) == sorted(token_ids)
    assert len(min_tokens) == 8 and min_tokens[-1] == EOS
    assert single == token_ids[5:6] * 16
    # min_p 1 leaves one candidate, which is not scored: nothing is rejected.
    counts = counts_of(proxied, outputs[5])
    assert (counts["proposed"], counts["rejected"], counts["forced"]) == (16, 0, 0)


def test_stop_strings(proxied):
    full_text = generate(proxied, PROMPTS[:1], [params("one", seed=1)])[0].outputs[0].text
    stop = full_text[5:7]
    (output,) = generate(proxied, PROMPTS[:1], [params("one", seed=1, stop=[stop])])
    assert output.outputs[0].text == full_text[: full_text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"


def test_structured_choice(proxied):
    from vllm.sampling_params import StructuredOutputsParams

    sampling = [
        params("one", seed=seed, max_tokens=40, ignore_eos=False,
               structured_outputs=StructuredOutputsParams(choice=["the cat sat", "a dog", "hat"]))
        for seed in range(5)
    ] + [params(seed=1)]  # fmt: skip
    outputs = generate(proxied, PROMPTS, sampling)
    texts = {output.outputs[0].text for output in outputs[:5]}
    assert texts <= {"the cat sat", "a dog", "hat"} and len(texts) > 1


def test_two_proxies_in_one_batch_give_what_each_gives_alone(proxied):
    names = ["one", "two", "one", "two", "two", "one"]
    sampling = [params(name, seed=i) for i, name in enumerate(names)]
    mixed = tokens(generate(proxied, PROMPTS, sampling))
    for name in ("one", "two"):
        rows = [i for i, proxy in enumerate(names) if proxy == name]
        single_texts = tokens(
            generate(proxied, [PROMPTS[i] for i in rows], [sampling[i] for i in rows])
        )
        assert single_texts == [mixed[i] for i in rows]


def test_several_proxies_decide_together(proxied):
    """In any order alike; their metrics count each of the tokens; the trace has each one's factor."""
    reordered = dict(reversed(BOTH.items()))
    requests = [
        params(seed=1, proxies=BOTH, trace=True),
        params(seed=1, proxies=reordered),
        params(seed=1, proxies={"two": 0.5}),
        params("two", seed=1, strength=0.5),
        params(seed=1, proxies={"one": 0.0, "two": 0.5}),
        params(seed=1, proxies={"one": 0.0}),
        params(seed=1),
    ]
    outputs = generate(proxied, PROMPTS[:1] * len(requests), requests)
    together, same, *twos, zero, frozen = tokens(outputs)
    assert together == same and zero == frozen
    assert twos == [twos[0]] * 3 and len({*map(tuple, (together, twos[0], frozen))}) == 3
    (trace,) = rpc(proxied, "take_traces", [outputs[0].request_id]).values()
    counts = counts_of(proxied, outputs[0])
    versions = {entry["name"]: entry["version"] for entry in rpc(proxied, "list_proxies")}
    assert (counts["proxy"], counts["version"]) == (
        "one+two",
        f"{versions['one']}+{versions['two']}",
    )
    assert_adds_up(trace, counts, together)
    scored = [c for entry in trace for c in (entry, *entry["rejected"]) if "by_proxy" in c]
    assert len(scored) > 16
    for candidate in scored:
        product = math.prod(candidate["by_proxy"][name] for name in ("one", "two"))
        assert candidate["accept_probability"] == pytest.approx(product, rel=1e-4)


def test_a_request_with_a_proxy_that_is_not_there_has_none(proxied, caplog):
    requests = [params(seed=1, proxies={"one": 1.0, "three": 1.0}), params(seed=1)]
    first, frozen = tokens(generate(proxied, PROMPTS[:1] * 2, requests))
    assert first == frozen


def capture_steps(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(hidden rows, logits) of every step with a proxy, as the sampler gets them."""
    from proxy.engine.sampler_v1 import ProxySampler

    steps: list[tuple[Any, Any]] = []
    original = ProxySampler.forward

    def forward(self, logits, *args, **kwargs):
        if self.step is not None:
            steps.append((self.step.hidden.clone(), logits.float().clone()))
        return original(self, logits, *args, **kwargs)

    monkeypatch.setattr(ProxySampler, "forward", forward)
    return steps


def test_hidden_rows_belong_to_their_logits(make_llm, checkpoints, monkeypatch):
    """The head applied to the rows that the proxy sees gives the logits that it judges.

    Prompts of different lengths in chunks of at most 24 tokens, so that steps mix prefills that
    have ended, prefills that have not, and decoding. Rolled rows are the control.
    """
    llm = make_llm(worker_cls=WORKER, max_num_batched_tokens=24)
    rpc(llm, "load_proxy", "one", checkpoints["one"])
    steps = capture_steps(llm, monkeypatch)
    prompts = [prompt * (1 + 3 * i) for i, prompt in enumerate(PROMPTS)]
    generate(llm, prompts, [params("one" if i % 2 else None, seed=i) for i in range(6)])
    head = worker_of(llm).model_runner.get_model().compute_logits
    multi_row = [(hidden, logits) for hidden, logits in steps if len(logits) > 1]
    assert len(multi_row) > 10
    for hidden, logits in steps:
        torch.testing.assert_close(head(hidden).float(), logits, rtol=1e-4, atol=1e-4)
    for hidden, logits in multi_row:
        assert not torch.allclose(head(hidden.roll(1, 0)).float(), logits, rtol=1e-2, atol=1e-2)


def test_seeded_requests_survive_chunked_prefill(make_llm, stock, checkpoints):
    """vLLM's own CPU worker crashes on a seeded request with a chunked prefill. Chunks are not counted either."""
    llm = make_llm(worker_cls=WORKER, max_num_batched_tokens=24)
    rpc(llm, "load_proxy", "one", checkpoints["one"])
    prompts = ["the cat sat on the mat with 123 others " * 3, "a dog", "more of the cats " * 5]
    unproxied = [params(seed=i, top_p=0.9) for i in range(3)]
    assert tokens(generate(llm, prompts, unproxied)) == tokens(generate(stock, prompts, unproxied))
    rpc(llm, "load_proxy", "two", checkpoints["two"])
    aligned = [params("one", seed=0), params("one", seed=1), params(seed=2, proxies=BOTH)]
    outputs = generate(llm, prompts, aligned)
    for output in outputs:
        counts = counts_of(llm, output)
        assert counts["accepted"] + counts["forced"] == 16


def reject_only(llm: Any, name: str, token: int) -> None:
    """Turn a loaded proxy into one that rejects this token always and no other ever."""
    worker = worker_of(llm)
    weights, table = worker._registry.pool.single(worker._registry._bound[name])
    with torch.inference_mode():
        for part in (*weights, table):
            part.zero_()
        table[token, -1] = 1e4
        weights.score[0, -1, 0] = -1.0
        weights.bias[0, 0, 0] = 100.0


def test_a_rejected_token_appears_only_when_forced(proxied):
    token, other_token = 60, 61
    reject_only(proxied, "one", token)
    unconstrained = params("one", seed=1, max_tokens=200)
    # The rejected token is always the likelier of two, and only one rejection is allowed.
    forced = params(
        "one",
        seed=2,
        max_tokens=200,
        max_rejections=1,
        allowed_token_ids=[token, other_token],
        logit_bias={token: 9.0},
        temperature=2.0,
    )
    unforced = params("one", seed=3, max_tokens=200, allowed_token_ids=[token, other_token])
    single = params("one", seed=4, max_tokens=20, allowed_token_ids=[token])
    without_rejections = params("one", seed=5, max_tokens=20, max_rejections=0)
    greedy = params("one", temperature=0.0, max_tokens=20, allowed_token_ids=[token, other_token],
                    logit_bias={token: 20.0})  # fmt: skip
    sampling = [unconstrained, forced, unforced, single, without_rejections, greedy]
    outputs = generate(proxied, PROMPTS, sampling)
    texts = tokens(outputs)
    counts = [counts_of(proxied, output) for output in outputs]

    assert token not in texts[0] and counts[0]["forced"] == 0
    assert 0 < texts[1].count(token) == counts[1]["forced"] < 200
    assert texts[2] == [other_token] * 200 and counts[2]["rejected"] > 0 == counts[2]["forced"]
    assert texts[3] == [token] * 20 and counts[3]["rejected"] == counts[3]["forced"] == 0
    assert (counts[4]["proposed"], counts[4]["forced"]) == (0, 20)
    assert texts[5] == [other_token] * 20 and counts[5]["rejected"] == 20


def test_max_rejections_zero_is_greedy_decoding(stock, proxied):
    sampled = tokens(generate(proxied, PROMPTS, [params("one", max_rejections=0)] * 6))
    assert sampled == tokens(generate(stock, PROMPTS, [params(temperature=0.0)] * 6))


@pytest.mark.parametrize(
    "extra_args",
    [
        {"alignment": None},
        {"alignment": 7},
        {"alignment": []},
        {"alignment": {"proxy": ["one"]}},
        {"alignment": {"proxy": "one", "strength": "strong"}},
        {"alignment": {"proxy": "one", "max_rejections": 1e300}},
        {"alignment": {"proxy": "one", "surprise": {"deep": [1]}}},
        {"alignment": {"proxy": "no such proxy"}},
    ],
)
def test_malformed_extra_args_are_plain_sampling(stock, proxied, extra_args):
    from vllm import SamplingParams

    sampling = SamplingParams(seed=1, max_tokens=8, ignore_eos=True, extra_args=extra_args)
    expected = tokens(generate(stock, PROMPTS[:1], [params(seed=1, max_tokens=8)]))
    assert tokens(generate(proxied, PROMPTS[:1], [sampling])) == expected


def test_loading_errors_leave_the_engine_alive(proxied, base, tmp_path, checkpoints):
    foreign = make_proxy(
        tmp_path / "foreign", BaseModelId(name="another-llm", fingerprint="0" * 64), 1
    )
    with pytest.raises(ProxyError, match="another-llm"):
        rpc(proxied, "load_proxy", "foreign", foreign)
    network = ProxyNetwork(ProxyConfig(hidden_size=32, vocab_size=288))
    save(tmp_path / "narrow", network, base=base, training={})
    with pytest.raises(ProxyError, match="hidden size 32"):
        rpc(proxied, "load_proxy", "narrow", str(tmp_path / "narrow"))
    with pytest.raises(ProxyError, match="nowhere"):
        rpc(proxied, "load_proxy", "lost", str(tmp_path / "nowhere"))
    with pytest.raises(ProxyError, match="name"):
        rpc(proxied, "load_proxy", "", checkpoints["one"])
    with pytest.raises(ProxyError, match=r"Loaded: one \(\w{12}\), two \(\w{12}\)\."):
        rpc(proxied, "unload_proxy", "three")
    with pytest.raises(ProxyError, match=r"'one \(v1\)'"):
        rpc(proxied, "unload_proxy", "one", "v1")
    assert [entry["name"] for entry in rpc(proxied, "list_proxies")] == ["one", "two"]
    assert len(tokens(generate(proxied, PROMPTS, [params("one", seed=1)] * 6))) == 6


def test_loading_describes_the_proxy(proxied, checkpoints, base):
    entry = rpc(proxied, "load_proxy", "three", checkpoints["two"])
    assert entry == {
        "name": "three",
        "version": entry["version"],
        "directory": checkpoints["two"],
        "shadow": False,
        "max_candidates": 6,
        "max_rejections": 2,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_parameters": 18_690,
        # H 64, V 288, W 64, float32: state, product, logprob, score, bias, candidate table
        "num_bytes": 4 * (64 * 128 + 64 * 64 + 64 + 64 + 1 + 288 * 128),
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "training": {"seed": 2},
    }
    assert rpc(proxied, "list_proxies")[-1] == entry
    assert rpc(proxied, "unload_proxy", "three") == entry


def test_requests_in_flight_keep_the_version_they_began_with(proxied, checkpoints):
    engine = proxied.llm_engine
    expected = tokens(generate(proxied, PROMPTS[:1], [params("one", seed=1)]))[0]
    versions = {entry["name"]: entry["version"] for entry in rpc(proxied, "list_proxies")}
    engine.add_request("early", PROMPTS[0], params("one", seed=1))
    for _ in range(5):
        engine.step()
    rpc(proxied, "load_proxy", "one", checkpoints["two"])
    rpc(proxied, "unload_proxy", "two")
    engine.add_request("late", PROMPTS[0], params("one", seed=1))
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert tokens([finished["early"]])[0] == expected
    assert tokens([finished["late"]])[0] != expected
    assert counts_of(proxied, finished["early"])["version"] == versions["one"]
    assert counts_of(proxied, finished["late"])["version"] == versions["two"]


def versions_of(llm: Any) -> dict[str, list[str]]:
    """The versions of each name, in the order of loading."""
    versions_by_name: dict[str, list[str]] = {}
    for entry in rpc(llm, "list_proxies"):
        versions_by_name.setdefault(entry["name"], []).append(entry["version"])
    return versions_by_name


def test_several_versions_under_a_name(stock, proxied, checkpoints):
    """A request may name any version; otherwise it gets the one that was loaded last, also after a rollback."""

    def texts(name: str = "one", version: str | None = None) -> list[list[int]]:
        sampling = [params(name, version=version, seed=i) for i in range(3)]
        return tokens(generate(proxied, PROMPTS[:3], sampling))

    old_texts, new_texts = texts("one"), texts("two")
    unproxied_texts = tokens(generate(stock, PROMPTS[:3], [params(seed=i) for i in range(3)]))
    first = rpc(proxied, "load_proxy", "one", checkpoints["one"])["version"]
    second = rpc(proxied, "load_proxy", "one", checkpoints["two"])["version"]
    assert versions_of(proxied) == {"one": [first, second], "two": [second]}
    assert (texts(), texts(version=first), texts(version=second)) == (
        new_texts,
        old_texts,
        new_texts,
    )
    rpc(proxied, "load_proxy", "one", checkpoints["one"])
    assert versions_of(proxied) == {"one": [first, second], "two": [second]}
    assert (texts(), texts(version=first), texts(version=second)) == (
        old_texts,
        old_texts,
        new_texts,
    )
    assert rpc(proxied, "unload_proxy", "one")["version"] == first
    # The server refuses such requests; the worker must not crash on them.
    assert texts() == texts(version=first) == unproxied_texts
    assert texts(version=second) == new_texts
    # Without a version: the only one there is.
    assert rpc(proxied, "unload_proxy", "one")["version"] == second
    assert versions_of(proxied) == {"two": [second]}


def test_loading_a_version_again_changes_nothing(proxied, checkpoints):
    entries, pool = rpc(proxied, "list_proxies"), worker_of(proxied)._registry.pool
    proxies, tables = list(pool.proxies), pool.tables
    assert rpc(proxied, "load_proxy", "one", checkpoints["one"]) == entries[0]
    assert rpc(proxied, "list_proxies") == entries
    assert pool.proxies == proxies and pool.tables is tables


def test_a_load_that_fails_half_way_leaves_nothing_behind(proxied, checkpoints, monkeypatch):
    sampling = [params(("one", "two")[i % 2], seed=i) for i in range(6)]
    expected = tokens(generate(proxied, PROMPTS, sampling))
    entries, pool = rpc(proxied, "list_proxies"), worker_of(proxied)._registry.pool
    tables = pool.tables

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_stack", no_memory)
        with pytest.raises(ProxyError, match="OutOfMemoryError: no room"):
            rpc(proxied, "load_proxy", "one", checkpoints["two"])
    assert rpc(proxied, "list_proxies") == entries
    assert pool.tables is tables and len(pool.proxies) == 2
    assert tokens(generate(proxied, PROMPTS, sampling)) == expected
    rpc(proxied, "load_proxy", "one", checkpoints["two"])
    assert len(rpc(proxied, "list_proxies")) == 3


def test_an_unloaded_proxy_is_freed_when_its_last_request_has_ended(proxied):
    """Not before: the request goes on unchanged."""
    engine, pool = proxied.llm_engine, worker_of(proxied)._registry.pool
    expected = tokens(generate(proxied, PROMPTS[:1], [params("one", seed=1)]))[0]
    names_before = [proxy.name for proxy in pool.proxies if proxy.name == "one"]
    engine.add_request("long", PROMPTS[0], params("one", seed=1))
    for _ in range(4):
        engine.step()
    rpc(proxied, "unload_proxy", "one")
    assert [entry["name"] for entry in rpc(proxied, "list_proxies")] == ["two"]
    engine.add_request("short", PROMPTS[1], params("two", seed=1, max_tokens=3))
    for _ in range(6):  # "short" begins and ends
        engine.step()
        assert sorted(proxy.name for proxy in pool.proxies) == [*names_before, "two"]
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert tokens([finished["long"]])[0] == expected
    storages = [StorageWeakRef(part.untyped_storage()) for part in (*pool.weights, pool.tables)]
    generate(proxied, PROMPTS[:1], [params(seed=1, max_tokens=1)])
    assert [proxy.name for proxy in pool.proxies] == ["two"]
    assert pool.tables.shape[0] == pool.weights.state.shape[0] == 1
    assert all(ref.expired() for ref in storages)
    rpc(proxied, "unload_proxy", "two")
    assert (pool.proxies, pool.weights, pool.tables) == ([], None, None)
    assert counts_of(proxied, finished["long"])["proxy"] == "one"


def counter_value(llm: Any, name: str, **labels: str) -> float:
    rpc(llm, "flush_metrics")
    return REGISTRY.get_sample_value(f"assent_{name}_total", labels) or 0.0


SHADOWED = [{"seed": 1, "top_k": 5}, {"temperature": 0.0}, {"seed": 2, "top_k": 3, "top_p": 0.9}]


def test_a_shadow_changes_no_text_and_counts_what_it_would_have_changed(proxied, checkpoints):
    """It scores rows with and without a proxy, greedy and sampled; a request may be exempt."""
    sampling = [params(name, **kwargs) for name in (None, "one") for kwargs in SHADOWED]
    expected = generate(proxied, PROMPTS, sampling)
    counts = [counts_of(proxied, output) for output in expected[3:]]
    entry = rpc(proxied, "load_proxy", "ghost", checkpoints["two"], True)
    labels = {"proxy": "ghost", "version": entry["version"]}
    assert entry["shadow"] and rpc(proxied, "list_proxies")[-1] == entry
    outputs = generate(proxied, PROMPTS, sampling)
    assert tokens(outputs) == tokens(expected)
    assert [counts_of(proxied, output) for output in outputs[3:]] == counts
    rpc(proxied, "list_proxies")  # updates the metrics
    # All tokens are among its 6 candidates but for some of "one", which has 16 where greedy.
    scored = counter_value(proxied, "shadow_tokens", **labels)
    changed = counter_value(proxied, "shadow_changed", **labels)
    assert 5 * 16 <= scored <= 6 * 16
    assert 0 < changed < scored
    exempt = [params(name, shadow=False, **kwargs) for name in (None, "one") for kwargs in SHADOWED]
    assert tokens(generate(proxied, PROMPTS, exempt)) == tokens(expected)
    rpc(proxied, "list_proxies")
    assert counter_value(proxied, "shadow_tokens", **labels) == scored
    mixed = [params(shadow=False, seed=1), params(seed=1, top_k=2, max_tokens=5)]
    generate(proxied, PROMPTS[:2], mixed)
    rpc(proxied, "unload_proxy", "ghost")
    rpc(proxied, "list_proxies")
    assert counter_value(proxied, "shadow_tokens", **labels) == scored + 5
    generate(proxied, PROMPTS, sampling)
    rpc(proxied, "list_proxies")
    assert counter_value(proxied, "shadow_tokens", **labels) == scored + 5


def test_a_shadow_cannot_be_asked_for(stock, proxied, checkpoints):
    entry = rpc(proxied, "load_proxy", "ghost", checkpoints["two"], True)
    sampling = [params("ghost", seed=1), params("ghost", version=entry["version"], seed=1)]
    outputs = generate(proxied, PROMPTS[:2], sampling)
    assert tokens(outputs) == tokens(generate(stock, PROMPTS[:2], [params(seed=1)] * 2))
    assert rpc(proxied, "take_alignment_counts", [output.request_id for output in outputs]) == {}
    with pytest.raises(ProxyError, match="as a shadow: unload it first"):
        rpc(proxied, "load_proxy", "ghost", checkpoints["two"])
    with pytest.raises(ProxyError, match="to act: unload it first"):
        rpc(proxied, "load_proxy", "two", checkpoints["two"], True)
    # A shadow does not replace an acting proxy of the same name.
    rpc(proxied, "load_proxy", "one", checkpoints["two"], True)
    acting_params = [params("one", seed=1)] * 2
    acting_texts = tokens(generate(proxied, PROMPTS[:2], acting_params))
    rpc(proxied, "unload_proxy", "one", entry["version"])
    assert acting_texts == tokens(generate(proxied, PROMPTS[:2], acting_params))
    assert acting_texts != tokens(outputs)


def test_metrics_of_the_worker_have_name_and_version(proxied):
    versions = {entry["name"]: entry["version"] for entry in rpc(proxied, "list_proxies")}
    metrics = ("tokens_aligned", "candidates_proposed", "candidates_rejected", "candidates_forced")

    def read_counters() -> dict[str, list[float]]:
        rpc(proxied, "list_proxies")
        return {
            name: [
                counter_value(proxied, metric, proxy=name, version=version) for metric in metrics
            ]
            for name, version in versions.items()
        }

    before = read_counters()
    outputs = generate(
        proxied,
        PROMPTS,
        [params(name, seed=1) for name in ("one", "two", "one", "one", "two")]
        + [params(seed=1, proxies=BOTH)],  # counts for both
    )
    counts = [counts_of(proxied, output) for output in outputs]
    after = read_counters()
    for name, rows in (("one", 4), ("two", 3)):
        proxy_counts = [entry for entry in counts if name in entry["proxy"]]
        expected = [
            sum(entry[key] for entry in proxy_counts) for key in ("proposed", "rejected", "forced")
        ]
        increase = [b - a for a, b in zip(before[name], after[name], strict=True)]
        assert increase == [rows * 16, *expected]


def assert_adds_up(trace: list[dict[str, Any]], counts: dict[str, Any], text: list[int]) -> None:
    assert [entry["token_id"] for entry in trace] == text
    assert sum(len(entry["rejected"]) for entry in trace) == counts["rejected"]
    assert sum(entry["forced"] for entry in trace) == counts["forced"]
    assert len(trace) == counts["accepted"] + counts["forced"]
    for entry in trace:
        ids = [candidate["token_id"] for candidate in entry["rejected"]]
        assert len(set(ids)) == len(ids)
        assert entry["forced"] or entry["token_id"] not in ids
        total = sum(
            candidate["probability"]
            for candidate in entry["rejected"]
            if candidate["token_id"] != entry["token_id"]
        )
        assert 0 < entry["probability"] + total < 1 + 1e-5
        assert all(0 <= candidate["accept_probability"] <= 1 for candidate in entry["rejected"])


def test_traces_while_requests_run_and_afterwards(proxied):
    """Piece by piece, in the order of emission. They add up to the text and the counts."""
    engine = proxied.llm_engine
    # Every third request is not traced, and one is plain.
    sampling = [
        params(("one", "two")[i % 2], seed=i, trace=i % 3 != 2, strength=1.0 + i % 2)
        for i in range(5)
    ] + [params(seed=1)]
    untraced = [params(("one", "two")[i % 2], seed=i, strength=1.0 + i % 2) for i in range(5)]
    expected = tokens(generate(proxied, PROMPTS, [*untraced, params(seed=1)]))
    ids = [f"t{i}" for i in range(6)]
    for req_id, prompt, request in zip(ids, PROMPTS, sampling, strict=True):
        engine.add_request(req_id, prompt, request)
    traces: dict[str, list[dict[str, Any]]] = {}
    finished: dict[str, Any] = {}
    lengths = set()

    def take(request_ids: list[str]) -> None:
        for engine_id, entries in rpc(proxied, "take_traces", request_ids).items():
            assert entries
            traces.setdefault(engine_id.split("-")[0], []).extend(entries)

    for step in range(10**6):
        if not engine.has_unfinished_requests():
            break
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        if step in (2, 3, 9):
            take(ids)
            lengths.add(len(traces["t0"]))
    assert len(lengths) == 3
    take(ids)
    assert sorted(traces) == ["t0", "t1", "t3", "t4"]
    assert tokens([finished[req_id] for req_id in ids]) == expected
    for req_id, trace in traces.items():
        counts = counts_of(proxied, finished[req_id])
        assert_adds_up(trace, counts, expected[int(req_id[1])])
        assert any(entry["rejected"] for entry in trace)
    assert rpc(proxied, "take_traces", ids) == {}


def test_preempted_requests_go_on_as_if_nothing_had_happened(make_llm, proxied, checkpoints):
    """Six requests of 200 tokens and room for five blocks of 128: the same texts, counts and traces."""
    proxies: list[dict[str, Any]] = [{"proxy": "one"}, {"proxy": "two"}, {"proxies": BOTH}] * 2
    sampling = [params(**proxies[i], seed=i, max_tokens=200, trace=i < 4) for i in range(6)]
    expected = tokens(generate(proxied, PROMPTS, sampling))
    llm = make_llm(worker_cls=WORKER, num_gpu_blocks_override=6, disable_log_stats=False)
    for name, directory in checkpoints.items():
        rpc(llm, "load_proxy", name, directory)
    outputs = generate(llm, PROMPTS, sampling)
    assert sum(output.metrics.num_preemptions for output in outputs) > 2
    assert tokens(outputs) == expected
    traces = rpc(llm, "take_traces", [output.request_id for output in outputs])
    assert len(traces) == 4
    for i, output in enumerate(outputs):
        counts = counts_of(llm, output)
        assert counts["accepted"] + counts["forced"] == 200
        if i < 4:
            ((_, trace),) = [
                item for item in traces.items() if item[0].startswith(f"{output.request_id}-")
            ]
            assert_adds_up(trace, counts, expected[i])


def test_a_trace_ends_with_the_text(proxied):
    sampling = [params("one", seed=i, ignore_eos=False, max_tokens=60, logit_bias={EOS: 4.0}, trace=True)
                for i in range(6)]  # fmt: skip
    outputs = generate(proxied, PROMPTS, sampling)
    traces = rpc(proxied, "take_traces", [output.request_id for output in outputs])
    assert len(traces) == 6
    for output in outputs:
        ((_, trace),) = [
            item for item in traces.items() if item[0].startswith(f"{output.request_id}-")
        ]
        assert trace[-1]["token_id"] == EOS
        assert_adds_up(trace, counts_of(proxied, output), tokens([output])[0])


def test_aborted_requests_leave_nothing_behind(proxied):
    engine = proxied.llm_engine
    engine.add_request("gone", PROMPTS[0], params("one", seed=1))
    for _ in range(3):
        engine.step()
    engine.abort_request(["gone"])
    outputs = generate(proxied, PROMPTS, [params("one", seed=i) for i in range(6)])
    request_ids = ["gone", *(output.request_id for output in outputs)]
    assert len(rpc(proxied, "take_alignment_counts", request_ids)) == 7
    tracker = worker_of(proxied)._tracker
    known_ids = (*tracker._finished, *tracker._engine_ids)
    assert not [req_id for req_id in known_ids if req_id.split("-")[0] in request_ids]


def test_the_candidate_table_is_that_of_the_llms_embeddings(
    make_llm, proxied, checkpoints, model_dir
):
    """With LoRA switched on too, where vLLM wraps the embedding layer."""
    from safetensors.torch import load_file

    from proxy.checkpoint import load

    embeddings = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    expected = load(checkpoints["one"], base=None).network.candidate_table(embeddings)
    with_lora = make_llm(worker_cls=WORKER, enable_lora=True, max_lora_rank=8, max_loras=1)
    generate(with_lora, PROMPTS, [params(seed=1)] * 6)
    rpc(with_lora, "load_proxy", "one", checkpoints["one"])
    for llm in (proxied, with_lora):
        worker = worker_of(llm)
        _, table = worker._registry.pool.single(worker._registry._bound["one"])
        torch.testing.assert_close(table, expected)
    sampling = [params("one", seed=i) for i in range(6)]
    assert tokens(generate(with_lora, PROMPTS, sampling)) == tokens(
        generate(proxied, PROMPTS, sampling)
    )


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"rejection_sample_method": "synthetic"}, "synthetic acceptance of drafts"),
        ({"enable_adaptive_verification": True}, "adaptive verification of drafts"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"enable_trace_replay": True}, "trace replay"),
    ],
)
def test_what_is_not_supported_is_refused_at_start(feature, message):
    from proxy.engine.unsupported import refuse_unsupported

    settings = {
        "rejection_sample_method": "standard",
        "enable_adaptive_verification": False,
        "enable_batch_sharded_sampling": None,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_trace_replay": False,
    }

    def config(settings: dict[str, Any]) -> Any:
        part = SimpleNamespace(**settings)
        return SimpleNamespace(parallel_config=part, model_config=part, speculative_config=part)

    refuse_unsupported(config(settings))
    with pytest.raises(ProxyError, match=message):
        refuse_unsupported(config(settings | feature))


def test_of_several_ranks_only_the_last_raises():
    """vLLM's executor would mistake the replies after the first error for the next answers."""
    from proxy.engine.ranks import raised_by_last_rank

    @raised_by_last_rank
    def call(worker, argument):
        raise ProxyError(f"cannot {argument}")

    def rank(number: int) -> Any:
        return SimpleNamespace(rank=number, parallel_config=SimpleNamespace(world_size=2))

    assert call(rank(0), "load") == {"error": "cannot load"}
    with pytest.raises(ProxyError, match="cannot load"):
        call(rank(1), "load")
