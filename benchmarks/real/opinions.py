"""Scores of answers: the reward that methods were trained on, and opinions that no training saw."""

from collections.abc import Sequence

from benchmarks.real.setting import TRAINED, Setting
from judge.prompts import up_to_end
from training.mean_states import read_means
from training.memory import MOST_TOKENS
from training.positions import Response
from training.reward_loading import load_reward
from training.rewards import Frozen, ImplicitReward, ProbeReward, Sample, sequence_logprobs

Scores = dict[str, list[float]]
REWARD, SECOND_PROBE, SECOND_IMPLICIT, SECOND_HELPFUL = (
    *("reward-probe", "second-probe"),
    *("second-implicit", "second-helpful"),
)
"""Names of scores, and of the jobs that train what gives them."""


def opinion_jobs(setting: Setting) -> list[str]:
    helpful = [SECOND_HELPFUL] if setting.helpful_pairs is not None else []
    return [REWARD, SECOND_PROBE, SECOND_IMPLICIT, *helpful]


class Opinions:
    """All of them, on one frozen LLM."""

    def __init__(self, setting: Setting, frozen: Frozen) -> None:
        self.frozen, self.num_costly = frozen, setting.num_costly
        self.probes: dict[str, ProbeReward] = {}
        for name in opinion_jobs(setting):
            reward = load_reward(str(setting.directory(name) / TRAINED), frozen)
            if isinstance(reward, ProbeReward):
                self.probes[name] = reward
            else:
                assert isinstance(reward, ImplicitReward), name
                self.implicit = reward

    def of(self, samples: Sequence[Sample]) -> Scores:
        """Scores of answers, by name. Those of the first `num_costly` ones only: `second-implicit`, and `logprob`, the
        mean log-probability of a token under the frozen LLM in nats.
        """
        few = samples[: self.num_costly]
        ids = [sample.prompt_ids for sample in few], [sample.response_ids for sample in few]
        size = max(1, self.frozen.batch_size // 8)  # of logits over the whole vocabulary
        tuned, reference = (
            sequence_logprobs(model, *ids, size)
            for model in (self.implicit.tuned, self.implicit.reference)
        )
        lengths = [len(response) for response in ids[1]]
        return probe_scores(self.probes, samples, self.frozen) | {
            SECOND_IMPLICIT: (self.implicit.beta * (tuned - reference)).tolist(),
            "logprob": [
                total / length for total, length in zip(reference.tolist(), lengths, strict=True)
            ],
        }


def probe_scores(
    probes: dict[str, ProbeReward], samples: Sequence[Sample], frozen: Frozen
) -> Scores:
    """What each probe returns, from one pass."""
    layers = sorted({probe.info.layer for probe in probes.values()})
    responses = [
        Response(sample.prompt_ids, up_to_end(sample.response_ids, frozen.end_ids))
        for sample in samples
    ]
    with frozen.plain() as model:
        tokens = MOST_TOKENS[model.device.type] // 4  # all layers' states are in memory at once
        means = read_means(responses, layers, model=model, max_tokens=tokens).means
    return {
        name: (means[:, layers.index(probe.info.layer)] @ probe.weight).tolist()
        for name, probe in probes.items()
    }
