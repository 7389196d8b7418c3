"""vLLM's verification of drafted tokens in Model Runner V2, with rows that proxies decide.

Where it runs: `RejectionSampler._verify` gets the raw logits of every drafted position and of the one
after them. Rows with a proxy are decided by `proxy.engine.hook` and emitted as `proxy.engine.drafts`
says; the requests without one go to vLLM's own method, as a batch of their own.
`proxy.engine.rejection_v1` does the same for the V1 model runner.

R = logits rows, B = requests, S = the configured number of drafts and one.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from proxy.engine.device import to_device
from proxy.engine.hook import Step, sample_proxied_rows, score_shadows
from proxy.engine.sampler_v2 import ProxySamplerV2


class ProxyRejectionSamplerV2(RejectionSampler):
    """The worker turns vLLM's rejection sampler into this class after the model has loaded."""

    sampler: ProxySamplerV2

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with the logprobs of `logprob_token_ids`, which it leaves out and a judge reads."""
        output = super().__call__(logits, input_batch, *args, **kwargs)
        sampler = self.sampler
        dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        if dims is not None and dims[1] > 0:
            cu_num_logits = input_batch.cu_num_logits_np
            requests = np.arange(input_batch.num_reqs).repeat(np.diff(cu_num_logits))
            of_rows = to_device(requests, torch.int64, logits.device)
            sampled = output.sampled_token_ids[of_rows, input_batch.expanded_local_pos.long()]
            output.logprobs_tensors = compute_topk_scores(
                logits,
                dims[0],
                sampled.clamp(min=0, max=logits.shape[1] - 1),
                cu_num_logits.tolist(),
                logprob_token_ids_state=sampler.logprob_token_ids_state,
                expanded_idx_mapping=input_batch.expanded_idx_mapping,
                max_per_req_token_ids=dims[1],
                logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
            )
        return output

    def _verify_in_chunks(
        self,
        logits: Tensor,  # [R, V]
        input_batch: Any,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,  # [R]
        pos: Tensor,  # [R]
        max_chunk_logits: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """vLLM's; with a proxy all rows are one chunk, because the plan is that of the batch."""
        if self.sampler.step is not None:
            max_chunk_logits = len(logits)
        return super()._verify_in_chunks(
            logits,
            input_batch,
            draft_logits,
            draft_sampled,
            pos,
            max_chunk_logits,
            *args,
            **kwargs,
        )

    def _verify(
        self,
        logits: Tensor,  # [R, V]
        draft_logits: Tensor | None,  # of all requests that the runner knows
        draft_sampled: Tensor,  # [R] int, the token that the row has read
        pos: Tensor,  # [R]
        cu_num_logits: Tensor,  # [B + 1]
        idx_mapping: Tensor,  # [B] int, -> index of the request in the runner's state
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,  # [R]
        expanded_local_pos: Tensor,  # [R]
        seq_lens_upper_bound_np: np.ndarray,  # [B]
        verify_draft_sampled: Tensor,  # [R], `draft_sampled` with -1 where it cannot be accepted
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Processed logits [R, V], tokens [B, S] int64 and how many of them are emitted [B] int32."""
        step = self.sampler.step
        if step is None:
            return super()._verify(
                logits,
                draft_logits,
                draft_sampled,
                pos,
                cu_num_logits,
                idx_mapping,
                idx_mapping_np,
                expanded_idx_mapping,
                expanded_local_pos,
                seq_lens_upper_bound_np,
                verify_draft_sampled,
            )
        plan, rows = step.plan, step.draft_rows
        assert rows is not None
        processed, temperature_applied = self._processed(
            step,
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        # The next row of a request has read what was drafted for this one.
        drafts = verify_draft_sampled.roll(-1).masked_fill(rows.offsets.roll(-1) == 0, -1)
        decided = None
        if plan.proxied is not None:
            decided = sample_proxied_rows(
                step, processed, temperature_applied=temperature_applied, drafts=drafts
            )
        size = self.num_speculative_steps + 1
        emitted = rows.emitted(plan.new_tokens(decided), drafts, size)
        if plan.unproxied_rows:
            requests = rows.requests_of(plan.unproxied_rows)
            index = to_device(requests, torch.int64, logits.device)
            counts = [0, *(rows.counts[i] for i in requests)]
            own = plan.unproxied_index
            _, sampled, num_sampled = super()._verify(
                logits[own],
                draft_logits,
                draft_sampled[own],
                pos[own],
                to_device(np.cumsum(counts), torch.int32, logits.device),
                idx_mapping[index],
                idx_mapping_np[requests],
                expanded_idx_mapping[own],
                expanded_local_pos[own],
                seq_lens_upper_bound_np[requests],
                verify_draft_sampled[own],
            )
            is_emitted = torch.arange(size, device=logits.device) < num_sampled.unsqueeze(-1)
            emitted[index] = sampled.masked_fill(~is_emitted, -1)
        score_shadows(
            step,
            processed,
            emitted[rows.requests, rows.offsets],
            temperature_applied=temperature_applied,
        )
        if self.sampler.shows_processed_logits(idx_mapping_np):
            processed = self.sampler.sampling_states.apply_top_k_top_p(
                processed, expanded_idx_mapping, idx_mapping_np
            )
        return processed, emitted, (emitted >= 0).sum(-1).int()

    def _processed(
        self,
        step: Step,
        logits: Tensor,  # [R, V]
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        *args: Any,
    ) -> tuple[Tensor, bool]:
        """The logits up to vLLM's top-k, by the plan's divisors, and whether they are divided by these."""
        sampler = self.sampler
        sampler.sampling_states.plan = step.plan
        try:
            processed = sampler.apply_sampling_params(
                logits,
                expanded_idx_mapping,
                idx_mapping,
                idx_mapping_np,
                *args,
                skip_top_k_top_p=True,
            )
        finally:
            sampler.sampling_states.plan = None
        return processed, bool(sampler.needs_logits_processing[idx_mapping_np].any())
