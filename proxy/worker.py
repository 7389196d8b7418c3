"""vLLM's workers with proxies: `--worker-cls proxy.worker.ProxyCPUWorker` or `ProxyGPUWorker`.

The worker gives the sampler what vLLM does not: the hidden states behind the logits, and the plan of
the batch. It answers the calls below, which the server makes with

    await engine_client.collective_rpc("load_proxy", args=("polite", "/path/to/checkpoint"))

between two steps, without disturbing requests in flight. The answer is a list with one entry per
rank. An exception becomes an error of the call, and the engine goes on. The file is longer than 300
lines because it says of each call what it takes and returns.
"""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from proxy.checkpoint import BaseModelId, ProxyCheckpoint, ProxyError, identify, load
from proxy.engine.embeddings import candidate_table, embedding_chunks
from proxy.engine.hook import Step
from proxy.engine.parent_watch import watch_parent
from proxy.engine.ranks import is_first_rank, on_all_ranks, raised_by_last_rank
from proxy.engine.reading import Reader
from proxy.engine.registry import Registry
from proxy.engine.request_tracker import RequestTracker
from proxy.engine.rows import warm_up
from proxy.engine.runner import adapt
from proxy.engine.unsupported import refuse_unsupported
from proxy.likelihood import log_ratios
from proxy.network import Weights
from proxy.probe import load_weight


