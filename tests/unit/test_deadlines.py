"""No call to an actor is left without a deadline: the syntax trees of all that may call one are searched.

A call counts as having one if it names `timeout_seconds`, or lies inside `asyncio.timeout(...)` or `timeout_at(...)` in
the function that makes it. `broadcast` never has: nobody would learn that it was lost.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "forge_core", "storage", "examples", "benchmarks")

ADVERBS = frozenset({"call", "call_one", "choose", "stream", "broadcast", "rref"})
"""How Monarch's endpoints are called."""

OTHERS = frozenset({
    ("forge_core/services/dispatch.py", "self._router.choose"),
    ("storage/s3.py", "self.requests.call"),
    ("storage/s3_upload.py", "self.calls.call"),
    ("storage/s3_upload.py", "replace(self.calls, patience=patience).call"),
    ("tasks/again.py", "run.buffer.choose"),
    ("tasks/segments.py", "line.choose"),
})  # fmt: skip
"""Methods of the same names that are no endpoints: of a router, of requests to S3, which have deadlines of their own,
of a replay buffer, and of the pipeline."""


class _Search(ast.NodeVisitor):
    """Collects the calls that have no deadline."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self._limits = 0

    def _visit_function(self, node: ast.AST) -> None:
        # A function that is defined inside a limit is not necessarily called there.
        outer, self._limits = self._limits, 0
        self.generic_visit(node)
        self._limits = outer

    visit_FunctionDef = _visit_function
    visit_AsyncFunctionDef = _visit_function
    visit_Lambda = _visit_function

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        limits = sum(_is_limit(item.context_expr) for item in node.items)
        for item in node.items:
            self.visit(item)
        self._limits += limits
        for statement in node.body:
            self.visit(statement)
        self._limits -= limits

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ADVERBS:
            names_one = any(keyword.arg == "timeout_seconds" for keyword in node.keywords)
            has_one = (names_one or self._limits > 0) and function.attr != "broadcast"
            if not has_one:
                self.found.append((node.lineno, ast.unparse(function)))
        self.generic_visit(node)


def _is_limit(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in (
        "asyncio.timeout",
        "asyncio.timeout_at",
    ):
        return False
    [limit] = node.args
    return not (isinstance(limit, ast.Constant) and limit.value is None)


def without_deadline(source: str) -> list[tuple[int, str]]:
    """Lines of a module that call an endpoint without a deadline, and what they call."""
    search = _Search()
    search.visit(ast.parse(source))
    return search.found


def _all_found() -> Iterator[tuple[str, int, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for line, what in without_deadline(path.read_text()):
                yield name, line, what


def test_every_call_of_an_endpoint_has_a_deadline() -> None:
    found = list(_all_found())
    left = [f"{name}:{line}: {what}" for name, line, what in found if (name, what) not in OTHERS]
    assert not left, left
    assert {(name, what) for name, _, what in found} == OTHERS, "an entry of OTHERS is out of date"


@pytest.mark.parametrize(
    "statement",
    [
        "await actors.work.call(1)",
        "await actors.work.call_one()",
        "answer = actors.work.choose().get()",
        "actors.work.broadcast()",
        "await getattr(actors, name).call(*args)",
        "await mesh.call('work', 1)",
        "async with asyncio.timeout(None):\n        await actors.work.call()",
        "async with asyncio.timeout(5):\n        actors.work.broadcast()",
        "async with asyncio.timeout(5):\n        pass\n    await actors.work.call()",
        "async with asyncio.timeout(5):\n        later = lambda: actors.work.call()",
        "async with other(5):\n        await actors.work.call()",
        "async with asyncio.timeout(await actors.limit.call_one()):\n        pass",
        "async with asyncio.timeout(5):\n"
        "        async def later():\n            await actors.work.call()",
    ],
)
def test_a_call_without_one_is_found(statement: str) -> None:
    assert without_deadline(f"async def function():\n    {statement}\n")


@pytest.mark.parametrize(
    "statement",
    [
        "await mesh.call('work', 1, timeout_seconds=5.0)",
        "async with asyncio.timeout(5):\n        await actors.work.call()",
        "async with asyncio.timeout_at(5):\n        await gather(actors.work.call_one())",
        "async with asyncio.timeout(5) as limit:\n"
        "        try:\n            await actors.work.call()\n        finally:\n            pass",
        "async with one(), asyncio.timeout(5):\n        await actors.work.call()",
        "async with asyncio.timeout(5):\n        for each in actors:\n            await each.work.call()",
    ],
)
def test_a_call_with_one_is_not(statement: str) -> None:
    assert not without_deadline(f"async def function():\n    {statement}\n")
