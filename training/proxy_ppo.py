"""Train a proxy with PPO beside a frozen LLM (Proxy-RLHF, arXiv 2403.04283).

    python -m training.proxy_ppo --model runs/base --reward runs/reward --prompts prompts.jsonl --output runs/proxy

State: prompt, tokens so far and the candidate that the LLM proposes. Action: accept or reject. Reward: the reward
model's score of the finished response. SKAM, which keeps the proxy inside the LLM's knowledge, is the law itself
(`proxy.acceptance`): candidates from the nucleus only, none proposed twice, the most probable token when all is
rejected.

Where this differs from the paper: the proxy reads the hidden state *before* the candidate and the candidate's
embedding, so all candidates of a position are scored in one LLM forward; and as the LLM is frozen, its hidden states
from the rollout are all that the update needs: PPO's epochs never run the LLM.

With several processes (`accelerate launch -m training.proxy_ppo ...`) each rolls out its share of the responses; the
result is that of one process, up to rounding. A run that was killed goes on with `--resume`.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from proxy.checkpoint import BaseModelId, identify, resolve_model_dir, save
from proxy.network import ProxyNetwork
from training.console import TrainingError, main_guard
from training.data import Message, read_rows
from training.metrics import Metrics
from training.ppo import action_entropy, action_logprobs, policy_losses, whiten
from training.rewards import Frozen, Reward, Sample, load_reward
from training.rollout import (
    Decisions,
    Decoding,
    Policy,
    Rollout,
    default_config,
    generate,
    longest_prompt,
)
from training.state import load_state, save_state
from training.supervised import Conversations, end_ids, load_model

_PATIENCE = 3  # updates in a row
_SAME = 1e-8  # rewards that vary less are the same


@dataclass(frozen=True)
class Options:
    """Options of proxy training."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    reward: str
    """A directory from `training.reward_model`, a sequence-classification model (directory or hub id), `self-judge`, or
    `module:function`."""
    prompts: str
    """JSON lines or Parquet of `prompt`, or a data set's name."""
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
    max_prompt_tokens: int = 1024
    """Longer prompts, and those that leave no room for a response in the LLM's context, are left out, and counted."""
    batch_size: int = 64
    """Responses at once in the device's memory, in the rollout and in the reward. Up to rounding it changes nothing."""
    decoding: Decoding = field(default_factory=Decoding)
    """How candidates are drawn."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen LLM computes in."""
    save_every: int = 5
    """Updates between two states that `--resume` can go on from."""
    resume: bool = False
    """Go on from the last state in the output directory, if there is one."""
    seed: int = 0
    """Of weights, prompts and noise."""


class Prompt(NamedTuple):
    """A prompt as it was read, and as the LLM reads it."""

    messages: list[Message]
    ids: list[int]


class Update(NamedTuple):
    """What an update did, averaged over its gradient steps."""

    policy_loss: float
    value_loss: float
    entropy: float
    clip_fraction: float
    approx_kl: float
    grad_norm: float
    skipped: int  # gradient steps left out


