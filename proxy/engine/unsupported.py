"""Features of vLLM that do not work with proxies."""

from typing import Any

from proxy.checkpoint import ProxyError


def refuse_unsupported(config: Any) -> None:
    """Refuse at start-up what would fail silently later."""
    reasons = []
    if config.speculative_config is not None:
        reasons.append("speculative decoding (leave out --speculative-config)")
    if config.parallel_config.enable_batch_sharded_sampling:
        reasons.append("batch-sharded sampling (leave out --enable-batch-sharded-sampling)")
    if config.parallel_config.pipeline_parallel_size > 1:
        reasons.append("pipeline parallelism (use --tensor-parallel-size)")
    if config.parallel_config.prefill_context_parallel_size > 1:
        reasons.append("prefill context parallelism (use --tensor-parallel-size)")
    if config.model_config is not None and config.model_config.enable_trace_replay:
        reasons.append("trace replay (leave out --enable-trace-replay)")
    if reasons:
        raise ProxyError(f"Proxies do not work yet with {'; '.join(reasons)}.")
