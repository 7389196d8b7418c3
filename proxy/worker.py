"""vLLM's workers with proxies: `--worker-cls proxy.worker.ProxyCPUWorker` or `ProxyGPUWorker`.

The worker hands the sampler what vLLM does not (the hidden states behind the logits and the plan
of the batch) and answers the calls below, which the server makes with

    await engine_client.collective_rpc("load_proxy", args=("polite", "/path/to/checkpoint"))

between two steps, without disturbing requests in flight. The answer is a list, one entry per
rank; an exception becomes an error of the call, and the engine goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.platforms import current_platform
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from proxy.checkpoint import BaseModelId, ProxyError, identify, load
from proxy.ledger import Ledger, ServedProxy
from proxy.sampler import ProxySampler, Step

_TABLE_CHUNK = 8192  # tokens embedded at once when a proxy is loaded


def raised_by_last_rank(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the worker whose errors, alike on all ranks, only the last rank raises.

    vLLM reads the ranks' replies in turn and stops at the first error. It would take what the
    ranks after it have sent for their answers to the next call, and so on ever after.
    """

    @wraps(call)
    def wrapped(self: "ProxyGPUWorker", *args: Any) -> Any:
        try:
            return call(self, *args)
        except Exception as error:
            if self.rank == self.parallel_config.world_size - 1:
                raise
            return {"error": str(error)}

    return wrapped


class ProxyGPUWorker(GPUWorker):
    """vLLM's CUDA worker with proxies; needs VLLM_USE_V2_MODEL_RUNNER=0."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        _refuse_unsupported(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._proxies: dict[str, ServedProxy] = {}
        self._descriptions: dict[str, dict[str, Any]] = {}
        self._base: BaseModelId | None = None

    # --- vLLM's own calls ---

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        sampler = self.model_runner.sampler
        if type(sampler) not in (Sampler, ProxySampler):
            raise ProxyError(
                f"Proxies need vLLM's own sampler, and this set-up samples with "
                f"{type(sampler).__name__}: switch off the feature that brings it."
            )
        sampler.__class__ = ProxySampler
        self._ledger = Ledger(self.device, reports=get_tp_group().rank_in_group == 0)

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner = self.model_runner
        state = runner.execute_model_state
        if state is None:
            return super().sample_tokens(grammar_output)
        sampler = runner.sampler
        with self._discarded_rows_unseeded():
            try:
                sampler.step = self._step(state.sample_hidden_states)
                return super().sample_tokens(grammar_output)
            finally:
                sampler.step = None

    # --- calls for collective_rpc ---

    @raised_by_last_rank
    def load_proxy(self, name: str, directory: str) -> dict[str, Any]:
        """Load a checkpoint under a name; requests that arrive from now on may ask for it.

        Loading under a name in use replaces that proxy for new requests; those in flight keep
        the one they began with.

        Returns:
            The proxy's entry in `list_proxies`: name, version, directory, max_candidates,
            max_rejections, num_parameters, base (name, fingerprint), training.

        Raises:
            ProxyError: the checkpoint cannot be read, or belongs to another LLM.
        """
        if not isinstance(name, str) or not name:
            raise ProxyError(f"A proxy's name is a string of at least one character, not {name!r}.")
        loaded = load(directory, base=self._base_model())
        config = loaded.config
        served = self.model_config.get_hidden_size(), self.model_config.get_vocab_size()
        if (config.hidden_size, config.vocab_size) != served:
            raise ProxyError(
                f"The proxy in {directory} is made for hidden size {config.hidden_size} and "
                f"vocabulary size {config.vocab_size}; the LLM has {served[0]} and {served[1]}."
            )
        network = loaded.network.to(self.device)
        with torch.inference_mode():
            chunks = [network.candidate_table(rows) for rows in self._embeddings()]
        self._proxies[name] = ServedProxy(
            name=name,
            version=loaded.version,
            network=network,
            table=torch.cat(chunks),
            totals=torch.zeros(3, dtype=torch.int64, device=self.device),
        )
        self._descriptions[name] = {
            "name": name,
            "version": loaded.version,
            "directory": str(Path(directory).resolve()),
            "max_candidates": config.max_candidates,
            "max_rejections": config.max_rejections,
            "num_parameters": network.num_parameters(),
            "base": loaded.base.model_dump(),
            "training": loaded.training,
        }
        return self._descriptions[name]

    @raised_by_last_rank
    def unload_proxy(self, name: str) -> dict[str, Any]:
        """Take a proxy away from new requests and return its entry; those in flight keep it.

        Raises:
            ProxyError: no proxy of that name is loaded.
        """
        if name not in self._proxies:
            loaded = ", ".join(sorted(self._proxies)) or "none"
            raise ProxyError(f"No proxy {name!r} is loaded. Loaded: {loaded}.")
        del self._proxies[name]
        return self._descriptions.pop(name)

    @raised_by_last_rank
    def list_proxies(self) -> list[dict[str, Any]]:
        """The loaded proxies, each as `load_proxy` returned it."""
        return list(self._descriptions.values())

    @raised_by_last_rank
    def take_alignment_counts(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What became of requests under their proxies. Ask once, when they have finished.

        Args:
            request_ids: ids as the caller gave them to the engine ("chatcmpl-abc", also where
                the request had n > 1), or the engine's own.

        Returns:
            By the engine's own id: "chatcmpl-abc-1f2e3d4c", or "0_chatcmpl-abc-1f2e3d4c",
            "1_..." for the samples of a request with n > 1, the number being the choice's index.
            Each entry: proxy (name), version, proposed, accepted, rejected, forced; accepted and
            forced tokens together are the tokens emitted. A request without a proxy, with
            strength 0, with an unknown proxy or asked for before is not in it. Only the first
            tensor-parallel rank counts; the others return {}.

        A stop string is found after the fact, outside the engine, so such a request's counts
        may include the few tokens under way by then.
        """
        self._ledger.flush_metrics()
        return self._ledger.take(request_ids)

    # --- inside ---

    def _step(self, hidden: Tensor) -> Step | None:
        """What the sampler has to know, or None if vLLM's own sampling is all that is needed."""
        runner = self.model_runner
        requests = runner.requests
        plan = self._ledger.plan(
            runner.input_batch.req_ids,
            lambda req_id: requests[req_id].sampling_params,
            requests.keys(),
            self._proxies,
        )
        if not plan.groups or len(hidden) != len(plan.req_ids):
            return None
        return Step(plan, hidden, runner.discard_request_mask.gpu, self._ledger)

    @contextmanager
    def _discarded_rows_unseeded(self) -> Iterator[None]:
        """Set aside the generators of rows whose token will be thrown away.

        vLLM draws for unfinished prefills too and winds the generator back afterwards, which a
        CPU generator cannot do: a seeded request with a chunked prefill would end the engine.
        """
        batch = self.model_runner.input_batch
        aside = {}
        if batch.generators:
            discarded = np.nonzero(self.model_runner.discard_request_mask.np[: batch.num_reqs])[0]
            rows = [row for row in discarded.tolist() if row in batch.generators]
            aside = {row: batch.generators.pop(row) for row in rows}
        try:
            yield
        finally:
            batch.generators.update(aside)

    def _base_model(self) -> BaseModelId:
        """The LLM being served; its fingerprint is taken when the first proxy is loaded."""
        if self._base is None:
            config = self.model_config
            cache_dir = self.vllm_config.load_config.download_dir
            self._base = identify(config.model, config.revision, cache_dir=cache_dir)
        return self._base

    def _embeddings(self) -> Iterator[Tensor]:
        """The LLM's embedding rows in chunks [<= 8192, H], whatever ranks hold them."""
        model = self.model_runner.get_model()
        vocab_size = self.model_config.get_vocab_size()
        with _frozen_embeddings(model):
            for start in range(0, vocab_size, _TABLE_CHUNK):
                stop = min(start + _TABLE_CHUNK, vocab_size)
                yield model.embed_input_ids(torch.arange(start, stop, device=self.device))


