"""What commands that learn from their own samples share: prompts, gradient steps, and the loop around the updates.

All randomness is a function of the seed and the update's number: a run that goes on has nothing else to remember, and
every process of several draws its own part of the same.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from training.data import RowOptions
from training.memory import responses_at_once
from training.metrics import METRICS_FILES, Metrics
from training.models import end_ids, load_model, load_tokenizer, read_config, refuse_unknown
from training.output import Run
from training.policy import Decoding
from training.prompts import Prompt, read_prompts, samples_of
from training.rewards import Frozen, Sample
from training.sizes import sizes_of
from training.state import STATE_FILES, load_state, save_state


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """Options that these commands have in common."""

    model: str
    """The LLM: a directory or a hub id."""
    prompts: str
    """JSON lines or Parquet of `prompt`, or a data set's name."""
    output: Path
    """Directory for the checkpoint and `metrics.jsonl`."""
    steps: PositiveInt = 60
    """Updates: rollouts."""
    epochs: PositiveInt
    """Passes over a rollout."""
    minibatches: PositiveInt = 4
    """Gradient steps in a pass."""
    learning_rate: Positive
    """Adam's, falling linearly to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts, and those that leave no room for a response in the LLM's context, are left out, and counted."""
    batch_size: PositiveInt = 64
    """Responses at once in the device's memory, in the rollout and in the reward; fewer where it has no room for so
    many. Up to rounding it changes nothing."""
    decoding: Decoding = field(default_factory=Decoding)
    """How tokens are drawn."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen models compute in."""
    save_every: PositiveInt = 5
    """Updates between two states that `--resume` can go on from."""
    resume: bool = False
    """Go on from the last state in the output directory, if there is one."""
    overwrite: bool = False
    """Replace what an earlier run of this command left in the output directory; other files stay."""
    seed: Seed = 0
    """Of weights, prompts and noise."""


OptionsT = TypeVar("OptionsT", bound=Options)


class OnPolicyTrainer(ABC, Generic[OptionsT]):
    """What learns, its optimiser and what surrounds them, in one of the run's processes.

    `optimiser` is set by whoever derives from it, and has all that `learner` trains.
    """

    shown: str
    """The figure beside the progress bar."""
    learner: nn.Module
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
        """One update, and its figures."""

    @abstractmethod
    def save(self, training: dict[str, Any]) -> str:
        """Write what was learned to the output directory; say what it is."""

    @abstractmethod
    def check(self, rows: list[dict[str, Any]]) -> None:
        """Look at the figures of all updates so far. Raises TrainingError to stop the run."""

    def plan_memory(self) -> int:
        """How many responses are sampled and scored at once, said before anything is loaded."""
        options = self.options
        return responses_at_once(
            self.sizes,
            options.batch_size,
            self.longest,
            options.decoding.max_new_tokens,
            getattr(torch, options.dtype).itemsize,
            self.beside(),
        )

    @abstractmethod
    def beside(self) -> float:
        """Bytes of what is in memory beside the frozen LLM, which takes `self.weights`."""

    def frozen(self) -> Frozen:
        """The frozen LLM, as rewards want it."""
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
        """This process's prompts of an update's `num`, a seed for each, and the place of the first among all."""
        options = self.options
        prompts = random.Random(f"{options.seed} {index}").choices(self.prompts, k=num)
        with self.accelerator.split_between_processes(list(enumerate(prompts))) as mine:
            first = mine[0][0]
            seeds = count((options.seed << 40) + index * num + first)
            return [prompt for _, prompt in mine], seeds, first

    def minibatches(self, size: int, index: int) -> Iterator[Tensor]:
        """Index tensors into `size` things of all processes, alike in all of them."""
        generator = torch.Generator().manual_seed((self.options.seed << 32) + index)
        for _ in range(self.options.epochs):
            yield from torch.randperm(size, generator=generator).chunk(self.options.minibatches)

    def anneal(self, index: int) -> float:
        """Set the update's learning rates, falling linearly to 0; returns what is left of them."""
        left = 1 - index / self.options.steps
        for group in self.optimiser.param_groups:
            group["lr"] = left * group.setdefault("initial_lr", group["lr"])
        return left

    def descend(self) -> float:
        """`descend`, of what learns."""
        return descend(self.accelerator, self.optimiser, self.options.max_grad_norm)

    def of_all(self, values: Tensor) -> Tensor:
        """[N] of every process, one after the other, on the CPU."""
        return torch.tensor(gather_object(values.tolist()))

    def samples(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[Sample]:
        """The responses as rewards want them, each to the prompt of its place."""
        return samples_of(self.tokenizer, prompts, responses)


def descend(
    accelerator: Accelerator, optimiser: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    """A gradient step on the sum of all processes' gradients, if it is finite; returns its norm."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for p in parameters:
        # A process without a share in the minibatch has none.
        p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if norm.isfinite():  # alike in all processes
        optimiser.step()
    optimiser.zero_grad()
    return norm.item()


def averaged(names: Sequence[str], steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over an update's gradient steps, each a list of figures with the gradient's norm at the end.

    Steps whose gradient was not finite were not taken: they are counted as `skipped`, and are not in the means.

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
    """The processes of this run; one, unless `accelerate launch` started it."""
    return Accelerator(cpu=not torch.cuda.is_available())


WRITES = (*METRICS_FILES, *STATE_FILES)
"""What `train` writes, as `training.output` wants to know it."""


def train(trainer: OnPolicyTrainer[Any], run: Run) -> None:
    """All updates, with a progress bar, metrics and states to resume from; then what was learned is saved."""
    options, accelerator = trainer.options, trainer.accelerator
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    run.start()
    done = 0
    if options.resume:
        done = load_state(options.output, trainer.learner, trainer.optimiser)
        accelerator.print(
            f"going on after update {done}" if done else "nothing to resume: beginning anew"
        )
        if done:
            run.saved = f"update {done} of {options.steps}"
    if not accelerator.is_main_process:
        for index in range(done, options.steps):
            trainer.step(index)
        return
    with Metrics(options.output, after=done or None) as metrics:
        bar = tqdm(range(done, options.steps), initial=done, total=options.steps, unit="update")
        for index in bar:
            metrics.add(trainer.step(index))
            trainer.check(metrics.rows)
            bar.set_postfix({trainer.shown: f"{metrics.rows[-1][trainer.shown]:.3f}"})
            if (index + 1) % options.save_every == 0 or index + 1 == options.steps:
                save_state(options.output, trainer.learner, trainer.optimiser, updates=index + 1)
                run.saved = f"update {index + 1} of {options.steps}"
    print(trainer.save({"options": settings, "last": metrics.rows[-1]}))
