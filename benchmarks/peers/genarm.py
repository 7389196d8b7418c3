"""GenARM (Xu et al.: Reward Guided Generation with Autoregressive Reward Model, arXiv 2410.08193).

A second LM with the same vocabulary is the reward of single tokens: ρ(v) = log π_guide(v) / π(v). The paper samples
from π(v) · exp(w ρ(v)), which here is the law `tilt`. Any pair of next-token distributions will do: an implicit reward
(DPO) of the LLM itself, a small LM, or the LLM under a system prompt, which needs no training at all.

The law `accept` puts the same ratio where a proxy's network is: candidate v of the nucleus is accepted with probability
exp(w (ρ(v) − max ρ) / T), by `proxy.acceptance`, as the server would. A rejected candidate is not proposed again, so at
the same w this law follows the guide more closely than `tilt`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers.decoders import Decode, Generation, Lab, Reader, Responses
from proxy.acceptance import Candidates, decide, uniform_nucleus
from proxy.noise import noise_key, seeded_noise
from training.prompts import Prompt

K = 16
"""Candidates at a position, as many as the demos' proxies have."""


def genarm(lab: Lab, *, weight: float, law: Literal["tilt", "accept"] = "tilt") -> Decode:
    decoding = lab.decoding

    @torch.inference_mode()
    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        frozen, guide, passes = lab.frozen, lab.guide, 0
        keys = torch.tensor([noise_key((seed << 16) + i) for i in range(len(prompts))])
        reader = Reader(frozen.model, [prompt.ids for prompt in prompts])
        second = Reader(guide.model, [guide.read(prompt) for prompt in prompts])
        responses = Responses(len(prompts), frozen.end_ids, decoding.max_new_tokens)
        position = 0
        while rows := responses.growing:
            logits, guiding = reader.logits(), second.logits()
            candidates = uniform_nucleus(
                logits, decoding.temperature, decoding.top_k, decoding.top_p, K
            )
            log_ratio = (guiding.log_softmax(-1) - logits.log_softmax(-1)).gather(
                -1, candidates.token_ids
            )
            tokens = decide_by(
                candidates,
                weight * log_ratio / decoding.temperature,
                seeded_noise(keys, torch.full_like(keys, position), candidates.token_ids),
                law,
            )
            for i in rows:
                responses.tokens[i].append(int(tokens[i]))
            reader.append(tokens)
            second.append(tokens)
            passes += len(rows)
            position += 1
        return Generation(responses.tokens, passes, passes)

    return decode


def decide_by(
    candidates: Candidates,
    log_tilt: Tensor,  # [R, K]
    noise: Tensor,  # [R, 2, K]
    law: Literal["tilt", "accept"],
) -> Tensor:
    """A token of each row: [R]."""
    if law == "tilt":
        logprobs = (candidates.logprobs + log_tilt).log_softmax(-1)
        candidates, log_accept = candidates._replace(logprobs=logprobs), torch.zeros_like(logprobs)
    else:
        inside = candidates.logprobs > -torch.inf
        best = log_tilt.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
        log_accept = log_tilt - best
    rows = len(log_tilt)
    return decide(
        candidates,
        accept_logits(log_accept),
        noise,
        strength=torch.ones(rows),
        max_rejections=torch.full((rows,), K),
    ).token_ids


def accept_logits(log_accept: Tensor) -> Tensor:
    """Logits whose sigmoid is the probability exp(log_accept), at most 1 − 1e-6."""
    log_accept = log_accept.clamp(max=-1e-6)
    return log_accept - torch.log(-torch.expm1(log_accept))
