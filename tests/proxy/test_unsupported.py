"""Features that proxies do not support: each by its flag, and in vLLM's own configuration."""

from argparse import Namespace

import pytest

from proxy.engine.unsupported import UNSUPPORTED, unsupported_in_arguments, unsupported_in_config

OFF = {
    "speculative_config": None,
    "enable_batch_sharded_sampling": None,
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "enable_trace_replay": False,
}
ON = [
    ("speculative_config", {"method": "ngram"}),
    ("enable_batch_sharded_sampling", True),
    ("pipeline_parallel_size", 2),
    ("prefill_context_parallel_size", 2),
    ("enable_trace_replay", True),
]


def config(**values):
    """A VllmConfig's parts, each with the values that it has."""
    return Namespace(
        speculative_config=values["speculative_config"],
        parallel_config=Namespace(
            **{
                name: value
                for name, value in values.items()
                if "parallel" in name or "batch" in name
            }
        ),
        model_config=Namespace(enable_trace_replay=values["enable_trace_replay"]),
    )


def test_nothing_is_refused_of_a_plain_engine():
    assert list(unsupported_in_arguments(Namespace(**OFF))) == []
    assert list(unsupported_in_config(config(**OFF))) == []
    without_model = config(**OFF)
    without_model.model_config = None
    assert list(unsupported_in_config(without_model)) == []


@pytest.mark.parametrize(("attribute", "value"), ON)
def test_both_find_the_same(attribute, value):
    values = OFF | {attribute: value}
    (by_flag,) = unsupported_in_arguments(Namespace(**values))
    (by_config,) = unsupported_in_config(config(**values))
    assert by_flag is by_config and by_flag.attribute == attribute


def test_all_of_them_are_tested():
    assert [feature.attribute for feature in UNSUPPORTED] == [attribute for attribute, _ in ON]


def test_vllm_has_these_flags_and_attributes():
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    parts = {None: VllmConfig, "parallel_config": ParallelConfig, "model_config": ModelConfig}
    for feature in UNSUPPORTED:
        assert feature.attribute in parts[feature.config].__dataclass_fields__
        assert feature.attribute in EngineArgs.__dataclass_fields__
        assert feature.flag == "--" + feature.attribute.replace("_", "-")
