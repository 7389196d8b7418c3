"""Train a proxy with PPO beside a frozen LLM (Proxy-RLHF, arXiv 2403.04283).

    python -m training.proxy_ppo --model runs/base --reward runs/reward --prompts prompts.jsonl --output runs/proxy

State: prompt, tokens so far, and the candidate that the LLM proposes. Action: accept or reject. Reward: the reward
model's score of the finished response. SKAM, which keeps the proxy within the LLM's knowledge, is part of accept/reject
sampling itself (`proxy.acceptance`): candidates come from the nucleus only, none is proposed twice, and the most
probable token is emitted if all are rejected.

Difference to the paper: the proxy reads the hidden state *before* the candidate and the candidate's embedding, so all
candidates of a position are scored in one LLM forward. The LLM is frozen, so the update needs only its hidden states
from the rollout: PPO's epochs never run the LLM.

Responses are sampled by the serving worker of vLLM, in this process or on servers, or by transformers (`--rollout`, see
`training.rollout_backends`). The same seed gives the same responses, up to rounding of the LLM's arithmetic.

With several processes (`accelerate launch -m training.proxy_ppo ...`) each rolls out its share of the responses; the
result is that of one process, up to rounding. `--resume` continues a killed run.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from judge.options import Finite, NonNegative, Positive
from proxy.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load, save
from proxy.hub import resolve_dir
from proxy.network import ProxyNetwork
from training import output, ppo_trainer
from training.console import TrainingError, main_guard, read_options
from training.on_policy import WRITES, average_steps, start, train
from training.policy import Decoding, Policy, default_config
from training.ppo import action_entropy, action_logprobs, policy_losses, whiten
from training.ppo_trainer import PATIENCE, Episodes
from training.publish import publish
from training.rollout import Decisions, Rollout
from training.rollout_backends import BackendOptions, make_backend, refuse_incomplete_servers
from training.run_card import write_card
from training.sizes import decision_bytes


@dataclass(frozen=True, kw_only=True)
class Options(ppo_trainer.Options, BackendOptions):
    """Options of training a proxy with PPO."""

    learning_rate: Positive = 2e-3
    """Adam's learning rate, decreasing linearly to 0."""
    entropy_weight: NonNegative = 0.003
    """Weight of the entropy bonus."""
    width: Annotated[int, Field(ge=2)] = 64
    """Width of the proxy's layers."""
    max_candidates: PositiveInt = 16
    """K: maximum number of candidates at a position."""
    max_rejections: NonNegativeInt = 8
    """Maximum number of rejections at a position; then the most probable token is emitted."""
    use_logprob: bool = True
    """Whether the candidate's log-probability is an input of the proxy."""
    accept_bias: Finite = 2.0
    """Accept logit before training: 2 accepts 88 %."""
    start_from: Path | None = None
    """A proxy to start from, for example of `training.proxy_dpo`, instead of an untrained one. Its configuration
    replaces the options above.
    """


