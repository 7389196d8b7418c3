"""A server with all features at once, and the frozen LLM in transformers to check it against.

In float32, because a kernel of bfloat16 rounds differently in a batch than alone; with a LoRA adapter, a
prefix cache, prompts in chunks, and a KV cache too small for 64 long answers.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.server.conftest import DEMO, MODEL, Server, proxy_flags, serving

ALIGNED, POLITE, LORA = f"{MODEL}:aligned", f"{MODEL}:polite", "tiny"
EOS = 1

BLOCK = 32  # tokens in a block of the KV cache
BLOCKS = 160
CHUNK = 96  # tokens that a step may compute, all requests together
FLAGS = {
    "--dtype": "float32",
    "--max-num-seqs": "64",
    "--max-num-batched-tokens": str(CHUNK),
    "--block-size": str(BLOCK),
    "--num-gpu-blocks-override": str(BLOCKS),
    "--max-lora-rank": "8",
}
# What vLLM adds to OpenAI's parameters and the client has to send in `extra_body`.
VLLM_FIELDS = {
    "alignment", "allowed_token_ids", "bad_words", "cache_salt", "ignore_eos", "include_stop_str_in_output",
    "min_p", "min_tokens", "prompt_logprobs", "repetition_penalty", "return_tokens_as_token_ids", "stop_token_ids",
    "structured_outputs", "top_k",
}  # fmt: skip


@contextmanager
def feature_server(adapter: Path, log: Path) -> Iterator[Server]:
    """`python -m server` with both of the demo's proxies and the adapter in that directory."""
    flags = ["--enable-prefix-caching", "--enable-lora", "--lora-modules", f"{LORA}={adapter}"]
    flags += [word for flag in FLAGS.items() for word in flag]
    with serving(log, *flags, *proxy_flags()) as server:
        yield server


def make_adapter(directory: Path) -> PeftModel:
    """The demo's LLM in float32 with a random LoRA adapter that changes its outputs; saved there."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        adapted = get_peft_model(model, config)
    adapted.save_pretrained(directory)
    return adapted.eval()


@dataclass
class FeatureClient:
    """A running feature server, asked through the `openai` client."""

    client: openai.OpenAI
    url: str

    def ask(
        self, prompt: str = "How do I look after my freezer?", model: str = ALIGNED, **options: Any
    ) -> Any:
        options = {"max_tokens": 32} | options
        extra = {key: options.pop(key) for key in VLLM_FIELDS & set(options)}
        if ":" in model:
            extra.setdefault("alignment", {})  # else the answer has no counts
        return self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            extra_body={"return_token_ids": True} | extra,
            **options,
        )


def tokens(answer: Any) -> list[list[int]]:
    return [choice.token_ids for choice in answer.choices]


def texts(answer: Any) -> list[str]:
    return [choice.message.content for choice in answer.choices]


@torch.no_grad()
def logits_of(
    llm: PeftModel, prompt: list[int], response_ids: list[int], *, adapted: bool
) -> Tensor:
    """Raw logits [T, V] before each of the response's T tokens, by transformers."""
    ids = torch.tensor([prompt + response_ids])
    if adapted:
        logits = llm(ids).logits
    else:
        with llm.disable_adapter():
            logits = llm(ids).logits
    return logits[0, len(prompt) - 1 : -1]


def is_allowed(
    logits: Tensor,  # [T, V]
    prompt: list[int],
    response_ids: list[int],
    options: Mapping[str, Any],
    slack: float,
) -> Tensor:
    """Whether each of the response's T tokens lies in the nucleus that the request's options leave: [T] bool.

    The documented meaning of OpenAI's and vLLM's options, over the whole sorted vocabulary. `slack`
    moves every threshold outwards (> 0): the server's float32 sums are not transformers'.
    """
    options = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **options}
    logits = logits.clone()
    for token, bias in options.get("logit_bias", {}).items():
        logits[:, int(token)] += bias
    one_hot = F.one_hot(torch.tensor(response_ids), logits.shape[-1])
    counts = one_hot.cumsum(0) - one_hot  # [T, V], before each token
    is_repeated = counts > 0
    is_in_context = is_repeated.clone()
    is_in_context[:, prompt] = True
    factor = options["repetition_penalty"]
    penalised = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(is_in_context, penalised, logits)
    logits -= options.get("frequency_penalty", 0.0) * counts
    logits -= options.get("presence_penalty", 0.0) * is_repeated
    logits /= options["temperature"]

    token_logits = logits.gather(-1, torch.tensor(response_ids).unsqueeze(-1))  # [T, 1]
    passes_min_p = (
        token_logits[:, 0] >= logits.amax(-1) + math.log(options["min_p"] or 1e-30) - slack
    )
    num_better = (logits > token_logits + slack).sum(-1)
    mass = logits.topk(options["top_k"]).values.softmax(-1).cumsum(-1)
    mass_before = F.pad(mass, (1, 0)).gather(
        -1, num_better.clamp(max=options["top_k"]).unsqueeze(-1)
    )
    within_mass = mass_before[:, 0] < options["top_p"] + slack
    return passes_min_p & (num_better < options["top_k"]) & within_mass
