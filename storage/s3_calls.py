"""Requests to S3: one filesystem per process, retries that are seen, errors in plain words."""

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fsspec.asyn import get_loop
from s3fs import S3FileSystem
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from storage.contract import StoreError, hurry
from storage.s3_faults import ERRORS, Fault, fault_of, reason_of, sentence_of

_logger = logging.getLogger("storage.s3")

_CREDENTIAL_ATTEMPTS = 3
"""How often credentials are read anew before a request is given up."""
_SLOWEST_BYTES_PER_SECOND = 2**18
"""An upload that is slower than this is broken off and made again."""
_LOOK_SECONDS = 0.2
"""How often a wait looks whether this process is told to end."""
_RETRIED = {Fault.TRANSIENT, Fault.CONFLICT, Fault.CREDENTIALS}

Result = TypeVar("Result")
Request = Callable[[S3FileSystem], Awaitable[Result]]
"""One request; it is made again from scratch if it fails."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server that does not do well."""

    connect_seconds: float = 5.0
    """For a connection."""
    read_seconds: float = 20.0
    """For the next bytes of an answer."""
    deadline_seconds: float = 90.0
    """After the first attempt, the last may begin."""
    first_wait_seconds: float = 0.2
    """Longest wait before the second attempt; it doubles with each, and the wait is random below it."""
    longest_wait_seconds: float = 10.0
    """Up to this."""


class _FileSystem(S3FileSystem):
    """The filesystem without retries of its own, which nobody would see."""

    retries = 1


async def _unless_in_a_hurry(seconds: float) -> None:
    """Sleep, but not on when this process is told to end."""
    events = asyncio.get_running_loop()
    over = events.time() + seconds
    # A signal handler sets the event, on another thread than this loop's.
    while not hurry.is_set() and (left := over - events.time()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(min(left, _LOOK_SECONDS))


_filesystems: dict[tuple[object, ...], _FileSystem] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Calls:
    """Makes the requests of one store. Threads may share it."""

    store: str
    """URI of the store, for messages."""
    patience: Patience
    """How long to wait for the server."""

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of work on the loop that all filesystems of the process share."""
        future = asyncio.run_coroutine_threadsafe(work, get_loop())
        try:
            return future.result()
        except BaseException:
            # If a signal ends the wait, no retry may write behind the caller's back.
            future.cancel()
            raise

    async def call(
        self,
        doing: str,
        request: Request[Result],
        *,
        expected: frozenset[Fault] = frozenset(),
        num_bytes: int = 0,
    ) -> Result | Fault:
        """The answer to a request, or the fault, if it is one of those expected.

        What may pass is tried again; what does not is raised as StoreError. `doing` completes "could not …", and
        `num_bytes` is what the request sends.
        """
        limit = self.patience.connect_seconds + self.patience.read_seconds
        limit += num_bytes / _SLOWEST_BYTES_PER_SECOND if num_bytes else 0
        refused = 0

        async def attempt() -> Result:
            nonlocal refused
            filesystem = _filesystem(self.patience)
            try:
                async with asyncio.timeout(limit if num_bytes else None):
                    return await request(filesystem)
            except Exception as error:
                if fault_of(error) is Fault.CREDENTIALS:
                    refused += 1
                    _forget(filesystem)
                raise

        def is_over(state: RetryCallState) -> bool:
            in_vain = refused > _CREDENTIAL_ATTEMPTS or hurry.is_set()
            return in_vain or stop_before_delay(self.patience.deadline_seconds)(state)

        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: fault_of(error) in _RETRIED - expected),
            stop=is_over,
            wait=wait_random_exponential(
                self.patience.first_wait_seconds, max=self.patience.longest_wait_seconds
            ),
            before_sleep=lambda state: self._tell(doing, state),
            sleep=_unless_in_a_hurry,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except ERRORS as error:
            fault = fault_of(error)
            if fault in expected:
                return fault
            number = getattr(error, "errno", None)
            raise StoreError(sentence_of(error, self.store, doing), number) from error

    def _tell(self, doing: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        _logger.warning(
            "store %s could not %s (%s): attempt %d, the next in %.1f s",
            self.store,
            doing,
            reason_of(error) if error else "unknown",
            state.attempt_number,
            state.upcoming_sleep,
        )


def _filesystem(patience: Patience) -> _FileSystem:
    """The filesystem of this process, for it does not survive a fork, and of the environment as it is now."""
    settings = frozenset(pair for pair in os.environ.items() if pair[0].startswith("AWS_"))
    timeouts = {
        "connect_timeout": patience.connect_seconds,
        "read_timeout": patience.read_seconds,
    }
    place = os.getpid(), hash(settings), *timeouts.values()
    with _lock:
        if place not in _filesystems:
            # boto's own name for the region is AWS_DEFAULT_REGION; all other tools know this one.
            region = os.environ.get("AWS_REGION")
            _filesystems[place] = _FileSystem(
                use_listings_cache=False,
                skip_instance_cache=True,
                client_kwargs={"region_name": region} if region else {},
                config_kwargs={
                    **timeouts,
                    "retries": {"mode": "standard", "total_max_attempts": 1},
                    "max_pool_connections": 32,
                },
            )
        return _filesystems[place]


def _forget(filesystem: _FileSystem) -> None:
    """Let the next request read the credentials anew: a profile, a token file or a service may have fresh ones."""
    with _lock:
        for place, each in list(_filesystems.items()):
            if each is filesystem:
                del _filesystems[place]
