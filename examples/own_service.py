"""A service of your own: a judge with three replicas, one of which is killed while it is asked.

    python examples/own_service.py

Every question is answered once; the replica that was killed is started again.
"""

from __future__ import annotations

import asyncio
import os
import signal

from forge_core.services.actor import ServedActor, concurrent_endpoint
from forge_core.services.policy import faults
from forge_core.services.routing import LeastLoaded
from forge_core.services.serving import serve


@faults(policy="route_around")
class Judge(ServedActor):
    """Tells how much of an answer is on topic."""

    def __init__(self, topic: str) -> None:
        self.topic = topic

    async def setup(self) -> None:
        self.words = set(self.topic.split())

    @concurrent_endpoint
    async def judge(self, answer: str) -> float:
        await asyncio.sleep(0.01)
        words = answer.split()
        return sum(word in self.words for word in words) / max(len(words), 1)


async def main() -> None:
    """Ask three hundred times."""
    judges = Judge.options(replicas=3).with_arguments("the cat sat on a mat")
    async with serve(judges, router=LeastLoaded()) as service:
        answers = [f"the cat {number}" for number in range(300)]
        asked = [
            asyncio.create_task(
                service.call("judge", answer, timeout_seconds=30.0, cost=len(answer))
            )
            for answer in answers
        ]
        await asyncio.sleep(0.05)
        victim = service.metrics().replicas[0].pids[0]
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        scores = await asyncio.gather(*asked)
        retries = service.metrics().retries
    print(
        f"{len(scores)} answers, mean score {sum(scores) / len(scores):.2f}; {retries} asked twice"
    )


if __name__ == "__main__":
    asyncio.run(main())
