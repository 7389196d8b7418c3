"""Times the parts of accept/reject sampling with wrappers around functions, each of which counts its own time."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch

import proxy.engine.rows
import proxy.engine.scoring
from proxy.engine.decision_stats import DecisionStats

SAMPLING_PARTS = ("nucleus", "network", "decide", "record")
"""The parts: the most probable candidates and their mass; the network; noise and decision; and what is kept for
statistics. On a CPU of one thread the compiled kernel does the first three, and they count as "decide".
"""


class Span(NamedTuple):
    """One call of a part, between two timestamps."""

    part: str
    parent: int | None  # index of the enclosing call
    start: Any
    end: Any


class Clock:
    """Collects the calls of wrapped functions.

    On a CPU the timestamps are CPU seconds of the thread, which vary less than wall time on a shared machine. On CUDA
    they are events, so nothing waits for the device; where the host submits more slowly than the device works, the time
    between two events includes the idle time.
    """

    def __init__(self, *, is_cuda: bool = False) -> None:
        self._is_cuda = is_cuda
        self._spans: list[Span] = []
        self._open: list[int] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time calls of `owner.name` from now on."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        index = len(self._spans)
        span = Span(name, self._open[-1] if self._open else None, self._mark(), None)
        self._spans.append(span)
        self._open.append(index)
        try:
            yield
        finally:
            self._open.pop()
            self._spans[index] = span._replace(end=self._mark())

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by part, without those of the parts inside it."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for span in self._spans:
            length = self._between(span.start, span.end)
            seconds[span.part] += length
            if span.parent is not None:
                seconds[self._spans[span.parent].part] -= length
        self._spans.clear()
        return seconds

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._is_cuda else end - start


@contextmanager
def timed_sampling(clock: Clock, device: str) -> Iterator[None]:
    """Time the parts in `SAMPLING_PARTS` inside the block."""
    wrapped: list[tuple[Any, str, str]] = [
        (proxy.engine.rows, "nucleus", "nucleus"),
        (proxy.engine.rows, "decide", "decide"),
        (proxy.engine.rows.ProxiedRows, "noise", "decide"),
        (proxy.engine.scoring.ProxyScorer, "project", "network"),
        (proxy.engine.scoring.ProxyScorer, "accept_logits", "network"),
        (DecisionStats, "record", "record"),
    ]
    if device == "cpu":
        from proxy.cpu import rows as cpu_rows

        wrapped += [
            (cpu_rows.KernelRows, "find_top", "nucleus"),
            (cpu_rows, "decide_rows", "decide"),
        ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, part in wrapped:
        clock.wrap(owner, name, part)
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
