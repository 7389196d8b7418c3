"""vLLM's LoRA on a CPU, mended: rows without an adapter get the frozen LLM, beside others too.

vLLM's CPU operators look up a row's adapter by its index, and -1, which says "none", finds the last
one: in a batch with an adapter, requests for the frozen LLM are answered by it (vLLM's pull requests
48421 and 49656). Here what such rows would add to an output is set to zero.
"""

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class FrozenRowsPunica(PunicaWrapperCPU):
    """All of its products with an adapter's second matrix pass one of the three methods."""

    def _expand_prefill(self, y: Tensor, x: Tensor, *args: Any) -> None:
        super()._expand_prefill(y, self._adapted(x), *args)

    def _expand_slice_prefill(self, y: Tensor, x: Tensor, *args: Any) -> None:
        super()._expand_slice_prefill(y, self._adapted(x), *args)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if len(y) != len(self.sampler_indices):
            # Logits of a prompt, for a judge that reads its log-probabilities: nobody says whose they are, but a
            # judge's adapter leaves lm_head alone. Other requests are refused them (server.plugin).
            return
        frozen = (self.sampler_indices < 0).nonzero().squeeze(-1)
        kept = y[frozen]
        super().add_lora_logits(y, x, *args, **kwargs)
        y[frozen] = kept

    def _adapted(self, x: Tensor) -> Tensor:
        """x [T, r], zero for tokens without an adapter."""
        return x.masked_fill((self.token_lora_indices < 0).unsqueeze(-1), 0)


def keep_adapters_off_frozen_rows(runner: Any) -> None:
    """Call it after the model has been loaded with LoRA."""
    manager = runner.lora_manager._adapter_manager
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.__class__ = FrozenRowsPunica
