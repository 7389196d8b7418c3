"""Training on preference pairs with the Bradley–Terry loss: −log sigmoid(r(chosen) − r(rejected)).

For DPO and the implicit reward (arXiv 2305.18290), r = β · (log π − log π_ref). π_ref is the model before its first
step. Its log-probabilities are computed once before training, so no second copy is in memory, and each pass reads a
pair once. For the scalar reward, r is the head's output at the last token.
"""

import hashlib
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from training.checkpoints import REFERENCE_FILE
from training.micro_batches import MicroBatchTrainer, split_by_tokens
from training.pairs import Pair, Reader


class PairTrainer(MicroBatchTrainer):
    """Trains a model to score the chosen answer higher, and logs how often it does."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train: list[Pair],
        held_out: list[Pair],
        **settings: Any,
    ) -> None:
        self.pairs = [*train, *held_out]
        indices = [{"index": i} for i in range(len(self.pairs))]
        self._figures: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # dropout would add noise to the difference of two scores
        super().__init__(
            model=model,
            args=args,
            train_dataset=indices[: len(train)],
            eval_dataset=indices[len(train) :] or None,
            **settings,
        )

    @abstractmethod
    def tokens(self, pair: Pair) -> int:
        """Tokens of a pair in a batch of its own."""

    @abstractmethod
    def rewards(self, model: Any, rows: list[int]) -> Tensor:
        """Rewards of the pairs with these indices, chosen and rejected: [2, n]."""

    def parts(self, inputs: Any) -> list[tuple[list[int], int]]:
        """Indices of pairs, and the number of pairs in the batch."""
        rows = inputs["index"].tolist()
        lengths = [self.tokens(self.pairs[row]) for row in rows]
        return [
            ([rows[i] for i in part], len(rows))
            for part in split_by_tokens(lengths, self.max_tokens)
        ]

    def part_loss(self, model: Any, part: tuple[list[int], int]) -> Tensor:
        rows, count = part
        rewards = self.rewards(model, rows)
        margins = rewards[0] - rewards[1]
        chosen, rejected = rewards.detach().sum(-1).tolist()
        self.note(
            len(rows),
            **{
                "rewards/accuracies": (margins > 0).sum().item(),
                "rewards/margins": chosen - rejected,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
            },
        )
        return -F.logsigmoid(margins).sum() / count

    def note(self, count: int, **sums: float) -> None:
        """Add to the sums behind the means of the next row of metrics."""
        figures = self._figures["train" if self.model.training else "eval"]
        for name, value in {"": count, **sums}.items():
            figures[name] = figures.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        names = list(self._figures[mode])
        if names:
            sums = torch.tensor(list(self._figures[mode].values()), device=self.args.device)
            count, *rest = self.accelerator.reduce(sums, "sum").tolist()
            prefix = "" if mode == "train" else "eval_"
            logs |= {prefix + name: x / count for name, x in zip(names[1:], rest, strict=True)}
            self._figures[mode] = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """transformers' estimate: 6 operations a token and weight."""
        tokens = sum(self.tokens(self.pairs[row]) for row in inputs["index"].tolist())
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)


class ImplicitTrainer(PairTrainer):
    """r = β · (log π − log π_ref)."""

    def __init__(self, *args: Any, beta: float, resume: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.beta = beta
        self.reader = Reader(self.model, self.pairs)
        path = Path(self.args.output_dir).parent / REFERENCE_FILE
        key = hashlib.sha256(repr(self.pairs).encode()).hexdigest()
        known = load_file(path).get(key) if resume and path.is_file() else None
        self.reference = self._reference() if known is None else known
        self.add_callback(_Saving({key: self.reference}, path))

    def tokens(self, pair: Pair) -> int:
        return self.reader.tokens(pair)

    def rewards(self, model: Any, rows: list[int]) -> Tensor:
        logprobs = self.reader([self.pairs[row] for row in rows]).sums(model, len(rows))
        chosen, rejected = logprobs.detach().sum(-1).tolist()
        self.note(0, **{"logps/chosen": chosen, "logps/rejected": rejected})
        return self.beta * (logprobs - self.reference[rows].T.to(logprobs.device))

    @torch.no_grad()
    def _reference(self) -> Tensor:
        """log π_ref of every pair's answers: [N, 2] nats."""
        self.model.train()  # so that rounding is the same as in training
        with self.accelerator.split_between_processes(list(range(len(self.pairs)))) as mine:
            pairs = [self.pairs[i] for i in mine]
            parts = split_by_tokens([self.tokens(pair) for pair in pairs], self.max_tokens)
            done: list[tuple[int, list[float]]] = []
            with tqdm(
                total=len(pairs),
                desc="reference",
                unit="pair",
                disable=not self.is_world_process_zero(),
            ) as bar:
                for part in parts:
                    with self.compute_loss_context_manager(), self.accelerator.autocast():
                        sums = self.reader([pairs[i] for i in part]).sums(self.model, len(part))
                    done += zip([mine[i] for i in part], sums.T.tolist(), strict=True)
                    bar.update(len(part))
        return torch.tensor([logprobs for _, logprobs in sorted(gather_object(done))])


class ScalarTrainer(PairTrainer):
    """r = the output of a sequence-classification model with one label."""

    def tokens(self, pair: Pair) -> int:
        return 2 * pair.longest

    def rewards(self, model: Any, rows: list[int]) -> Tensor:
        pairs = [self.pairs[row] for row in rows]
        answers = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
        pad = self.model.config.get_text_config().pad_token_id
        ids = torch.full((len(answers), max(map(len, answers))), pad)
        for i, answer in enumerate(answers):
            ids[i, : len(answer)] = torch.tensor(answer)
        # Under a causal mask, right padding does not change the result. The model uses the last token that is not
        # padding.
        return model(input_ids=ids.to(self.args.device)).logits.view(2, -1)


class _Saving(TrainerCallback):
    """Writes the reference beside the checkpoints, as soon as the output directory is this run's."""

    def __init__(self, tensors: dict[str, Tensor], path: Path) -> None:
        self._tensors, self._path = tensors, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._tensors, self._path)
