"""Features that proxies do not support: each by its flag, and in vLLM's own configuration."""

from argparse import Namespace

import pytest

from proxy.engine.unsupported import UNSUPPORTED, unsupported_in_arguments, unsupported_in_config

OFF = {
    "rejection_sample_method": "standard",
    "enable_adaptive_verification": False,
    "enable_batch_sharded_sampling": None,
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "enable_trace_replay": False,
}
ON = [
    ("rejection_sample_method", "synthetic"),
    ("enable_adaptive_verification", True),
    ("enable_batch_sharded_sampling", True),
    ("pipeline_parallel_size", 2),
    ("prefill_context_parallel_size", 2),
    ("enable_trace_replay", True),
]


OF_DRAFTS = ("rejection_sample_method", "enable_adaptive_verification")


def arguments(**values):
    """vLLM's parsed command line: what is about drafts is in one JSON object."""
    of_drafts = {name: values.pop(name) for name in OF_DRAFTS}
    return Namespace(speculative_config={"method": "ngram"} | of_drafts, **values)


def config(**values):
    """A VllmConfig's parts, each with the values that it has."""
    return Namespace(
        speculative_config=Namespace(**{name: values[name] for name in OF_DRAFTS}),
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
    assert list(unsupported_in_arguments(arguments(**OFF))) == []
    assert list(unsupported_in_config(config(**OFF))) == []
    without_parts, without_drafts = config(**OFF), arguments(**OFF)
    without_parts.model_config = without_parts.speculative_config = None
    without_drafts.speculative_config = None
    assert list(unsupported_in_config(without_parts)) == []
    assert list(unsupported_in_arguments(without_drafts)) == []


@pytest.mark.parametrize(("attribute", "value"), ON)
def test_both_find_the_same(attribute, value):
    values = OFF | {attribute: value}
    (by_flag,) = unsupported_in_arguments(arguments(**values))
    (by_config,) = unsupported_in_config(config(**values))
    assert by_flag is by_config and by_flag.attribute == attribute


def test_all_of_them_are_tested():
    assert [feature.attribute for feature in UNSUPPORTED] == [attribute for attribute, _ in ON]


def test_vllm_has_these_flags_and_attributes():
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    parts = {
        "parallel_config": ParallelConfig,
        "model_config": ModelConfig,
        "speculative_config": SpeculativeConfig,
    }
    for feature in UNSUPPORTED:
        is_of_drafts = feature.config == "speculative_config"
        argument = feature.config if is_of_drafts else feature.attribute
        assert feature.attribute in parts[feature.config].__dataclass_fields__
        assert argument in EngineArgs.__dataclass_fields__
        assert feature.flag == "--" + argument.replace("_", "-")
