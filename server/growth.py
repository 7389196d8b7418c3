"""What has been generated of a sample so far, for who decides about it before it has ended."""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar


class Growth:
    """A sample's tokens so far."""

    def __init__(self) -> None:
        self.token_ids: Sequence[int] = ()
        self._grown = asyncio.Event()

    def update(self, token_ids: Sequence[int]) -> None:
        """The engine has generated more: these are all."""
        self.token_ids = token_ids
        self._grown.set()

    async def reach(self, num_tokens: int) -> None:
        """Wait until there are so many; for ever, if the sample ends before."""
        while len(self.token_ids) < num_tokens:
            self._grown.clear()
            await self._grown.wait()


GROWTH: ContextVar[Growth | None] = ContextVar("growth", default=None)
"""Of the sample that this task draws; None = nobody asks before its end."""
