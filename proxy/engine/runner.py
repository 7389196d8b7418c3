"""What a sampling step is read from: vLLM's model runner, V1 or V2, behind one interface.

vLLM chooses the runner: V1 on a CPU, V2 on CUDA where it supports the configuration. An adapter puts
the proxies' sampler in the place of vLLM's and reads the runner's state. B = requests of the step, T =
its tokens, R = its logits rows: one for each request, and one more for each token that vLLM drafted.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

from proxy.checkpoint import ProxyError
from proxy.engine.drafts import DraftRows
from proxy.engine.hook import Step
from proxy.engine.rejection_v1 import ProxyRejectionSampler
from proxy.engine.request_tracker import Batch
from proxy.engine.sampler_v1 import ProxySampler


class SamplingInputs(NamedTuple):
    """The rows of the logits that the step samples from."""

    hidden: Tensor  # [R, H], the lm_head's input
    positions: Tensor  # [R or more] int, index of the token to be drawn
    discarded: Tensor | None  # [R] bool, rows of unfinished prefills; None = no row


class ScheduledTokens(NamedTuple):
    """Every token that the step computed, request by request."""

    req_ids: list[str]
    counts: list[int]  # tokens of each request
    hidden: Tensor  # [T or more, H]


class RunnerAdapter(Protocol):
    """Reads one of vLLM's model runners. The methods below `sampling` want a step under way."""

    def schedule(self, scheduler_output: Any) -> None:
        """Note what vLLM's scheduler decided for the next step; called before the step runs."""

    def live_requests(self) -> Collection[str]:
        """Every request that may go on, in this step or not."""

    def sampling(self, step: Step | None) -> AbstractContextManager[None]:
        """While this is open, the sampler has this step; None = vLLM's own sampling."""

    def request_ids(self) -> list[str]:
        """The requests of the step."""

    def batch(self) -> Batch:
        """The same requests with their sampling parameters."""

    def draft_rows(self) -> DraftRows | None:
        """The rows of the step's requests; None if nothing was drafted."""

    def sampling_inputs(self, draft_rows: DraftRows | None = None) -> SamplingInputs:
        """The rows of the step's logits."""

    def scheduled_tokens(self) -> ScheduledTokens:
        """The step's tokens, prefills included."""


def adapt(runner: Any, *, is_v2: bool) -> RunnerAdapter:
    """The adapter of a model runner whose model is loaded; replaces the runner's sampler.

    Raises:
        ProxyError: the runner does not use vLLM's standard sampler.
    """
    return RunnerV2(runner) if is_v2 else RunnerV1(runner)


class RunnerV1:
    """vLLM's V1 model runner."""

    def __init__(self, runner: Any) -> None:
        _replace_sampler(runner.sampler, Sampler, ProxySampler)
        if runner.speculative_config is not None:
            _replace_sampler(runner.rejection_sampler, RejectionSampler, ProxyRejectionSampler)
        self._runner = runner

    def schedule(self, scheduler_output: Any) -> None:
        """Nothing to note: the runner keeps preempted requests."""

    def live_requests(self) -> Collection[str]:
        return self._runner.requests.keys()

    @contextmanager
    def sampling(self, step: Step | None) -> Iterator[None]:
        """As the protocol says, and without the generators of rows whose token is discarded.

        vLLM draws for unfinished prefills too and rewinds the generator afterwards. A CPU generator
        cannot be rewound: a seeded request with a chunked prefill would end the engine.
        """
        runner = self._runner
        generators, hidden = runner.input_batch.generators, {}
        if generators:
            discarded = runner.discard_request_mask.np
            hidden = {row: generators.pop(row) for row in [*generators] if discarded[row]}
        runner.sampler.step = step
        try:
            yield
        finally:
            runner.sampler.step = None
            generators.update(hidden)

    def request_ids(self) -> list[str]:
        return self._runner.input_batch.req_ids

    def batch(self) -> Batch:
        requests = self._runner.requests
        return Batch(
            req_ids=self.request_ids(),
            params_of=lambda req_id: requests[req_id].sampling_params,
            live=requests.keys(),
        )

    def draft_rows(self) -> DraftRows | None:
        metadata = self._runner.execute_model_state.spec_decode_metadata
        if metadata is None or metadata.max_spec_len == 0:
            return None
        return DraftRows.of([count + 1 for count in metadata.num_draft_tokens], self._runner.device)

    def sampling_inputs(self, draft_rows: DraftRows | None = None) -> SamplingInputs:
        runner = self._runner
        hidden, positions = runner.execute_model_state.sample_hidden_states, runner.seq_lens
        count = len(runner.input_batch.req_ids)
        mask, discarded = runner.discard_request_mask, None
        # A search in the bytes takes a tenth of the time of numpy's `any`, at every step.
        if mask.np.tobytes().find(1, 0, count) >= 0:
            discarded = mask.gpu[:count].clone()
        if draft_rows is not None:
            positions = draft_rows.positions(positions)
            discarded = None if discarded is None else discarded[draft_rows.requests]
        return SamplingInputs(hidden, positions, discarded)

    def scheduled_tokens(self) -> ScheduledTokens:
        state, req_ids = self._runner.execute_model_state, self.request_ids()
        scheduled = state.scheduler_output.num_scheduled_tokens
        counts = [scheduled[req_id] for req_id in req_ids]
        return ScheduledTokens(req_ids, counts, state.hidden_states)


