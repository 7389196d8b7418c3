"""vLLM's workers with proxies: `--worker-cls proxy.worker.ProxyCPUWorker` or `ProxyGPUWorker`.

The worker hands the sampler what vLLM does not (the hidden states behind the logits and the plan
of the batch) and answers the calls below, which the server makes with

    await engine_client.collective_rpc("load_proxy", args=("polite", "/path/to/checkpoint"))

between two steps, without disturbing requests in flight. The answer is a list, one entry per
rank; an exception becomes an error of the call, and the engine goes on.
"""

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
from vllm.platforms import current_platform
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from proxy import sampler as sampler_v1
from proxy.checkpoint import BaseModelId, LoadedProxy, ProxyError, identify, load
from proxy.hook import Step
from proxy.ledger import Ledger
from proxy.likelihood import log_ratios
from proxy.network import ProxyNetwork
from proxy.orphan import end_with_server
from proxy.reading import Reader
from proxy.registry import Registry

_TABLE_CHUNK = 8192  # tokens embedded at once when a proxy is loaded

_T = TypeVar("_T")


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


def _on_all_ranks(part: Callable[[], tuple[_T, str]]) -> _T:
    """Do a part of a load on every tensor-parallel rank and wait for the others.

    `part` returns its result and what must be the same on all ranks.

    Raises:
        ProxyError: on every rank, whatever went wrong on whichever of them.
    """
    result, said, problem = None, "", ""
    try:
        result, said = part()
    except ProxyError as error:
        problem = str(error)
    except Exception as error:  # a rank that left here would keep the others waiting for ever
        problem = f"{type(error).__name__}: {error}"
    group = get_tp_group()
    ranks = [(problem, said)] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(ranks, (problem, said), group=group.cpu_group)
    for rank, (problem, _) in enumerate(ranks):
        if problem:
            where = f" (tensor-parallel rank {rank})" if len(ranks) > 1 else ""
            raise ProxyError(f"{problem}{where}")
    if len({*ranks}) > 1:
        raise ProxyError(f"The ranks read different checkpoints: {[said for _, said in ranks]}.")
    return cast(_T, result)


