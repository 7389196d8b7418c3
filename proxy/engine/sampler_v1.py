"""vLLM's sampler (V1 model runner) with accept/reject sampling in the place of its draw.

Where it runs: `Sampler.forward` has taken raw logprobs and applied every constraint and penalty
(grammar, allowed ids, bad words, min_tokens, logit_bias, penalties) when it calls `sample`. Here:

    temperature -> min-p -> rows with a proxy:     `proxy.engine.hook.sample_proxied_rows`
                         -> rows without a proxy:  vLLM's own top-k, top-p and draw

Rows without a proxy get, bit for bit, the token that vLLM draws from their generators. A batch
without proxies goes to vLLM's own `sample` unchanged. Rows with a proxy are divided by the
temperature of the proxy's training, and min-p and logits processors after the temperature see them
so; `proxy.acceptance` says what the request's own temperature does. A greedy row with a proxy is
decided by the proxy too, without noise. vLLM switches top-k, top-p and min-p off for greedy
requests: such a row has the nucleus of the proxy's training.
"""

import math

import torch
from torch import Tensor
from vllm.config.model import LogprobsMode
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from proxy.engine.assignment import GREEDY_TEMPERATURE
from proxy.engine.batch_plan import BatchPlan
from proxy.engine.hook import Step, sample_proxied_rows, score_shadows


class ProxySampler(Sampler):
    """The worker turns vLLM's sampler into this class after the model has loaded.

    `step` is set during one sampling step, if a proxy decides or scores any row of it. Profiling and
    warm-up runs leave it None.
    """

    step: Step | None = None
    _checked: tuple[list[str], SamplingMetadata, bool] | None = None
    """The last plan's `req_ids`, its batch's metadata, and the result of `only_proxies_decide` for them."""

    def forward(
        self,
        logits: Tensor,  # [R, V], may be changed in place
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> SamplerOutput:
        """vLLM's stages; where they have nothing to do, the proxies read the logits as they are.

        Of a row they need K logits: converting all to float32 and dividing by the temperature would
        be wasted.
        """
        step, md = self.step, sampling_metadata
        skips_stages = False
        if step is not None:
            plan, checked = step.plan, self._checked
            if checked is None or checked[0] is not plan.req_ids or checked[1] is not md:
                checked = self._checked = plan.req_ids, md, only_proxies_decide(plan, md)
            skips_stages = checked[2] and logits.shape[0] == len(plan.req_ids)
        if step is None or not skips_stages:
            return super().forward(logits, md, predict_bonus_token, logprobs_mode_override)
        token_ids = sample_proxied_rows(step, logits, temperature_applied=False)
        return SamplerOutput(token_ids.to(torch.int32).unsqueeze(-1), logprobs_tensors=None)

    def sample(
        self,
        logits: Tensor,  # [R, V] float32, may be changed in place
        sampling_metadata: SamplingMetadata,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [R] int64, and processed logprobs [R, V] if a request asks for logprobs in that mode."""
        step, md = self.step, sampling_metadata
        if step is None or len(logits) != len(step.plan.req_ids):
            return super().sample(logits, md, logprobs_mode_override)
        plan = step.plan
        mode = logprobs_mode_override or self.logprobs_mode
        wants_processed = mode in ("processed_logits", "processed_logprobs") and (
            md.max_num_logprobs is not None or bool(md.logprob_token_ids)
        )
        processed = None
        if wants_processed and md.all_greedy:
            processed = self._processed(logits, md, mode)
        # vLLM takes the argmax before it applies the temperature: so do the rows without a proxy.
        greedy_sampled = None
        if plan.unproxied_rows and not md.all_random:
            greedy_sampled = self.greedy_sample(logits[plan.unproxied_index])
        if plan.divisors is not None:
            logits = self.apply_temperature(logits, plan.divisors, all_random=True)
        for processor in md.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        if wants_processed and not md.all_greedy:
            processed = self._processed(logits, md, mode)

        decided = None
        if plan.proxied is not None:
            decided = sample_proxied_rows(step, logits, temperature_applied=True)
        sampled = plan.new_tokens(decided)
        if plan.unproxied_rows:
            drawn = self._draw_unproxied(logits[plan.unproxied_index], md, plan, greedy_sampled)
            sampled[plan.unproxied_index] = drawn
        score_shadows(step, logits, sampled, temperature_applied=True)
        return sampled, processed

    def _draw_unproxied(
        self,
        logits: Tensor,  # [P, V]
        md: SamplingMetadata,
        plan: BatchPlan,
        greedy_sampled: Tensor | None,  # [P]
    ) -> Tensor:
        """vLLM's own last stages, for the P rows without a proxy: token ids [P]."""
        if md.temperature is None:  # every row of the batch is greedy
            assert greedy_sampled is not None
            return greedy_sampled
        index = plan.unproxied_index
        drawn, _ = self.topk_topp_sampler(
            logits,
            {
                i: md.generators[row]
                for i, row in enumerate(plan.unproxied_rows)
                if row in md.generators
            }
            if md.generators
            else {},
            None if md.top_k is None else md.top_k[index],
            None if md.top_p is None else md.top_p[index],
        )
        if greedy_sampled is not None:
            is_greedy = md.temperature[index] < GREEDY_TEMPERATURE
            drawn = torch.where(is_greedy, greedy_sampled, drawn)
        return drawn.long()

    @staticmethod
    def compute_logprobs(logits: Tensor) -> Tensor:
        """vLLM's, [R, V]; with -inf in the place of NaN, which JSON cannot hold, where no token is allowed."""
        return Sampler.compute_logprobs(logits).nan_to_num_(nan=-math.inf, neginf=-math.inf)

    def _processed(self, logits: Tensor, md: SamplingMetadata, mode: LogprobsMode) -> Tensor:
        """What vLLM reports in its processed_* modes: without the proxy, at the nucleus' temperature."""
        logits = logits.clone()
        if not md.all_greedy:
            logits = apply_top_k_top_p(logits, md.top_k, md.top_p)
        return logits if mode == "processed_logits" else self.compute_logprobs(logits)


_WORK_OF: dict[type, str] = {
    MinTokensLogitsProcessor: "min_toks",
    LogitBiasLogitsProcessor: "biases",
    MinPLogitsProcessor: "min_p_count",
}
"""Attributes in which vLLM's own processors keep their work. A plug-in is assumed to have some."""


def only_proxies_decide(plan: BatchPlan, md: SamplingMetadata) -> bool:
    """Whether proxies decide all rows, and vLLM's stages have nothing to do for any of them.

    The result holds until the batch changes.
    """
    holder = md.thinking_budget_state_holder
    return (
        not plan.unproxied_rows
        and not plan.shadows
        and md.max_num_logprobs is None
        and not md.logprob_token_ids
        and md.no_penalties
        and md.allowed_token_ids_mask is None
        and not md.bad_words_token_ids
        and (holder is None or not holder.has_tracked_requests())
        and not any(getattr(p, _WORK_OF.get(type(p), "apply")) for p in md.logitsprocs.all)
    )
