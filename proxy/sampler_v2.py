"""vLLM's sampler of Model Runner V2 with the accept/reject law in the place of its draw.

Where it runs: `Sampler.sample` has applied logit_bias, penalties, bad words, temperature and min-p
(a grammar's bitmask before that) when it calls `_sample_random`. Rows without a proxy go to vLLM's
own: its noise is a function of a request's seed and the position, so a row draws the same whichever
rows are beside it (flashinfer's is not, but vLLM takes that only for batches without seeds).
`proxy.sampler` is the same for the V1 model runner, and says what greedy means.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.sample import states
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates

from proxy.hook import Step, align, score_shadows
from proxy.ledger import Batch
from proxy.plan import Plan


class ProxySamplerV2(Sampler):
    """The worker turns vLLM's sampler into this class after the model has loaded.

    `step` is set for the duration of one sampling step and only if a proxy has something to do.
    """

    step: Step | None = None
    sampling_states: "ProxySamplingStates"
    params: dict[int, SamplingParams]
    """By the request's slot in the runner's state, which vLLM gives to the next one when it is free."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Note what the request asks for; V2 keeps no SamplingParams itself."""
        super().add_request(req_idx, sampling_params)
        self.params[req_idx] = sampling_params

    def sample(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """vLLM's, with each row divided by what the plan says: [R] tokens, [R, V] processed logits."""
        step = self.step
        if step is not None and len(logits) == len(step.plan.req_ids):
            self.sampling_states.plan = step.plan
        try:
            return super().sample(logits, *args, **kwargs)
        finally:
            self.sampling_states.plan = None

    def _sample_random(
        self,
        processed_logits: Tensor,  # [R, V]
        expanded_idx_mapping: Tensor,  # [R] int, row -> slot
        idx_mapping_np: np.ndarray,  # [R] the same on the host
        pos: Tensor,  # [R] index of the last token known
        top_k: Tensor | None,  # [R]
        top_p: Tensor | None,  # [R]
        use_fused_sampler: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [R] int64, and the logits they were drawn from as far as logprobs need them."""
        step = self.step
        if step is None or len(processed_logits) != len(step.plan.req_ids):
            return super()._sample_random(
                processed_logits,
                expanded_idx_mapping,
                idx_mapping_np,
                pos,
                top_k,
                top_p,
                use_fused_sampler,
            )
        plan = step.plan
        sampled = torch.empty(
            len(processed_logits), dtype=torch.int64, device=processed_logits.device
        )
        # Where no request of the batch needs it, vLLM leaves out the temperature with all the rest.
        tempered = bool(self.needs_logits_processing[idx_mapping_np].any())
        if plan.aligned is not None:
            aligned = align(step, processed_logits, tempered=tempered)
            sampled[... if plan.aligned.index is None else plan.aligned.index] = aligned
        if plan.plain_rows:
            index = plan.plain_index
            drawn, _ = super()._sample_random(
                processed_logits[index],
                expanded_idx_mapping[index],
                idx_mapping_np[plan.plain_rows],
                pos[index],
                None if top_k is None else top_k[index],
                None if top_p is None else top_p[index],
                use_fused_sampler,
            )
            sampled[index] = drawn.long()
        score_shadows(step, processed_logits, sampled, tempered=tempered)
        if self._shows_processed_logits(idx_mapping_np):
            processed_logits = apply_top_k_top_p(processed_logits, top_k, top_p)
        return sampled, processed_logits

    def _shows_processed_logits(self, idx_mapping_np: np.ndarray) -> bool:
        """Whether a request gets to see the nucleus: the law has not touched the vocabulary."""
        return self.return_sampling_mask or (
            self.logprobs_mode in PROCESSED_LOGPROBS_MODES
            and self.get_logprobs_dims(idx_mapping_np) is not None
        )


class ProxySamplingStates(SamplingStates):
    """What requests ask for; a row with a proxy is divided by the temperature that it was trained at.

    The worker turns the sampler's states into this class. `plan` is set while `sample` runs.
    """

    plan: Plan | None = None

    def apply_temperature(
        self,
        logits: Tensor,  # [R, V] float32, changed in place
        expanded_idx_mapping: Tensor,  # [R] int, row -> slot
        idx_mapping_np: np.ndarray,
    ) -> None:
        """By vLLM's own kernel, so that rows without a proxy are what they are in vLLM, to the bit."""
        if self.plan is None:
            super().apply_temperature(logits, expanded_idx_mapping, idx_mapping_np)
        elif self.plan.divisors is not None:
            rows = torch.arange(len(logits), device=logits.device)
            states.apply_temperature(logits, rows, self.plan.divisors)


def read_ids(runner: Any) -> list[str]:
    """The ids of the requests that this model runner is about to sample, row by row."""
    return runner.execute_model_state.input_batch.req_ids


def read_batch(runner: Any) -> Batch:
    """The same requests, and all that is known of them."""
    slot_of = runner.req_states.req_id_to_index
    return Batch(
        req_ids=read_ids(runner),
        params_of=lambda req_id: runner.sampler.params.get(slot_of[req_id]),
        live=slot_of.keys(),
    )


def read_scheduled(runner: Any) -> tuple[list[str], list[int], Tensor]:
    """The requests of the step, how many tokens of each were computed, and all their hidden states."""
    state = runner.execute_model_state
    return read_ids(runner), state.input_batch.num_scheduled_tokens.tolist(), state.hidden_states


def read_rows(runner: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Its hidden states, positions and discarded rows, as `Step` has them.

    A CUDA graph may pad `seq_lens` and the hidden states beyond the batch's requests and tokens;
    `req_ids`, `idx_mapping` and `logits_indices` have one entry for every row of the logits.
    """
    state, requests = runner.execute_model_state, runner.req_states
    batch = state.input_batch
    computed = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
    seq_lens = batch.seq_lens[: batch.num_reqs]
    discarded = None
    if (computed < batch.prefill_len_np).any():
        discarded = seq_lens < requests.prefill_len.gpu[batch.idx_mapping]
    return state.hidden_states[batch.logits_indices], seq_lens, discarded
