"""Base class and loop of trainers that learn from their own samples.

All randomness is a function of the seed and the number of the update. So a resumed run needs no random state, and each
of several processes draws its own part of the same samples.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from judge.options import Positive, Seed
from proxy.checkpoint import BaseModelId, identify, resolve_model_dir
from training.console import TrainingError
from training.memory import responses_at_once
from training.metrics import METRICS_FILES, Metrics
from training.model_card import CARD_FILE, Score
from training.models import end_ids, load_model, load_tokenizer, read_config, refuse_unknown
from training.output import Run
from training.policy import Decoding
from training.prompts import Prompt, read_prompts, samples_of
from training.rewards import Frozen, Sample
from training.run_marker import settings_of
from training.run_options import RunOptions
from training.sizes import sizes_of
from training.state import STATE_FILES, load_state, save_state


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of all trainers that learn from their own samples."""

    model: str
    """The LLM: a directory or a hub id."""
    prompts: str
    """JSON lines or Parquet of `prompt`, or a data set's name."""
    output: Path
    """Directory for the checkpoint and `metrics.jsonl`."""
    steps: PositiveInt = 60
    """Updates, each with a rollout."""
    epochs: PositiveInt
    """Passes over a rollout."""
    minibatches: PositiveInt = 4
    """Gradient steps in a pass over a rollout."""
    learning_rate: Positive
    """Adam's learning rate, decreasing linearly to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts, and those that leave no room for a response in the LLM's context, are left out and counted."""
    batch_size: PositiveInt = 64
    """Responses at once in the device's memory, for rollout and reward. Halved until they fit. It changes only
    rounding.
    """
    decoding: Decoding = field(default_factory=Decoding)
    """How responses are sampled."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen models."""
    save_every: PositiveInt = 5
    """Updates between two states that `--resume` can continue from."""
    resume: bool = False
    """Continue from the last state in the output directory, if there is one."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of weights, prompts and noise."""


OptionsT = TypeVar("OptionsT", bound=Options)