class RunnerV2:
    """vLLM's Model Runner V2. It forgets preempted requests and gets them again as new ones."""

    def __init__(self, runner: Any) -> None:
        # These need Triton: imported only where vLLM has chosen V2.
        from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
            RejectionSampler as RejectionSamplerV2,
        )

        from proxy.engine.rejection_v2 import ProxyRejectionSamplerV2
        from proxy.engine.sampler_v2 import ProxySamplerV2, ProxySamplingStates

        _replace_sampler(runner.sampler, SamplerV2, ProxySamplerV2)
        runner.sampler.params = {}
        runner.sampler.sampling_states.__class__ = ProxySamplingStates
        if runner.rejection_sampler is not None:
            _replace_sampler(runner.rejection_sampler, RejectionSamplerV2, ProxyRejectionSamplerV2)
        self._runner = runner
        self._preempted: set[str] = set()

    def schedule(self, scheduler_output: Any) -> None:
        """Note which requests are preempted."""
        self._preempted |= scheduler_output.preempted_req_ids or set()
        self._preempted -= scheduler_output.finished_req_ids
        self._preempted -= {new.req_id for new in scheduler_output.scheduled_new_reqs}

    def live_requests(self) -> Collection[str]:
        known = self._runner.req_states.req_id_to_index.keys()
        return known | self._preempted if self._preempted else known

    @contextmanager
    def sampling(self, step: Step | None) -> Iterator[None]:
        self._runner.sampler.step = step
        try:
            yield
        finally:
            self._runner.sampler.step = None

    def request_ids(self) -> list[str]:
        return self._runner.execute_model_state.input_batch.req_ids

    def batch(self) -> Batch:
        index_of = self._runner.req_states.req_id_to_index
        params = self._runner.sampler.params
        return Batch(
            req_ids=self.request_ids(),
            params_of=lambda req_id: params.get(index_of[req_id]),
            live=self.live_requests(),
        )

    def draft_rows(self) -> DraftRows | None:
        batch = self._runner.execute_model_state.input_batch
        if batch.num_draft_tokens == 0:
            return None
        return DraftRows.of(np.diff(batch.cu_num_logits_np).tolist(), self._runner.device)

    def sampling_inputs(self, draft_rows: DraftRows | None = None) -> SamplingInputs:
        """As the protocol says.

        A CUDA graph may pad `seq_lens` and the hidden states beyond the batch's requests and tokens;
        `req_ids`, `idx_mapping` and `logits_indices` have one entry for each row of the logits.
        """
        state, requests = self._runner.execute_model_state, self._runner.req_states
        batch = state.input_batch
        computed = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
        seq_lens = batch.seq_lens[: batch.num_reqs]
        discarded = None
        if (computed < batch.prefill_len_np).any():
            discarded = seq_lens < requests.prefill_len.gpu[batch.idx_mapping]
        hidden = state.hidden_states
        if batch.num_tokens == batch.num_reqs:  # one token each: saves a kernel's launch
            hidden = hidden[: batch.num_reqs]
        else:
            hidden = hidden[batch.logits_indices]
        if draft_rows is None:
            return SamplingInputs(hidden, seq_lens, discarded)
        if discarded is not None:
            discarded = discarded[draft_rows.requests]
        return SamplingInputs(hidden, draft_rows.positions(seq_lens), discarded)

    def scheduled_tokens(self) -> ScheduledTokens:
        state = self._runner.execute_model_state
        counts = state.input_batch.num_scheduled_tokens.tolist()
        return ScheduledTokens(self.request_ids(), counts, state.hidden_states)


def _replace_sampler(sampler: Any, expected: type, replacement: type) -> None:
    """Turn vLLM's sampler into ours, with the state that it has."""
    if type(sampler) not in (replacement, expected):
        raise ProxyError(
            f"Proxies need vLLM's own sampler, and this set-up samples with "
            f"{type(sampler).__name__}: switch off the feature that brings it."
        )
    sampler.__class__ = replacement
