"""What went wrong with a request to S3: whether it passes, and one sentence for people if it does not."""

import asyncio
from enum import Enum, auto

import aiohttp
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError


class Fault(Enum):
    """What an error means for whoever made the request."""

    MISSING = auto()
    """There is no such object."""
    TAKEN = auto()
    """The object exists, and the write was to create it."""
    VANISHED = auto()
    """The server has forgotten the upload in parts: it ended it, or someone aborted it."""
    EMPTY = auto()
    """The object exists and has no bytes, of which some were asked for."""
    CONFLICT = auto()
    """Another write of the same object was under way: the whole write is to be made again."""
    TRANSIENT = auto()
    """The same request may succeed a little later."""
    CREDENTIALS = auto()
    """The credentials have expired or are not known: new ones may help."""
    FINAL = auto()
    """Trying again would not help."""


_MENDS = {
    "AccessDenied": "give the credentials the rights that docs/s3.md lists",
    "AllAccessDisabled": "give the credentials the rights that docs/s3.md lists",
    "403": "give the credentials the rights that docs/s3.md lists",
    "NoSuchBucket": "create the bucket, or correct its name or the endpoint",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the region of the bucket",
    "PermanentRedirect": "set AWS_REGION to the region of the bucket",
    "IllegalLocationConstraintException": "set AWS_REGION to the region of the bucket",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "NotImplemented": "use a server that knows If-None-Match, such as those that docs/s3.md names",
    "QuotaExceeded": "free space there or raise the quota",
    "InsufficientStorage": "free space there or raise the quota",
    "507": "free space there or raise the quota",
}
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_CREDENTIAL_ERRORS = (
    boto.CredentialRetrievalError,
    boto.NoAuthTokenError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.TokenRetrievalError,
)
_TRANSIENT_ERRORS = (
    boto.ConnectionError,
    boto.FlexibleChecksumError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
)


ERRORS = (
    BotoCoreError,
    ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
    ValueError,  # An endpoint that is no URL.
)
"""What a request may raise; anything else is a mistake in this program."""


def fault_of(error: BaseException) -> Fault:
    """What the error of a request means."""
    response = _response(error)
    if response is not None:
        return _fault_of_response(*response)
    if isinstance(error, FileExistsError):
        return Fault.TAKEN
    if isinstance(error, boto.SSLError):
        return Fault.FINAL
    if isinstance(error, _CREDENTIAL_ERRORS):
        return Fault.CREDENTIALS
    return Fault.TRANSIENT if isinstance(error, _TRANSIENT_ERRORS) else Fault.FINAL


def reason_of(error: BaseException) -> str:
    """A few words on what happened."""
    cause = _client_error(error)
    if cause is None:
        return str(error) or type(error).__name__
    status, code = _status_and_code(cause)
    message = cause.response.get("Error", {}).get("Message", "")
    return " ".join(str(word) for word in (status, code) if word) + (message and f": {message}")


def sentence_of(error: BaseException, store: str, doing: str) -> str:
    """One sentence for people: which store, what was refused and why, what to do."""
    reason = reason_of(error).rstrip(".")
    fault = fault_of(error)
    if fault is Fault.CREDENTIALS:
        return (
            f"the credentials of store {store!r} have expired or are refused ({reason}): renew them;"
            " `forgeflow resume RUN` continues a run that stopped"
        )
    response = _response(error)
    mend = _MENDS.get(response[1]) if response is not None else None
    if mend is None and fault in (Fault.TRANSIENT, Fault.CONFLICT):
        mend = (
            "see that AWS_ENDPOINT_URL is right and the server can be reached; `forgeflow resume RUN` continues a run"
            " that stopped"
        )
    if mend is None and response is not None and response[0] == 403:
        mend = _MENDS["AccessDenied"]
    if mend is None and isinstance(error, ValueError):
        mend = "correct AWS_ENDPOINT_URL"
    return f"store {store!r} could not {doing} ({reason}): {mend or 'see docs/s3.md'}"


def _fault_of_response(status: int, code: str) -> Fault:
    faults: dict[int | str, Fault] = {
        "NoSuchKey": Fault.MISSING,
        "NoSuchUpload": Fault.VANISHED,
        409: Fault.CONFLICT,
        412: Fault.TAKEN,
        416: Fault.EMPTY,
    }
    known = faults.get(code) or faults.get(status)
    if known is not None:
        return known
    if code in _CREDENTIAL_CODES:
        return Fault.CREDENTIALS
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES:
        return Fault.TRANSIENT
    return Fault.FINAL


def _response(error: BaseException) -> tuple[int, str] | None:
    """Status and code of the server's answer, if the error is one."""
    cause = _client_error(error)
    return None if cause is None else _status_and_code(cause)


def _client_error(error: BaseException) -> ClientError | None:
    """The answer behind an error: s3fs raises its own, of this cause."""
    if isinstance(error, ClientError):
        return error
    return error.__cause__ if isinstance(error.__cause__, ClientError) else None


def _status_and_code(error: ClientError) -> tuple[int, str]:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, str(error.response.get("Error", {}).get("Code", ""))
