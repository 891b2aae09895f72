"""How commands speak: options they share, refusals, JSON documents and tables."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from flows.s3_block import use_s3_block
from storage.contract import ObjectNotFound, StoreError

REFUSED = 2
"""Exit code for input that is refused."""
FAILED = 1
"""Exit code for whatever else was not done."""


def _with_credentials(uri: str) -> str:
    """The store's URI, once the environment has the credentials of a block, if it names one."""
    with refusing_input():
        use_s3_block(uri)
    return uri


Store = Annotated[
    str,
    typer.Option("--store", metavar="URI", help="Where runs are kept.", callback=_with_credentials),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log more, to the error stream.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run.")]

DEFAULT_STORE = "./forge-store"
_FILE_WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


def console() -> Console:
    """The console for people: tables as wide as the terminal, or wide enough in a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def leave(code: int) -> NoReturn:
    """End the process. All that was started is stopped; exit handlers of libraries would only wait for servers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_json(document: Any) -> None:
    """Print the one document of a command with `--json`."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def set_up_logging(verbose: bool) -> None:
    """Log to the error stream: warnings only, unless more is asked for."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def refuse(sentence: str) -> NoReturn:
    """Say why input is refused, in at most two lines on the error stream, and exit."""
    for line in sentence.strip().splitlines()[:2]:
        typer.echo(line, err=True)
    raise typer.Exit(REFUSED)


@contextmanager
def refusing_input() -> Iterator[None]:
    """Turn a ValueError, which is the user's to mend, into a refusal, and a store that fails into one sentence."""
    try:
        yield
    except ValueError as error:
        refuse(str(error))
    except (ObjectNotFound, StoreError) as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(FAILED) from error
