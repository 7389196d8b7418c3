"""Proxy-RLHF as in the paper: the proxy reads the LLM's hidden state *after* the candidate.

Every candidate costs an LLM forward. In a batch each response is at its own position: a forward takes the present
candidate of each, and a rejected one stays in the cache, masked out.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparison.answers import answer, grade
from benchmarks.comparison.evaluation import frozen_texts, noise, open_evaluation_set
from benchmarks.comparison.jobs import Job, Setting
from benchmarks.comparison.trainings import Choose, needs_of_reward, proxy_options, train_proxy
from proxy.acceptance import Candidates, arrival_times, nucleus
from proxy.noise import noise_key, seeded_noise
from training import proxy_ppo
from training.model_inputs import HeadInput, pad_left
from training.policy import Decoding
from training.rollout import Counts, Decisions, Rollout


class LiteralNetwork(nn.Module):
    """Accept logit and value of the state after the candidate, [D, H] -> [D] each: two layers each."""

    def __init__(self, hidden_size: int, width: int, accept_bias: float) -> None:
        super().__init__()
        self.accept_bias = accept_bias
        self.policy = _two_layers(hidden_size, width)
        self.critic = _two_layers(hidden_size, width // 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.policy(_normalised(hidden)).squeeze(-1) + self.accept_bias

    def value(self, hidden: Tensor) -> Tensor:
        return self.critic(_normalised(hidden)).squeeze(-1)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def _two_layers(hidden_size: int, width: int) -> nn.Sequential:
    last = nn.Linear(width, 1)
    nn.init.normal_(last.weight, std=0.01)  # close to the frozen LLM initially
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), last)


def _normalised(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden.float(), hidden.shape[-1:])


class LiteralTrainer(proxy_ppo.ProxyPPOTrainer):
    """`training.proxy_ppo` with the literal proxy instead of the one-pass one."""

    network: LiteralNetwork  # type: ignore[assignment]

    def make_network(self) -> LiteralNetwork:  # type: ignore[override]
        hidden_size = self.model.get_input_embeddings().weight.shape[1]
        # Twice the width of the one-pass proxy, which has two halves: the same number of parameters.
        return LiteralNetwork(hidden_size, 2 * self.options.width, self.options.accept_bias)

    def roll_out(self, prompts: Sequence[list[int]], seeds: Iterable[int]) -> Rollout:
        return generate(
            self.model,
            self.network,
            prompts,
            self.options.decoding,
            end_ids=self.end_ids,
            seeds=seeds,
            max_candidates=self.options.max_candidates,
            max_rejections=self.options.max_rejections,
        )

    def evaluate(self, decisions: Decisions) -> tuple[Tensor, Tensor]:
        return self.network(decisions.hidden), self.network.value(decisions.hidden)


class _Positions:
    """The present position of each of N responses: candidates, their order, and the next one to propose."""

    def __init__(self, keys: Tensor, decoding: Decoding, max_candidates: int) -> None:
        count = len(keys)
        self.keys, self.decoding, self.max_candidates = keys, decoding, max_candidates
        self.token_ids = torch.zeros(count, max_candidates, dtype=torch.long)
        self.logprobs = torch.full((count, max_candidates), -torch.inf)
        self.order = torch.zeros(count, max_candidates, dtype=torch.long)
        self.acceptance_noise = torch.ones(count, max_candidates)
        self.sizes = torch.zeros(count, dtype=torch.long)
        self.num_rejected = torch.zeros(count, dtype=torch.long)

    def begin(self, rows: Tensor, logits: Tensor, positions: Tensor) -> None:
        """Start a new position in these rows, from the LLM's `logits` [R, V]."""
        decoding = self.decoding
        logits = logits.float() / decoding.temperature
        top_k = torch.full((len(rows),), decoding.top_k or logits.shape[-1])
        top_p = torch.full((len(rows),), decoding.top_p)
        candidates: Candidates = nucleus(logits, self.max_candidates, top_k, top_p)
        race, acceptance_noise = seeded_noise(
            self.keys[rows], positions, candidates.token_ids
        ).unbind(1)
        self.token_ids[rows], self.logprobs[rows] = candidates
        self.order[rows] = arrival_times(candidates, race).argsort(-1)
        self.acceptance_noise[rows] = acceptance_noise
        self.sizes[rows] = (candidates.logprobs > -torch.inf).sum(-1)
        self.num_rejected[rows] = 0

    def slots(self, limit: int) -> tuple[Tensor, Tensor]:
        """The proposed slot, and whether it is forced because all candidates were rejected. [N] each."""
        forced = self.num_rejected >= self.sizes.clamp(max=limit)
        proposed = self.order.gather(
            -1, self.num_rejected.clamp(max=self.max_candidates - 1)[:, None]
        )
        return torch.where(forced, 0, proposed.squeeze(-1)), forced


