"""The trace of an answer: for every token what the proxy was asked, and what it said.

    {"token", "token_id", "probability", "accept_probability", "forced", "rejected": [...]}

A rejected candidate has the first four. Probabilities are the LLM's within the nucleus, at the
temperature that the proxy was trained at; accept probabilities are after the strength, and None
where nobody asked.
"""

from collections import defaultdict
from typing import Any

from server.admission import Plan
from server.engine import decode_token_ids
from server.state import Served

Entry = dict[str, Any]


class Trace:
    """Hands out the entries of one answer as its tokens come out of the engine.

    The worker may be a step ahead of the answer, or past the stop string that ended it: an entry
    waits here for its token, and one whose token never comes is never shown.
    """

    def __init__(self, plan: Plan, state: Served) -> None:
        self.plan = plan
        self.state = state
        self.tokenizer: Any = state.engine.renderer.get_tokenizer()
        self.entries: defaultdict[tuple[str, int], list[Entry]] = defaultdict(list)
        self.shown: defaultdict[tuple[str, int], int] = defaultdict(int)

    async def advance(self) -> list[dict[str, Any]]:
        """The entries of the tokens since the last call: [{"index": choice, "entries": [...]}]."""
        delivered = dict(self.plan.delivered)
        if any(count > len(self.entries[sample]) for sample, count in delivered.items()):
            taken = await self.state.traces.take(self.plan.engine_ids)
            for sample, entries in taken.items():
                self.entries[sample] += entries
        new = []
        for sample, count in sorted(delivered.items(), key=lambda item: self._choice(item[0])):
            entries = self.entries[sample][self.shown[sample] : count]
            self.shown[sample] += len(entries)
            if entries:
                shown = [self._as_json(entry) for entry in entries]
                new.append({"index": self._choice(sample), "entries": shown})
        return new

    def is_truncated(self) -> bool:
        """Whether the worker had to drop entries; ask after the last `advance`."""
        acts = self.plan.alignment is not None and self.plan.alignment.acts
        delivered = self.plan.delivered
        return acts and any(count > self.shown[sample] for sample, count in delivered.items())

    def _choice(self, sample: tuple[str, int]) -> int:
        """The index in the answer: prompt by prompt, each with n samples."""
        request_id, index = sample
        return self.plan.engine_ids.index(request_id) * self.plan.num_samples + index

    def _as_json(self, entry: Entry) -> Entry:
        candidates = [entry, *entry["rejected"]]
        tokens = decode_token_ids([each["token_id"] for each in candidates], self.tokenizer)
        named = [{"token": text} | each for (text, _), each in zip(tokens, candidates, strict=True)]
        return named[0] | {"rejected": named[1:]}
