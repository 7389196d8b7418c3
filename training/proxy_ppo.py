"""Train a proxy with PPO beside a frozen LLM (Proxy-RLHF, arXiv 2403.04283).

    python -m training.proxy_ppo --model runs/base --reward runs/reward --prompts prompts.jsonl --output runs/proxy

State: prompt, tokens so far and the candidate that the LLM proposes. Action: accept or reject. Reward: the reward
model's score of the finished response. SKAM, which keeps the proxy inside the LLM's knowledge, is the law itself
(`proxy.acceptance`): candidates from the nucleus only, none proposed twice, the most probable token when all is
rejected.

Where this differs from the paper: the proxy reads the hidden state *before* the candidate and the candidate's
embedding, so all candidates of a position are scored in one LLM forward; and as the LLM is frozen, its hidden states
from the rollout are all that the update needs: PPO's epochs never run the LLM.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from proxy.checkpoint import BaseModelId, identify, resolve_model_dir, save
from proxy.network import ProxyNetwork
from training.console import TrainingError, main_guard
from training.data import read_rows
from training.ppo import action_entropy, action_logprobs, policy_loss, whiten
from training.rewards import Reward, load_reward
from training.rollout import Decisions, Decoding, Policy, Rollout, default_config, generate
from training.supervised import Conversations, load_model


@dataclass(frozen=True)
class Options:
    """Options of proxy training."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    reward: Path
    """A reward model, from `training.reward_model`."""
    prompts: Path
    """JSON lines of `prompt`."""
    output: Path
    """Directory for the proxy checkpoint and `metrics.jsonl`."""
    steps: int = 60
    """Updates of the proxy: rollouts."""
    episodes: int = 256
    """Responses in a rollout. Fewer than about 200 learn much less."""
    epochs: int = 4
    """Passes over a rollout's decisions."""
    minibatches: int = 4
    """Gradient steps in a pass."""
    learning_rate: float = 2e-3
    """Adam's, falling linearly to 0."""
    clip: float = 0.2
    """PPO's ε."""
    entropy_weight: float = 0.003
    """Weight of the entropy bonus."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    width: int = 64
    """Width of the proxy's layers."""
    max_candidates: int = 16
    """K: candidates of a position, at most."""
    max_rejections: int = 8
    """Rejections at a position, at most; then the most probable token is taken."""
    accept_bias: float = 2.0
    """Accept logit before training: 2 accepts 88 %."""
    decoding: Decoding = field(default_factory=Decoding)
    """How candidates are drawn."""
    seed: int = 0
    """Of weights, prompts and noise."""


class Update(NamedTuple):
    """What an update did, averaged over its gradient steps."""

    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float


class Trainer:
    """The proxy, its optimiser and what surrounds them."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.base: BaseModelId = identify(options.model)
        self.model, tokenizer = load_model(str(resolve_model_dir(options.model)))
        self.model.to(torch.bfloat16).eval().requires_grad_(False)
        self.reward: Reward = load_reward(options.reward, self.model, self.base)
        chats = Conversations(tokenizer)
        rows = read_rows(options.prompts, ("prompt",))
        self.prompts = [chats.prompt_ids(row["prompt"]) for row in rows]
        self.end_id = tokenizer.eos_token_id
        config = default_config(
            self.model,
            width=options.width,
            max_candidates=options.max_candidates,
            max_rejections=options.max_rejections,
            accept_bias=options.accept_bias,
        )
        self.network = ProxyNetwork(config)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=options.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimiser, start_factor=1.0, end_factor=0.0, total_iters=options.steps
        )
        self.rng = random.Random(options.seed)

    def step(self, index: int) -> dict[str, float]:
        """One update: roll out, score, estimate advantages, take PPO's gradient steps."""
        prompts = self.rng.choices(self.prompts, k=self.options.episodes)
        rollout = self._roll_out(prompts, index)
        rewards = self.reward(prompts, rollout.responses)
        if index == 0 and rewards.std() < 1e-8:
            raise TrainingError(
                "the reward gives every response the same score: there is nothing to learn"
            )
        update = self._update(rollout.decisions, whiten(rewards)[rollout.decisions.episodes])
        self.schedule.step()
        return {"step": index + 1, **_describe(rollout, rewards), **update._asdict()}

    def _roll_out(self, prompts: list[list[int]], index: int) -> Rollout:
        return generate(
            Policy(self.model, self.network),
            prompts,
            self.options.decoding,
            end_id=self.end_id,
            seed=self.options.seed * 1_000_003 + index,
        )

    def _evaluate(self, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """Accept logits and values of recorded decisions: [D] both."""
        embeddings = self.model.get_input_embeddings().weight[decisions.token_ids]  # [D, H]
        candidates = self.network.candidate_table(embeddings).unsqueeze(1)
        logits = self.network(decisions.hidden, candidates, decisions.logprobs.unsqueeze(1))
        return logits.squeeze(1), self.network.value(decisions.hidden)

    def _update(self, decisions: Decisions, returns: Tensor) -> Update:
        options = self.options
        decisions = Decisions(*(tensor.clone() for tensor in decisions))  # out of inference mode
        returns = returns.clone()
        with torch.no_grad():
            logits, values = self._evaluate(decisions)
            old_logprobs = action_logprobs(logits, decisions.accepted)
        advantages = whiten(returns - values)
        done = []
        for part in self._minibatches(len(returns)):
            some = Decisions(*(tensor[part] for tensor in decisions))
            logits, values = self._evaluate(some)
            logprobs = action_logprobs(logits, some.accepted)
            losses = (
                policy_loss(logprobs, old_logprobs[part], advantages[part], options.clip),
                (values - returns[part]).square().mean(),
                action_entropy(logits).mean(),
            )
            loss = losses[0] + options.value_weight * losses[1] - options.entropy_weight * losses[2]
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), options.max_grad_norm)
            self.optimiser.step()
            clipped = ((logprobs - old_logprobs[part]).exp() - 1).abs() > options.clip
            done.append(torch.stack([*losses, clipped.float().mean()]).detach())
        return Update(*torch.stack(done).mean(0).tolist())

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        for _ in range(self.options.epochs):
            yield from torch.randperm(count).chunk(self.options.minibatches)


def _describe(rollout: Rollout, rewards: Tensor) -> dict[str, float]:
    counts = rollout.counts
    return {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / len(rewards) ** 0.5).item(),
        "tokens_per_response": counts.tokens / len(rewards),
        "acceptance_rate": 1 - counts.rejected / counts.proposed,
        "rejections_per_token": counts.rejected / counts.tokens,
        "forced_rate": counts.forced / counts.tokens,
        "decisions": len(rollout.decisions.token_ids),
    }


def main(options: Options) -> None:
    trainer = Trainer(options)
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        f"{trainer.network.num_parameters():,} parameters train, {trainer.model.num_parameters():,} stay frozen"
    )
    with (options.output / "metrics.jsonl").open("w", encoding="utf-8") as log:
        bar = tqdm(range(options.steps), unit="update")
        for index in bar:
            metrics = trainer.step(index)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            bar.set_postfix(
                reward=f"{metrics['reward']:.3f}", accepted=f"{metrics['acceptance_rate']:.1%}"
            )
    training = {"options": _jsonable(asdict(options)), "last": metrics}
    version = save(options.output, trainer.network, base=trainer.base, training=training)
    print(f"{options.output}: version {version}")


def _jsonable(options: dict[str, object]) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
