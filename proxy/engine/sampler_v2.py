"""vLLM's sampler of Model Runner V2 with accept/reject sampling in the place of its draw.

Where it runs: `Sampler.sample` has applied the grammar's bitmask, logit_bias, penalties, bad words,
temperature and min-p when it calls `_sample_random`. Rows without a proxy go to vLLM's own method:
its noise is a function of a request's seed and the position, so a row draws the same token in every
batch. (flashinfer's noise is not, but vLLM uses flashinfer only for batches without seeds.)
`proxy.engine.sampler_v1` does the same for the V1 model runner, and says what greedy means.
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

from proxy.engine.batch_plan import BatchPlan
from proxy.engine.hook import Step, sample_proxied_rows, score_shadows


class ProxySamplerV2(Sampler):
    """The worker turns vLLM's sampler into this class after the model has loaded.

    `step` is set during one sampling step, if a proxy decides or scores any row of it.
    """

    step: Step | None = None
    sampling_states: "ProxySamplingStates"
    params: dict[int, SamplingParams]
    """By the request's index in the runner's state; vLLM reuses the index of a finished request."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Keep the request's SamplingParams, which V2 does not."""
        super().add_request(req_idx, sampling_params)
        self.params[req_idx] = sampling_params

    def sample(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """vLLM's, with the plan's divisors for the temperature: tokens [R], processed logits [R, V]."""
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
        expanded_idx_mapping: Tensor,  # [R] int, row -> index of its request
        idx_mapping_np: np.ndarray,  # [R] the same on the host
        pos: Tensor,  # [R] index of the last token known
        top_k: Tensor | None,  # [R]
        top_p: Tensor | None,  # [R]
        use_fused_sampler: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [R] int64, and the processed logits [R, V] for logprobs."""
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
        # vLLM skips the temperature, with all other processing, if no request of the batch needs any.
        temperature_applied = bool(self.needs_logits_processing[idx_mapping_np].any())
        decided = None
        if plan.proxied is not None:
            decided = sample_proxied_rows(
                step, processed_logits, temperature_applied=temperature_applied
            )
        sampled = plan.new_tokens(decided)
        if plan.unproxied_rows:
            index = plan.unproxied_index
            drawn, _ = super()._sample_random(
                processed_logits[index],
                expanded_idx_mapping[index],
                idx_mapping_np[plan.unproxied_rows],
                pos[index],
                None if top_k is None else top_k[index],
                None if top_p is None else top_p[index],
                use_fused_sampler,
            )
            sampled[index] = drawn.long()
        score_shadows(step, processed_logits, sampled, temperature_applied=temperature_applied)
        if self.shows_processed_logits(idx_mapping_np):
            processed_logits = apply_top_k_top_p(processed_logits, top_k, top_p)
        return sampled, processed_logits

    def shows_processed_logits(self, idx_mapping_np: np.ndarray) -> bool:
        """Whether a request asks for processed logits, which accept/reject sampling does not compute."""
        return self.return_sampling_mask or (
            self.logprobs_mode in PROCESSED_LOGPROBS_MODES
            and self.get_logprobs_dims(idx_mapping_np) is not None
        )


class ProxySamplingStates(SamplingStates):
    """vLLM's sampling states, but a row with a proxy is divided by the temperature of its training.

    The worker turns the sampler's states into this class. `plan` is set while `sample` runs.
    """

    plan: BatchPlan | None = None

    def apply_temperature(
        self,
        logits: Tensor,  # [R, V] float32, changed in place
        expanded_idx_mapping: Tensor,  # [R] int, row -> index of its request
        idx_mapping_np: np.ndarray,
    ) -> None:
        """With vLLM's own kernel, so that rows without a proxy are the same as in vLLM, bit for bit."""
        if self.plan is None:
            super().apply_temperature(logits, expanded_idx_mapping, idx_mapping_np)
        elif self.plan.divisors is not None:
            rows = torch.arange(len(logits), device=logits.device)
            states.apply_temperature(logits, rows, self.plan.divisors)
