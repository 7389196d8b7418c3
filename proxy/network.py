"""The proxy network: hidden state and candidates in, one accept logit per candidate out.

The paper's input is the LLM's hidden state *after* the candidate, which costs one LLM forward pass
per candidate. Here the input is the state *before* it, h, with the candidate's own frozen embedding
e(y). Together they determine everything the LLM knows about "prefix + y", and all K candidates of a
position are scored at once. `acceptance` turns the scores into a token.

    u = W_h rms(h)      c = W_e rms(e(y))      x = [u + c, u * c, log p(y) / 5]
    accept logit = w · gelu(W x + b) + accept_bias

With W = [A B l] the product splits into A u, A c + b, B (u * c) and l log p(y) / 5. The first depends
on the position alone. c and A c + b depend on the token alone, so `candidate_table` computes them once
for the whole vocabulary. `state_features` and `accept_logits` do the rest, for one proxy or for
several stacked ones; the trainer and the server both call them.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

# Log-probabilities are a feature, clamped from below.
MIN_LOGPROB = -20.0
_LOGPROB_SCALE = 5.0
MAX_CANDIDATES = 4096  # per position, so rejections too
NORM_FLOOR = 1e-6  # for a state of zeros


class ProxyConfig(BaseModel):
    """Sizes of the network, and the sampling settings that it was trained with.

    A checkpoint may come from somebody else: the bounds keep its numbers from exhausting memory or overflowing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    hidden_size: int = Field(gt=0, le=2**17)  # H of the LLM
    vocab_size: int = Field(gt=0, le=2**22)  # V of the LLM
    width: int = Field(64, ge=2, le=4096)  # of the proxy's layers
    max_candidates: int = Field(16, gt=0, le=MAX_CANDIDATES)  # K
    max_rejections: int = Field(8, ge=0, le=MAX_CANDIDATES)  # default; a request may set another
    use_logprob: bool = True  # whether the candidate's log-probability is a feature
    accept_bias: float = Field(2.0, ge=-1e6, le=1e6)  # accept logit at the start: 2 = 88 %
    # Decoding in training. The nucleus always has this temperature, T0, and is never wider than this
    # top-k and top-p, which greedy requests use too.
    temperature: float = Field(1.0, ge=0.01, le=100)
    top_k: int = Field(0, ge=0, lt=2**31)  # 0 = no limit but max_candidates
    top_p: float = Field(1.0, gt=0, le=1)


class Weights(NamedTuple):
    """All weights but the candidate table, of P proxies of width W: float32."""

    state: Tensor  # [P, H, 2W], gives u and A u
    product: Tensor  # [P, W, W], B
    logprob: Tensor  # [P, 1, W], l / 5
    score: Tensor  # [P, W, 1], w
    bias: Tensor  # [P, 1, 1]


def state_features(weights: Weights, hidden: Tensor) -> Tensor:
    """u and A u of every position: [P, R, H], the lm_head's input -> [P, R, 2W]."""
    hidden = hidden.float()
    # The norm is divided out after the product: the same result with H / 2W times fewer divisions.
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).add_(NORM_FLOOR)
    return torch.bmm(hidden, weights.state).div(norm)


def accept_logits(
    weights: Weights,
    features: Tensor,  # [P, R, 2W] from `state_features`
    candidates: Tensor,  # [P, R, K, 2W], rows of the proxies' candidate tables
    logprobs: Tensor,  # [P, R, K], natural log, renormalised over the nucleus; may be -inf
) -> Tensor:
    """Accept logits [P, R, K], each proxy on its own R positions; their sigmoid is the probability."""
    u, from_state = features.unsqueeze(2).chunk(2, -1)
    c, from_candidate = candidates.chunk(2, -1)
    mixed = torch.addcmul(
        from_candidate + from_state,
        logprobs.clamp(min=MIN_LOGPROB).unsqueeze(-1),
        weights.logprob.unsqueeze(1),
    )
    mixed = torch.baddbmm(mixed.flatten(1, 2), (u * c).flatten(1, 2), weights.product)
    return torch.baddbmm(weights.bias, F.gelu(mixed), weights.score).view_as(logprobs)


def score_single(
    weights: Weights,  # P = 1
    hidden: Tensor,  # [R, H]
    candidates: Tensor,  # [R, K, 2W]
    logprobs: Tensor,  # [R, K]
) -> Tensor:
    """Accept logits of a single proxy: [R, K]."""
    features = state_features(weights, hidden.unsqueeze(0))
    inputs = (candidates.unsqueeze(0), logprobs.unsqueeze(0))
    return accept_logits(weights, features, *inputs).squeeze(0)


class ProxyNetwork(nn.Module):
    """Accept logits for candidates, and the value of a state (used in training only).

    Computes in float32, whatever the input dtype.
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
        # Training starts near "accept all candidates with the same probability", close to the frozen LLM.
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, config.accept_bias)
        nn.init.zeros_(self.value_score.weight)
        nn.init.zeros_(self.value_score.bias)

    def candidate_table(self, embeddings: Tensor) -> Tensor:
        """Frozen embedding rows [V, H] -> c and A c + b, [V, 2 width]; works on any part of V."""
        c = self.candidate_half(_rms_normalise(embeddings))
        return torch.cat((c, F.linear(c, self._parts()[0], self.mix.bias)), dim=-1)

    def weights(self) -> Weights:
        """All weights but the table, with P = 1."""
        of_sum, of_product, of_logprob = self._parts()
        state = self.state_half.weight
        both = torch.cat((state, of_sum @ state)).T * math.sqrt(self.config.hidden_size)
        return Weights(
            state=both.unsqueeze(0),
            product=of_product.T.unsqueeze(0),
            logprob=of_logprob.T.unsqueeze(0) / _LOGPROB_SCALE,
            score=self.score.weight.T.unsqueeze(0),
            bias=self.score.bias.view(1, 1, 1),
        )

    def forward(self, hidden: Tensor, candidates: Tensor, logprobs: Tensor) -> Tensor:
        """[R, H], rows of the candidate table [R, K, 2 width], logprobs [R, K] -> [R, K]."""
        return score_single(self.weights(), hidden, candidates, logprobs)

    def value(self, hidden: Tensor) -> Tensor:
        """Expected return from states [R, H] -> [R], by a separate head."""
        features = F.gelu(self.value_hidden(_rms_normalise(hidden)))
        return self.value_score(features).squeeze(-1)

    def num_parameters(self) -> int:
        """Number of trained parameters, the value head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and l, the columns of the mixing layer; l is 0 if it is not a feature."""
        width = self.config.width
        weight = self.mix.weight
        if not self.config.use_logprob:
            weight = torch.cat((weight, weight.new_zeros(width, 1)), dim=-1)
        of_sum, of_product, of_logprob = weight.split((width, width, 1), dim=-1)
        return of_sum, of_product, of_logprob


def _rms_normalise(x: Tensor) -> Tensor:
    """Rows scaled to root mean square 1, in float32: the scale differs between LLMs by orders of magnitude."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