if current_platform.is_cpu():
    # Not elsewhere: importing vLLM's CPU worker puts dummies in the place of torch.cuda's streams.
    from vllm.v1.worker.cpu_worker import CPUWorker

    class ProxyCPUWorker(ProxyGPUWorker, CPUWorker):
        """vLLM's CPU worker, itself a kind of its CUDA worker, with proxies."""


@contextmanager
def _frozen_embeddings(model: nn.Module) -> Iterator[None]:
    """Embeddings without LoRA: its layer looks up adapters by the rows of the last batch."""
    wrapped = [m for m in model.modules() if isinstance(m, VocabParallelEmbeddingWithLoRA)]
    for module in wrapped:
        module.forward = module.base_layer.forward
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward


def _refuse_unsupported(config: VllmConfig) -> None:
    """Stop at start-up what would go wrong without a word later."""
    reasons = []
    if config.use_v2_model_runner:
        reasons.append("Model Runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)")
    if config.speculative_config is not None:
        reasons.append("speculative decoding (leave out --speculative-config)")
    if config.parallel_config.enable_batch_sharded_sampling:
        reasons.append("batch-sharded sampling (leave out --enable-batch-sharded-sampling)")
    if config.parallel_config.pipeline_parallel_size > 1:
        reasons.append("pipeline parallelism (use --tensor-parallel-size)")
    if reasons:
        raise ProxyError(f"Proxies do not work yet with {'; '.join(reasons)}.")
