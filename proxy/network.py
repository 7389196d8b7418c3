"""The proxy network: hidden state and candidates in, one accept logit per candidate out.

The paper feeds the LLM's hidden state *after* the candidate, which costs one LLM forward per
candidate. Here the state *before* it, h, meets the candidate's own frozen embedding e(y): together
they determine everything the LLM knows about "prefix + y", and all K candidates of a position are
scored at once (`acceptance` has the law that follows).

    u = W_h rms(h)      c = W_e rms(e(y))      x = [u + c, u * c, log p(y) / 5]
    accept logit = w · gelu(W x + b) + accept_bias

c depends on the token alone, so `candidate_table` computes it once for the whole vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

# Log-probabilities enter as a feature; below this one, less probable makes no difference.
_MIN_LOGPROB = -20.0
_LOGPROB_SCALE = 5.0


class ProxyConfig(BaseModel):
    """Sizes of the network, and the settings of the law that it was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    hidden_size: int = Field(gt=0)  # H of the LLM
    vocab_size: int = Field(gt=0)  # V of the LLM
    width: int = Field(64, ge=2)  # of the proxy's layers
    max_candidates: int = Field(16, gt=0)  # K
    max_rejections: int = Field(8, ge=0)  # a request may ask for another number
    use_logprob: bool = True  # whether the candidate's log-probability is a feature
    accept_bias: float = Field(2.0, allow_inf_nan=False)  # accept logit at the start: 2 = 88 %


class ProxyNetwork(nn.Module):
    """Accept logits for candidates, and the value of a state (used in training only).

    Computes in float32, whatever it is given.
    """

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.state_half = nn.Linear(config.hidden_size, width, bias=False)
        self.candidate_half = nn.Linear(config.hidden_size, width, bias=False)
        self.mix = nn.Linear(2 * width + config.use_logprob, width)
        self.score = nn.Linear(width, 1)
        self.value_hidden = nn.Linear(config.hidden_size, width // 2)
        self.value_score = nn.Linear(width // 2, 1)
        # Training starts near "accept every candidate alike": close to the frozen LLM.
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, config.accept_bias)
        nn.init.zeros_(self.value_score.weight)
        nn.init.zeros_(self.value_score.bias)

    def candidate_table(self, embeddings: Tensor) -> Tensor:
        """Frozen embedding rows [V, H] -> the candidate half [V, width]; any part of V will do."""
        return self.candidate_half(_rms_normalise(embeddings))

    def forward(
        self,
        hidden: Tensor,  # [R, H], the lm_head's input
        candidates: Tensor,  # [R, K, width], rows of the candidate table
        logprobs: Tensor,  # [R, K], natural log, renormalised over the nucleus; may be -inf
    ) -> Tensor:
        """Accept logits [R, K]; sigmoid gives the probability of acceptance."""
        state = self.state_half(_rms_normalise(hidden)).unsqueeze(-2)
        candidates = candidates.float()
        features = [state + candidates, state * candidates]
        if self.config.use_logprob:
            clamped = logprobs.float().clamp(_MIN_LOGPROB, 0.0) / _LOGPROB_SCALE
            features.append(clamped.unsqueeze(-1))
        return self.score(F.gelu(self.mix(torch.cat(features, dim=-1)))).squeeze(-1)

    def value(self, hidden: Tensor) -> Tensor:
        """Expected return from states [R, H] -> [R]; a head of its own."""
        features = F.gelu(self.value_hidden(_rms_normalise(hidden)))
        return self.value_score(features).squeeze(-1)

    def num_parameters(self) -> int:
        """How many parameters training changes, the value head included."""
        return sum(parameter.numel() for parameter in self.parameters())


def _rms_normalise(x: Tensor) -> Tensor:
    """Rows of root mean square 1, in float32: LLMs differ in scale by orders of magnitude."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
