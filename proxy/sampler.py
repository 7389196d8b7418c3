"""vLLM's sampler (V1 model runner) with the accept/reject law in the place of its draw.

Where it runs: `Sampler.forward` has taken raw logprobs and applied every constraint and penalty
(grammar, allowed ids, bad words, min_tokens, logit_bias, penalties) when it calls `sample`. Here:

    temperature -> min-p -> rows with a proxy:  the law (`proxy.hook.align`)
                         -> rows without:       vLLM's own top-k, top-p and draw

Rows without a proxy get, bit for bit, what vLLM would draw from their generators; a batch without
any goes to vLLM's own `sample` untouched. A greedy row that has a proxy is decided by the law as
well, without dice: proposals by probability, accepted where a^strength >= 1/2. vLLM switches top-k,
top-p and min-p off for greedy requests, so its nucleus is the K most probable tokens.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config.model import LogprobsMode
from vllm.v1.sample.logits_processor import MinPLogitsProcessor
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
        if not (plan.plain_rows or plan.shadowed is not None or wants_processed) and not (
            self._uses_processors(plan, md)
        ):
            # The law takes the temperature on K candidates; nothing else of size V is needed.
            return align(step, logits, md.top_k, md.top_p, tempered=False), processed

        # vLLM takes the argmax before it applies the temperature; so must the plain rows.
        greedy_sampled = None
        if plan.plain_rows and not md.all_random:
            greedy_sampled = self.greedy_sample(logits[plan.plain_index])
        if md.temperature is not None:
            logits = self.apply_temperature(logits, md.temperature, md.all_random)
        for processor in md.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        if wants_processed and not md.all_greedy:
            processed = self._processed(logits, md, mode)

        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        if plan.aligned is not None:
            aligned = align(step, logits, md.top_k, md.top_p, tempered=True)
            sampled[... if plan.aligned.index is None else plan.aligned.index] = aligned
        if plan.plain_rows:
            drawn = self._draw_plain(logits[plan.plain_index], md, plan, greedy_sampled)
            sampled[plan.plain_index] = drawn
        score_shadows(step, logits, md.top_k, md.top_p, sampled)
        return sampled, processed

    def _uses_processors(self, plan: Plan, md: SamplingMetadata) -> bool:
        """Whether something between temperature and top-k has work to do: min-p, or a plug-in."""
        return plan.needs_processors or any(
            type(processor) is not MinPLogitsProcessor
            for processor in md.logitsprocs.argmax_invariant
        )

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

    def _processed(self, logits: Tensor, md: SamplingMetadata, mode: LogprobsMode) -> Tensor:
        """What vLLM returns in its processed_* modes, of all rows alike: before the proxy."""
        logits = logits.clone()
        if not md.all_greedy:
            logits = apply_top_k_top_p(logits, md.top_k, md.top_p)
        return logits if mode == "processed_logits" else self.compute_logprobs(logits)


def read_batch(runner: Any) -> Batch:
    """The requests that this model runner is about to sample."""
    requests = runner.requests
    return Batch(
        req_ids=runner.input_batch.req_ids,
        params_of=lambda req_id: requests[req_id].sampling_params,
        live=requests.keys(),
    )


def read_rows(runner: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Its hidden states, positions and discarded rows, as `Step` has them."""
    count = len(runner.input_batch.req_ids)
    mask = runner.discard_request_mask
    some = 1 in mask.np[:count].tobytes()  # `any` takes ten times as long, at every step
    return (
        runner.execute_model_state.sample_hidden_states,
        runner.seq_lens[:count],
        mask.gpu[:count].clone() if some else None,
    )
