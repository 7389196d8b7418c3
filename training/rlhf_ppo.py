"""Full RLHF: PPO on all weights of an actor and a critic, or on LoRAs on them, the baseline for Proxy-RLHF.

    python -m training.rlhf_ppo --model runs/base --reward runs/reward --prompts prompts.jsonl --output runs/rlhf

As in InstructGPT (arXiv 2203.02155), the actor and the critic start from the model, and a frozen copy of it is the
reference. The reward of a token is −w · (log π_old − log π_ref); the last one also gets the response's score, whitened
over the rollout as in `training.proxy_ppo`. Tokens are sampled from the actor's full distribution: with a cut-off, its
probabilities would not be those of the samples, and the actor could diverge in tokens that are never sampled. Data,
rewards, prompts, several processes and `--resume` are as in `training.proxy_ppo`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model
from pydantic import NonNegativeInt
from torch import Tensor, nn
from transformers import AutoModel

from judge.options import NonNegative, Positive, Share
from proxy.checkpoint import resolve_model_dir
from training import output, ppo_trainer
from training.adapters import lora_config
from training.console import TrainingError, main_guard, read_options
from training.logprobs import response_logprobs
from training.memory import Work, plan
from training.micro_batches import split_by_tokens
from training.model_inputs import pad_responses
from training.models import load_model, loading
from training.on_policy import WRITES, average_steps, start, train
from training.policy import Decoding, Policy
from training.ppo import gae, policy_losses, whiten
from training.ppo_trainer import Episodes
from training.publish import publish
from training.rollout import Rollout, generate
from training.run_card import write_card
from training.saving import MODEL_FILES, saving


@dataclass(frozen=True, kw_only=True)
class Options(ppo_trainer.Options):
    """Options of full RLHF."""

    learning_rate: Positive = 5e-5
    """Adam's learning rate, decreasing linearly to 0. 5e-5 suits a small model; use about 1e-6 for a pretrained LLM."""
    critic_learning_rate: Positive = 2e-4
    """The learning rate of the critic."""
    lora_rank: NonNegativeInt = 0
    """Rank of a LoRA on all linear layers, trained instead of the weights, of the actor and of the critic; 0 = none."""
    kl_weight: NonNegative = 0.1
    """w: penalty for a nat of divergence from the reference, in standard deviations of the score."""
    gae_lambda: Share = 0.95
    """λ of the advantage estimates."""
    decoding: Decoding = field(default_factory=lambda: Decoding(top_k=0, top_p=1.0))
    """How responses are sampled: the temperature is 1 and nothing is cut off."""


class Batch(NamedTuple):
    """Responses of a rollout, padded on the right; T positions, each of which predicts the next token."""

    ids: Tensor  # [N, T + 1]
    mask: Tensor  # [N, T] bool, True = the predicted token belongs to the response
    old_logprobs: Tensor  # [N, T] natural log, of the actor that sampled the responses
    advantages: Tensor  # [N, T]
    returns: Tensor  # [N, T]

    def lengths(self) -> list[int]:
        """Length of prompt and response, for each."""
        places = torch.arange(2, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.mask * places).amax(-1).tolist()

    def rows(self, part: Tensor) -> "Batch":
        """Some rows, without columns that none of them needs."""
        rows = Batch(*(column[part] for column in self))
        width = max(rows.lengths())
        return Batch(rows.ids[:, :width], *(column[:, : width - 1] for column in rows[1:]))


