"""A correction of vLLM's LoRA on a CPU: rows without an adapter get the frozen LLM.

vLLM's CPU operators look up a row's adapter by its index, and the index -1, which means "none", finds
the last adapter: in a batch with an adapter, requests for the frozen LLM get its output (vLLM's pull
requests 48421 and 49656). Here the adapter's contribution to such rows is set to zero.
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class FrozenRowsPunica(PunicaWrapperCPU):
    """Every product with an adapter's second matrix goes through one of these three methods."""

    def _expand_prefill(self, y: Tensor, x: Tensor, *args: Any) -> None:
        super()._expand_prefill(y, self._adapted(x), *args)

    def _expand_slice_prefill(self, y: Tensor, x: Tensor, *args: Any) -> None:
        super()._expand_slice_prefill(y, self._adapted(x), *args)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if len(y) != len(self.sampler_indices):
            # Prompt logprobs, for a judge that reads them: vLLM does not say whose rows these are, but a
            # judge's adapter leaves lm_head unchanged. The server refuses them to other requests.
            return
        frozen = (self.sampler_indices < 0).nonzero().squeeze(-1)
        kept = y[frozen]
        super().add_lora_logits(y, x, *args, **kwargs)
        y[frozen] = kept

    def _adapted(self, x: Tensor) -> Tensor:
        """x [T, r], zero for tokens without an adapter."""
        return x.masked_fill((self.token_lora_indices < 0).unsqueeze(-1), 0)


def keep_adapters_off_frozen_rows(runner: Any) -> None:
    """Correct a runner whose model is loaded with LoRA."""
    manager = runner.lora_manager._adapter_manager
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.__class__ = FrozenRowsPunica