class ProxyGPUWorker(GPUWorker):
    """vLLM's CUDA worker with proxies, for both of its model runners."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        _refuse_unsupported(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        end_with_server()
        self._base: BaseModelId | None = None
        self._preempted: set[str] = set()  # V2 alone

    # --- vLLM's own calls ---

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        sampler = self.model_runner.sampler
        if self.use_v2_model_runner:
            from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2

            from proxy import sampler_v2

            ours, theirs = sampler_v2.ProxySamplerV2, SamplerV2
            self._read: Any = sampler_v2
        else:
            ours, theirs = sampler_v1.ProxySampler, Sampler
            self._read = sampler_v1
        if type(sampler) not in (ours, theirs):
            raise ProxyError(
                f"Proxies need vLLM's own sampler, and this set-up samples with "
                f"{type(sampler).__name__}: switch off the feature that brings it."
            )
        sampler.__class__ = ours
        sampler.params = {}  # V2's reads them
        if self.use_v2_model_runner:
            sampler.sampling_states.__class__ = sampler_v2.ProxySamplingStates
        self._registry = Registry()
        reports = get_tp_group().rank_in_group == 0
        self._ledger = Ledger(self.device, reports=reports)
        self._reader = Reader(self._logits_of, reports=reports)

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.use_v2_model_runner:
            # It forgets preempted requests, and gets them again as new ones.
            self._preempted |= scheduler_output.preempted_req_ids or set()
            self._preempted -= scheduler_output.finished_req_ids
            self._preempted -= {new.req_id for new in scheduler_output.scheduled_new_reqs}
        self._reader.schedule(scheduler_output)
        output = super().execute_model(scheduler_output)
        if self._registry.retired and scheduler_output.finished_req_ids:
            self._free_unused()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner = self.model_runner
        if runner.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        if self._reader.is_busy:
            self._reader.read(*self._read.read_scheduled(runner))
        # V2 has no generators.
        generators = {} if self.use_v2_model_runner else runner.input_batch.generators
        aside = self._of_discarded_rows(generators) if generators else {}
        try:
            runner.sampler.step = self._step()
            return super().sample_tokens(grammar_output)
        finally:
            runner.sampler.step = None
            generators.update(aside)

    # --- calls for collective_rpc ---

    @raised_by_last_rank
    def load_proxy(self, name: str, directory: str, shadow: bool = False) -> dict[str, Any]:
        """Load a checkpoint under a name, on all ranks or on none.

        From now on the name stands for this version in requests that ask for no other. Versions
        loaded under it before stay, for requests that ask for them, until they are unloaded. The
        same version again changes nothing.

        Args:
            name: what requests will call it.
            directory: the checkpoint.
            shadow: it only scores what others say; requests cannot ask for it.

        Returns:
            The proxy's entry in `list_proxies`: name, version, directory, shadow, max_candidates,
            max_rejections, temperature, top_k, top_p, num_parameters, num_bytes, base (name,
            fingerprint), training.

        Raises:
            ProxyError: the checkpoint cannot be read, or belongs to another LLM.
        """
        loaded = self._read_checkpoint(name, directory)

        def together(add: Callable[[], None]) -> None:
            def part() -> tuple[None, str]:
                add()
                return None, ""

            _on_all_ranks(part)

        self._free_unused()
        with torch.inference_mode():
            description = self._registry.load(
                name,
                directory,
                loaded,
                lambda: self._table(loaded.network.to(self.device)),
                together,
                shadow=shadow,
            )
        self._ledger.forget_plan()
        return description

    @raised_by_last_rank
    def unload_proxy(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Take a version of a proxy away from new requests and return its entry.

        Requests in flight keep it; its memory is given back when the last of them has ended.
        Without a version: the one that the name stands for, or the only one there is.

        Raises:
            ProxyError: nothing of that name, or not this version of it, is loaded.
        """
        description = self._registry.unload(name, version)
        self._free_unused()
        return description

    @raised_by_last_rank
    def list_proxies(self) -> list[dict[str, Any]]:
        """The loaded proxies, each as `load_proxy` returned it."""
        return self._registry.list()

    @raised_by_last_rank
    def flush_metrics(self) -> None:
        """Bring the Prometheus counters up to the last step."""
        self._ledger.history.fold()
        self._ledger.history.flush_metrics()

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
        return self._ledger.take(request_ids)

    @raised_by_last_rank
    def take_traces(self, request_ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """What the proxies were asked in requests with `trace`, since the last time.

        May be asked while a request runs; for what is left at its end ask before its counts.

        Returns:
            By the engine's own id, a list with an entry for every token emitted: token_id,
            probability (within the nucleus), accept_probability (strength included; None where
            the proxy was not asked, as where there is a single candidate), forced, and rejected:
            a list of the same three for each candidate that was rejected before it, in the order
            of proposal. At most 4096 tokens of a request are traced.
        """
        return self._ledger.take_traces(request_ids)

    @raised_by_last_rank
    def take_positions(self, request_ids: Iterable[str]) -> dict[str, bytes]:
        """What was read in requests with `read`, once they have finished.

        Args:
            request_ids: ids as the caller gave them to the engine.

        Returns:
            By these ids, `proxy.positions.Positions` of one response each, as safetensors. What was
            asked for before, or too long ago, is not in it.
        """
        found = self._reader.take(list(request_ids))
        return {key: safetensors.torch.save(each._asdict()) for key, each in found.items()}

    @raised_by_last_rank
    def take_log_ratios(
        self, request_ids: Iterable[str], name: str, version: str
    ) -> dict[str, float]:
        """How much likelier a proxy makes what was read in requests with `read`: nats, `proxy.likelihood`.

        Args:
            request_ids: as for `take_positions`; the nucleus that they asked for has to be the proxy's.
            name, version: of a loaded proxy.

        Raises:
            ProxyError: no such proxy is loaded.
        """
        proxy = self._registry.find(name, version)
        if proxy is None:
            raise ProxyError(f"No proxy {name!r} of version {version} is loaded.")
        weights, table = self._registry.pool.alone(proxy)
        return {
            key: log_ratios(weights, table, proxy.config, positions).item()
            for key, positions in self._reader.take(list(request_ids)).items()
        }

    # --- inside ---

    def _logits_of(self, hidden: Tensor) -> Tensor | None:
        """The head's logits of hidden states [R, H] on the first tensor-parallel rank, as sampling sees them."""
        return self.model_runner.get_model().compute_logits(hidden)

    def _step(self) -> Step | None:
        """What the sampler has to know, or None if vLLM's own sampling is all that is needed."""
        registry = self._registry
        if not registry.pool.proxies:
            return None
        runner = self.model_runner
        plan = self._ledger.plan_of(self._read.read_ids(runner))
        if plan is None:
            batch = self._read.read_batch(runner)
            if self._preempted:
                batch = batch._replace(live=self._live_requests())
            plan = self._ledger.plan(
                batch, registry.pool, registry.find, shadows=registry.shadows()
            )
        if plan.aligned is None and not plan.shadows:
            return None
        hidden, positions, discarded = self._read.read_rows(runner)
        return Step(plan, hidden, positions, discarded, self._ledger.history)

    def _read_checkpoint(self, name: str, directory: str) -> LoadedProxy:
        """What `load` says, if it says the same on every rank. Raises ProxyError."""

        def read() -> tuple[LoadedProxy, str]:
            if not isinstance(name, str) or not name:
                raise ProxyError(
                    f"A proxy's name is a string of at least one character, not {name!r}."
                )
            loaded = load(directory, base=self._base_model())
            if self.device.type == "cpu":
                # Takes a second: now, not in the first request.
                importlib.import_module("proxy.loop")
            return loaded, loaded.version

        loaded = _on_all_ranks(read)
        made_for = loaded.config.hidden_size, loaded.config.vocab_size
        # Not config.hidden_size: some embeddings, and then the head's inputs, are narrower.
        # All ranks are here by now, and they share the embeddings out among them.
        served = next(self._embeddings()).shape[-1], self.model_config.get_vocab_size()
        if made_for != served:
            raise ProxyError(
                f"The proxy in {directory} is made for hidden size {made_for[0]} and "
                f"vocabulary size {made_for[1]}; the LLM has {served[0]} and {served[1]}."
            )
        return loaded

    def _table(self, network: ProxyNetwork) -> Tensor:
        """The candidate table [V, 2 width]; goes through to the end even if this rank cannot.

        The other ranks wait for it at every chunk of the embeddings.
        """
        chunks: list[Tensor] = []
        failure: Exception | None = None
        for rows in self._embeddings():
            try:
                if failure is None:
                    chunks.append(network.candidate_table(rows))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return torch.cat(chunks)

    def _free_unused(self) -> None:
        """Give back what unloaded proxies occupy, as soon as no request uses them."""
        if not self._registry.retired:
            return
        with torch.inference_mode():
            self._registry.free(self._ledger.proxies_in_use(self._live_requests()))
        self._ledger.forget_plan()

    def _live_requests(self) -> Collection[str]:
        if self.use_v2_model_runner:
            return self.model_runner.req_states.req_id_to_index.keys() | self._preempted
        return self.model_runner.requests.keys()

    def _of_discarded_rows(
        self, generators: dict[int, torch.Generator]
    ) -> dict[int, torch.Generator]:
        """Take out the generators of rows whose token will be thrown away.

        vLLM draws for unfinished prefills too and winds the generator back afterwards, which a
        CPU generator cannot do: a seeded request with a chunked prefill would end the engine.
        """
        discarded = self.model_runner.discard_request_mask.np
        rows = [row for row in generators if discarded[row]]
        return {row: generators.pop(row) for row in rows}

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

    from proxy.lora_cpu import keep_adapters_off_frozen_rows

    class ProxyCPUWorker(ProxyGPUWorker, CPUWorker):
        """vLLM's CPU worker, itself a kind of its CUDA worker, with proxies."""

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            super().load_model(*args, **kwargs)
            if self.vllm_config.lora_config is not None:
                keep_adapters_off_frozen_rows(self.model_runner)


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
