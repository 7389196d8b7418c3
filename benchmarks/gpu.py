"""Tokens per second on a GPU, with a proxy and without, at the shapes of Qwen2 0.5B and 7B: `python -m benchmarks.gpu`

vLLM's own engine with random weights, which cost as much as others, and no tokenizer. Plain and aligned rounds
alternate. The time of a step is the difference between a long and a short generation, over the tokens between them:
prefills and starts do not count. The table has the medians of the rounds. Each runner of vLLM has its own engine.

What is emitted there is tested by `python -m tests.proxy.gpu_kernel --device cuda`; `python -m benchmarks.hook --device
cuda` refuses any wait for the device.

On a CPU, to try the command: `--shapes tiny --runners V1 --batches 1 8 --kv-cache-gib 0.1`
"""

import json
import os
import random
import struct
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import Qwen2Config

from benchmarks.figures import write_figures
from benchmarks.models import make_proxy
from benchmarks.throughput import SAMPLINGS, SamplingName
from judge.options import read_options
from proxy.request import WorkerAlignment

ShapeName = Literal["tiny", "0.5B", "7B"]
SHAPES: dict[ShapeName, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
PROMPT_TOKENS = 16
SHORT = 16  # tokens
LOGITS_STD = 2.4  # as wide as a trained model's
EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[ShapeName, ...] = ("0.5B", "7B")
    """Shapes of the LLM."""
    runners: tuple[Literal["V1", "V2"], ...] = ("V2", "V1")
    """vLLM's model runners."""
    batches: tuple[int, ...] = (1, 8, 64, 256)
    """Requests at once."""
    samplings: tuple[SamplingName, ...] = ("top_p 1", "top_p 0.95")
    """Sampling parameters; the temperature is 1 unless stated."""
    tokens: int = 80
    """Of a long generation; a short one has 16."""
    rounds: int = 3
    """Of each case."""
    kv_cache_gib: float = 12.0
    """GiB of the KV cache."""
    output: Path | None = None
    """A JSON file for the metrics."""


def make_shape(directory: Path, shape: ShapeName) -> None:
    """A directory with a configuration, a proxy, and a sparse file in the place of weights, for its fingerprint."""
    config = SHAPES[shape]
    Qwen2Config(
        **config,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(directory)
    rows, columns = config["vocab_size"], config["hidden_size"]
    num_bytes = 2 * rows * columns
    entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, num_bytes]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)
    make_proxy(directory / "proxy", directory, max_candidates=32)


def spread_logits(worker: Any) -> None:
    """Give a model of random weights logits as wide as a trained one's."""
    model = worker.model_runner.get_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(std=EMBEDDING_STD)
        hidden_size = model.config.hidden_size
        model.model.norm.weight.fill_(LOGITS_STD / (EMBEDDING_STD * hidden_size**0.5))


def make_engine(directory: Path, runner: str, options: Options) -> Any:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send `spread_logits` to the worker
    from vllm import LLM
    from vllm.envs import disable_envs_cache

    disable_envs_cache()
    kind = "GPU" if torch.cuda.is_available() else "CPU"
    llm = LLM(
        str(directory),
        worker_cls=f"proxy.worker.Proxy{kind}Worker",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=max(options.batches),
        max_model_len=512,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
        disable_log_stats=True,
    )
    llm.collective_rpc(spread_logits)
    llm.collective_rpc("load_proxy", args=("proxy", str(directory / "proxy")))
    return llm


def seconds_of(llm: Any, count: int, tokens: int, vocab_size: int, settings: Any) -> float:
    """Seconds of one generation for `count` prompts."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [random.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)]}
        for _ in range(count)
    ]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **settings)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def measure_case(
    llm: Any, count: int, sampling: SamplingName, vocab_size: int, options: Options
) -> dict[str, Any]:
    """Milliseconds a step, plain and aligned: the medians, and those of each round."""
    settings = {"temperature": 1.0} | SAMPLINGS[sampling]
    aligned = {"extra_args": WorkerAlignment(proxy="proxy").to_extra_args()}
    kinds = {"plain": settings, "aligned": settings | aligned}
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(options.rounds + 1):
        for kind, of_kind in kinds.items():
            short, long = (
                seconds_of(llm, count, tokens, vocab_size, of_kind)
                for tokens in (SHORT, options.tokens)
            )
            if number > 0:  # the first one warms up
                steps[kind].append((long - short) / (options.tokens - SHORT) * 1e3)
    plain, with_proxy = median(steps["plain"]), median(steps["aligned"])
    return {
        "requests": count,
        "sampling": sampling,
        "plain_ms": plain,
        "aligned_ms": with_proxy,
        "ratio": plain / with_proxy,
        "rounds_ms": steps,
    }


def measure(options: Options) -> list[dict[str, Any]]:
    rows = []
    cases = [*product(options.batches, options.samplings)]
    for shape, runner in product(options.shapes, options.runners):
        with tempfile.TemporaryDirectory() as directory:
            make_shape(Path(directory), shape)
            llm = make_engine(Path(directory), runner, options)
            for count, sampling in tqdm(cases, desc=f"{shape}, {runner}"):
                vocab_size = SHAPES[shape]["vocab_size"]
                row = measure_case(llm, count, sampling, vocab_size, options)
                rows.append({"shape": shape, "runner": runner} | row)
            llm.llm_engine.engine_core.shutdown()
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the docs."""
    lines = [
        "| shape | runner | requests | sampling | plain, ms a step | aligned | aligned / plain, tokens per second |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['shape']} | {row['runner']} | {row['requests']} | {row['sampling']} | {row['plain_ms']:.2f} "
        f"| {row['aligned_ms']:.2f} | {row['ratio']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(options: Options) -> None:
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    random.seed(0)
    rows = measure(options)
    print(markdown(rows))
    write_figures(options.output, rows)


if __name__ == "__main__":
    main(read_options(Options, __doc__))
