"""Features of vLLM that proxies do not work with yet: the one list, for the command line and for the worker.

The command line refuses them by flag before the engine starts. The worker checks vLLM's finished configuration, which
other settings can change, and which a user of the worker without our server has too.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

from proxy.checkpoint import ProxyError


class Feature(NamedTuple):
    """A flag of vLLM's, and where its value is in `VllmConfig`."""

    name: str
    flag: str
    config: str
    """Attribute of VllmConfig that holds the value."""
    attribute: str
    """Of that object, and of the parsed command line, or of the JSON object that the flag takes."""
    advice: str
    value: str | None = None
    """The value that is refused; None = every one that switches the feature on."""


UNSUPPORTED = (
    # Of speculative decoding: what does not keep the LLM's distribution, and a layout that only the device knows.
    Feature(
        "synthetic acceptance of drafts",
        "--speculative-config",
        "speculative_config",
        "rejection_sample_method",
        "leave rejection_sample_method out of it",
        "synthetic",
    ),
    Feature(
        "adaptive verification of drafts",
        "--speculative-config",
        "speculative_config",
        "enable_adaptive_verification",
        "leave enable_adaptive_verification out of it",
    ),
    Feature(
        "batch-sharded sampling",
        "--enable-batch-sharded-sampling",
        "parallel_config",
        "enable_batch_sharded_sampling",
        "leave out --enable-batch-sharded-sampling",
    ),
    Feature(
        "pipeline parallelism",
        "--pipeline-parallel-size",
        "parallel_config",
        "pipeline_parallel_size",
        "use --tensor-parallel-size",
    ),
    Feature(
        "prefill context parallelism",
        "--prefill-context-parallel-size",
        "parallel_config",
        "prefill_context_parallel_size",
        "use --tensor-parallel-size",
    ),
    Feature(
        "trace replay",
        "--enable-trace-replay",
        "model_config",
        "enable_trace_replay",
        "leave out --enable-trace-replay",
    ),
)


def unsupported_in_arguments(args: Any) -> Iterator[Feature]:
    """The features that vLLM's parsed command line switches on."""
    of_drafts = args.speculative_config or {}
    for feature in UNSUPPORTED:
        holder = args
        if feature.config == "speculative_config":
            if feature.attribute not in of_drafts:
                continue
            holder = Namespace(**of_drafts)
        if _is_on(holder, feature):
            yield feature


def unsupported_in_config(config: Any) -> Iterator[Feature]:
    """The features that a VllmConfig switches on. A part of it that is None switches nothing on."""
    for feature in UNSUPPORTED:
        holder = getattr(config, feature.config)
        if holder is not None and _is_on(holder, feature):
            yield feature


def refuse_unsupported(config: Any) -> None:
    """Refuse at start-up what would fail silently later.

    Raises:
        ProxyError: the VllmConfig switches a feature of the list on.
    """
    reasons = [f"{feature.name} ({feature.advice})" for feature in unsupported_in_config(config)]
    if reasons:
        raise ProxyError(f"Proxies do not work yet with {'; '.join(reasons)}.")


def _is_on(holder: Any, feature: Feature) -> bool:
    value = getattr(holder, feature.attribute)
    if feature.value is not None:
        return bool(value == feature.value)
    if type(value) is int:  # the size of a group of devices
        return value > 1
    return value is not None and value is not False
