"""Times the parts of the law from outside: wrappers around functions, each of which counts its own time."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch

import proxy.rows
from proxy.history import History

LAW = ("nucleus", "network", "decide", "record")
"""The law's parts: the most probable candidates and their mass; the network; noise and decision; and what is kept for
the counts. On a CPU of one thread the compiled loop does the first three, and decide has them."""


class Span(NamedTuple):
    """One call of a part, between two marks."""

    part: str
    parent: int | None  # index of the call within which it happened
    start: Any
    end: Any


class Clock:
    """Collects the calls of wrapped functions.

    On a CPU the marks are CPU seconds of the thread: steadier than the wall's on a machine that others use too. On CUDA
    they are events, so that nothing waits for the device; where the host queues more slowly than the device works, its
    time is what lies between them.
    """

    def __init__(self, *, is_cuda: bool = False) -> None:
        self._is_cuda = is_cuda
        self._spans: list[Span] = []
        self._open: list[int] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time `owner.name` from now on."""
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
        """Seconds since the last time, by part: its own, without those of the parts within it."""
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
def wrapped_law(clock: Clock, device: str) -> Iterator[None]:
    """Time the parts named in `LAW`, for as long as the block lasts."""
    wraps_of: list[tuple[Any, str, str]] = [
        (proxy.rows, "nucleus", "nucleus"),
        (proxy.rows, "decide", "decide"),
        (proxy.rows.AlignedRows, "noise", "decide"),
        (proxy.rows.Mixture, "project", "network"),
        (proxy.rows.Mixture, "accept_logits", "network"),
        (History, "record", "record"),
    ]
    if device == "cpu":
        from proxy import loop_rows

        wraps_of += [
            (loop_rows.LoopRows, "_share_out", "nucleus"),
            (loop_rows, "decide_rows", "decide"),
        ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wraps_of]
    for owner, name, part in wraps_of:
        clock.wrap(owner, name, part)
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