class ProxyPPOTrainer(ppo_trainer.PPOTrainer[Options]):
    """Trains the proxy; the LLM stays unchanged."""

    policy_class = Policy

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        refuse_incomplete_servers(options)
        super().__init__(options, accelerator)
        self.network = self.trained = self.make_network().to(accelerator.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=options.learning_rate)
        self.backend = make_backend(
            options,
            self.model,
            self.base,
            accelerator,
            longest=self.longest,
            responses=options.episodes,
            batch_size=self.batch_size,
            policy_class=self.policy_class,
        )
        accelerator.print(
            f"{self.network.num_parameters():,} parameters train, {self.model.num_parameters():,} stay frozen"
        )

    def other_bytes(self) -> float:
        options = self.options
        decisions = 2 * options.episodes * options.decoding.max_new_tokens
        # Recorded decisions, their copies for the update, and the float32 values computed from these.
        learned = 3 * decision_bytes(self.sizes, decisions, 4)
        return super().other_bytes() + learned + options.backend_bytes(self.sizes.parameters)

    def make_network(self) -> ProxyNetwork:
        """The initial proxy."""
        options = self.options
        sampled_with = decoding_settings(options.decoding)
        if options.start_from is not None:
            loaded = load(resolve_dir(options.start_from), base=self.base)
            network = ProxyNetwork(loaded.config.model_copy(update=sampled_with))
            network.load_state_dict(loaded.network.state_dict())
            return network
        config = default_config(
            self.model,
            **sampled_with,
            width=options.width,
            max_candidates=options.max_candidates,
            max_rejections=options.max_rejections,
            use_logprob=options.use_logprob,
            accept_bias=options.accept_bias,
        )
        return ProxyNetwork(config)

    def close(self) -> None:
        """Release what the backend holds outside this process."""
        self.backend.close()

    def roll_out(self, prompts: Sequence[list[int]], seeds: Iterable[int]) -> Rollout:
        decoding, ends = self.options.decoding, self.end_ids
        return self.backend.generate(self.network, prompts, decoding, end_ids=ends, seeds=seeds)

    def evaluate(self, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """Accept logits and values of recorded decisions: [D] both."""
        embeddings = self.model.get_input_embeddings().weight[decisions.token_ids]  # [D, H]
        candidates = self.network.candidate_table(embeddings).unsqueeze(1)
        logits = self.network(decisions.hidden, candidates, decisions.logprobs.unsqueeze(1))
        return logits.squeeze(1), self.network.value(decisions.hidden)

    def learn(self, episodes: Episodes, index: int) -> dict[str, float]:
        """PPO's update on the decisions [D] of this process; gradients are summed over all processes."""
        options, recorded = self.options, episodes.rollout.decisions
        sizes = gather_object([len(recorded.token_ids)])
        if not sum(sizes):  # every position had a single candidate
            return {}
        decisions = Decisions(*(tensor.clone() for tensor in recorded))  # leaves inference mode
        device = decisions.hidden.device
        of_episodes = whiten(episodes.rewards).to(device)
        returns = of_episodes[episodes.first + decisions.episodes]
        with torch.no_grad():
            logits, values = self.evaluate(decisions)
            old_logprobs = action_logprobs(logits, decisions.accepted)
        before = sum(sizes[: self.accelerator.process_index])
        own = slice(before, before + len(returns))
        advantages = whiten(self.gather(returns - values))[own].to(device)
        step_metrics = []
        for minibatch in self.minibatches(sum(sizes), index):
            own_indices = (
                minibatch[(minibatch >= own.start) & (minibatch < own.stop)].to(device) - own.start
            )
            batch = Decisions(*(tensor[own_indices] for tensor in decisions))
            logits, values = self.evaluate(batch)
            logprobs = action_logprobs(logits, batch.accepted)
            log_ratios = logprobs - old_logprobs[own_indices]
            ratios = log_ratios.exp()
            sums = torch.stack(
                [
                    policy_losses(log_ratios, advantages[own_indices], options.clip).sum(),
                    (values - returns[own_indices]).square().sum(),
                    action_entropy(logits).sum(),
                    ((ratios - 1).abs() > options.clip).sum(),
                    (ratios - 1 - log_ratios).sum(),  # an estimate of KL(old ‖ new)
                ]
            )
            means = sums / len(minibatch)
            loss = means[0] + options.value_weight * means[1] - options.entropy_weight * means[2]
            loss.backward()
            step_metrics.append(
                [*self.accelerator.reduce(means.detach(), "sum").tolist(), self.gradient_step()]
            )
        names = ("policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl")
        return average_steps(names, step_metrics)

    def describe(self, rollout: Rollout) -> dict[str, float]:
        totals = (*rollout.counts, len(rollout.responses), len(rollout.decisions.token_ids))
        on_device = torch.tensor(totals, device=self.accelerator.device)
        sums = self.accelerator.reduce(on_device, "sum").tolist()
        tokens, proposed, rejected, forced, responses, decisions = sums
        return {
            "tokens_per_response": tokens / responses,
            "acceptance_rate": 1 - rejected / proposed,
            "rejections_per_token": rejected / tokens,
            "forced_rate": forced / tokens,
            "decisions": decisions,
        }

    def save(self, training: dict[str, Any]) -> str:
        version = save(self.options.output, self.network, base=self.base, training=training)
        return f"{self.options.output}: version {version}"

    def check(self, rows: list[dict[str, Any]]) -> None:
        super().check(rows)
        refuse_idle_proxy(rows[-PATIENCE:])


def decoding_settings(decoding: Decoding) -> dict[str, Any]:
    """The settings of a proxy's configuration that state the decoding it is trained with.

    Raises:
        TrainingError: the decoding is greedy, so there is nothing to learn from.
    """
    if decoding.temperature == 0:
        raise TrainingError(
            "--decoding.temperature 0 is greedy, so there is nothing to learn from: train above 0; "
            "the proxy can be used at any temperature"
        )
    return {name: getattr(decoding, name) for name in ("temperature", "top_k", "top_p")}


def refuse_idle_proxy(last: Sequence[dict[str, Any]]) -> None:
    """Stop a run whose proxy has nothing to decide, or always decides the same.

    Raises:
        TrainingError: in each of the last three updates no position left a choice, or the proxy rejected everything or
            nothing.
    """

    def always(name: str, value: float) -> bool:
        return len(last) == PATIENCE and all(row[name] == value for row in last)

    if always("decisions", 0):
        raise TrainingError(
            "every position has a single candidate: raise the temperature, top_k or top_p"
        )
    for rate, behaviour in ((0, "rejects everything"), (1, "rejects nothing")):
        if always("acceptance_rate", rate):
            raise TrainingError(
                f"the proxy {behaviour}, {PATIENCE} updates in a row, and learns no more from it: lower the learning "
                "rate, or raise the entropy weight"
            )


def main(options: Options) -> None:
    reads, writes = (
        ("model", "reward", "prompts", "start_from"),
        (*WRITES, WEIGHTS_FILE, CONFIG_FILE),
    )
    with output.run(options, "training.proxy_ppo", reads=reads, writes=writes) as run:
        if not run.is_finished:
            with closing(ProxyPPOTrainer(options, start())) as trainer:
                train(trainer, run)
            write_card(run, options)
    publish(run, options)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
