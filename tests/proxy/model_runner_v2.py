"""Model Runner V2 (MRV2) in real engines on a CPU: Triton's interpreter runs its kernels.

`make test-triton` installs Triton, whose wheel is some 200 MB and which vLLM's CPU build does not ask for,
and runs this.

It prints a line for each check that passed, and ends with an error at the first that failed.
Of MRV2 it leaves out what needs a GPU: compiled kernels and CUDA graphs, flashinfer, and the Triton
kernel for top-k and top-p, which the interpreter cannot run (vLLM's fallback in PyTorch does).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.proxy.architectures import ARCHITECTURES, make_model, make_proxy
from tests.proxy.proxies import random_network

PROMPT_LENGTHS = [7, 60, 3, 90, 33, 1, 50, 20]
NUM_TOKENS = 40

# (proxy, or several, and sampling parameters): every other request has no proxy
REQUESTS: list[tuple[str | None, dict[str, Any]]] = [
    ("one", {"seed": 1}),
    (None, {"seed": 2, "top_p": 0.8}),
    ("one+two", {"seed": 3, "top_p": 0.9, "temperature": 1.3}),
    (None, {"temperature": 0.0}),
    ("one", {"temperature": 0.0}),
    (None, {"seed": 4, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}),
    ("two", {"seed": 5, "top_k": 6, "min_p": 0.02, "frequency_penalty": 0.5}),
    (None, {"seed": 6, "temperature": 0.7, "logit_bias": {5: 3.0}}),
]
WITH_PROXY = [row for row, (proxy, _) in enumerate(REQUESTS) if proxy is not None]
WITHOUT_PROXY = [row for row, (proxy, _) in enumerate(REQUESTS) if proxy is None]

ENGINES: list[Any] = []  # they share vLLM's groups, and the first to stop would destroy them


def use_interpreter() -> None:
    """Call it before vLLM or Triton is imported."""
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",
    }
    triton = import_module("triton.backends")  # not installed for the type checker

    class NoDriver:
        @staticmethod
        def is_active() -> bool:
            return False

    # vLLM asks for one of this name.
    triton.backends["cpu"] = triton.Backend(driver=NoDriver, compiler=None)
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def make_engine(directory: Path, *, v2: bool = True, proxies: bool = True, **settings: Any) -> Any:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    from vllm import LLM
    from vllm.envs import disable_envs_cache

    disable_envs_cache()  # the previous engine has cached its environment

    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 << 20,
        "disable_log_stats": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if proxies:
        defaults["worker_cls"] = "proxy.worker.ProxyCPUWorker"
    llm = LLM(str(directory), **(defaults | settings))
    ENGINES.append(llm)
    if proxies:
        llm.collective_rpc("load_proxy", args=("one", str(directory / "proxy")))
        llm.collective_rpc("load_proxy", args=("two", str(directory / "two")))
    return llm


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def prompts(vocab_size: int) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(1)
    return [
        {"prompt_token_ids": torch.randint(2, vocab_size, (length,), generator=rng).tolist()}
        for length in PROMPT_LENGTHS
    ]


def params(proxy: str | None, *, trace: bool = False, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    alignment_args: dict[str, Any] | None = None
    if proxy is not None:
        proxies = dict.fromkeys(proxy.split("+"), 1.0)
        alignment_args = {"alignment": {"proxies": proxies, "trace": trace}}
    defaults = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}
    return SamplingParams(extra_args=alignment_args, **(defaults | kwargs))


def generate(llm: Any, vocab_size: int, sampling: list[Any], rows: Any = ...) -> list[Any]:
    selected = prompts(vocab_size)
    if rows is not ...:
        selected = [selected[row] for row in rows]
    return llm.generate(selected, sampling, use_tqdm=False)


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def counts_of(llm: Any, outputs: list[Any]) -> list[dict[str, Any]]:
    """The counts of each request, in the order of the ids. Requests without a proxy have none."""
    (counts,) = llm.collective_rpc(
        "take_alignment_counts", args=([output.request_id for output in outputs],)
    )
    return [counts[req_id] for req_id in sorted(counts, key=lambda r: int(r.split("-")[0]))]


@contextmanager
def recorded_steps() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(hidden rows, the head's logits) of every step with a proxy."""
    from proxy.engine.sampler_v2 import ProxySamplerV2

    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = ProxySamplerV2.__call__

    def call(self: Any, logits: torch.Tensor, batch: Any) -> Any:
        if self.step is not None:
            steps.append((self.step.hidden.clone(), logits.clone()))
        return original(self, logits, batch)

    with patch.object(ProxySamplerV2, "__call__", call):
        yield steps


def report(statement: str) -> None:
    print("held:", statement, flush=True)


