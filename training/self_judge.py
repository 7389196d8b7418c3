"""On-policy self-training with the model's own judgments (SELF-JUDGE, arXiv 2402.11253).

    python -m training.self_judge --model runs/base --prompts prompts.jsonl --held-out held_out.jsonl \\
        --output runs/self

The model answers each prompt twice. Its initial version judges in both orders which answer is better, and the model is
trained to prefer that one, with the initial model as the reference. With a LoRA (the default), judge and reference are
the same weights with the LoRA switched off; without one they are a second copy.

Nothing external corrects this method, so it is monitored: every `check_every` updates the model answers held-out
prompts. If a limit below is exceeded, training stops with an error. The model of the last check within the limits is
kept.

The file is longer than 300 lines because a quarter of it is options.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from judge.options import NonNegative, Positive, Share
from judge.principles import FILE_NAME, principles_of, write_principles
from judge.prompts import Question
from judge.verdict import PairResult
from proxy.checkpoint import resolve_model_dir
from training import on_policy, output
from training.adapters import CausalLM, lora_config
from training.console import TrainingError, main_guard, read_options
from training.logprobs import response_logprobs
from training.memory import Work, plan
from training.micro_batches import split_by_tokens
from training.model_card import Score
from training.model_inputs import pad_responses
from training.models import load_model
from training.on_policy import WRITES, average_steps, start, train
from training.pair_judges import judge_pairs, load_judges
from training.policy import Decoding, Policy
from training.preference_losses import preference_losses
from training.prompts import Prompt, read_prompts
from training.publish import publish
from training.reward_loading import load_reward, reward_bytes
from training.rewards import Reward
from training.rollout import generate
from training.run_card import write_card
from training.saving import MODEL_FILES, saving


@dataclass(frozen=True, kw_only=True)
class Options(on_policy.Options):
    """Options of self-training."""

    held_out: str
    """Prompts for monitoring, which are not trained on: JSON lines, Parquet or a data set's name."""
    judge: str | None = None
    """Directory of a judge that is a LoRA on the model, from `training.jsft --lora-rank`, or another reward, as
    `training.proxy_ppo` takes one, to judge by its scores. None = the initial model itself.
    """
    principles: tuple[str, ...] = ()
    """Names of the judge's principles to judge by; the majority decides. Empty = the first."""
    pairs: PositiveInt = 128
    """Prompts in an update, each answered twice."""
    epochs: PositiveInt = 1
    """Passes over an update's pairs."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of DPO (arXiv 2305.18290), SLiC (2305.10425) or IPO (2310.12036)."""
    beta: Positive = 0.1
    """β of the loss: a higher one stays nearer to the initial model."""
    soft_labels: bool = False
    """Train on both orders of a pair, weighted by the judge's probability (cDPO), instead of on the likelier one only
    as in the paper. The better a policy becomes, the more pairs are practically equal.
    """
    lora_rank: NonNegativeInt = 8
    """Rank of a LoRA on all linear layers; 0 = train all weights."""
    learning_rate: Positive = 1e-5
    """Adam's learning rate, decreasing linearly to 0. 1e-5 suits a LoRA on a pretrained LLM; a small model needs more.
    """
    decoding: Decoding = field(default_factory=lambda: Decoding(top_k=0, top_p=0.9))
    """How answers are sampled."""
    check_every: PositiveInt = 10
    """Updates between two checks on the held-out prompts."""
    num_held_out: PositiveInt = 128
    """Use only the first held-out prompts, up to this number."""
    outside: str | None = None
    """An independent reward, as `training.proxy_ppo` takes one, to compare the judge's verdicts with."""
    min_agreement: Share = 0.5
    """Stop if the judge agrees with the outside reward in fewer of the pairs."""
    min_diversity: NonNegative = 0.5
    """Stop if the share of distinct word pairs falls below this part of its initial value."""
    max_length_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """Stop if answers are longer than this many times their initial length, or shorter than its reciprocal."""
    max_flips: Share = 0.75
    """Stop if the two orders disagree in more of the pairs: the judge no longer sees a difference."""


