"""Preferences between an LLM's own answers: it answers each prompt several times, and a reward ranks the answers.

Samples are written to `samples/` in the output directory, one file of JSON lines for some prompts of a round. A resumed
run reads them.
"""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from proxy.network import ProxyNetwork
from training.console import TrainingError
from training.machine import print_once
from training.positions import Response
from training.ppo_trainer import refuse_bad_rewards
from training.preferences import Collection, Preferences
from training.prompts import Prompt, samples_of
from training.reward_loading import reward_of
from training.rewards import Frozen
from training.rollout_backends import RolloutBackend
from training.run_marker import write_whole

SAMPLES = "samples"
_IN_A_FILE = 512  # approximate number of answers in a file


class RankedAnswers:
    """Samples answers in rounds, from the frozen LLM or from a proxy; the result is the same in each of several
    processes.
    """

    def __init__(
        self,
        options: Any,
        prompts: Sequence[Prompt],
        frozen: Frozen,
        backend: RolloutBackend,
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            options: of `training.proxy_dpo`.
            prompts: to be answered.
            frozen: the LLM.
            backend: samples the answers.
            accelerator: of this run's processes; each takes its share.
        """
        self._options, self._accelerator = options, accelerator
        self._prompts, self._frozen = prompts, frozen
        self._reward = reward_of(options, prompts, frozen, accelerator)
        self._backend = backend
        self._answers: list[list[Response]] = [[] for _ in prompts]
        self._rewards: list[list[float]] = [[] for _ in prompts]
        self._collection = Collection()  # in the order of sampling: the next round appends to it

    def sample(self, round_number: int, network: ProxyNetwork | None) -> None:
        """Sample a round of answers. Rankings include the answers of earlier rounds. network None = the frozen LLM
        answers.

        Raises:
            TrainingError: a reward is not a finite number.
        """
        size = max(1, _IN_A_FILE // self._options.samples)
        starts = range(0, len(self._prompts), size)
        rewards: list[float] = []
        bar = tqdm(
            starts,
            desc=f"round {round_number + 1}: answers",
            disable=not self._accelerator.is_main_process,
        )
        for part, first in enumerate(bar):
            name = f"{round_number:02}-{part:05}.jsonl"
            indices = range(first, min(first + size, len(self._prompts)))
            for row in self._rows(
                self._options.output / SAMPLES / name, indices, round_number, network
            ):
                prompt = self._prompts[row["prompt"]].ids
                responses = [Response(prompt, ids) for ids in row["responses"]]
                for response in responses:
                    self._collection.index(response)
                self._answers[row["prompt"]] += responses
                self._rewards[row["prompt"]] += row["rewards"]
                rewards += row["rewards"]
        print_once(
            f"round {round_number + 1}: mean reward {fmean(rewards):.3f} of {len(rewards)} answers"
        )

    def preferences(self) -> Preferences:
        """The pairs of all prompts.

        Raises:
            TrainingError: there is none.
        """
        index = self._collection.index
        pairs = [
            (index(answers[better]), index(answers[worse]))
            for answers, rewards in zip(self._answers, self._rewards, strict=True)
            for better, worse in all_pairs(answers, rewards)
        ]
        if not pairs:
            raise TrainingError(
                "the reward gives all answers to a prompt the same score: there is nothing to learn"
            )
        return Preferences([*self._collection.preferences.responses], pairs, [])

    def _rows(
        self, path: Path, indices: Sequence[int], round_number: int, network: ProxyNetwork | None
    ) -> list[dict[str, Any]]:
        """The answers to each prompt with their rewards, read from the file or sampled and written to it."""
        if not path.is_file():
            rows = self._sampled(indices, round_number, network)
            if self._accelerator.is_main_process:
                write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._accelerator.wait_for_everyone()
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _sampled(
        self, indices: Sequence[int], round_number: int, network: ProxyNetwork | None
    ) -> list[dict[str, Any]]:
        """Samples of all processes. A seed is a function of run, round, prompt and number only."""
        options = self._options
        size, first_seed = options.samples, (options.seed << 40) + (round_number << 32)
        with self._accelerator.split_between_processes(list(indices)) as mine:
            prompts = [self._prompts[index] for index in mine for _ in range(size)]
            seeds = [first_seed + index * size + i for index in mine for i in range(size)]
            responses = self._backend.responses(
                network,
                [prompt.ids for prompt in prompts],
                options.decoding,
                end_ids=self._frozen.end_ids,
                seeds=seeds,
            )
            samples = samples_of(self._frozen.tokenizer, prompts, responses)
            rewards = self._reward(samples)
            refuse_bad_rewards(rewards)
            rows = []
            for place, index in enumerate(mine):
                part = slice(place * size, (place + 1) * size)
                rows.append(
                    {
                        "prompt": index,
                        "messages": self._prompts[index].messages,
                        "texts": [sample.text for sample in samples[part]],
                        "rewards": rewards[part].tolist(),
                        "responses": responses[part],
                    }
                )
        return gather_object(rows)


def all_pairs(responses: Sequence[Response], rewards: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of a prompt's responses, by index, the better one first.

    Equal rewards or equal responses make no pair.
    """
    order = sorted(range(len(responses)), key=lambda i: -rewards[i])
    return [
        (better, worse)
        for better, worse in combinations(order, 2)
        if rewards[better] > rewards[worse] and responses[better] != responses[worse]
    ]
