"""ARGS (Khanov, Burapacheep, Li: Alignment as Reward-Guided Search, arXiv 2402.01694).

At each position the k most probable tokens are candidates. Each candidate's continuation is scored by a reward, and the
token of largest p + w · r is taken. Greedy, as the paper's main results. The paper's k and w are the defaults; its w is
for the scale of its reward model, here it multiplies standard deviations of the reward.
"""

from collections.abc import Sequence

import torch

from benchmarks.peers.decoders import Decode, Generation, Lab, Reader, Responses
from training.prompts import Prompt, samples_of


def args(lab: Lab, *, k: int = 10, weight: float = 1.5) -> Decode:
    @torch.inference_mode()
    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        frozen, passes, scored = lab.frozen, 0, 0
        reader = Reader(frozen.model, [prompt.ids for prompt in prompts])
        responses = Responses(len(prompts), frozen.end_ids, lab.decoding.max_new_tokens)
        while rows := responses.growing:
            probabilities, tokens = reader.logits().softmax(-1).topk(k)
            continuations = [
                responses.tokens[i] + [token] for i in rows for token in tokens[i].tolist()
            ]
            owners = [prompts[i] for i in rows for _ in range(k)]
            rewards = lab.score(samples_of(frozen.tokenizer, owners, continuations)).view(-1, k)
            best = (probabilities[rows] + weight * rewards).argmax(-1)
            emitted = tokens[:, 0].clone()
            emitted[rows] = tokens[rows].gather(-1, best.unsqueeze(-1)).squeeze(-1)
            for i in rows:
                responses.tokens[i].append(int(emitted[i]))
            reader.append(emitted)
            passes += len(rows)
            scored += len(continuations)
        return Generation(responses.tokens, passes, scored * lab.passes_of_reward)

    return decode
