"""A proxy or a judge on a transformers model in this process, without a server; for notebooks and small experiments.

The proxy decides by the same accept/reject sampling as in the server, the judge asks in both orders as `/judge` does.
One prompt at a time, without vLLM's speed. It needs Assent's extra `train`.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from assent.results import Candidate
from judge.messages import Message
from judge.principles import Principle, principles_of
from judge.prompts import Question
from judge.tournament import Pair, TournamentRecord, play
from judge.verdict import PairResult, Verdict
from proxy.checkpoint import identify, load
from proxy.hub import resolve_dir
from training.conversations import Conversations
from training.model_inputs import HeadInput, pad_left
from training.model_judge import ModelJudge
from training.models import context_of, end_ids, load_model, load_tokenizer
from training.policy import Decoding, Policy
from training.rewards import Frozen, ProxyReward, Sample
from training.rollout import generate

Prompt = str | Sequence[Mapping[str, Any]]
_BATCH = 16  # sequences at once in the device's memory


class AlignedModel:
    """A frozen LLM with a proxy.

    Args:
        path_or_hub_id: a proxy checkpoint: a directory, `org/repo` or `org/repo@revision`
        model: the LLM that it was trained for: loaded, or a directory or a hub id
        tokenizer: of a loaded model; None = the one that its directory or hub id has

    Raises:
        ProxyError: there is no such proxy, or it was trained for another LLM.
    """

    def __init__(
        self, path_or_hub_id: str | Path, model: PreTrainedModel | str, tokenizer: Any = None
    ) -> None:
        self.model, self.tokenizer = _loaded(model, tokenizer)
        base = identify(self.model.name_or_path)
        checkpoint = load(resolve_dir(path_or_hub_id), base=base)
        self.network, self.config = checkpoint.network.to(self.model.device), checkpoint.config
        self.version = checkpoint.version
        """As the server calls it."""
        self._chats = Conversations(self.tokenizer)
        self._ends = end_ids(self.model, self.tokenizer)
        decoding = Decoding(self.config.temperature, self.config.top_k, self.config.top_p)
        self._frozen = Frozen(self.model, self.tokenizer, base, decoding, self._ends, _BATCH)

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        seed: int = 0,
        strength: float = 1.0,
        temperature: float | None = None,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Answers to a prompt.

        Args:
            prompt: a text, or chat messages
            n: number of answers
            seed: of the first answer; the next has the next seed
            strength: 0 = the frozen LLM, 1 = the proxy as trained
            temperature: None = that of the proxy's training; 0 = greedy
            max_new_tokens: limit of an answer
        """
        config = self.config
        heat = config.temperature if temperature is None else temperature
        rollout = generate(
            Policy(self.model, self.network, strength),
            [self._chats.prompt_ids(_turns(prompt))] * n,
            Decoding(heat, config.top_k, config.top_p, max_new_tokens),
            end_ids=self._ends,
            seeds=itertools.count(seed),
            batch_size=_BATCH,
        )
        return self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)

    @torch.inference_mode()
    def candidates(self, prompt: Prompt, response: str = "") -> list[Candidate]:
        """What the LLM proposes next, the likeliest first, and with what probability the proxy accepts each.

        Args:
            prompt: a text, or chat messages
            response: what has been said so far
        """
        ids = self._chats.prompt_ids(_turns(prompt))
        ids += self.tokenizer(response, add_special_tokens=False)["input_ids"]
        policy = Policy(self.model, self.network)
        with HeadInput(self.model) as head:
            output = self.model(**pad_left([ids], self.model.device), logits_to_keep=1)
        found = policy.candidates(output.logits[:, -1], self._frozen.decoding)
        accepts = policy.accept_logits(head.rows, found).sigmoid()
        rows = zip(*(column[0].tolist() for column in (*found, accepts)), strict=True)
        kept = [row for row in rows if row[1] > -math.inf]
        return [
            Candidate(
                self.tokenizer.decode([token]),
                token,
                math.exp(logprob),
                accept if len(kept) > 1 else None,
            )
            for token, logprob, accept in kept
        ]

    def scores(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """How much likelier the proxy makes each response: log π/p within the nucleus, in nats."""
        turns = _turns(prompt)
        samples = [
            Sample(turns, response, *self._chats.split_ids(turns, response))
            for response in responses
        ]
        return ProxyReward(self.network, self._frozen)(samples).tolist()


def load_proxy(
    path_or_hub_id: str | Path, model: PreTrainedModel | str, tokenizer: Any = None
) -> AlignedModel:
    """A proxy on its LLM; see `AlignedModel`."""
    return AlignedModel(path_or_hub_id, model, tokenizer)


class Judge:
    """The LLM's own judgment of pairs of responses (SELF-JUDGE).

    Args:
        model: loaded, or a directory or a hub id
        tokenizer: of a loaded model; None = the one that its directory or hub id has
        principles: what to judge by; None = the first of the model's own, else a built-in one. The majority decides
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: Any = None,
        principles: Mapping[str, Principle] | None = None,
    ) -> None:
        self.model, self.tokenizer = _loaded(model, tokenizer)
        known = principles or dict([*principles_of(Path(self.model.name_or_path)).items()][:1])
        context = context_of(self.model)
        self._judges = {
            name: ModelJudge(self.model, self.tokenizer, principle, context, _BATCH)
            for name, principle in known.items()
        }

    def compare(
        self, prompt: Prompt, response_a: str, response_b: str, *, tie_band: float = 0.0
    ) -> PairResult:
        """Which of two responses is better, asked in both orders: its `winner` and its `probability` (of a).

        Args:
            prompt: what was responded to
            response_a: one response
            response_b: the other
            tie_band: a probability nearer to 0.5 than this is a tie
        """
        return self._compare([Question(_turns(prompt), response_a, response_b)], tie_band)[0]

    def rank(
        self,
        prompt: Prompt,
        responses: Sequence[str],
        *,
        strategy: Literal["knock-out", "final-four", "round-robin"] = "knock-out",
        seed: int | None = None,
    ) -> TournamentRecord:
        """Which of several responses is best, by a tournament: its `ranking` is the best first.

        Args:
            prompt: what was responded to
            responses: at least one
            strategy: which pairs are compared
            seed: of the draw; None = a random one
        """
        turns = _turns(prompt)

        async def compare_round(pairs: list[Pair], tokens: int | None) -> list[PairResult]:
            return self._compare([Question(turns, responses[a], responses[b]) for a, b in pairs])

        drawn = random.randrange(2**32) if seed is None else seed
        # The tournament awaits its comparisons; these compute at once, so no event loop is needed.
        games = play(strategy, len(responses), compare_round, drawn)
        try:
            games.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("nothing was awaited")

    def _compare(self, questions: list[Question], tie_band: float = 0.0) -> list[PairResult]:
        orders = [judge.log_odds(questions).sigmoid().tolist() for judge in self._judges.values()]
        return [
            PairResult(
                {
                    name: Verdict((first, second), tie_band)
                    for name, (first, second) in zip(self._judges, row, strict=True)
                }
            )
            for row in zip(*orders, strict=True)
        ]


def _loaded(model: PreTrainedModel | str, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    if isinstance(model, str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded, its_own = load_model(
            model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
        return loaded.to(device).eval(), tokenizer or its_own
    return model.eval(), tokenizer or load_tokenizer(model.name_or_path)


def _turns(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)]
    return [Message(**turn) for turn in prompt]  # type: ignore[typeddict-item]
