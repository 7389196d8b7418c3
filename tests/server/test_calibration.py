"""The judge's rolling rates, from verdicts worked out by hand."""

import pytest
from prometheus_client import REGISTRY

from judge.prompts import Question
from judge.verdict import Verdict
from server.calibration import WINDOW, Calibration


def rates(judge):
    names = ("flip", "tie", "longer")
    return [
        REGISTRY.get_sample_value(f"assent_judge_{name}_rate", {"judge": judge}) for name in names
    ]


def test_rates():
    calibration = Calibration("test")
    assert rates("test") == [None, None, None]
    calibration.add(Question([], "longer", "short"), Verdict((0.9, 0.8)))  # the longer
    calibration.add(Question([], "longer", "short"), Verdict((0.2, 0.3)))  # the shorter
    calibration.add(Question([], "x", "longer"), Verdict((0.2, 0.3)))  # the longer
    calibration.add(Question([], "longer", "short"), Verdict((0.9, 0.3)))  # orders disagree
    calibration.add(Question([], "longer", "short"), Verdict((0.6, 0.6), tie_band=0.2))
    calibration.add(Question([], "same", "long"), Verdict((0.9, 0.9)))  # of one length
    calibration.add(Question([], "same", "same"), Verdict((0.5, 0.5)))  # does not count
    assert rates("test") == pytest.approx([1 / 6, 2 / 6, 2 / 3])


def test_only_the_last_verdicts_count():
    calibration = Calibration("rolling")
    for _ in range(WINDOW):
        calibration.add(Question([], "longer", "short"), Verdict((0.9, 0.3)))
    for _ in range(WINDOW // 4):
        calibration.add(Question([], "longer", "short"), Verdict((0.9, 0.9)))
    assert rates("rolling") == pytest.approx([0.75, 0.75, 1.0])