class OnPolicyTrainer(ABC, Generic[OptionsT]):
    """A trained module, its optimiser, the frozen LLM and the prompts, in one of the run's processes.

    Subclasses set `trained`, the trained module, and `optimiser`, which has all of its parameters.
    """

    progress_metric: str
    """The metric beside the progress bar."""
    trained: nn.Module
    optimiser: torch.optim.Optimizer

    def __init__(self, options: OptionsT, accelerator: Accelerator) -> None:
        torch.manual_seed(options.seed)
        self.options, self.accelerator = options, accelerator
        self.base: BaseModelId = identify(options.model)
        directory, dtype = str(resolve_model_dir(options.model)), getattr(torch, options.dtype)
        self.tokenizer, self.config = load_tokenizer(directory), read_config(directory)
        self.prompts = read_prompts(options.prompts, options, self.tokenizer, self.config)
        self.sizes = sizes_of(directory)
        self.longest = max(len(prompt.ids) for prompt in self.prompts)
        self.weights = self.sizes.parameters * dtype.itemsize
        self.batch_size = self.plan_memory()
        self.model = load_model(directory, dtype=dtype)[0]
        self.model.to(accelerator.device).eval().requires_grad_(False)
        self.end_ids = end_ids(self.model, self.tokenizer)
        refuse_unknown(self.model, self.tokenizer, (prompt.ids for prompt in self.prompts))

    @abstractmethod
    def step(self, index: int) -> dict[str, float]:
        """One update; returns its metrics."""

    @abstractmethod
    def save(self, training: dict[str, Any]) -> str:
        """Save the trained weights to the output directory; returns a description for the user."""

    @abstractmethod
    def check(self, rows: list[dict[str, Any]]) -> None:
        """Check the metrics of all updates so far.

        Raises:
            TrainingError: stops the run.
        """

    def scores(self, row: dict[str, Any]) -> list[Score]:
        """What the last update's metrics say of the result, for the model card."""
        return []

    def plan_memory(self) -> int:
        """How many responses are sampled and scored at once; printed before anything is loaded."""
        options = self.options
        return responses_at_once(
            self.sizes,
            options.batch_size,
            self.longest,
            options.decoding.max_new_tokens,
            getattr(torch, options.dtype).itemsize,
            self.other_bytes(),
        )

    @abstractmethod
    def other_bytes(self) -> float:
        """Bytes in memory in addition to the frozen LLM, which takes `self.weights`."""

    def frozen(self) -> Frozen:
        """The frozen LLM in the form that rewards take."""
        options = self.options
        return Frozen(
            self.model,
            self.tokenizer,
            self.base,
            options.decoding,
            self.end_ids,
            self.batch_size,
        )

    def draw_prompts(self, index: int, num: int) -> tuple[list[Prompt], Iterator[int], int]:
        """This process's share of an update's `num` prompts, their seeds, and the index of the first one among all."""
        options = self.options
        prompts = random.Random(f"{options.seed} {index}").choices(self.prompts, k=num)
        with self.accelerator.split_between_processes(list(enumerate(prompts))) as mine:
            first = mine[0][0]
            seeds = count((options.seed << 40) + index * num + first)
            return [prompt for _, prompt in mine], seeds, first

    def minibatches(self, size: int, index: int) -> Iterator[Tensor]:
        """Index tensors into `size` items of all processes; the same in each process."""
        generator = torch.Generator().manual_seed((self.options.seed << 32) + index)
        for _ in range(self.options.epochs):
            yield from torch.randperm(size, generator=generator).chunk(self.options.minibatches)

    def anneal(self, index: int) -> float:
        """Set the update's learning rates, decreasing linearly to 0; returns the remaining share."""
        left = 1 - index / self.options.steps
        for group in self.optimiser.param_groups:
            group["lr"] = left * group.setdefault("initial_lr", group["lr"])
        return left

    def gradient_step(self) -> float:
        """A gradient step of the trained module; returns the gradient's norm."""
        return gradient_step(self.accelerator, self.optimiser, self.options.max_grad_norm)

    def gather(self, values: Tensor) -> Tensor:
        """The values [N] of all processes, concatenated on the CPU."""
        return torch.tensor(gather_object(values.tolist()))

    def samples(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[Sample]:
        """The responses in the form that rewards take, each to the prompt at its index."""
        return samples_of(self.tokenizer, prompts, responses)


def gradient_step(
    accelerator: Accelerator, optimiser: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    """A gradient step on the sum of all processes' gradients, if it is finite; returns its norm."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for p in parameters:
        # A process without rows of the minibatch has no gradient.
        p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if norm.isfinite():  # the same in all processes
        optimiser.step()
    optimiser.zero_grad()
    return norm.item()


def average_steps(names: Sequence[str], steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over an update's gradient steps. Each step is a list of metrics that ends with the gradient's norm.

    Steps with a non-finite gradient were not taken: they are counted as `skipped` and excluded from the means.

    Raises:
        TrainingError: no gradient was finite.
    """
    taken = [row for row in steps if math.isfinite(row[-1])]
    if not taken:
        raise TrainingError(
            "no gradient of this update was finite: lower the learning rate, or look at the reward's scale"
        )
    means = [fmean(column) for column in zip(*taken, strict=True)]
    return dict(zip((*names, "grad_norm"), means, strict=True)) | {
        "skipped": len(steps) - len(taken)
    }


def start() -> Accelerator:
    """The processes of this run: one, unless `accelerate launch` started it."""
    return Accelerator(cpu=not torch.cuda.is_available())


WRITES = (*METRICS_FILES, *STATE_FILES, CARD_FILE)
"""The files that `train` writes, as `training.output` expects them."""


def train(trainer: OnPolicyTrainer[Any], run: Run) -> None:
    """Run all updates, with progress bar, metrics and states to resume from; then save the result."""
    options, accelerator = trainer.options, trainer.accelerator
    run.start()
    num_done = 0
    if options.resume:
        num_done = load_state(options.output, trainer.trained, trainer.optimiser)
        accelerator.print(
            f"resuming after update {num_done}" if num_done else "nothing to resume: starting anew"
        )
        if num_done:
            run.saved = f"update {num_done} of {options.steps}"
    if not accelerator.is_main_process:
        for index in range(num_done, options.steps):
            trainer.step(index)
        return
    with Metrics(options, after=num_done or None) as metrics:
        bar = tqdm(
            range(num_done, options.steps), initial=num_done, total=options.steps, unit="update"
        )
        for index in bar:
            metrics.add(trainer.step(index))
            trainer.check(metrics.rows)
            bar.set_postfix(
                {trainer.progress_metric: f"{metrics.rows[-1][trainer.progress_metric]:.3f}"}
            )
            if (index + 1) % options.save_every == 0 or index + 1 == options.steps:
                save_state(options.output, trainer.trained, trainer.optimiser, updates=index + 1)
                run.saved = f"update {index + 1} of {options.steps}"
    print(trainer.save({"options": settings_of(options, ()), "last": metrics.rows[-1]}))
    run.scores = trainer.scores(metrics.rows[-1])
