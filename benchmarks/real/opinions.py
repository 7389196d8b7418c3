"""Scores of answers: the reward that methods were trained on, and opinions that no training saw."""

from collections.abc import Sequence

from benchmarks.real.setting import TRAINED, Setting
from benchmarks.real.words import SECOND_WORDS, Weights, score
from judge.prompts import up_to_end
from training.mean_states import read_means
from training.memory import MOST_TOKENS
from training.positions import Response
from training.reward_loading import load_reward
from training.rewards import Frozen, ProbeReward, Sample, sequence_logprobs

Scores = dict[str, list[float]]
REWARD, SECOND_PROBE, SECOND_HELPFUL = "reward-probe", "second-probe", "second-helpful"
"""Names of scores, and of the jobs that train what gives them."""


def opinion_jobs(setting: Setting) -> list[str]:
    return [*_probe_jobs(setting), SECOND_WORDS]


def _probe_jobs(setting: Setting) -> list[str]:
    helpful = [SECOND_HELPFUL] if setting.helpful_pairs is not None else []
    return [REWARD, SECOND_PROBE, *helpful]


class Opinions:
    """All of them, on one frozen LLM."""

    def __init__(self, setting: Setting, frozen: Frozen) -> None:
        self.frozen, self.num_costly = frozen, setting.num_costly
        self.probes: dict[str, ProbeReward] = {}
        self.weights: Weights = setting.result(SECOND_WORDS)["weights"]
        for name in _probe_jobs(setting):
            reward = load_reward(str(setting.directory(name) / TRAINED), frozen)
            assert isinstance(reward, ProbeReward), name
            self.probes[name] = reward

    def of(self, samples: Sequence[Sample]) -> Scores:
        """Scores of answers, by name. Those of the first `num_costly` ones only: `logprob`, the mean log-probability
        of a token under the frozen LLM in nats.
        """
        few = samples[: self.num_costly]
        prompts = [sample.prompt_ids for sample in few]
        responses = [sample.response_ids for sample in few]
        size = max(1, self.frozen.batch_size // 8)  # of logits over the whole vocabulary
        with self.frozen.plain() as model:
            totals = sequence_logprobs(model, prompts, responses, size).tolist()
        logprobs = [
            total / len(response) for total, response in zip(totals, responses, strict=True)
        ]
        return probe_scores(self.probes, samples, self.frozen) | {
            SECOND_WORDS: [score(self.weights, sample.text) for sample in samples],
            "logprob": logprobs,
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
