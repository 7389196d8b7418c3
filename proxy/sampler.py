"""vLLM's sampler (V1 model runner) with the accept/reject law in the place of its draw.

Where it runs: `Sampler.forward` has taken raw logprobs and applied every constraint and penalty
(grammar, allowed ids, bad words, min_tokens, logit_bias, penalties) when it calls `sample`. Here:

    temperature -> min-p -> rows with a proxy:  the law (`proxy.hook.align`)
                         -> rows without:       vLLM's own top-k, top-p and draw

Rows without a proxy get, bit for bit, what vLLM would draw from their generators; a batch without
any goes to vLLM's own `sample` untouched. Rows with a proxy are divided by the temperature that it
was trained at, and so min-p, and plug-ins after the temperature, see them; what the request's own
temperature does is in `proxy.acceptance`. A greedy row that has a proxy is decided by the law as
well, without dice. vLLM switches top-k, top-p and min-p off for greedy requests: the nucleus of
such a row is that of the proxy's training.
"""

import math
from typing import Any

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

from proxy.hook import Step, align, score_shadows
from proxy.ledger import Batch
from proxy.plan import Plan
from proxy.rows import GREEDY_TEMPERATURE


class ProxySampler(Sampler):
    """The worker turns vLLM's sampler into this class after the model has loaded.

    `step` is set for the duration of one sampling step and only if a proxy has something to do.
    Profile and warm-up runs leave it None.
    """

    step: Step | None = None
    _settled: tuple[list[str], SamplingMetadata, bool] | None = None
    """A plan's `req_ids`, the batch's metadata, and whether `_is_all_law` holds for these two objects."""

    def forward(
        self,
        logits: Tensor,  # [R, V], may be changed in place
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> SamplerOutput:
        """vLLM's stages; where they have nothing to do, the law reads the logits as they are.

        It wants K of a row: float32 logits, divided by the temperature, would be made in vain.
        """
        step, md = self.step, sampling_metadata
        is_all_law = False
        if step is not None:
            plan, settled = step.plan, self._settled
            if settled is None or settled[0] is not plan.req_ids or settled[1] is not md:
                settled = self._settled = plan.req_ids, md, _is_all_law(plan, md)
            is_all_law = settled[2] and logits.shape[0] == len(plan.req_ids)
        if step is None or not is_all_law:
            return super().forward(logits, md, predict_bonus_token, logprobs_mode_override)
        token_ids = align(step, logits, tempered=False)
        return SamplerOutput(token_ids.to(torch.int32).unsqueeze(-1), logprobs_tensors=None)

    def sample(
        self,
        logits: Tensor,  # [R, V] float32, may be changed in place
        sampling_metadata: SamplingMetadata,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [R] int64, and processed logprobs [R, V] if logprobs of that mode are wanted."""
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
        # vLLM takes the argmax before it applies the temperature; so must the plain rows.
        greedy_sampled = None
        if plan.plain_rows and not md.all_random:
            greedy_sampled = self.greedy_sample(logits[plan.plain_index])
        if plan.divisors is not None:
            logits = self.apply_temperature(logits, plan.divisors, all_random=True)
        for processor in md.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        if wants_processed and not md.all_greedy:
            processed = self._processed(logits, md, mode)

        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        if plan.aligned is not None:
            aligned = align(step, logits, tempered=True)
            sampled[... if plan.aligned.index is None else plan.aligned.index] = aligned
        if plan.plain_rows:
            drawn = self._draw_plain(logits[plan.plain_index], md, plan, greedy_sampled)
            sampled[plan.plain_index] = drawn
        score_shadows(step, logits, sampled, tempered=True)
        return sampled, processed

    def _draw_plain(
        self,
        logits: Tensor,  # [P, V]
        md: SamplingMetadata,
        plan: Plan,
        greedy_sampled: Tensor | None,  # [P]
    ) -> Tensor:
        """vLLM's own last stages, for the P rows without a proxy: token ids [P]."""
        if md.temperature is None:  # every row of the batch is greedy
            assert greedy_sampled is not None
            return greedy_sampled
        index = plan.plain_index
        drawn, _ = self.topk_topp_sampler(
            logits,
            {i: md.generators[row] for i, row in enumerate(plan.plain_rows) if row in md.generators}
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
        """vLLM's, [R, V]; where no token is allowed -inf in the place of NaN, which no JSON can hold."""
        return Sampler.compute_logprobs(logits).nan_to_num_(nan=-math.inf, neginf=-math.inf)

    def _processed(self, logits: Tensor, md: SamplingMetadata, mode: LogprobsMode) -> Tensor:
        """What vLLM returns in its processed_* modes: before the proxy, at the nucleus' temperature."""
        logits = logits.clone()
        if not md.all_greedy:
            logits = apply_top_k_top_p(logits, md.top_k, md.top_p)
        return logits if mode == "processed_logits" else self.compute_logprobs(logits)


_WORK_OF: dict[type, str] = {
    MinTokensLogitsProcessor: "min_toks",
    LogitBiasLogitsProcessor: "biases",
    MinPLogitsProcessor: "min_p_count",
}
"""Where vLLM's own processors say what they have to do; a plug-in's is taken to have something."""


def _is_all_law(plan: Plan, md: SamplingMetadata) -> bool:
    """Whether proxies decide all rows, and nothing but the head has a say in what they choose from.

    What vLLM's stages have to do can only grow when the batch changes.
    """
    holder = md.thinking_budget_state_holder
    return (
        not plan.plain_rows
        and not plan.shadows
        and md.max_num_logprobs is None
        and not md.logprob_token_ids
        and md.no_penalties
        and md.allowed_token_ids_mask is None
        and not md.bad_words_token_ids
        and (holder is None or not holder.has_tracked_requests())
        and not any(getattr(p, _WORK_OF.get(type(p), "apply")) for p in md.logitsprocs.all)
    )


def read_ids(runner: Any) -> list[str]:
    """The ids of the requests that this model runner is about to sample, row by row."""
    return runner.input_batch.req_ids


def read_batch(runner: Any) -> Batch:
    """The same requests, and all that is known of them."""
    requests = runner.requests
    return Batch(
        req_ids=read_ids(runner),
        params_of=lambda req_id: requests[req_id].sampling_params,
        live=requests.keys(),
    )


def read_scheduled(runner: Any) -> tuple[list[str], list[int], Tensor]:
    """The requests of the step, how many tokens of each were computed, and all their hidden states."""
    state, req_ids = runner.execute_model_state, read_ids(runner)
    scheduled = state.scheduler_output.num_scheduled_tokens
    return req_ids, [scheduled[req_id] for req_id in req_ids], state.hidden_states


def read_rows(runner: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Its hidden states, positions and discarded rows, as `Step` has them."""
    count = len(runner.input_batch.req_ids)
    mask = runner.discard_request_mask
    some = mask.np.tobytes().find(1, 0, count) >= 0  # `any` takes ten times as long, at every step
    return (
        runner.execute_model_state.sample_hidden_states,
        runner.seq_lens,
        mask.gpu[:count].clone() if some else None,
    )
