"""Tiny random models of many architectures in the real engine: the hook's inputs, against transformers.

test_architectures.py runs it. By hand, from the repository's root:

    VLLM_ENABLE_V1_MULTIPROCESSING=0 python -m tests.proxy.architectures /tmp/results.jsonl llama gemma2

adds one line for each architecture (all, if none is named) to the file: {"architecture": ...} with what `examine`
returns, or with {"error": ...}.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

# A step takes at most 96 tokens and 4 requests: prefills in chunks, among rows that decode.
PROMPT_LENGTHS = [7, 150, 3, 260, 97, 40]
MAX_NEW_TOKENS = 24
WEIGHT_STD = 0.2  # spreads logits as widely as a trained model's

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
_WIDE_HEADS = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}


class Architecture(NamedTuple):
    config: str  # transformers' class
    settings: dict[str, Any]
    finish: Callable[[Tensor], Tensor] | None = None  # from the head's output to the logits


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", _WIDE_HEADS | {"vocab_size": 288}),
    "llama, odd vocabulary": Architecture("LlamaConfig", _WIDE_HEADS | {"vocab_size": 331}),
    "llama, tied": Architecture(
        "LlamaConfig", _WIDE_HEADS | {"vocab_size": 257, "tie_word_embeddings": True}
    ),
    "mistral": Architecture(
        "MistralConfig", _WIDE_HEADS | {"vocab_size": 301, "sliding_window": 64}
    ),
    "qwen2": Architecture("Qwen2Config", _SIZES | {"vocab_size": 293, "num_key_value_heads": 1}),
    "qwen3": Architecture(
        "Qwen3Config", _WIDE_HEADS | {"vocab_size": 299, "tie_word_embeddings": True}
    ),
    "gemma": Architecture("GemmaConfig", _WIDE_HEADS | {"vocab_size": 288}),
    "gemma2": Architecture(
        "Gemma2Config",
        _WIDE_HEADS | {"vocab_size": 289, "sliding_window": 64, "final_logit_softcapping": 3.0},
        lambda x: 3.0 * torch.tanh(x / 3.0),
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig", _WIDE_HEADS | {"vocab_size": 288, "sliding_window": 64}
    ),
    "gpt2": Architecture("GPT2Config", _GPT | {"vocab_size": 307}),
    "gptj": Architecture("GPTJConfig", _GPT | {"vocab_size": 277, "rotary_dim": 16}),
    "gpt_neox": Architecture("GPTNeoXConfig", _SIZES | {"vocab_size": 313}),
    "opt": Architecture(
        "OPTConfig", _SIZES | {"vocab_size": 283, "ffn_dim": 96, "word_embed_proj_dim": 64}
    ),
    "opt, narrow embeddings": Architecture(
        "OPTConfig", _SIZES | {"vocab_size": 287, "ffn_dim": 96, "word_embed_proj_dim": 32}
    ),
    "phi": Architecture("PhiConfig", _SIZES | {"vocab_size": 311}),
    "phi3": Architecture("Phi3Config", _SIZES | {"vocab_size": 317}),
    "granite": Architecture(
        "GraniteConfig",
        _SIZES | {"vocab_size": 293, "embedding_multiplier": 12.0, "logits_scaling": 0.5},
        lambda x: x / 0.5,
    ),
    "cohere": Architecture(
        "CohereConfig", _WIDE_HEADS | {"vocab_size": 271, "logit_scale": 1.75}, lambda x: 1.75 * x
    ),
    "olmo2": Architecture("Olmo2Config", _SIZES | {"vocab_size": 281}),
    "stablelm": Architecture(
        "StableLmConfig", _SIZES | {"vocab_size": 337, "num_key_value_heads": 2}
    ),
}


class Step(NamedTuple):
    """The sampler's inputs in one step, R rows."""

    logits: Tensor  # [R, V]
    hidden: Tensor | None  # [R, H]; None: no row had a proxy
    req_ids: list[str]
    is_unfinished: list[bool]  # rows of unfinished prefills, whose token is discarded


def examine(architecture: Architecture, directory: Path) -> dict[str, Any]:
    """Serve requests and check the sampler's inputs.

    Returns:
        steps: number of sampling steps, and among them
        tapped_steps: those in which the sampler had hidden rows,
        mixed_steps: those with rows of unfinished prefills beside others.
        Largest absolute errors, over all steps and rows:
        head_error: the head on the hidden rows, against the logits.
        hidden_error, logits_error: against transformers on the finished texts.
        table_error: the server's candidate table against the trainer's.
        Controls, the least over the steps of a step's largest error:
        rolled_error: as head_error, with each row's hidden state replaced by its neighbour's.
        bare_error: as head_error, with the head's weights alone: no bias, scale or cap.
    """
    from proxy.network import ProxyNetwork

    model = make_model(architecture, directory)
    head = model.get_output_embeddings()

    def logits_of(hidden: Tensor) -> Tensor:
        return architecture.finish(head(hidden)) if architecture.finish else head(hidden)

    network = make_proxy(model, directory)
    with recorded_calls(ProxyNetwork, "candidate_table") as tables, engine(directory) as llm:
        llm.collective_rpc("load_proxy", args=("one", str(directory / "proxy")))
        steps, outputs = serve(llm, vocab_size=network.config.vocab_size)

    tapped = [(step.hidden, step) for step in steps if step.hidden is not None]
    multi_row = [(hidden, step) for hidden, step in tapped if len(hidden) > 1]
    with torch.inference_mode():
        result = {
            "steps": len(steps),
            "tapped_steps": len(tapped),
            "mixed_steps": sum(0 < sum(s.is_unfinished) < len(s.logits) for s in steps),
            "head_error": max(_error(logits_of(h), s.logits) for h, s in tapped),
            "rolled_error": min(_error(logits_of(h.roll(1, 0)), s.logits) for h, s in multi_row),
            "bare_error": min(_error(h @ head.weight.T, s.logits) for h, s in tapped),
            "table_error": _error(
                torch.cat(tables), network.candidate_table(model.get_input_embeddings().weight)
            ),
        }
        errors = [compare_text(model, steps, output) for output in outputs]
    result["hidden_error"], result["logits_error"] = map(max, zip(*errors, strict=True))
    return result