class ProxyGPUWorker(GPUWorker):
    """vLLM's CUDA worker with proxies, for both of its model runners."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        watch_parent()
        self._base: BaseModelId | None = None

    # --- vLLM's own calls ---

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the LLM and put the proxies' sampler in the place of vLLM's."""
        super().load_model(*args, **kwargs)
        self._runner = adapt(self.model_runner, is_v2=self.use_v2_model_runner)
        reports = is_first_rank()
        self._registry = Registry()
        self._tracker = RequestTracker(self.device, reports=reports)
        self._reader = Reader(self._logits_of, reports=reports)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the LLM on the scheduled tokens."""
        self._runner.schedule(scheduler_output)
        self._reader.schedule(scheduler_output)
        output = super().execute_model(scheduler_output)
        if self._registry.retired and scheduler_output.finished_req_ids:
            self._free_unused()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample from the logits of the step, with the proxies."""
        if self.model_runner.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        if self._reader.is_busy:
            self._reader.read(*self._runner.scheduled_tokens())
        with self._runner.sampling(self._step()):
            return super().sample_tokens(grammar_output)

    # --- calls for collective_rpc ---

    @raised_by_last_rank
    def load_proxy(self, name: str, directory: str, shadow: bool = False) -> dict[str, Any]:
        """Load a checkpoint under a name, on all ranks or on none.

        From now on the name is bound to this version, which requests get that ask for no other.
        Versions loaded under the name before stay for requests that ask for them, until they are
        unloaded. Loading the same version again only binds the name.

        Args:
            name: what requests will call it.
            directory: the checkpoint.
            shadow: it only scores the emitted tokens; requests cannot ask for it.

        Returns:
            The proxy's entry in `list_proxies`: name, version, directory, shadow, max_candidates,
            max_rejections, temperature, top_k, top_p, num_parameters, num_bytes, base (name,
            fingerprint), training.

        Raises:
            ProxyError: the checkpoint cannot be read, or belongs to another LLM.
        """
        checkpoint = self._read_checkpoint(name, directory)

        def tensors() -> tuple[Weights, Tensor]:
            network = checkpoint.network.to(self.device)
            return network.weights(), candidate_table(network, self._embeddings())

        def add_on_all_ranks(add: Callable[[], None]) -> None:
            def part() -> tuple[None, str]:
                add()
                return None, ""

            on_all_ranks(part)

        self._free_unused()
        with torch.inference_mode():
            description = self._registry.load(
                name, directory, checkpoint, tensors, add_on_all_ranks, shadow=shadow
            )
            if self.device.type == "cuda":
                hidden_size = checkpoint.config.hidden_size
                hidden = torch.zeros(
                    2, hidden_size, dtype=self.model_config.dtype, device=self.device
                )
                logits = self._logits_of(hidden)
                if logits is not None:
                    warm_up(self._registry.pool, logits, hidden)
        self._tracker.forget_plan()
        return description

    @raised_by_last_rank
    def unload_proxy(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Unload a version of a proxy and return its entry.

        Requests in flight keep it, and its memory is freed when the last of them has ended.
        Without a version: the one that the name is bound to, or else the only one of that name.

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
        self._tracker.stats.aggregate()
        self._tracker.stats.flush_metrics()

    @raised_by_last_rank
    def take_alignment_counts(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The counts of requests under their proxies. To be called once, when they have finished.

        Args:
            request_ids: ids as the caller gave them to the engine ("chatcmpl-abc", also where
                the request had n > 1), or the engine's own.

        Returns:
            By the engine's own id: "chatcmpl-abc-1f2e3d4c", or "0_chatcmpl-abc-1f2e3d4c",
            "1_..." for the samples of a request with n > 1, the number being the choice's index.
            Each entry: proxy (name), version, proposed, accepted, rejected, forced. The emitted
            tokens are the accepted and the forced ones. Requests without a proxy, with strength 0,
            with an unknown proxy, and those taken before are left out. Only the first
            tensor-parallel rank counts; the others return {}.

        Stop strings are found outside the engine, after the fact: the counts of such a request may
        include a few tokens after its end.
        """
        return self._tracker.take(request_ids)

    @raised_by_last_rank
    def take_traces(self, request_ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The traces of requests with `trace`, since the last time.

        May be called while a request runs. At its end, call it before `take_alignment_counts`.

        Returns:
            By the engine's own id, a list with an entry for every token emitted: token_id,
            probability (within the nucleus), accept_probability (strength included; None if the
            proxy did not decide on it, as for a single candidate), forced, and rejected: a list of
            the first three for each candidate that was rejected, in the order of proposal. At most
            4096 tokens of a request are traced.
        """
        return self._tracker.take_traces(request_ids)

    @raised_by_last_rank
    def take_positions(self, request_ids: Iterable[str]) -> dict[str, bytes]:
        """The positions of requests with `read` that have finished.

        Args:
            request_ids: ids as the caller gave them to the engine.

        Returns:
            By these ids, `proxy.positions.Positions` of one response each, as safetensors. Positions
            that were taken before, or dropped because nobody took them, are left out.
        """
        positions = self._reader.take(list(request_ids))
        return {key: safetensors.torch.save(p._asdict()) for key, p in positions.items()}

    @raised_by_last_rank
    def take_log_ratios(
        self, request_ids: Iterable[str], name: str, version: str
    ) -> dict[str, float]:
        """How much likelier a proxy makes the responses of requests with `read`, in nats (`proxy.likelihood`).

        Args:
            request_ids: as for `take_positions`; their nucleus has to be the proxy's.
            name, version: of a loaded proxy.

        Raises:
            ProxyError: no such proxy is loaded.
        """
        proxy = self._registry.find(name, version)
        if proxy is None:
            raise ProxyError(f"No proxy {name!r} of version {version} is loaded.")
        weights, table = self._registry.pool.single(proxy)
        return {
            key: log_ratios(weights, table, proxy.config, positions).item()
            for key, positions in self._reader.take(list(request_ids)).items()
        }

    @raised_by_last_rank
    def load_probe(self, directory: str) -> None:
        """Load the probe (`proxy.probe`) that scores requests with a `ScoreRequest`, in the place of another.

        Raises:
            ProxyError: it cannot be read, or is made for another hidden size.
        """

        def read() -> tuple[Tensor, str]:
            weight = load_weight(Path(directory))
            return weight, hashlib.sha256(weight.numpy().tobytes()).hexdigest()

        weight, hidden_size = on_all_ranks(read), next(self._embeddings()).shape[-1]
        if len(weight) != hidden_size:
            raise ProxyError(
                f"The probe in {directory} is made for hidden size {len(weight)}; the LLM has {hidden_size}."
            )
        self._reader.probe = weight.to(self.device)

    @raised_by_last_rank
    def take_probe_scores(self, request_ids: Iterable[str]) -> dict[str, float]:
        """The probe's scores of requests with a `ScoreRequest` that have finished.

        Args:
            request_ids: ids as the caller gave them to the engine.

        Returns:
            By these ids; scores that were taken before, or dropped because nobody took them, are left out.
        """
        return self._reader.take_scores(list(request_ids))

    # --- inside ---

    def _logits_of(self, hidden: Tensor) -> Tensor | None:
        """Hidden states [R, H] -> the head's logits [R, V], on the first tensor-parallel rank."""
        return self.model_runner.get_model().compute_logits(hidden)

    def _step(self) -> Step | None:
        """What the sampler needs to know; None if vLLM's own sampling is enough."""
        registry, runner = self._registry, self._runner
        if not registry.pool.proxies:
            return None
        draft_rows, rows = runner.draft_rows(), runner.request_ids()
        if draft_rows is not None:
            rows = draft_rows.expand(rows)
        plan = self._tracker.plan_of(rows)
        if plan is None:
            batch = runner.batch()._replace(req_ids=rows)
            plan = self._tracker.plan(
                batch, registry.pool, registry.find, shadows=registry.shadows()
            )
        if plan.proxied is None and not plan.shadows:
            return None
        return Step(plan, *runner.sampling_inputs(draft_rows), self._tracker.stats, draft_rows)

    def _read_checkpoint(self, name: str, directory: str) -> ProxyCheckpoint:
        """The checkpoint, if all ranks read the same. Raises ProxyError."""

        def read() -> tuple[ProxyCheckpoint, str]:
            if not isinstance(name, str) or not name:
                raise ProxyError(
                    f"A proxy's name is a string of at least one character, not {name!r}."
                )
            checkpoint = load(directory, base=self._base_model())
            if self.device.type == "cpu":
                # The import compiles, which takes a second: now, not in the first request.
                importlib.import_module("proxy.cpu.kernel")
            return checkpoint, checkpoint.version

        checkpoint = on_all_ranks(read)
        expected = checkpoint.config.hidden_size, checkpoint.config.vocab_size
        # Not config.hidden_size: some embeddings, and then the head's inputs, are narrower.
        # All ranks get here, and the embeddings are distributed over them.
        actual = next(self._embeddings()).shape[-1], self.model_config.get_vocab_size()
        if expected != actual:
            raise ProxyError(
                f"The proxy in {directory} is made for hidden size {expected[0]} and "
                f"vocabulary size {expected[1]}; the LLM has {actual[0]} and {actual[1]}."
            )
        return checkpoint

    def _free_unused(self) -> None:
        """Give back the memory of unloaded proxies that no request uses."""
        if not self._registry.retired:
            return
        with torch.inference_mode():
            in_use = self._tracker.proxies_in_use(self._runner.live_requests())
            self._registry.free(in_use)
        self._tracker.forget_plan()

    def _base_model(self) -> BaseModelId:
        """The LLM's identity; its fingerprint is computed when the first proxy is loaded."""
        if self._base is None:
            config = self.model_config
            cache_dir = self.vllm_config.load_config.download_dir
            self._base = identify(config.model, config.revision, cache_dir=cache_dir)
        return self._base

    def _embeddings(self) -> Iterator[Tensor]:
        """The LLM's embedding rows [<= 8192, H], chunk by chunk; all ranks ask for all of them."""
        model, vocab_size = self.model_runner.get_model(), self.model_config.get_vocab_size()
        return embedding_chunks(model, vocab_size, self.device)


if current_platform.is_cpu():
    # Not elsewhere: importing vLLM's CPU worker puts dummies in the place of torch.cuda's streams.
    from vllm.v1.worker.cpu_worker import CPUWorker

    from proxy.engine.drafts_cpu import correct_drafts
    from proxy.engine.lora_cpu import keep_adapters_off_frozen_rows

    class ProxyCPUWorker(ProxyGPUWorker, CPUWorker):
        """vLLM's CPU worker, itself a kind of its CUDA worker, with proxies."""

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            """As its parent's, with corrections of vLLM's LoRA and speculative decoding."""
            super().load_model(*args, **kwargs)
            if self.vllm_config.speculative_config is not None and not self.use_v2_model_runner:
                correct_drafts(self.model_runner)
            if self.vllm_config.lora_config is not None:
                keep_adapters_off_frozen_rows(self.model_runner)
