"""A server that can do everything at once, and the frozen LLM in transformers to check it against.

In float32, because a kernel of bfloat16 rounds otherwise in a batch than alone; with a LoRA adapter, a
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
VLLMS_OWN = {
    "alignment", "allowed_token_ids", "bad_words", "cache_salt", "ignore_eos", "include_stop_str_in_output",
    "min_p", "min_tokens", "prompt_logprobs", "repetition_penalty", "return_tokens_as_token_ids", "stop_token_ids",
    "structured_outputs", "top_k",
}  # fmt: skip


@contextmanager
def feature_server(adapter: Path, log: Path) -> Iterator[Server]:
    """`python -m server` with both of the demo's proxies and the adapter in that directory."""
    flags = ["--enable-prefix-caching", "--enable-lora", "--lora-modules", f"{LORA}={adapter}"]
    flags += [word for flag in FLAGS.items() for word in flag]
    with serving(log, *flags, *proxy_flags()) as running:
        yield running


def make_adapter(directory: Path) -> PeftModel:
    """The demo's LLM in float32 with a random LoRA adapter that changes what it says; saved there."""
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
class Served:
    """A running feature server, asked through the `openai` client."""

    client: openai.OpenAI
    url: str

    def ask(
        self, prompt: str = "How do I look after my freezer?", model: str = ALIGNED, **options: Any
    ) -> Any:
        options = {"max_tokens": 32} | options
        extra = {key: options.pop(key) for key in VLLMS_OWN & set(options)}
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
def logits_of(llm: PeftModel, prompt: list[int], said: list[int], *, adapted: bool) -> Tensor:
    """Raw logits [T, V] before each of the T tokens said, by transformers."""
    ids = torch.tensor([prompt + said])
    if adapted:
        logits = llm(ids).logits
    else:
        with llm.disable_adapter():
            logits = llm(ids).logits
    return logits[0, len(prompt) - 1 : -1]


def sayable(
    logits: Tensor,  # [T, V]
    prompt: list[int],
    said: list[int],
    options: Mapping[str, Any],
    slack: float,
) -> Tensor:
    """Whether each of the T tokens said lies in the nucleus that the request's options leave: [T] bool.

    The documented meaning of OpenAI's and vLLM's options, over the whole sorted vocabulary. `slack`
    moves every threshold outwards (> 0): the server's float32 sums are not transformers'.
    """
    options = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **options}
    logits = logits.clone()
    for token, bias in options.get("logit_bias", {}).items():
        logits[:, int(token)] += bias
    spoken = F.one_hot(torch.tensor(said), logits.shape[-1])
    counts = spoken.cumsum(0) - spoken  # [T, V], before each token
    seen = counts > 0
    seen_or_asked = seen.clone()
    seen_or_asked[:, prompt] = True
    factor = options["repetition_penalty"]
    penalised = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen_or_asked, penalised, logits)
    logits -= options.get("frequency_penalty", 0.0) * counts
    logits -= options.get("presence_penalty", 0.0) * seen
    logits /= options["temperature"]

    own = logits.gather(-1, torch.tensor(said).unsqueeze(-1))  # [T, 1]
    likely_enough = own[:, 0] >= logits.amax(-1) + math.log(options["min_p"] or 1e-30) - slack
    num_better = (logits > own + slack).sum(-1)
    mass = logits.topk(options["top_k"]).values.softmax(-1).cumsum(-1)
    before = F.pad(mass, (1, 0)).gather(-1, num_better.clamp(max=options["top_k"]).unsqueeze(-1))
    within_mass = before[:, 0] < options["top_p"] + slack
    return likely_enough & (num_better < options["top_k"]) & within_mass