def make_model(architecture: Architecture, directory: Path) -> Any:
    """A model with random weights, biases and norms included; also saved."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    # "eager" is the only implementation that supports all of them, for example Gemma2's capped scores.
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += WEIGHT_STD * torch.randn_like(parameter)
    model.save_pretrained(directory)
    # Where vLLM has no model of its own it puts its compiler into transformers' class.
    model.base_model.do_not_compile = True
    return model.eval()


def make_proxy(model: Any, directory: Path) -> Any:
    """A random proxy of the shape that the trainer would give it, with strong opinions."""
    from proxy.checkpoint import identify, save
    from proxy.network import ProxyNetwork
    from training.policy import default_config

    network = ProxyNetwork(default_config(model, accept_bias=0.0))
    torch.nn.init.normal_(network.score.weight, std=1.5)
    save(directory / "proxy", network, base=identify(str(directory)), training={})
    return network


@contextmanager
def engine(directory: Path) -> Iterator[Any]:
    """An engine in this process, shut down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(directory),
        worker_cls="proxy.worker.ProxyCPUWorker",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=True,
        seed=0,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def serve(llm: Any, vocab_size: int) -> tuple[list[Step], list[Any]]:
    """Serve requests of all kinds at once, half of them long. Returns the sampler's inputs and vLLM's outputs."""
    from vllm import SamplingParams

    from proxy.engine.sampler_v1 import ProxySampler

    rng = torch.Generator().manual_seed(1)
    prompts = [
        {"prompt_token_ids": torch.randint(2, vocab_size, (length,), generator=rng).tolist()}
        for length in PROMPT_LENGTHS
    ]
    proxied = {"alignment": {"proxy": "one"}}
    # Requests 0 and 3 have no proxy; at least one that has is in every batch of four.
    params = [
        SamplingParams(
            max_tokens=MAX_NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            temperature=0.0 if i == 4 else 1.0,
            seed=i if i % 2 else None,
            prompt_logprobs=1 if i in (1, 2) else None,
            extra_args=proxied if i % 3 else None,
        )
        for i in range(len(prompts))
    ]
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    steps: list[Step] = []
    original = ProxySampler.forward

    def forward(self: ProxySampler, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = None if self.step is None else self.step.hidden.clone()
        unfinished = runner.discard_request_mask.np[: len(logits)].tolist()
        steps.append(
            Step(logits.float().clone(), hidden, list(runner.input_batch.req_ids), unfinished)
        )
        return original(self, logits, *args, **kwargs)

    with patch.object(ProxySampler, "forward", forward):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_logprobs is not None for output in outputs] == [
        p.prompt_logprobs is not None for p in params
    ]
    return steps, outputs


def compare_text(model: Any, steps: list[Step], output: Any) -> tuple[float, float]:
    """Errors of a request's (hidden rows, logits), one per token, against transformers' own."""
    tokens = list(output.outputs[0].token_ids)
    rows = [
        (step.hidden[row], step.logits[row])
        for step in steps
        for row, req_id in enumerate(step.req_ids)
        if req_id.rsplit("-", 1)[0] == output.request_id and not step.is_unfinished[row]
        if step.hidden is not None
    ]
    assert len(rows) == len(tokens) == MAX_NEW_TOKENS
    head_inputs: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: head_inputs.append(inputs[0][0])
    )
    expected = model(torch.tensor([[*output.prompt_token_ids, *tokens]])).logits[0]
    handle.remove()
    first = len(output.prompt_token_ids) - 1
    positions = slice(first, first + len(tokens))
    hidden, logits = (torch.stack(column) for column in zip(*rows, strict=True))
    return _error(hidden, head_inputs[0][positions]), _error(logits, expected[positions])


@contextmanager
def recorded_calls(owner: type, method: str) -> Iterator[list[Any]]:
    """Record the result of each call of a method."""
    original, results = getattr(owner, method), []

    def call(*args: Any) -> Any:
        results.append(original(*args))
        return results[-1]

    with patch.object(owner, method, call):
        yield results


def _error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def main(results: str, *names: str) -> None:
    # vLLM inspects each model's class in a process of its own, so that CUDA does not start in this one.
    with patch(
        "vllm.model_executor.models.registry._run_in_subprocess", lambda function: function()
    ):
        for name in names or ARCHITECTURES:
            try:
                with tempfile.TemporaryDirectory() as directory:
                    result = examine(ARCHITECTURES[name], Path(directory))
            except Exception:  # go on with the others
                result = {"error": traceback.format_exc()}
            with Path(results).open("a") as file:
                print(json.dumps({"architecture": name} | result), file=file)


if __name__ == "__main__":
    main(*sys.argv[1:])