class Critic(nn.Module):
    """The LLM's body with a linear head: [N, T] ids -> the value of the state after each token, [N, T].

    Args:
        directory: of the LLM.
        dtype: of the body.
        lora_rank: of a LoRA that is trained instead of the body; 0 = none.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, lora_rank: int) -> None:
        super().__init__()
        with loading(f"the critic from {directory}"):
            self.body = AutoModel.from_pretrained(directory, dtype=dtype)
        if lora_rank:
            self.body = get_peft_model(self.body, lora_config(lora_rank, "FEATURE_EXTRACTION"))
        self.head = nn.Linear(self.body.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids).last_hidden_state.float()).squeeze(-1)


class RLHFTrainer(ppo_trainer.PPOTrainer[Options]):
    """Trains an actor and a critic; computes in `dtype`, with weights in float32."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        full_distribution = Decoding(
            top_k=0, top_p=1.0, max_new_tokens=options.decoding.max_new_tokens
        )
        if options.decoding != full_distribution:
            raise TrainingError(
                "full RLHF draws from the whole distribution: leave temperature 1, top_k 0 and top_p 1"
            )
        super().__init__(options, accelerator)
        directory, device = resolve_model_dir(options.model), accelerator.device
        # Not copies of `self.model`: a reward may have added its LoRA to that.
        dtype = self.model.dtype if options.lora_rank else torch.float32
        # Without a LoRA it samples faster as a copy in `dtype`.
        self.sampler = load_model(str(directory), dtype=self.model.dtype)[0].to(device).eval()
        self.actor: Any = (
            get_peft_model(self.sampler, lora_config(options.lora_rank))
            if options.lora_rank
            else load_model(str(directory))[0].to(device).eval()
        )
        self.critic = Critic(directory, dtype, options.lora_rank).to(device).eval()
        actor, critic = (
            [p for p in module.parameters() if p.requires_grad]
            for module in (self.actor, self.critic)
        )
        self.trained = nn.ParameterList([*actor, *critic])
        self.optimiser = torch.optim.Adam(
            [
                {"params": actor, "lr": options.learning_rate},
                {"params": critic, "lr": options.critic_learning_rate},
            ]
        )
        accelerator.print(f"{sum(p.numel() for p in self.trained.parameters()):,} parameters train")

    def other_bytes(self) -> float:
        if self.options.lora_rank:  # a LoRA takes little beside the weights
            return super().other_bytes() + 2 * self.weights
        learned = (
            2 * 16 * self.sizes.parameters
        )  # actor and critic, with gradients and Adam's moments
        return super().other_bytes() + self.weights + learned

    def plan_memory(self) -> int:
        options = self.options
        work = Work(
            model=str(resolve_model_dir(options.model)),
            longest=self.longest + options.decoding.max_new_tokens,
            lora_rank=options.lora_rank,
            bf16=options.dtype == "bfloat16",
            other_bytes=super().other_bytes() + 2 * self.weights,
            graphs=2,
        )
        lower = "lower --max-prompt-tokens or --decoding.max-new-tokens, or train a proxy"
        self.max_tokens = plan(work, lower).tokens
        return super().plan_memory()

    def roll_out(self, prompts: Sequence[list[int]], seeds: Iterable[int]) -> Rollout:
        if not self.options.lora_rank:
            self.sampler.load_state_dict(self.actor.state_dict())
        return generate(
            Policy(self.sampler),
            prompts,
            self.options.decoding,
            end_ids=self.end_ids,
            seeds=seeds,
            batch_size=self.batch_size,
        )

    def learn(self, episodes: Episodes, index: int) -> dict[str, float]:
        options, process = self.options, self.accelerator.process_index
        batch, kl = self._batch(episodes)
        sizes = gather_object([int(batch.mask.sum())])
        own = slice(sum(sizes[:process]), sum(sizes[: process + 1]))
        advantages = torch.zeros_like(batch.advantages)
        whitened = whiten(self.gather(batch.advantages[batch.mask]))[own]
        advantages[batch.mask] = whitened.to(advantages.device)
        batch = batch._replace(advantages=advantages)
        first, count, lengths = episodes.first, len(batch.ids), batch.lengths()
        step_metrics = []
        for minibatch in self.minibatches(len(episodes.rewards), index):
            own_rows = minibatch[(minibatch >= first) & (minibatch < first + count)] - first
            tokens = self.accelerator.reduce(batch.mask[own_rows].sum(), "sum")
            sums = torch.zeros(4, device=batch.ids.device)
            for chunk in split_by_tokens([lengths[i] for i in own_rows.tolist()], self.max_tokens):
                losses = self._losses(batch.rows(own_rows[chunk]))
                (losses[0] + options.value_weight * losses[1]).div(tokens).backward()
                sums += losses.detach()
            means = self.accelerator.reduce(sums, "sum") / tokens
            step_metrics.append([*means.tolist(), self.gradient_step()])
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
        return {"kl": self.gather(kl).mean().item(), **average_steps(names, step_metrics)}

    def _batch(self, episodes: Episodes) -> tuple[Batch, Tensor]:
        """The rollout with everything that PPO needs, and log π_old / π_ref of each response: [N] nats."""
        responses, device = episodes.rollout.responses, self.model.device
        ids, is_response = pad_responses(episodes.prompts, responses)
        ids, mask = ids.to(device), is_response[:, 1:].to(device)
        parts = list(zip(*(x.split(self.batch_size) for x in (ids, mask)), strict=True))
        with torch.no_grad():
            old, reference, values = (
                torch.cat([compute(*inputs) for inputs in parts])
                for compute in (self._logprobs, self._reference_logprobs, self._values)
            )
        divergence = (old - reference) * mask
        rewards = -self.options.kl_weight * divergence
        scores = whiten(episodes.rewards)[episodes.first : episodes.first + len(ids)]
        last = (
            mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
        )  # index of each response's last token
        rewards[torch.arange(len(ids), device=device), last] += scores.to(device)
        advantages = gae(rewards, values, mask, self.options.gae_lambda)
        return Batch(ids, mask, old, advantages, advantages + values), divergence.sum(-1)

    def _losses(self, batch: Batch) -> Tensor:
        """[4]: policy loss, value loss, clipped, and estimated KL(old ‖ new), summed over the tokens."""
        mask, clip = batch.mask, self.options.clip
        log_ratios = (self._logprobs(batch.ids, mask) - batch.old_logprobs)[mask]
        errors = (self._values(batch.ids, mask) - batch.returns)[mask]
        ratios = log_ratios.exp()
        return torch.stack(
            [
                policy_losses(log_ratios, batch.advantages[mask], clip).sum(),
                errors.square().sum(),
                ((ratios - 1).abs() > clip).sum(),
                (ratios - 1 - log_ratios).sum(),
            ]
        )

    def _logprobs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """log π(token | previous tokens) of the responses' tokens: [N, T + 1], [N, T] -> [N, T]."""
        with self._autocast():
            return response_logprobs(self.actor, ids, mask)

    def _reference_logprobs(self, ids: Tensor, mask: Tensor) -> Tensor:
        return response_logprobs(self.model, ids, mask)

    def _values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The critic's value of the state before each token but the first: [N, T + 1] -> [N, T]."""
        with self._autocast():
            return self.critic(ids)[:, :-1].float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"
        )

    def describe(self, rollout: Rollout) -> dict[str, float]:
        totals = torch.tensor([rollout.counts.tokens, len(rollout.responses)])
        tokens, responses = self.accelerator.reduce(totals.to(self.model.device), "sum").tolist()
        return {"tokens_per_response": tokens / responses}

    def save(self, training: dict[str, Any]) -> str:
        with saving(self.options.output) as directory:
            if not self.options.lora_rank:
                self.actor.to(torch.bfloat16)
            self.actor.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        return str(self.options.output)


def main(options: Options) -> None:
    reads, writes = ("model", "reward", "prompts"), (*WRITES, *MODEL_FILES)
    with output.run(options, "training.rlhf_ppo", reads=reads, writes=writes) as run:
        if not run.is_finished:
            train(RLHFTrainer(options, start()), run)
            write_card(run, options)
    publish(run, options)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