@torch.inference_mode()
def generate(
    model: nn.Module,
    network: LiteralNetwork,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    end_ids: Iterable[int],
    seeds: Iterable[int],
    max_candidates: int,
    max_rejections: int,
) -> Rollout:
    """One response to each prompt by the paper's loop; samples and records are as in `training.rollout`."""
    count = len(prompts)
    everyone = torch.arange(count)
    keys = torch.tensor([noise_key(seed) for seed in islice(seeds, count)])
    ends = torch.tensor(sorted(end_ids))
    inputs = pad_left(prompts, torch.device("cpu"))
    attention = inputs["attention_mask"]
    lengths = attention.sum(-1)  # of prompt and response, [N]
    starts = lengths.clone()
    state = _Positions(keys, decoding, max_candidates)
    alive = torch.ones(count, dtype=torch.bool)
    responses: list[list[int]] = [[] for _ in prompts]
    parts: list[Decisions] = []
    totals = torch.zeros(4, dtype=torch.long)
    with HeadInput(model) as head:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        state.begin(everyone, output.logits[:, -1], lengths)
        while alive.any():
            slots, forced = state.slots(max_rejections)
            tokens = state.token_ids.gather(-1, slots[:, None])
            attention = torch.cat([attention, alive[:, None].long()], dim=-1)
            output = model(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=lengths[:, None],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logprobs, acceptance_noise = (
                x.gather(-1, slots[:, None])[:, 0] for x in (state.logprobs, state.acceptance_noise)
            )
            accepted = acceptance_noise > F.softplus(-network(head.rows))
            decides = alive & ~forced & (state.sizes > 1)
            columns = (head.rows, tokens[:, 0], logprobs, accepted, everyone)
            parts.append(Decisions(*(column[decides] for column in columns)))
            emitted = alive & (accepted | forced | (state.sizes == 1))
            totals += torch.stack(
                [emitted, alive & ~forced, alive & ~emitted, emitted & forced]
            ).sum(-1)
            attention[:, -1] = emitted.long()
            lengths += emitted
            state.num_rejected += alive & ~emitted
            for row in emitted.nonzero()[:, 0].tolist():
                responses[row].append(int(tokens[row]))
            alive &= ~(emitted & torch.isin(tokens[:, 0], ends))
            alive &= lengths - starts < decoding.max_new_tokens
            going_on = (emitted & alive).nonzero()[:, 0]
            state.begin(going_on, output.logits[going_on, -1], lengths[going_on])
    return Rollout(responses, _by_response(parts), Counts(*totals.tolist()), None)


def _by_response(parts: Sequence[Decisions]) -> Decisions:
    decisions = Decisions(*(torch.cat(column) for column in zip(*parts, strict=True)))
    order = decisions.episodes.argsort(stable=True)
    return Decisions(*(column[order] for column in decisions))


def make_literal_proxy(
    name: str,
    reward: str,
    seed: int,
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
) -> Job:
    """`benchmarks.comparison.trainings.make_proxy` for the literal proxy, whose answers have no exact divergence."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = proxy_options(setting, directory, reward, seed, choose(setting))
        trainer, result = train_proxy(LiteralTrainer, options)
        evaluation = open_evaluation_set(setting, split)
        answers = answer(evaluation, noise("proxy", seed), trainer.roll_out)
        frozen = frozen_texts(setting, split, seed)
        return result | {"row": grade(evaluation, answers, frozen)}

    return Job(name, run, (*needs_of_reward(reward, seed), *needs))
