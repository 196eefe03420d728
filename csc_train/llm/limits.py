"""Limits of the requests to one server: requests in flight, requests per minute and tokens per minute."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from csc_train.llm.config import LLMConfig


class RateLimiter:
    """A number of units per minute, spread evenly, without a burst after a pause.

    A request waits for the units of the requests before it, not for its own, so a request larger than a minute's units
    is possible. aiolimiter's bucket refuses such a request, and cannot correct an estimate.
    """

    def __init__(self, per_minute: float):
        self._seconds_per_unit = 60 / per_minute
        self._next_start = 0.0

    async def acquire(self, amount: float) -> None:
        """Wait until `amount` more units may be used, and use them."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + amount * self._seconds_per_unit
        if self._seconds_per_unit:  # 0 without a limit
            await asyncio.sleep(start - now)

    def adjust(self, difference: float) -> None:
        """Use `difference` more units; negative: return units."""
        self._next_start += difference * self._seconds_per_unit


class RequestLimits:
    """The limits of one server, shared by all requests to it.

    `concurrency` bounds the requests in flight. A rate limit error of the server halves the bound, once for all
    requests in flight. Every answer raises it by its reciprocal, so by one per full round.

    Attributes:
        concurrency: the current bound; at least 1.
    """

    def __init__(self, config: LLMConfig):
        self._max_concurrency = config.concurrency
        self.concurrency = float(config.concurrency)
        self._requests = RateLimiter(config.requests_per_minute or math.inf)
        self._tokens = RateLimiter(config.tokens_per_minute or math.inf)
        self._in_flight = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._round = 0
        self._paused_until = 0.0

    @contextlib.asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[int]:
        """Wait until a request of about `tokens` tokens may be sent; holds its slot until the block ends.

        Yields:
            The round, for `on_rate_limit`.
        """
        async with self._turn:  # in the order of arrival
            while self._in_flight >= int(self.concurrency):
                self._freed.clear()
                await self._freed.wait()
            self._in_flight += 1
        try:
            await self._requests.acquire(1)
            await self._tokens.acquire(tokens)
            loop = asyncio.get_running_loop()
            while (wait := self._paused_until - loop.time()) > 0:
                await asyncio.sleep(wait)
            yield self._round
        finally:
            self._in_flight -= 1
            self._freed.set()

    def adjust_tokens(self, difference: int) -> None:
        """Correct the estimate of a request by `difference` tokens."""
        self._tokens.adjust(difference)

    def on_success(self) -> None:
        """A request was answered: raise the bound. Its slot, when it ends, lets others in."""
        self.concurrency = min(self._max_concurrency, self.concurrency + 1 / self.concurrency)

    def on_rate_limit(self, sent_in: int, wait_s: float) -> None:
        """The server rejected a request of round `sent_in`: halve the bound and send nothing for `wait_s` seconds."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + wait_s)
        if sent_in == self._round:
            self._round += 1
            self.concurrency = max(1.0, self.concurrency / 2)
