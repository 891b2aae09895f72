"""Credentials from a Prefect block: which fields become which variables; what is refused, without telling secrets."""

from __future__ import annotations

import os
from typing import Any

import pytest

from flows import s3_block
from flows.s3_block import VARIABLE, environment_of, use_s3_block

SECRET = "canary-secret"
KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET}
# As prefect-aws 0.7 stores a block in which only the keys and the endpoint were filled in.
AWS_CREDENTIALS = {
    **KEYS,
    "region_name": None,
    "profile_name": None,
    "aws_session_token": "",
    "assume_role_arn": None,
    "assume_role_kwargs": {"RoleSessionName": None, "Policy": ""},
    "aws_client_parameters": {
        "api_version": None,
        "use_ssl": True,
        "verify": None,
        "verify_cert_path": None,
        "endpoint_url": "http://127.0.0.1:1",
        "config": None,
    },
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (KEYS, {}),
        (
            {**KEYS, "aws_session_token": "token", "region_name": "eu-central-1"},
            {"AWS_SESSION_TOKEN": "token", "AWS_REGION": "eu-central-1"},
        ),
        (
            {**KEYS, "endpoint_url": "http://127.0.0.1:1"},
            {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"},
        ),
        (AWS_CREDENTIALS, {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}),
    ],
)
def test_fields_become_the_variables_of_aws_tools(
    fields: dict[str, Any], expected: dict[str, str]
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET}
    assert environment_of("s3-credentials/a", fields) == {**keys, **expected}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "lacks aws_access_key_id and aws_secret_access_key: fill them in"),
        ({**KEYS, "aws_access_key_id": ""}, "lacks aws_access_key_id: fill it in"),
        ({**KEYS, "profile_name": SECRET}, "sets profile_name to what a store makes no use of"),
        ({**KEYS, "aws_client_parameters": {"verify": False}}, "sets aws_client_parameters.verify"),
        ({**KEYS, "region_name": {"secret": SECRET}}, "sets region_name"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name_alone(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as caught:
        environment_of("aws-credentials/team", fields)
    sentence = str(caught.value)
    assert sentence.startswith(f"{VARIABLE} 'aws-credentials/team': the block ")
    assert words in sentence
    assert SECRET not in sentence and len(sentence.splitlines()) == 1


@pytest.mark.parametrize("reference", ["team", "s3-credentials/", "/team", "a/b/c"])
def test_a_reference_that_is_none_is_refused(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, reference)
    with pytest.raises(ValueError, match=f"{reference}' is no TYPE/NAME: write s3-credentials/N"):
        use_s3_block("s3://bucket/a")


def test_a_store_in_a_directory_asks_for_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no reference")
    before = dict(os.environ)
    use_s3_block("./forge-store")
    assert dict(os.environ) == before


def test_a_token_of_other_keys_is_not_sent_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of the shell")
    monkeypatch.setenv(VARIABLE, "s3-credentials/team")
    monkeypatch.setattr(s3_block, "_used", None)
    monkeypatch.setattr(s3_block, "_read", lambda reference: KEYS)
    use_s3_block("s3://bucket/a")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert "AWS_SESSION_TOKEN" not in os.environ
