"""A store on S3 whose endpoint, region and credentials a block on a real Prefect server has."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from harness import command
from prefect.blocks.core import Block
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from s3_blocks import environment_with, save_writer
from s3_server import WRITER, S3Server

from flows.s3_credentials import read_fields

SECONDS = 120


class AwsCredentials(Block):
    """A block of the type that prefect-aws registers, as far as it concerns a store."""

    _block_type_slug = "aws-credentials"

    aws_access_key_id: str | None = None
    profile_name: str | None = None


@pytest.fixture(scope="module")
def blocks(
    prefect_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The server, with one block that has all that a store needs and one that lacks something."""
    save_writer(prefect_server, s3_server, tmp_path_factory.mktemp("work"))
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        AwsCredentials(aws_access_key_id=WRITER[0]).save("half", overwrite=True)
    return prefect_server


@pytest.mark.parametrize(
    ("block", "code", "words"),
    [
        ("s3-credentials/writer", 0, ""),
        ("aws-credentials/half", 2, "the block lacks aws_secret_access_key: fill it in on"),
    ],
)
def test_a_command_opens_the_store_with_the_blocks_fields_or_says_what_they_lack(
    block: str, code: int, words: str, blocks: str, s3_server: S3Server
) -> None:
    done = subprocess.run(
        command("runs", "--store", s3_server.new_uri()),
        env=environment_with(block, blocks),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert ("holds no runs" in done.stdout) == (code == 0)
    assert len(done.stderr.splitlines()) == (code != 0)
    assert WRITER[1] not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("{server}", "refused", "the Prefect server at {server} has no such block: make it"),
        ("{server}/gone", "refused", "the Prefect server at {server}/gone has no such block"),
        (None, "refused", "no server is named: set PREFECT_API_URL to the one that keeps it"),
        ("http://127.0.0.1:9/api", "failed", "at http://127.0.0.1:9/api did not answer"),
    ],
)
def test_a_block_that_cannot_be_read_is_told_in_a_sentence(
    url: str | None, kind: str, words: str, blocks: str
) -> None:
    settings = {
        PREFECT_API_URL: None if url is None else url.format(server=blocks),
        PREFECT_CLIENT_MAX_RETRIES: 0,
    }
    with temporary_settings(settings):
        told = asyncio.run(read_fields("s3-credentials", "nobody"))
    assert words.format(server=blocks) in told.pop(kind)
    assert told == {}
