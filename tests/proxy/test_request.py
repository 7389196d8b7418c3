"""What a request may ask for, at admission and in the worker."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.request import Alignment, alignment_of


def test_round_trip_through_extra_args():
    alignment = Alignment(proxy="polite", strength=1.5, max_rejections=3)
    extra_args = alignment.to_extra_args()
    assert extra_args == {"alignment": {"proxy": "polite", "strength": 1.5, "max_rejections": 3}}
    assert alignment_of(extra_args) == alignment


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": -0.1},
        {"strength": 16.1},
        {"strength": math.inf},
        {"strength": math.nan},
        {"max_rejections": -1},
        {"max_rejections": 10**30},
        {"proxy": 3},
        {"strenght": 1.0},
    ],
)
def test_admission_refuses(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        Alignment(**({"proxy": "polite"} | wrong))
    assert alignment_of({"alignment": {"proxy": "polite"} | wrong}) is None


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        [],
        "alignment",
        {"alignment": None},
        {"alignment": 7},
        {"alignment": "polite"},
        {"alignment": ["polite"]},
        {"alignment": {}},
        {"alignment": {"proxy": None}},
        {"alignment": {"proxy": "polite", "strength": 0}},
    ],
)
def test_plain_sampling_where_there_is_nothing_to_apply(extra_args: Any):
    assert alignment_of(extra_args) is None
