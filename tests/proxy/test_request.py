"""What a request may ask for, at admission and in the worker."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from proxy.request import Alignment, WorkerAlignment, alignment_of


def test_round_trip_through_extra_args():
    alignment = WorkerAlignment(
        proxy="polite", strength=1.5, max_rejections=3, trace=True, version="0123456789ab"
    )
    extra_args = alignment.to_extra_args()
    assert extra_args == {
        "alignment": {
            "proxy": "polite",
            "strength": 1.5,
            "proxies": None,
            "max_rejections": 3,
            "trace": True,
            "version": "0123456789ab",
            "versions": None,
            "read": None,
            "shadow": True,
        }
    }
    assert alignment_of(json.loads(json.dumps(extra_args))) == alignment


def test_several_proxies():
    alignment = WorkerAlignment(
        proxies={"polite": 0.5, "plain": 0.0}, versions={"polite": "0123456789ab"}
    )
    assert alignment_of(json.loads(json.dumps(alignment.to_extra_args()))) == alignment
    assert alignment.strengths == {"polite": 0.5, "plain": 0.0}
    assert [alignment.version_of(name) for name in alignment.strengths] == ["0123456789ab", None]
    assert alignment.acts and not WorkerAlignment(proxies={"polite": 0.0}).acts


def test_what_a_request_leaves_out():
    parsed = alignment_of({"alignment": {"proxy": "polite"}})
    assert (parsed.strength, parsed.max_rejections, parsed.version) == (1.0, None, None)
    assert (parsed.trace, parsed.shadow, parsed.acts) == (False, True, True)


@pytest.mark.parametrize(
    "invalid",
    [
        {"strength": -0.1},
        {"strength": 16.1},
        {"strength": math.inf},
        {"strength": math.nan},
        {"max_rejections": -1},
        {"max_rejections": 10**30},
        {"proxy": 3},
        {"trace": "sometimes"},
        {"proxies": {}},
        {"proxies": ["polite"]},
        {"proxies": {"polite": -1}},
        {"proxies": {"polite": None}},
        {"proxies": {f"p{number}": 1 for number in range(9)}},
        {"strenght": 1.0},
    ],
)
def test_admission_refuses(invalid: dict[str, Any]):
    with pytest.raises(ValidationError):
        Alignment(**({"proxy": "polite"} | invalid))
    with pytest.raises(ValidationError):
        WorkerAlignment(**({"proxy": "polite"} | invalid))
    assert alignment_of({"alignment": {"proxy": "polite"} | invalid}) == WorkerAlignment()


@pytest.mark.parametrize("server_fields", [{"version": "0123456789ab"}, {"shadow": False}])
def test_what_the_server_adds_is_not_a_clients_to_say(server_fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        Alignment(proxy="polite", **server_fields)
    WorkerAlignment(proxy="polite", **server_fields)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"proxy": value}
    return value


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
        {"alignment": {"proxy": None, "trace": True}},
        {"alignment": {"proxy": "polite", "strength": 0}},
        {"alignment": {"proxy": "polite", "version": 5}},
        {"alignment": {"proxy": "polite", "shadow": "perhaps"}},
        {"alignment": nested(5000)},
    ],
)
def test_plain_sampling_where_there_is_nothing_to_apply(extra_args: Any):
    parsed = alignment_of(extra_args)
    assert not parsed.acts
    assert parsed.shadow  # a request that did not come through the server is scored like any other


def test_a_request_may_be_exempt_from_shadows():
    parsed = alignment_of({"alignment": {"shadow": False}})
    assert (parsed.shadow, parsed.acts) == (False, False)


@pytest.mark.parametrize(
    ("engine_id", "caller", "sample"),
    [
        ("chatcmpl-x-1f2e3d4c", "chatcmpl-x", 0),
        ("0_chatcmpl-x-1f2e3d4c", "chatcmpl-x", 0),
        ("11_chatcmpl-x-1f2e3d4c", "chatcmpl-x", 11),
        ("cmpl-0_y-12345678-00000000", "cmpl-0_y-12345678", 0),
        ("resp_z_0", "resp_z_0", 0),  # where vLLM adds nothing
    ],
)
def test_ids_of_the_engine(engine_id, caller, sample):
    from proxy.request import caller_id, sample_index

    assert (caller_id(engine_id), sample_index(engine_id)) == (caller, sample)
