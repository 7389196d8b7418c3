"""Jobs that train rewards and judges on part A of the pairs, and second opinions on part B.

They have no seed: one reward trains all seeds of a method. DPO's LoRA is the implicit reward and has seeds, in
`benchmarks.real.trainings`.
"""

from pathlib import Path
from typing import Any

from benchmarks.comparison.jobs import Job, timed
from benchmarks.real.setting import PRINCIPLES, TRAINED, Setting
from judge.principles import FILE_NAME
from judge.prompts import Question
from proxy.reward_file import RewardFile
from training import jsft, reward_model
from training.models import read_config
from training.pair_judges import PairJudge, judge_pairs, load_judges
from training.reward_loading import model_judges
from training.rewards import Frozen

LORA: dict[str, Any] = {"lora_rank": 8, "batch_size": 16, "learning_rate": 1e-4}
MAX_LENGTH = 256
"""Longer pairs train no LoRA."""
_JUDGED_PAIRS = 400


def make_probe(
    name: str, pairs: str, *, other_layers: bool = False, coherence_weight: float = 0.0
) -> Job:
    """A probe of the last layer, or of the best one of two layers in the middle; perhaps with coherence."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        depth = read_config(str(setting.model)).get_text_config().num_hidden_layers
        middle = (max(1, 2 * depth // 5), max(1, 2 * depth // 3))
        with timed(result):
            reward_model.main(
                reward_model.Options(
                    model=str(setting.model),
                    preferences=str(setting.data(pairs)),
                    output=directory / TRAINED,
                    overwrite=True,
                    kind="probe",
                    layers=tuple(dict.fromkeys(middle)) if other_layers else (),
                    coherence_weight=coherence_weight,
                )
            )
        probe = RewardFile.read(directory / TRAINED).probe
        assert probe is not None, "it was just trained"
        return result | {"layer": probe.layer, "training": probe.training}

    return Job(name, run, ("data",))


def train_implicit(setting: Setting, output: Path, pairs: str, seed: int) -> dict[str, Any]:
    """A LoRA by DPO, which is a policy and an implicit reward."""
    result: dict[str, Any] = {}
    with timed(result):
        reward_model.main(
            reward_model.Options(
                model=str(setting.model),
                preferences=str(setting.data(pairs)),
                output=output,
                overwrite=True,
                max_length=MAX_LENGTH,
                seed=seed,
                **LORA,
            )
        )
    return result


def make_jsft() -> Job:
    """The pairwise judge as a LoRA, on some of the pairs."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        some = directory / "pairs.jsonl"
        lines = setting.data("pairs_a").read_text(encoding="utf-8").splitlines(keepends=True)
        some.write_text("".join(lines[: setting.scaled(_JUDGED_PAIRS, 16)]), encoding="utf-8")
        result: dict[str, Any] = {}
        with timed(result):
            jsft.main(
                jsft.Options(
                    model=str(setting.model),
                    preferences=(str(some),),
                    principles=setting.directory("data") / FILE_NAME,
                    output=directory / TRAINED,
                    overwrite=True,
                    max_length=2 * MAX_LENGTH,
                    **LORA,
                )
            )
        return result

    return Job("reward-jsft", run, ("data",))


def reward_path(setting: Setting, reward: str, seed: int) -> Path:
    """Where a reward is, by its short name."""
    return setting.directory(reward_job(reward, seed)) / TRAINED


def reward_job(reward: str, seed: int) -> str:
    """The job that trains a reward or a second opinion."""
    if reward == "implicit":
        return f"dpo/{seed}"
    return reward if reward.startswith("second-") else f"reward-{reward}"


def pair_judge(setting: Setting, judge: str, seed: int, frozen: Frozen) -> PairJudge:
    """A judge of pairs; `self` is the frozen LLM's own judgment by the comparison's principle."""
    if judge == "self":
        data = setting.directory("data")
        return model_judges(frozen.without_adapter, frozen, data)[next(iter(PRINCIPLES))]
    return next(iter(load_judges(str(reward_path(setting, judge, seed)), frozen).values()))


def share_right(judge: PairJudge, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of pairs that a judge orders as people did, and its standard error."""
    questions = [
        Question(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows
    ]
    right = [result.first_advances for result in judge_pairs({"judge": judge}, questions)]
    share = sum(right) / len(right)
    return share, (share * (1 - share) / len(right)) ** 0.5