class Pairs(NamedTuple):
    """N prompts, each answered twice: all first answers, then all second ones."""

    prompts: list[Prompt]
    responses: list[list[int]]  # [2 N] token ids
    pair_results: list[PairResult]  # [N], of the first answer against the second


class SelfJudgeTrainer(on_policy.OnPolicyTrainer[Options]):
    """The policy, its initial version, and the monitoring."""

    progress_metric = "margin"

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        super().__init__(options, accelerator)
        device = accelerator.device
        self.directory = directory = resolve_model_dir(options.model)
        self.outside = self._load_outside(directory) if options.outside else None
        if options.lora_rank:
            self.policy: Any = get_peft_model(self.model, lora_config(options.lora_rank))
            self.sampler = self.model
        else:
            self.policy = load_model(str(directory))[0].to(device).eval()
            # A copy of the policy in `dtype`, which samples faster.
            self.sampler = load_model(str(directory), dtype=self.model.dtype)[0].to(device).eval()
        self.trained = nn.ParameterList(p for p in self.policy.parameters() if p.requires_grad)
        self.optimiser = torch.optim.Adam(self.trained, lr=options.learning_rate)
        frozen = replace(self.frozen(), model=self.policy if options.lora_rank else self.model)
        self.initial = frozen.without_adapter
        self.judges = load_judges(options.judge, frozen, options.principles)
        self.held_out = read_prompts(options.held_out, options, self.tokenizer, self.config)[
            : options.num_held_out
        ]
        self.saved = False
        self.at_start = self._look()  # still the initial model, even in a resumed run
        accelerator.print(f"{sum(p.numel() for p in self.trained):,} parameters train")

    def other_bytes(self) -> float:
        options = self.options
        rewards = sum(
            reward_bytes(name, getattr(torch, options.dtype))
            for name in (options.judge, options.outside)
            if name
        )
        outside = self.weights if options.outside else 0.0  # it has its own LLM
        policy = 0.0 if options.lora_rank else self.weights + 16 * self.sizes.parameters
        return rewards + outside + policy

    def plan_memory(self) -> int:
        options, longest = self.options, self.longest + self.options.decoding.max_new_tokens
        learned = 0 if options.lora_rank else 16 * self.sizes.parameters
        work = Work(
            model=str(resolve_model_dir(options.model)),
            longest=longest,
            least=2 * longest,
            lora_rank=options.lora_rank,
            bf16=options.dtype == "bfloat16",
            other_bytes=self.other_bytes() - learned + (0 if options.lora_rank else self.weights),
        )
        lower = "lower --max-prompt-tokens or --decoding.max-new-tokens, or train a LoRA"
        self.max_tokens = plan(work, lower).tokens
        return super().plan_memory()

    def _load_outside(self, directory: Path) -> Reward:
        """Load the outside reward on its own LLM, because `self.model` will get a LoRA."""
        model = load_model(str(directory), dtype=self.model.dtype)[0].to(self.model.device).eval()
        assert self.options.outside is not None
        return load_reward(self.options.outside, replace(self.frozen(), model=model))

    def step(self, index: int) -> dict[str, float]:
        """One update: answer twice, judge, and train on the preferences."""
        started, options = time.monotonic(), self.options
        prompts, seeds, first = self.draw_prompts(index, options.pairs)
        pairs = self._answer(prompts, list(islice(seeds, len(prompts))))
        left = self.anneal(index)
        row = {"step": index + 1, **self._describe(pairs), **self._learn(pairs, first, index)}
        if (index + 1) % options.check_every == 0 or index + 1 == options.steps:
            row |= {f"held_out_{name}": value for name, value in self._look().items()}
        seconds = time.monotonic() - started
        return row | {"learning_rate": left * options.learning_rate, "seconds": seconds}

    def _answer(self, prompts: list[Prompt], seeds: list[int]) -> Pairs:
        if self.sampler is not self.model:
            self.sampler.load_state_dict(self.policy.state_dict())
        rollout = generate(
            Policy(self.sampler),
            [prompt.ids for prompt in prompts] * 2,
            self.options.decoding,
            end_ids=self.end_ids,
            seeds=[*seeds, *(seed + (1 << 39) for seed in seeds)],
            batch_size=self.batch_size,
        )
        texts = self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
        questions = [
            Question([*prompt.messages], *both)
            for prompt, *both in zip(
                prompts, texts[: len(prompts)], texts[len(prompts) :], strict=True
            )
        ]
        return Pairs(prompts, rollout.responses, judge_pairs(self.judges, questions))

    def _learn(self, pairs: Pairs, first: int, index: int) -> dict[str, float]:
        """Gradient steps on −log σ(β Δ), or another loss, of the pairs whose answers differ.

        Δ = log (π / π_ref)(chosen) − log (π / π_ref)(rejected).
        """
        options, count, device = self.options, len(pairs.prompts), self.model.device
        prompts = [prompt.ids for prompt in pairs.prompts] * 2
        ids, is_response = (x.to(device) for x in pad_responses(prompts, pairs.responses))
        mask = is_response[:, 1:]
        lengths = [  # tokens of a pair, padded
            2 * (len(prompt.ids) + max(map(len, answers)))
            for prompt, *answers in zip(
                pairs.prompts, pairs.responses[:count], pairs.responses[count:], strict=True
            )
        ]
        sign = torch.tensor([1.0 if r.first_advances else -1.0 for r in pairs.pair_results]).to(
            device
        )
        certainty = torch.ones_like(sign)  # weight of the likelier order in a pair's loss
        if options.soft_labels:
            certainty = torch.tensor([r.probability for r in pairs.pair_results]).to(device)
            certainty = torch.where(sign > 0, certainty, 1 - certainty)
        differs = (~torch.tensor(_identical(pairs))).float().to(device)  # [N]
        with torch.no_grad():
            places = torch.arange(len(ids)).split(self.batch_size)
            reference = torch.cat([_logprobs(self.initial, ids[i], mask[i]) for i in places])
        step_metrics = []
        for minibatch in self.minibatches(options.pairs, index):
            own_rows = minibatch[(minibatch >= first) & (minibatch < first + count)] - first
            total = self.accelerator.reduce(differs[own_rows].sum(), "sum").clamp(min=1)
            sums = torch.zeros(3, device=device)
            for chunk in split_by_tokens([lengths[i] for i in own_rows.tolist()], self.max_tokens):
                rows = own_rows[chunk]
                both = torch.cat([rows, rows + count])
                with self._autocast():
                    gains = _logprobs(self.policy, ids[both], mask[both]) - reference[both]
                margins = sign[rows] * (gains[: len(rows)] - gains[len(rows) :])
                losses = preference_losses(margins, certainty[rows], options.loss, options.beta)
                losses = losses * differs[rows]
                (losses.sum() / total).backward()
                kept = margins.detach() * differs[rows]
                sums += torch.stack([losses.detach().sum(), (kept > 0).sum(), kept.sum()])
            means = self.accelerator.reduce(sums, "sum") / total
            step_metrics.append([*means.tolist(), self.gradient_step()])
        return average_steps(("loss", "accuracy", "margin"), step_metrics)

    def _describe(self, pairs: Pairs) -> dict[str, float]:
        columns = {
            "flips": [not pair_result.mean.consistent for pair_result in pairs.pair_results],
            "confidence": [
                abs(pair_result.probability - 0.5) for pair_result in pairs.pair_results
            ],
            "identical": _identical(pairs),
            "tokens_per_response": [len(response) for response in pairs.responses],
        }
        return {
            name: self.gather(torch.tensor(column, dtype=torch.float)).mean().item()
            for name, column in columns.items()
        }

    def _look(self) -> dict[str, float]:
        """Metrics on the held-out prompts, with the same noise each time."""
        with self.accelerator.split_between_processes(list(enumerate(self.held_out))) as mine:
            prompts = [prompt for _, prompt in mine]
            seeds = [(self.options.seed << 40) + (1 << 38) + i for i, _ in mine]
        pairs = self._answer(prompts, seeds)
        metrics = self._describe(pairs)
        bigrams = [pair for r in gather_object(pairs.responses) for pair in pairwise(r)]
        metrics["diversity"] = len(set(bigrams)) / max(1, len(bigrams))
        if self.outside is not None:
            scores = self.outside(self.samples([*prompts, *prompts], pairs.responses))
            first_scores, second_scores = scores.cpu().split(len(prompts))
            prefers = torch.tensor([r.first_advances for r in pairs.pair_results])
            agrees = torch.where(
                first_scores == second_scores,
                0.5,
                ((first_scores > second_scores) == prefers).float(),
            )
            metrics["agreement"] = self.gather(agrees).mean().item()
            metrics["outside_reward"] = self.gather(scores).mean().item()
        return metrics

    def scores(self, row: dict[str, Any]) -> list[Score]:
        of, count = "held-out prompts", len(self.held_out)
        names = {
            "flips": "pairs on which the judge's two orders disagree",
            "diversity": "distinct word pairs",
            "agreement": "pairs on which the judge agrees with the outside reward",
        }
        return [
            Score(text, row[f"held_out_{name}"], None, count, of)
            for name, text in names.items()
            if f"held_out_{name}" in row
        ]

    def check(self, rows: list[dict[str, Any]]) -> None:
        """Stop if a limit is exceeded; else save the model."""
        last, options = rows[-1], self.options
        if "held_out_diversity" not in last:
            return
        now = {name.removeprefix("held_out_"): value for name, value in last.items()}
        start, agreement = self.at_start, now.get("agreement", 1.0)
        longer = now["tokens_per_response"] / start["tokens_per_response"]
        varied = now["diversity"] / start["diversity"]
        bounds = {
            f"answers are {longer:.2f} times as long as at the start": (
                1 / options.max_length_ratio <= longer <= options.max_length_ratio
            ),
            f"the share of distinct word pairs is {varied:.2f} of what it was at the start": (
                varied >= options.min_diversity
            ),
            f"the judge's two orders disagree in {now['flips']:.0%} of the pairs": (
                now["flips"] <= options.max_flips
            ),
            f"the judge agrees with the outside reward in {agreement:.0%} of the pairs": (
                agreement >= options.min_agreement
            ),
        }
        broken = [problem for problem, holds in bounds.items() if not holds]
        if broken:
            kept = "what the last check before saved is kept" if self.saved else "nothing was saved"
            raise TrainingError(f"stopped after update {last['step']}: {'; '.join(broken)}; {kept}")
        self.save({})
        self.saved = True

    def save(self, training: dict[str, Any]) -> str:
        options = self.options
        with saving(options.output) as directory:
            if options.lora_rank:
                self.policy.save_pretrained(directory, selected_adapters=["default"])
            else:
                # A copy: training continues in float32.
                copy.deepcopy(self.policy).to(torch.bfloat16).save_pretrained(directory)
                write_principles(directory / FILE_NAME, principles_of(self.directory))
            self.tokenizer.save_pretrained(directory)
        return str(options.output)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"
        )


def _identical(pairs: Pairs) -> list[bool]:
    """Whether a prompt's two answers are the same."""
    count = len(pairs.prompts)
    return [a == b for a, b in zip(pairs.responses[:count], pairs.responses[count:], strict=True)]


def _logprobs(model: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """log π(response | prompt) in nats: [N, T + 1] ids, [N, T] True = token of the response -> [N]."""
    width = int(mask.any(0).nonzero().max()) + 2  # without columns that only longer ones need
    return response_logprobs(model, ids[:, :width], mask[:, : width - 1]).sum(-1)


def main(options: Options) -> None:
    reads = ("model", "prompts", "held_out", "judge", "outside")
    writes = (*WRITES, *MODEL_FILES)
    with output.run(options, "training.self_judge", reads=reads, writes=writes) as run:
        if not run.is_finished:
            train(SelfJudgeTrainer(options, start()), run)
            write_card(run, options)
    publish(run, options)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
