"""The pairwise judge on a model in this process, for rewards and self-training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from judge.pairwise import encode_question
from judge.principles import Principle
from judge.prompts import Question, label_ids
from training.adapters import CausalLM
from training.model_inputs import pad_left


class ModelJudge:
    """Judges pairs by one principle, in both orders.

    Args:
        model: the model that judges
        tokenizer: its own
        principle: what it judges by
        context: the most tokens that it reads; longer questions are shortened by `judge.prompts.shorten`
        batch_size: judge prompts at once in the device's memory

    Raises:
        JudgePromptError: the tokenizer cannot encode a judgment.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Any, principle: Principle, context: int, batch_size: int
    ) -> None:
        self.model, self.tokenizer, self.principle = model, tokenizer, principle
        self.max_tokens, self.batch_size = context - 1, batch_size
        self.labels = list(label_ids(tokenizer, principle))

    @torch.inference_mode()
    def log_odds(self, questions: Sequence[Question]) -> Tensor:
        """log p(first wins) / p(second wins), natural log, as shown in each of the two orders: [N, 2]."""
        rows = [
            ids
            for question in questions
            for ids in encode_question(
                self.tokenizer, question, self.principle, self.max_tokens
            ).prompts
        ]
        last = []
        for start in range(0, len(rows), self.batch_size):
            inputs = pad_left(rows[start : start + self.batch_size], self.model.device)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits
            last.append(logits[:, -1, self.labels].float())
        of_a = (
            torch.cat(last).diff(dim=-1).neg().view(-1, 2)
        )  # in the first order, the first response is A
        return torch.stack([of_a[:, 0], -of_a[:, 1]], dim=-1)
