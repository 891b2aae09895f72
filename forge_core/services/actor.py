"""The base of actors that are served: their requests run side by side, and can be given up.

    request ──▶ running ──▶ answered, or raised
                  └─ give_up ──▶ cancelled at its next await

Endpoints are Monarch's own, and `async`. Those marked `@concurrent_endpoint` run side by side, so that a long one never
keeps a short one waiting; those marked `@endpoint` one at a time, in the order in which they came.

Example:
    class Echo(ServedActor):
        def __init__(self, prefix: str) -> None:
            self._prefix = prefix

        async def setup(self) -> None:
            self._words = await load_words()

        @concurrent_endpoint
        async def say(self, word: str) -> str:
            return self._prefix + self._words[word]

    async with serve(Echo.options(replicas=4, cores=1).with_arguments("> ")) as echo:
        await echo.call("say", "hello", timeout_seconds=5.0)
"""

from __future__ import annotations

import asyncio
import copy
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from forge_core.process_environment import prepare_for_monarch
from forge_core.services.declaration import Declaration

# Monarch reads it when it is imported.
prepare_for_monarch()

from monarch.actor import Actor, concurrent_endpoint  # noqa: E402
from monarch.actor import endpoint as one_at_a_time  # noqa: E402

__all__ = ["RemoteError", "ServedActor", "concurrent_endpoint", "one_at_a_time"]


class RemoteError(RuntimeError):
    """Stands for an error of an endpoint that cannot be sent between processes; its message has the traceback."""


class ServedActor(Actor):
    """An actor that a service can call, cancel, set up and watch."""

    @classmethod
    def options(cls, **needs: Any) -> Declaration:
        """What a service of this class is to have: see the fields of `Declaration`."""
        return Declaration(actor=cls, **needs)

    async def setup(self) -> None:
        """Whatever takes long, or may fail; a replica serves once this has returned. To be overridden."""

    @concurrent_endpoint
    async def run_setup(self) -> None:
        """For the service."""
        await self.setup()

    @concurrent_endpoint
    async def turn(self) -> None:
        """For the service: that it is answered says that the actor's event loop turns."""

    @concurrent_endpoint
    async def serve(
        self, number: int, endpoint: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """For the service: request `number`, which `give_up` can name."""
        task = asyncio.current_task()
        assert task is not None
        running = self._running()
        running[number] = task
        try:
            return await self._call(endpoint, args, kwargs)
        except asyncio.CancelledError:
            # Whoever asked waits no longer. Uncaught, Monarch would log it as the actor's error.
            return None
        except Exception as error:
            raise _sendable(error) from None
        finally:
            del running[number]

    @concurrent_endpoint
    async def give_up(self, number: int) -> None:
        """For the service: cancel a request, if it still runs."""
        if (task := self._running().get(number)) is not None:
            task.cancel()

    async def _call(self, endpoint: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        body, is_concurrent = endpoint_body(type(self), endpoint)
        if is_concurrent:
            return await body(self, *args, **kwargs)
        async with self._turns():
            return await body(self, *args, **kwargs)

    # Not in `__init__`: a subclass need not call it.
    def _running(self) -> dict[int, asyncio.Task[Any]]:
        running: dict[int, asyncio.Task[Any]] = self.__dict__.setdefault("_served_running", {})
        return running

    def _turns(self) -> asyncio.Lock:
        lock: asyncio.Lock = self.__dict__.setdefault("_served_turns", asyncio.Lock())
        return lock


def endpoint_body(actor: type[Any], name: str) -> tuple[Any, bool]:
    """The function behind an endpoint, and whether it is concurrent. Raises AttributeError if there is none."""
    found = getattr(actor, name, None)
    method = getattr(found, "_method", None)
    if method is None:
        known = sorted(each for each in dir(actor) if hasattr(getattr(actor, each), "_method"))
        own = [each for each in known if each not in _FOR_SERVICES]
        raise AttributeError(
            f"{actor.__name__} has no endpoint {name!r}: it has {', '.join(own) or 'none'}"
        )
    # Monarch wraps the body of a concurrent endpoint into one that starts it as a task.
    body = getattr(method, "__wrapped__", None)
    return (method, False) if body is None else (body, True)


_FOR_SERVICES = frozenset({"run_setup", "turn", "serve", "give_up"})


def _sendable(error: Exception) -> Exception:
    """`error`, or what says the same if it could not be rebuilt in another process."""
    try:
        # What pickling would do, as far as building it again goes.
        copy.deepcopy(error)
    except Exception:
        told = "".join(traceback.format_exception(error))
        return RemoteError(f"{type(error).__name__}: {error}\n{told}")
    return error
