"""ARGS (Khanov, Burapacheep, Li: Alignment as Reward-Guided Search, arXiv 2402.01694).

At each position the k most probable tokens are candidates. Each candidate's continuation is scored by a reward, and the
token of largest p + w · r is taken. Greedy, as the paper's main results. The paper's k and w are the defaults; its w is
for the scale of its reward model, here it multiplies standard deviations of the reward.

A reward model reads k continuations a token. An implicit reward needs one pass of its LM: the rewards of continuations
by one token differ by β log π_guide(v) / π(v).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.decoders import Decode, Generation, Lab, Reader, Responses
from training.prompts import Prompt, samples_of


def args(lab: Lab, *, k: int = 10, weight: float = 1.5) -> Decode:
    @torch.inference_mode()
    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        frozen, passes, scored = lab.frozen, 0, 0
        reader = Reader(frozen.model, [prompt.ids for prompt in prompts])
        guide = None
        if lab.beta is not None:
            guide = Reader(lab.guide.model, [lab.guide.read(prompt) for prompt in prompts])
        responses = Responses(len(prompts), frozen.end_ids, lab.decoding.max_new_tokens)
        while rows := responses.growing:
            logits = reader.logits()
            probabilities, tokens = logits.softmax(-1).topk(k)
            if guide is not None and lab.beta is not None:
                ratios = guide.logits().log_softmax(-1) - logits.log_softmax(-1)
                rewards = (lab.beta * ratios.gather(-1, tokens) / lab.scale.std)[rows]
                scored += len(rows)
            else:
                rewards = _score(lab, prompts, responses, rows, tokens)
                scored += k * len(rows) * lab.passes_of_reward
            best = (probabilities[rows] + weight * rewards).argmax(-1)
            emitted = tokens[:, 0].clone()
            emitted[rows] = tokens[rows].gather(-1, best.unsqueeze(-1)).squeeze(-1)
            for i in rows:
                responses.tokens[i].append(int(emitted[i]))
            for each in (reader, guide):
                if each is not None:
                    each.append(emitted)
            passes += len(rows)
        return Generation(responses.tokens, passes, scored)

    return decode


def _score(
    lab: Lab, prompts: Sequence[Prompt], responses: Responses, rows: Sequence[int], tokens: Tensor
) -> Tensor:
    """The reward of each row's continuations by one of its tokens [N, k]: [rows, k]."""
    k = tokens.shape[-1]
    continuations = [responses.tokens[i] + [token] for i in rows for token in tokens[i].tolist()]
    owners = [prompts[i] for i in rows for _ in range(k)]
    return lab.score(samples_of(lab.frozen.tokenizer, owners, continuations)).view(-1, k)