def compare_with_v1(directory: Path, vocab_size: int) -> tuple[list[list[int]], list[Any]]:
    """Returns the texts and counts that all other engines must give."""
    sampling = [params(proxy, **kwargs) for proxy, kwargs in REQUESTS]
    v1 = make_engine(directory, v2=False)
    outputs = generate(v1, vocab_size, sampling)
    expected, counts = texts(outputs), counts_of(v1, outputs)
    v2 = make_engine(directory)
    worker = worker_of(v2)
    assert type(worker_of(v1).model_runner.sampler).__name__ == "ProxySampler"
    assert type(worker.model_runner).__module__ == "vllm.v1.worker.cpu.model_runner"
    assert type(worker.model_runner.sampler).__name__ == "ProxySamplerV2"
    report("the worker picks the sampler of the model runner that vLLM picked")

    outputs = generate(v2, vocab_size, sampling)
    tokens = texts(outputs)
    for row in [*WITH_PROXY, 3]:  # 3 is greedy; seeds without a proxy are not those of V1
        assert tokens[row] == expected[row], row
    assert counts_of(v2, outputs) == counts
    assert all(
        request_counts["accepted"] + request_counts["forced"] == NUM_TOKENS
        for request_counts in counts
    )
    assert sum(request_counts["rejected"] for request_counts in counts) > NUM_TOKENS
    report("rows with a proxy emit the same tokens as on V1, with the same counts")

    stock = make_engine(directory, proxies=False)
    stock_texts = texts(
        generate(stock, vocab_size, [params(None, **kwargs) for _, kwargs in REQUESTS])
    )
    assert [tokens[row] for row in WITHOUT_PROXY] == [stock_texts[row] for row in WITHOUT_PROXY]
    assert all(tokens[row] != stock_texts[row] for row in WITH_PROXY)
    report("rows without a proxy emit in a mixed batch the same tokens as in vLLM's own MRV2")

    for row in WITH_PROXY:
        assert texts(generate(v2, vocab_size, [sampling[row]], [row])) == [tokens[row]]
    report("a seed gives the same text alone")
    return tokens, counts


def check_hidden_rows(directory: Path, vocab_size: int) -> None:
    llm = make_engine(directory, max_num_batched_tokens=32)
    with recorded_steps() as steps:
        generate(llm, vocab_size, [params("one" if i % 2 else None, seed=i) for i in range(8)])
    head = worker_of(llm).model_runner.get_model().compute_logits
    multi_row = [(hidden, logits) for hidden, logits in steps if len(logits) > 2]
    assert len(multi_row) > 20
    for hidden, logits in steps:
        torch.testing.assert_close(head(hidden), logits, rtol=1e-4, atol=1e-4)
    for hidden, logits in multi_row:
        assert not torch.allclose(head(hidden.roll(1, 0)), logits, rtol=1e-2, atol=1e-2)
    report(f"the head gives the logits of {len(steps)} steps, chunked prefills among them")


def check_engines(
    directory: Path, vocab_size: int, expected: list[list[int]], counts: list[Any]
) -> None:
    """Settings that must not change the output."""
    sampling = [params(proxy, **kwargs) for proxy, kwargs in REQUESTS]
    for statement, settings in {
        "chunked prefill": {"max_num_batched_tokens": 32},
        "synchronous scheduling": {"async_scheduling": False},
        "asynchronous scheduling": {"async_scheduling": True},
        "preemption": {"num_gpu_blocks_override": 9, "block_size": 32},
    }.items():
        llm = make_engine(directory, **settings)
        preempted: set[str] = set()
        runner = worker_of(llm).model_runner
        original = runner.finish_requests

        def finish(
            scheduled: Any, original: Any = original, preempted_ids: set[str] = preempted
        ) -> None:
            preempted_ids.update(scheduled.preempted_req_ids or ())
            original(scheduled)

        runner.finish_requests = finish
        outputs = generate(llm, vocab_size, sampling)
        assert texts(outputs) == expected, statement
        assert counts_of(llm, outputs) == counts, statement
        assert (statement == "preemption") == bool(preempted)
        report(f"the same texts and counts with {statement}, {len(preempted)} requests preempted")


