"""The judge by the hosted LLM's scores. A likelihood ratio's are β · log(π / π_base), π the LLM with a LoRA or a proxy.

The LoRA is trained on the pairs with the Bradley–Terry (DPO) loss (Rafailov et al., arXiv 2305.18290). The judge reads
each response alone (`scoring`). `proxy.likelihood` computes the ratio of a proxy. A probe's scores (`proxy.probe`) are
fitted with the same loss.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Literal

from judge.prompts import ChatTokenizer
from judge.scoring import Answer, Reading, ScoringJudge

ReadScores = Callable[[list[Reading]], Awaitable[list[float]]]
"""Readings -> log π(response | prompt) - log π_base(response | prompt) of each, in nats; or a probe's score."""


class LikelihoodJudge(ScoringJudge):
    """Scores by the engine's own LLM.

    Args:
        tokenizer: the LLM's
        read_scores: asks the engine
        beta: the β that π was trained with; 1 for a probe
        kind: whose score it is
        readings: how often the engine reads a response
        max_tokens, tie_band, end_ids: as of ScoringJudge
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        read_scores: ReadScores,
        *,
        beta: float,
        max_tokens: int,
        tie_band: float = 0.0,
        kind: Literal["likelihood", "proxy", "probe"] = "likelihood",
        readings: int = 2,
        end_ids: Collection[int] = (),
    ) -> None:
        super().__init__(
            tokenizer,
            kind=kind,
            beta=beta,
            max_tokens=max_tokens,
            tie_band=tie_band,
            end_ids=end_ids,
        )
        self.read_scores, self.readings = read_scores, readings

    async def read(self, answers: Sequence[Answer]) -> list[float]:
        """As of ScoringJudge."""
        readings = [answer.reading for answer in answers]
        scores = await self.read_scores(readings)
        for reading in readings:
            self.usage.prompt_tokens += self.readings * (
                len(reading.prompt) + len(reading.response)
            )
            self.usage.completion_tokens += self.readings
        return scores
