"""vLLM's verification of drafted tokens (V1 model runner), with rows that proxies decide.

Where it runs: `RejectionSampler.forward` gets the raw logits of every drafted position and of the one
after them. Here, if anything was drafted:

    constraints, penalties -> rows with a proxy:     `proxy.engine.hook.sample_proxied_rows`,
                                                     emitted as `proxy.engine.drafts` says
                           -> rows without a proxy:  vLLM's own rejection sampling

R = logits rows, B = requests, S = rows of the request that has most, P = requests without a proxy.
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import (
    RejectionSampler,
    apply_sampling_constraints,
    rejection_sample,
)
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from proxy.engine.device import to_device
from proxy.engine.hook import Step, sample_proxied_rows, score_shadows
from proxy.engine.sampler_v1 import ProxySampler, only_proxies_decide


class ProxyRejectionSampler(RejectionSampler):
    """The worker turns vLLM's rejection sampler into this class after the model has loaded."""

    sampler: ProxySampler

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,  # [R - B, V]; None = each draft has probability 1
        logits: Tensor,  # [R, V]
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Tokens [B, S] int32, -1 where a draft was rejected, and logprobs of all of them."""
        step, md = self.sampler.step, sampling_metadata
        if metadata.max_spec_len == 0:
            return self.sampler(logits, md)
        if step is None:
            # It would take the labels' logprobs for those of the whole vocabulary.
            without_labels = replace(md, logprob_token_ids=None)
            output = super().forward(metadata, draft_probs, logits, without_labels)
        else:
            output = self._forward_proxied(step, metadata, draft_probs, logits, md)
        if md.logprob_token_ids:
            output.logprobs_tensors = self._label_logprobs(
                metadata, logits, md.logprob_token_ids, output.sampled_token_ids
            )
        return output

    def _forward_proxied(
        self,
        step: Step,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,  # [R - B, V]
        logits: Tensor,  # [R, V]
        md: SamplingMetadata,
    ) -> SamplerOutput:
        plan, rows = step.plan, step.draft_rows
        assert rows is not None
        drafts = metadata.draft_token_ids.new_full((len(logits),), -1)
        drafts[metadata.target_logits_indices] = metadata.draft_token_ids
        constrained = logits
        if not only_proxies_decide(plan, md):
            constrained = self._constrained(metadata, logits, md)
        decided = None
        if plan.proxied is not None:
            decided = sample_proxied_rows(
                step, constrained, temperature_applied=False, drafts=drafts
            )
        size = metadata.max_spec_len + 1
        emitted = rows.emitted(plan.new_tokens(decided).int(), drafts, size)
        if plan.unproxied_rows:
            requests = rows.requests_of(plan.unproxied_rows)
            index = to_device(requests, torch.int64, logits.device)
            emitted[index] = self._verify(metadata, draft_probs, constrained, md, requests, index)
        sampled = emitted[rows.requests, rows.offsets]
        score_shadows(step, constrained, sampled.long(), temperature_applied=False)
        logprobs = None
        if md.max_num_logprobs is not None:
            reported = logits
            if self.is_processed_logprobs_mode:
                reported = self._processed(step, constrained, md)
            logprobs = self._get_logprobs_tensors(
                md.max_num_logprobs,
                metadata,
                reported,
                reported[metadata.target_logits_indices],
                reported[metadata.bonus_logits_indices],
                emitted,
            )
        return SamplerOutput(emitted, logprobs)

    def _constrained(
        self, metadata: SpecDecodeMetadata, logits: Tensor, md: SamplingMetadata
    ) -> Tensor:
        """[R, V] float32: vLLM's constraints and penalties, of each row with the drafts before it."""
        result = torch.empty_like(logits, dtype=torch.float32)
        drafted, last = metadata.target_logits_indices, metadata.bonus_logits_indices
        result[last] = self.sampler.apply_logits_processors(
            logits[last].float(), md, predict_bonus_token=True
        )
        result[drafted] = self.apply_logits_processors(logits[drafted].float(), md, metadata)
        return result

    def _verify(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,  # [R - B, V]
        constrained: Tensor,  # [R, V]
        md: SamplingMetadata,
        requests: list[int],  # P, into the batch
        index: Tensor,  # the same on the device
    ) -> Tensor:
        """vLLM's own last stages, for the requests without a proxy: tokens [P, S], -1 = none."""
        device, ends = constrained.device, [*accumulate(metadata.num_draft_tokens)]
        counts = [metadata.num_draft_tokens[i] for i in requests]
        drafts = [
            draft
            for i, count in zip(requests, counts, strict=True)
            for draft in range(ends[i] - count, ends[i])
        ]
        draft_index = to_device(drafts, torch.int64, device)
        ends_of_drafts = to_device([*accumulate(counts)], torch.int32, device)

        def of_requests(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        own = replace(
            md,
            temperature=of_requests(md.temperature),
            top_k=of_requests(md.top_k),
            top_p=of_requests(md.top_p),
            generators={i: md.generators[r] for i, r in enumerate(requests) if r in md.generators},
            max_num_logprobs=None,
            logprob_token_ids=None,
        )
        last_rows = constrained[metadata.bonus_logits_indices[index]]
        last, _ = Sampler.sample(self.sampler, last_rows, own)  # [P]
        if not drafts:
            output = last.new_full((len(requests), metadata.max_spec_len + 1), -1)
            output[:, 0] = last
            return output.int()
        draft_rows = constrained[metadata.target_logits_indices[draft_index]]
        return rejection_sample(
            metadata.draft_token_ids[draft_index],
            counts,
            metadata.max_spec_len,
            ends_of_drafts,
            None if draft_probs is None else draft_probs[draft_index],
            apply_sampling_constraints(draft_rows, ends_of_drafts, own),
            last.unsqueeze(-1),
            own,
            use_fp64_gumbel=self.use_fp64_gumbel,
        )

    def _processed(self, step: Step, constrained: Tensor, md: SamplingMetadata) -> Tensor:
        """As `ProxySampler`, what vLLM reports in its processed_* modes: [R, V] logits."""
        if md.all_greedy:
            return constrained
        logits, divisors, rows = constrained.clone(), step.plan.divisors, step.draft_rows
        assert rows is not None
        if divisors is not None:
            logits /= divisors.unsqueeze(-1)
        top_k = None if md.top_k is None else md.top_k[rows.requests]
        top_p = None if md.top_p is None else md.top_p[rows.requests]
        return apply_top_k_top_p(logits, top_k, top_p)

    def _label_logprobs(
        self,
        metadata: SpecDecodeMetadata,
        logits: Tensor,  # [R, V]
        labels: dict[int, list[int]],  # by request, into the batch
        emitted: Tensor,  # [B, S]
    ) -> LogprobsTensors | None:
        """The logprobs of `logprob_token_ids`, which vLLM's rejection sampler does not report: [B * S] rows.

        A judge reads them, of requests that draw one token.
        """
        ends, size = metadata.bonus_logits_indices + 1, emitted.shape[1]
        counts = to_device(metadata.num_draft_tokens, torch.int64, logits.device) + 1
        offsets = torch.arange(size, device=logits.device)
        rows = torch.minimum((ends - counts).unsqueeze(-1) + offsets, ends.unsqueeze(-1) - 1)
        reported = logits[rows.flatten()]
        if not self.is_logits_logprobs_mode:
            reported = self.sampler.compute_logprobs(reported)
        return self.sampler.gather_specific_token_logprobs(
            reported.float(),
            {i * size + offset: ids for i, ids in labels.items() for offset in range(size)},
            emitted.flatten().clamp(min=0).long(),
        )