class Trainer:
    """The proxy, its optimiser and what surrounds them, in one of the run's processes.

    All randomness is a function of the seed and the update's number: a run that goes on has
    nothing else to remember, and every process draws its own part of the same.
    """

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        torch.manual_seed(options.seed)
        self.options, self.accelerator = options, accelerator
        self.base: BaseModelId = identify(options.model)
        self.model, tokenizer = load_model(
            str(resolve_model_dir(options.model)), dtype=getattr(torch, options.dtype)
        )
        self.model.to(accelerator.device).eval().requires_grad_(False)
        self.tokenizer, self.end_ids = tokenizer, end_ids(self.model, tokenizer)
        self.reward: Reward = load_reward(
            options.reward,
            Frozen(
                self.model,
                tokenizer,
                self.base,
                options.decoding,
                self.end_ids,
                options.batch_size,
            ),
        )
        self.prompts = self._read_prompts()
        config = default_config(
            self.model,
            width=options.width,
            max_candidates=options.max_candidates,
            max_rejections=options.max_rejections,
            accept_bias=options.accept_bias,
        )
        self.network = ProxyNetwork(config).to(accelerator.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=options.learning_rate)

    def _read_prompts(self) -> list[Prompt]:
        chats = Conversations(self.tokenizer)
        rows = read_rows(self.options.prompts, ("prompt",))
        prompts = [Prompt(row["prompt"], chats.prompt_ids(row["prompt"])) for row in rows]
        most = min(
            self.options.max_prompt_tokens, longest_prompt(self.model, self.options.decoding)
        )
        kept = [prompt for prompt in prompts if len(prompt.ids) <= most]
        if len(kept) < len(prompts):
            self.accelerator.print(
                f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts of over {most} tokens"
            )
        if not kept:
            raise TrainingError(
                f"no prompt is within {most} tokens: --max-prompt-tokens, or what the model reads"
            )
        return kept

    def step(self, index: int) -> dict[str, float]:
        """One update: roll out, score, estimate advantages, take PPO's gradient steps."""
        started = time.monotonic()
        options = self.options
        prompts = random.Random(f"{options.seed} {index}").choices(self.prompts, k=options.episodes)
        with self.accelerator.split_between_processes(list(enumerate(prompts))) as mine:
            first = mine[0][0]
            prompts = [prompt for _, prompt in mine]
        rollout = generate(
            Policy(self.model, self.network),
            [prompt.ids for prompt in prompts],
            options.decoding,
            end_ids=self.end_ids,
            seeds=count((options.seed << 40) + index * options.episodes + first),
            batch_size=options.batch_size,
        )
        texts = self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        samples = [
            Sample(prompt.messages, text, prompt.ids, response)
            for prompt, text, response in zip(prompts, texts, rollout.responses, strict=True)
        ]
        rewards = self._of_all(self.reward(samples))
        _refuse_bad_rewards(rewards)
        learning_rate = options.learning_rate * (1 - index / options.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        row = {"step": index + 1, **self._describe(rollout, rewards)}
        if row["decisions"] and row["reward_std"] > _SAME:  # else there is nothing to learn
            returns = whiten(rewards)[first + rollout.decisions.episodes.cpu()]
            row |= self._update(rollout.decisions, returns, index)._asdict()
        return row | {"learning_rate": learning_rate, "seconds": time.monotonic() - started}

    def _evaluate(self, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """Accept logits and values of recorded decisions: [D] both."""
        embeddings = self.model.get_input_embeddings().weight[decisions.token_ids]  # [D, H]
        candidates = self.network.candidate_table(embeddings).unsqueeze(1)
        logits = self.network(decisions.hidden, candidates, decisions.logprobs.unsqueeze(1))
        return logits.squeeze(1), self.network.value(decisions.hidden)

    def _update(self, decisions: Decisions, returns: Tensor, index: int) -> Update:
        """PPO's gradient steps on the decisions [D] of this process and those of the others."""
        options, parameters = self.options, list(self.network.parameters())
        decisions = Decisions(*(tensor.clone() for tensor in decisions))  # out of inference mode
        returns = returns.to(decisions.hidden.device)
        with torch.no_grad():
            logits, values = self._evaluate(decisions)
            old_logprobs = action_logprobs(logits, decisions.accepted)
        sizes = gather_object([len(returns)])
        before = sum(sizes[: self.accelerator.process_index])
        own = slice(before, before + len(returns))
        advantages = whiten(self._of_all(returns - values))[own].to(returns.device)
        done = []
        for whole in self._minibatches(sum(sizes), index):
            part = whole[(whole >= own.start) & (whole < own.stop)] - own.start
            some = Decisions(*(tensor[part] for tensor in decisions))
            logits, values = self._evaluate(some)
            logprobs = action_logprobs(logits, some.accepted)
            ratios = logprobs - old_logprobs[part]
            sums = torch.stack(
                [
                    policy_losses(ratios, advantages[part], options.clip).sum(),
                    (values - returns[part]).square().sum(),
                    action_entropy(logits).sum(),
                    ((ratios.exp() - 1).abs() > options.clip).sum(),
                    (ratios.exp() - 1 - ratios).sum(),  # an estimate of KL(old ‖ new)
                ]
            )
            means = sums / len(whole)
            loss = means[0] + options.value_weight * means[1] - options.entropy_weight * means[2]
            self.optimiser.zero_grad()
            loss.backward()
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            if norm.isfinite():  # alike in all processes
                self.optimiser.step()
            done.append([*self.accelerator.reduce(means.detach(), "sum").tolist(), norm.item()])
        return _averaged(done)

    def _minibatches(self, count: int, index: int) -> Iterator[Tensor]:
        """Index tensors into the decisions of all processes, alike in all of them."""
        generator = torch.Generator().manual_seed((self.options.seed << 32) + index)
        for _ in range(self.options.epochs):
            yield from torch.randperm(count, generator=generator).chunk(self.options.minibatches)

    def _of_all(self, values: Tensor) -> Tensor:
        """[N] of every process, one after the other, on the CPU."""
        return torch.tensor(gather_object(values.tolist()))

    def _describe(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        decisions = len(rollout.decisions.token_ids)
        ours = torch.tensor([*rollout.counts, decisions], device=self.accelerator.device)
        sums = self.accelerator.reduce(ours, "sum").tolist()
        tokens, proposed, rejected, forced, decisions = sums
        return {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "reward_se": (rewards.std() / len(rewards) ** 0.5).item(),
            "tokens_per_response": tokens / len(rewards),
            "acceptance_rate": 1 - rejected / proposed,
            "rejections_per_token": rejected / tokens,
            "forced_rate": forced / tokens,
            "decisions": decisions,
        }


def _averaged(steps: list[list[float]]) -> Update:
    """The gradient steps of an update; those that were left out count as such and not in the means."""
    taken = [row for row in steps if math.isfinite(row[-1])]
    if not taken:
        raise TrainingError(
            "no gradient of this update was finite: lower the learning rate, or look at the reward's scale"
        )
    means = [fmean(column) for column in zip(*taken, strict=True)]
    return Update._make([*means, len(steps) - len(taken)])


def _refuse_bad_rewards(rewards: Tensor) -> None:
    bad = int((~rewards.isfinite()).sum())
    if bad:
        raise TrainingError(
            f"the reward of {bad} of {len(rewards)} responses is not a finite number"
        )


def refuse_collapse(rows: list[dict[str, Any]]) -> None:
    """Stop a run whose last updates had nothing to learn from.

    Raises:
        TrainingError: every response had the same reward in the first update, or in the last three; or in each of the
            last three the LLM left nothing to decide, or the proxy rejected everything or nothing.
    """
    last = rows[-_PATIENCE:]

    def always(name: str, value: float) -> bool:
        return len(last) == _PATIENCE and all(row[name] == value for row in last)

    if rows[0]["reward_std"] <= _SAME or all(row["reward_std"] <= _SAME for row in last):
        raise TrainingError(
            "the reward gives every response the same score: there is nothing to learn"
        )
    if always("decisions", 0):
        raise TrainingError(
            "every position has a single candidate: raise the temperature, top_k or top_p"
        )
    for rate, what in ((0, "rejects everything"), (1, "rejects nothing")):
        if always("acceptance_rate", rate):
            raise TrainingError(
                f"the proxy {what}, {_PATIENCE} updates in a row, and learns no more from it: lower the learning rate, "
                "or raise the entropy weight"
            )


def main(options: Options) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trainer = Trainer(options, accelerator)
    settings = _jsonable(asdict(options))
    state = {k: v for k, v in settings.items() if k not in ("output", "resume", "save_every")}
    done = 0
    if options.resume:
        done = load_state(options.output, trainer.network, trainer.optimiser, options=state)
        accelerator.print(
            f"going on after update {done}" if done else "nothing to resume: beginning anew"
        )
    accelerator.print(
        f"{trainer.network.num_parameters():,} parameters train, {trainer.model.num_parameters():,} stay frozen"
    )
    if not accelerator.is_main_process:
        for index in range(done, options.steps):
            trainer.step(index)
        return
    with Metrics(options.output, after=done or None) as metrics:
        bar = tqdm(range(done, options.steps), initial=done, total=options.steps, unit="update")
        for index in bar:
            row = trainer.step(index)
            metrics.add(row)
            refuse_collapse(metrics.rows)
            bar.set_postfix(reward=f"{row['reward']:.3f}", accepted=f"{row['acceptance_rate']:.1%}")
            if (index + 1) % options.save_every == 0 or index + 1 == options.steps:
                save_state(
                    options.output,
                    trainer.network,
                    trainer.optimiser,
                    updates=index + 1,
                    options=state,
                )
    training = {"options": settings, "last": metrics.rows[-1]}
    version = save(options.output, trainer.network, base=trainer.base, training=training)
    print(f"{options.output}: version {version}")


def _jsonable(options: dict[str, object]) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
