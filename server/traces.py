"""The trace of a response: for every token, the candidates and what the proxy decided.

    {"token", "token_id", "probability", "accept_probability", "forced", "rejected": [...]}

Where several proxies decide, `by_proxy` has the accept probability of each, by name. A rejected candidate has the
fields but the last two. `alignment_stats.TraceEntry` defines them.
"""

from collections import defaultdict
from typing import Any

from server.admission import Admission
from server.alignment_stats import AlignmentCounts, Sample, TracedCandidate, TraceEntry
from server.app_state import AppState
from server.engine import decode_token_ids, tokenizer_of
from server.proxies import OWNER


class Trace:
    """Hands out the entries of one response as its tokens come out of the engine.

    The worker may be a step ahead of the response, or past the stop string that ended it. An entry
    waits here for its token; an entry whose token never comes is never shown.
    """

    def __init__(self, admission: Admission, counts: AlignmentCounts, state: AppState) -> None:
        self.admission, self.counts, self.state = admission, counts, state
        self.tokenizer = tokenizer_of(state.engine)
        self.entries: defaultdict[Sample, list[TraceEntry]] = defaultdict(list)
        self.shown: defaultdict[Sample, int] = defaultdict(int)

    async def advance(self) -> list[dict[str, Any]]:
        """The entries of the tokens since the last call: [{"index": choice, "entries": [...]}]."""
        delivered = dict(self.counts.delivered)
        if any(count > len(self.entries[sample]) for sample, count in delivered.items()):
            taken = await self.state.traces.take(self.counts.engine_ids)
            for sample, entries in taken.items():
                self.entries[sample] += entries
        new = []
        for sample, count in sorted(delivered.items(), key=lambda item: self._choice(item[0])):
            entries = self.entries[sample][self.shown[sample] : count]
            self.shown[sample] += len(entries)
            if entries:
                named = [self._with_tokens(entry) for entry in entries]
                new.append({"index": self._choice(sample), "entries": named})
        return new

    def is_truncated(self) -> bool:
        """Whether the worker had to drop entries. Call it after the last `advance`."""
        alignment, delivered = self.admission.alignment, self.counts.delivered
        acts = alignment is not None and alignment.acts
        return acts and any(count > self.shown[sample] for sample, count in delivered.items())

    def _choice(self, sample: Sample) -> int:
        """The index in the response: prompt by prompt, each with n samples."""
        request_id, index = sample
        return self.counts.engine_ids.index(request_id) * self.counts.num_samples + index

    def _with_tokens(self, entry: TraceEntry) -> dict[str, Any]:
        candidates: list[TracedCandidate] = [entry, *entry["rejected"]]
        ids = [candidate["token_id"] for candidate in candidates]
        tokens = decode_token_ids(ids, self.tokenizer)
        named = [
            {"token": text, **candidate, **_by_shown_name(candidate)}
            for (text, _), candidate in zip(tokens, candidates, strict=True)
        ]
        return named[0] | {"rejected": named[1:]}


def _by_shown_name(candidate: TracedCandidate) -> dict[str, Any]:
    """`by_proxy` with the names that callers use, where the candidate has it."""
    probabilities = candidate.get("by_proxy")
    if probabilities is None:
        return {}
    return {"by_proxy": {name.partition(OWNER)[0]: p for name, p in probabilities.items()}}
