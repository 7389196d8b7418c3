"""vLLM's sampler (V1 model runner) with the accept/reject law in the place of its draw.

Where it runs: `Sampler.forward` has taken raw logprobs and applied every constraint and penalty
(grammar, allowed ids, bad words, min_tokens, logit_bias, penalties) when it calls `sample`. Here:

    temperature -> min-p -> rows with a proxy:  nucleus -> accept logits -> decide
                         -> rows without:       vLLM's own top-k, top-p and draw

Rows without a proxy get, bit for bit, what vLLM would draw from their generators; a batch without
any goes to vLLM's own `sample` untouched. A greedy row that has a proxy is decided by the law as
well, without dice: proposals by probability, accepted where a^strength >= 1/2. vLLM switches top-k,
top-p and min-p off for greedy requests, so its nucleus is the K most probable tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.config.model import LogprobsMode
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from proxy.acceptance import decide, draw_noise, nucleus
from proxy.ledger import Group, Ledger, Plan

_GREEDY_TEMPERATURE = 1e-5  # vLLM takes anything below for greedy


class Step(NamedTuple):
    """What the worker knows about the step under way and vLLM's sampler is not told."""

    plan: Plan
    hidden: Tensor  # [R, H], the lm_head's input, row by row that of the logits
    discarded: Tensor  # [R] bool, rows of unfinished prefills: their tokens are thrown away
    ledger: Ledger


class ProxySampler(Sampler):
    """The worker turns vLLM's sampler into this class after the model has loaded.

    `step` is set for the duration of one sampling step and only if some row has a proxy. Profile
    and warm-up runs leave it None.
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
        mode = logprobs_mode_override or self.logprobs_mode
        plan = step.plan
        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)

        processed = self._processed(logits, md, mode) if md.all_greedy else None
        # vLLM takes the argmax before it applies the temperature; so must the plain rows.
        plain_greedy = None
        if plan.plain_rows and not md.all_random:
            plain_greedy = self.greedy_sample(logits[plan.plain_index])
        if md.temperature is not None:
            logits = self.apply_temperature(logits, md.temperature, md.all_random)
        for processor in md.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        if not md.all_greedy:
            processed = self._processed(logits, md, mode)

        for group in plan.groups:
            sampled[group.row_index] = self._align(logits, md, group, step)
        if plan.plain_rows:
            sampled[plan.plain_index] = self._draw_plain(logits, md, plan, plain_greedy)
        return sampled, processed

    def _align(self, logits: Tensor, md: SamplingMetadata, group: Group, step: Step) -> Tensor:
        """The law, for the G rows of one proxy: token ids [G]."""

        def rows_of(x: Tensor) -> Tensor:  # saves a copy of the logits where all rows are ours
            return x if len(group.rows) == len(logits) else x[group.row_index]

        network = group.proxy.network
        candidates = nucleus(
            rows_of(logits),
            network.config.max_candidates,
            None if md.top_k is None else rows_of(md.top_k),
            None if md.top_p is None else rows_of(md.top_p),
        )
        accept_logits = network(
            rows_of(step.hidden), group.proxy.table[candidates.token_ids], candidates.logprobs
        )
        num_rows, num_candidates = candidates.token_ids.shape
        if md.temperature is None:  # every row of the batch is greedy
            greedy = torch.ones(num_rows, dtype=torch.bool, device=logits.device)
        else:
            greedy = rows_of(md.temperature) < _GREEDY_TEMPERATURE
        decision = decide(
            candidates,
            accept_logits,
            draw_noise(num_rows, num_candidates, logits.device, _reindexed(md, group.rows)),
            strength=group.strength,
            max_rejections=group.max_rejections,
            greedy=greedy,
        )
        step.ledger.record(group, decision, step.discarded)
        return decision.token_ids

    def _draw_plain(
        self, logits: Tensor, md: SamplingMetadata, plan: Plan, greedy_sampled: Tensor | None
    ) -> Tensor:
        """vLLM's own last stages, for the P rows without a proxy: token ids [P]."""
        if md.temperature is None:
            assert greedy_sampled is not None
            return greedy_sampled
        index = plan.plain_index
        drawn, _ = self.topk_topp_sampler(
            logits[index],
            _reindexed(md, plan.plain_rows),
            None if md.top_k is None else md.top_k[index],
            None if md.top_p is None else md.top_p[index],
        )
        if greedy_sampled is not None:
            is_greedy = md.temperature[index] < _GREEDY_TEMPERATURE
            drawn = torch.where(is_greedy, greedy_sampled, drawn)
        return drawn.long()

    def _processed(self, logits: Tensor, md: SamplingMetadata, mode: LogprobsMode) -> Tensor | None:
        """What vLLM returns in its processed_* modes, of all rows alike: before the proxy."""
        wanted = md.max_num_logprobs is not None or md.logprob_token_ids
        if not wanted or mode not in ("processed_logits", "processed_logprobs"):
            return None
        logits = logits.clone()
        if not md.all_greedy:
            logits = apply_top_k_top_p(logits, md.top_k, md.top_p)
        return logits if mode == "processed_logits" else self.compute_logprobs(logits)


def _reindexed(md: SamplingMetadata, rows: list[int]) -> dict[int, torch.Generator]:
    """The seeded rows' generators, by position within `rows`."""
    if not md.generators:
        return {}
    return {i: md.generators[row] for i, row in enumerate(rows) if row in md.generators}
