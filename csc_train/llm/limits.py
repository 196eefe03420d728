"""How much is asked of a server at a time: requests under way, requests and tokens a minute."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from csc_train.llm.config import LLMConfig


class RateLimiter:
    """So many units a minute, spread evenly: there is no burst after a pause.

    A request goes when those before it have been paid for, whatever it costs itself, so one that is larger than a
    minute's share waits for nobody's but its own predecessors. aiolimiter's bucket refuses such a request, and cannot
    take back a wrong estimate.
    """

    def __init__(self, per_minute: float):
        self._seconds = 60 / per_minute
        self._paid_at = 0.0

    async def take(self, amount: float) -> None:
        """Wait until `amount` more may be used, and use it."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._paid_at)
        self._paid_at = start + amount * self._seconds
        await asyncio.sleep(start - now)

    def correct(self, difference: float) -> None:
        """Account for `difference` more than was taken, or less where it is negative."""
        self._paid_at += difference * self._seconds


class RequestLimits:
    """The limits of one server, shared by all requests to it.

    Requests under way are bounded by `concurrency`. A rate limit of the server halves the bound, once for all requests
    that were under way by then, and every answer raises it by its reciprocal, so by one for every full round.

    Attributes:
        concurrency: the bound as it is now; at least 1.
    """

    def __init__(self, config: LLMConfig):
        self._most = config.concurrency
        self.concurrency = float(config.concurrency)
        self._requests = RateLimiter(config.requests_per_minute) if config.requests_per_minute else None
        self._tokens = RateLimiter(config.tokens_per_minute) if config.tokens_per_minute else None
        self._permits = config.concurrency
        self._free = asyncio.Semaphore(config.concurrency)
        self._round = 0
        self._paused_until = 0.0

    @contextlib.asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[int]:
        """Wait until a request of about so many tokens may be sent; hold its place until it is answered.

        Yields:
            What `rate_limited` wants to know.
        """
        await self._acquire()
        try:
            if self._requests:
                await self._requests.take(1)
            if self._tokens:
                await self._tokens.take(tokens)
            loop = asyncio.get_running_loop()
            while (wait := self._paused_until - loop.time()) > 0:
                await asyncio.sleep(wait)
            yield self._round
        finally:
            self._release()

    def used(self, estimated: int, tokens: int) -> None:
        """A request took so many tokens where `estimated` were taken into account."""
        if self._tokens:
            self._tokens.correct(tokens - estimated)

    def answered(self) -> None:
        """A request was answered: the bound rises."""
        self.concurrency = min(self._most, self.concurrency + 1 / self.concurrency)
        while self._permits < int(self.concurrency):
            self._permits += 1
            self._free.release()

    def rate_limited(self, sent_in: int, wait_s: float) -> None:
        """The server refused a request that `slot` let go in round `sent_in`; nothing is sent for `wait_s` seconds."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + wait_s)
        if sent_in == self._round:
            self._round += 1
            self.concurrency = max(1.0, self.concurrency / 2)

    async def _acquire(self) -> None:
        await self._free.acquire()
        while self._permits > int(self.concurrency):  # the bound has fallen: this place is gone
            self._permits -= 1
            await self._free.acquire()

    def _release(self) -> None:
        if self._permits > int(self.concurrency):
            self._permits -= 1
        else:
            self._free.release()
