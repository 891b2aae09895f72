"""A store in a bucket of S3, or of a server that speaks its protocol.

Endpoint, region and credentials are those of AWS's environment variables and profiles. An object is created by a
request that carries `If-None-Match: *`, of which the server lets one succeed. Nothing is cached: each read and each
listing asks the server.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from s3fs import S3FileSystem

from storage.contract import ObjectInfo, ObjectNotFound, check_key, check_prefix
from storage.s3_calls import Calls, Patience
from storage.s3_faults import Fault
from storage.s3_probe import probe
from storage.s3_upload import WHOLE_BYTES, Source, Upload, gather

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_READS_AT_ONCE = 32
_PAGE_KEYS = 1000
"""Most that a server tells at once."""


@dataclass(frozen=True, slots=True)
class S3Store:
    """A store in a bucket. Opening it touches no network; processes may be handed it, or its URI."""

    bucket: str
    """Name of the bucket, which must exist."""
    prefix: str
    """What all keys in the bucket begin with, without '/' at its end; may be empty."""
    patience: Patience = field(default=Patience(), compare=False)
    """How long to wait for a server that does not do well."""

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """The store at `s3://bucket/prefix`. Raises ValueError."""
        bucket, _, prefix = uri[len("s3://") :].partition("/")
        if "@" in bucket:
            raise ValueError(
                "the URI of a store on S3 holds no credentials: put them into AWS's environment variables or a profile"
            )
        prefix = prefix.rstrip("/")
        try:
            if not _BUCKET.fullmatch(bucket):
                raise ValueError(f"{bucket!r} is no name of a bucket")
            if prefix:
                check_key(prefix)
        except ValueError as error:
            raise ValueError(
                f"store {uri!r} is not at s3://BUCKET/PREFIX ({error}): correct it"
            ) from None
        return cls(bucket, prefix)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._write(key, Source.of_bytes(data), only_new=True)

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        with path.open("rb") as file:
            source = Source.of_file(file.fileno())
            # The server says only in the end that the object exists, when all of it has been sent.
            if source.size > WHOLE_BYTES and self.exists(key):
                return False
            return self._write(key, source, only_new=True)

    def replace(self, key: str, data: bytes) -> None:
        self._write(key, Source.of_bytes(data), only_new=False)

    def delete(self, key: str) -> None:
        place = self._place(key)
        self.requests.run(
            self.requests.call(
                f"delete {key!r}",
                lambda files: files._call_s3("delete_object", **place),
                expected=frozenset({Fault.MISSING}),
            )
        )

    def read(self, key: str) -> bytes:
        return self.requests.run(self._read(key))

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        return self.requests.run(self._read_many(keys))

    def exists(self, key: str) -> bool:
        # Not by a HEAD request, whose answer does not tell a missing object from a missing bucket.
        answer = self.requests.run(self._get(f"look up {key!r}", key, Range="bytes=0-0"))
        return answer is not Fault.MISSING

    def listing(self, prefix: str) -> list[ObjectInfo]:
        return self.requests.run(self._listing(prefix))

    def keys(self, prefix: str) -> list[str]:
        return [info.key for info in self.listing(prefix)]

    def folders(self, prefix: str) -> list[str]:
        return self.requests.run(self._folders(prefix))

    def local_path(self, key: str) -> None:
        check_key(key.removesuffix("/"))

    def probe(self) -> None:
        probe(self)

    def put_in_parts_if_absent(self, key: str, data: bytes) -> bool:
        """The same as `put_if_absent` in the way of a big file, however few the bytes."""
        upload = self._upload(key, Source.of_bytes(data), only_new=True)
        return self.requests.run(upload.write(in_parts=True))

    @property
    def requests(self) -> Calls:
        """What makes the requests to the server."""
        return Calls(self.uri, self.patience)

    @property
    def _base(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _place(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self.bucket, "Key": self._base + key}

    def _write(self, key: str, source: Source, *, only_new: bool) -> bool:
        return self.requests.run(self._upload(key, source, only_new).write())

    def _upload(self, key: str, source: Source, only_new: bool) -> Upload:
        return Upload(self.requests, self._place(key), f"write {key!r}", source, only_new)

    async def _get(self, doing: str, key: str, **arguments: str) -> bytes | Fault:
        place = self._place(key)

        async def request(files: S3FileSystem) -> bytes:
            answer = await files._call_s3("get_object", **place, **arguments)
            async with answer["Body"] as body:
                return await body.read()

        return await self.requests.call(
            doing, request, expected=frozenset({Fault.MISSING, Fault.EMPTY})
        )

    async def _read(self, key: str) -> bytes:
        data = await self._get(f"read {key!r}", key)
        if isinstance(data, Fault):
            raise ObjectNotFound(f"store {self.uri} holds no object {key!r}")
        return data

    async def _read_many(self, keys: Sequence[str]) -> list[bytes]:
        turn = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(key: str) -> bytes | ObjectNotFound:
            async with turn:
                try:
                    return await self._read(key)
                except ObjectNotFound as missing:
                    return missing

        contents = await gather(*map(read, keys))
        for content in contents:
            if isinstance(content, ObjectNotFound):
                raise content
        return contents

    async def _listing(self, prefix: str) -> list[ObjectInfo]:
        infos = []
        async for page in self._pages(prefix):
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._base)
                if not key.endswith("/"):  # Consoles make such objects to show a folder.
                    infos.append(ObjectInfo(key, found["Size"], found["LastModified"].timestamp()))
        return sorted(infos, key=lambda info: info.key)

    async def _folders(self, prefix: str) -> list[str]:
        names = set()
        async for page in self._pages(prefix, Delimiter="/"):
            for found in page.get("CommonPrefixes", []):
                names.add(found["Prefix"].removeprefix(self._base + prefix).rstrip("/"))
        return sorted(names)

    async def _pages(self, prefix: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        check_prefix(prefix)
        arguments |= {
            "Bucket": self.bucket,
            "Prefix": self._base + prefix,
            "MaxKeys": _PAGE_KEYS,
        }
        while True:
            page: Any = await self.requests.call(
                f"list {prefix!r}",
                lambda files: files._call_s3("list_objects_v2", **arguments),
            )
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]