def check_drafts(
    directory: Path, vocab_size: int, expected: list[list[int]], counts: list[Any]
) -> None:
    """Speculative decoding: proxies emit the same tokens, the frozen LLM what it emits in vLLM's own."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    drafts["prompt_lookup_min"] = 1
    # vLLM refuses min_p and logit_bias beside drafts.
    requests = [
        (proxy, {key: x for key, x in kwargs.items() if key not in ("min_p", "logit_bias")})
        for proxy, kwargs in REQUESTS
    ]
    same = [row for row in range(len(REQUESTS)) if requests[row] == REQUESTS[row]]
    sampling = [params(proxy, **kwargs) for proxy, kwargs in requests]
    llm = make_engine(directory, speculative_config=drafts)
    rejection_sampler = worker_of(llm).model_runner.rejection_sampler
    assert type(rejection_sampler).__name__ == "ProxyRejectionSamplerV2"
    original, sizes = rejection_sampler._verify, []

    def verify(*args: Any) -> Any:
        result = original(*args)
        sizes.extend(result[2].tolist())
        return result

    rejection_sampler._verify = verify
    outputs = generate(llm, vocab_size, sampling)
    tokens = texts(outputs)
    for row in {*WITH_PROXY} & {*same}:
        assert tokens[row] == expected[row], row
    assert max(sizes) > 1 and min(sizes) == 1
    taken = counts_of(llm, outputs)
    for i, row in enumerate(WITH_PROXY):
        assert taken[i]["accepted"] + taken[i]["forced"] == NUM_TOKENS
        assert row not in same or taken[i] == counts[i], row
    report(f"the same texts and counts with drafts; a step emitted up to {max(sizes)} tokens")
    stock = make_engine(directory, proxies=False, speculative_config=drafts)
    frozen = [params(None, **kwargs) for _, kwargs in requests]
    stock_texts = texts(generate(stock, vocab_size, frozen))
    assert [tokens[row] for row in WITHOUT_PROXY] == [stock_texts[row] for row in WITHOUT_PROXY]
    report(
        "rows without a proxy emit in a mixed batch the same tokens as in vLLM's own, with drafts"
    )


def check_unloading(directory: Path, vocab_size: int) -> None:
    """A request keeps its proxy to the end, even if it is preempted while the proxy is unloaded."""
    llm = make_engine(directory, num_gpu_blocks_override=9, block_size=32)
    worker = worker_of(llm)
    runner = worker.model_runner
    sampling = [params(("one", "two")[i % 2], seed=i) for i in range(4)]
    rows = [1, 1, 6, 6]  # two blocks each at their start, and three to four at their end
    expected = texts(generate(llm, vocab_size, sampling, rows))
    original, unloaded = runner.finish_requests, []

    def finish(scheduled: Any) -> None:
        original(scheduled)
        if scheduled.preempted_req_ids and not unloaded:
            unloaded.extend(worker.unload_proxy(name) for name in ("one", "two"))

    runner.finish_requests = finish
    outputs = generate(llm, vocab_size, sampling, rows)
    assert len(unloaded) == 2 and worker.list_proxies() == []
    assert texts(outputs) == expected
    report("preempted requests keep the proxy that was unloaded meanwhile")
    generate(llm, vocab_size, [params(None)], [0])
    assert worker._registry.pool.proxies == []
    report("and its memory is given back when they have ended")


def check_features(directory: Path, vocab_size: int) -> None:
    llm = make_engine(directory, logprobs_mode="processed_logprobs")
    allowed = [11, 12, 13, 14]
    sampling = [
        params("one", seed=1, allowed_token_ids=allowed),
        params("two", seed=2, bad_words=None, logit_bias=dict.fromkeys(allowed, 100.0)),
        params("one", seed=3, top_k=3, logprobs=3),
        params("one", seed=4, trace=True),
        params("one", seed=5, stop_token_ids=list(range(50, 90)), ignore_eos=False),
        params("one", n=2, seed=6),
    ]
    outputs = generate(llm, vocab_size, sampling, range(6))
    tokens = texts(outputs)
    assert {*tokens[0]} <= {*allowed} and len({*tokens[0]}) > 1
    assert {*tokens[1]} <= {*allowed} and len({*tokens[1]}) > 1
    for token, entry in zip(tokens[2], outputs[2].outputs[0].logprobs, strict=True):
        finite = {t: e.logprob for t, e in entry.items() if e.logprob > -1e30}
        assert token in finite and len(finite) == 3
        assert abs(sum(torch.tensor([*finite.values()]).exp()) - 1) < 1e-4
    (traces,) = llm.collective_rpc("take_traces", args=([outputs[3].request_id],))
    (trace,) = traces.values()
    assert [entry["token_id"] for entry in trace] == tokens[3]
    assert any(entry["rejected"] for entry in trace)
    (counts,) = llm.collective_rpc("take_alignment_counts", args=([outputs[4].request_id],))
    ((_, stopped_counts),) = counts.items()
    assert stopped_counts["accepted"] + stopped_counts["forced"] == len(tokens[4]) < NUM_TOKENS
    samples = [list(sample.token_ids) for sample in outputs[5].outputs]
    separate = generate(llm, vocab_size, [params("one", seed=6), params("one", seed=7)], [5, 5])
    assert samples == texts(separate) and samples[0] != samples[1]
    report("allowed ids, logit_bias, processed logprobs, traces, stop tokens and n > 1")


def main() -> None:
    use_interpreter()
    with tempfile.TemporaryDirectory() as name:
        from proxy.checkpoint import identify, save

        directory = Path(name)
        model = make_model(ARCHITECTURES["llama"], directory)
        config = make_proxy(model, directory).config
        sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
        second_proxy = random_network(2, width=10, max_candidates=6, max_rejections=2, **sizes)
        save(directory / "two", second_proxy, base=identify(str(directory)), training={})
        vocab_size = config.vocab_size
        expected, counts = compare_with_v1(directory, vocab_size)
        check_hidden_rows(directory, vocab_size)
        check_engines(directory, vocab_size, expected, counts)
        check_drafts(directory, vocab_size, expected, counts)
        check_features(directory, vocab_size)
        check_unloading(directory, vocab_size)


if __name__ == "__main__":
    main()
