"""How far the judge can be trusted: rates over its last verdicts, on GET /metrics.

assent_judge_flip_rate{judge}     share of verdicts in which the two orders disagree: position bias
assent_judge_tie_rate{judge}      share of ties, which include those
assent_judge_longer_rate{judge}   share of the other verdicts that prefer the longer response

Over the last `WINDOW` verdicts. Identical responses do not count.
"""

from collections import deque
from statistics import fmean

from prometheus_client import Gauge

from judge.prompts import Question
from judge.verdict import Verdict

WINDOW = 1000


def _gauge(name: str, text: str) -> Gauge:
    # Without this mode each process would export its own value; only the API server sets one.
    return Gauge(f"assent_judge_{name}_rate", text, ["judge"], multiprocess_mode="mostrecent")


FLIPS = _gauge("flip", "Of the last verdicts: the two orders disagree.")
TIES = _gauge("tie", "Of the last verdicts: ties.")
LONGER = _gauge("longer", "Of the last verdicts but ties: prefer the longer response.")


class Calibration:
    """The last verdicts of one judge."""

    def __init__(self, judge: str) -> None:
        self.judge = judge
        self.flips: deque[bool] = deque(maxlen=WINDOW)
        self.ties: deque[bool] = deque(maxlen=WINDOW)
        self.longer: deque[bool] = deque(maxlen=WINDOW)

    def add(self, question: Question, verdict: Verdict) -> None:
        """Count a verdict."""
        lengths = len(question.first), len(question.second)
        if question.first == question.second:
            return
        self._set(FLIPS, self.flips, not verdict.consistent)
        self._set(TIES, self.ties, verdict.winner == "tie")
        if verdict.winner != "tie" and lengths[0] != lengths[1]:
            prefers_first = verdict.winner == "a"
            self._set(LONGER, self.longer, prefers_first == (lengths[0] > lengths[1]))

    def _set(self, gauge: Gauge, last: deque[bool], value: bool) -> None:
        last.append(value)
        gauge.labels(self.judge).set(fmean(last))
