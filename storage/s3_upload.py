"""Writing an object to S3: in one request, or in parts that count only once the last request is answered."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from s3fs import S3FileSystem

from storage.contract import StoreError
from storage.s3_calls import Calls
from storage.s3_faults import Fault

_logger = logging.getLogger("storage.s3")

WHOLE_BYTES = 16 * 2**20
"""Objects up to this size are written by one request."""
PART_BYTES = 8 * 2**20
"""Size of a part of a larger one. S3 takes 10,000 parts of at least 5 MiB."""
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
_ATTEMPTS = 3
_ABORT_SECONDS = 5.0
_AGAIN = (Fault.VANISHED, Fault.CONFLICT)


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes of an object, of which no more than a few parts are asked for at a time."""

    size: int
    """How many there are."""
    read: Callable[[int, int], bytes]
    """Takes an offset and a number of bytes."""

    @classmethod
    def of_bytes(cls, data: bytes) -> "Source":
        """Bytes in memory."""
        return cls(len(data), lambda offset, length: data[offset : offset + length])

    @classmethod
    def of_file(cls, descriptor: int) -> "Source":
        """An open file."""
        size = os.fstat(descriptor).st_size
        return cls(size, lambda offset, length: os.pread(descriptor, length, offset))


@dataclass(frozen=True, slots=True)
class Upload:
    """One write of one object."""

    calls: Calls
    """Makes the requests."""
    place: dict[str, str]
    """Bucket and key, as S3 names them."""
    doing: str
    """What a message says is done."""
    source: Source
    """What is written."""
    only_new: bool
    """Whether an object that stands under the key already is left alone."""

    async def write(self, *, in_parts: bool | None = None) -> bool:
        """Write it; False if it was there already. Raises StoreError.

        Whether in parts follows from the size unless it is given.
        """
        if in_parts if in_parts is not None else self.source.size > WHOLE_BYTES:
            return await self._write_in_parts()
        data = self.source.read(0, self.source.size)
        answer = await self.calls.call(
            self.doing,
            lambda files: files._call_s3("put_object", Body=data, **self.place, **self._condition),
            expected=frozenset({Fault.TAKEN}) if self.only_new else frozenset(),
            num_bytes=len(data),
        )
        return answer is not Fault.TAKEN

    async def _write_in_parts(self) -> bool:
        for _ in range(_ATTEMPTS):
            created = await self._call("create_multipart_upload")
            upload = {"UploadId": created["UploadId"]}
            try:
                answer = await self._fill(upload)
            except BaseException:
                await self._abort(upload)
                raise
            if answer not in _AGAIN:
                if answer is Fault.TAKEN:
                    await self._abort(upload)
                return answer is not Fault.TAKEN
            # Either our last request was done and its answer lost, which the next round finds out, or another writer
            # was faster.
            _logger.warning(
                "store %s could not %s (%s): all parts again", self.calls.store, self.doing, answer
            )
            await self._abort(upload)
        raise StoreError(
            f"store {self.calls.store!r} could not {self.doing} (its parts were lost {_ATTEMPTS} times): see that"
            " nothing else aborts uploads in this bucket"
        )

    async def _fill(self, upload: dict[str, str]) -> Any:
        """Send all parts and make them an object; the fault, if that is not to be."""
        size = max(PART_BYTES, -(-self.source.size // _MAX_PARTS))
        offsets = range(0, max(self.source.size, 1), size)
        turn = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def send(number: int, offset: int) -> dict[str, Any]:
            async with turn:
                data = await asyncio.to_thread(self.source.read, offset, size)
                part = {"PartNumber": number, **upload}
                answer = await self._call("upload_part", len(data), Body=data, **part)
                return {"PartNumber": number, "ETag": answer["ETag"]}

        parts = await gather(*(send(number, offset) for number, offset in enumerate(offsets, 1)))
        faults = {*_AGAIN, *((Fault.TAKEN,) if self.only_new else ())}
        return await self.calls.call(
            self.doing,
            lambda files: files._call_s3(
                "complete_multipart_upload",
                MultipartUpload={"Parts": parts},
                **self.place,
                **upload,
                **self._condition,
            ),
            expected=frozenset(faults),
        )

    async def _call(self, method: str, num_bytes: int = 0, /, **arguments: Any) -> Any:
        def request(files: S3FileSystem) -> Any:
            return files._call_s3(method, **self.place, **arguments)

        return await self.calls.call(self.doing, request, num_bytes=num_bytes)

    async def _abort(self, upload: dict[str, str]) -> None:
        """Let the server forget the parts. If it does not, they cost room and nothing else."""
        patience = replace(self.calls.patience, deadline_seconds=_ABORT_SECONDS)
        try:
            await replace(self.calls, patience=patience).call(
                self.doing,
                lambda files: files._call_s3("abort_multipart_upload", **self.place, **upload),
                expected=frozenset({Fault.VANISHED}),
            )
        except StoreError as error:
            _logger.warning("parts of an upload that was broken off were left behind: %s", error)

    @property
    def _condition(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self.only_new else {}


async def gather(*works: Any) -> list[Any]:
    """The results of all, in order. At the first error the others are broken off."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
