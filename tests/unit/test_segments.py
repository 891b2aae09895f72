"""Memory that processes share: who reads it keeps it from being written, and nothing of it outlives them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest
import torch

from forge_core.weights.segments import Handle, Pool, Segment, attach, handle_of

SIZE = 3 * 4096 + 5
SECONDS = 60.0


def _reader(pipe: Connection) -> None:
    """Attach what it is told, tell the sum of it, and let go when told so."""
    while (handle := pipe.recv()) is not None:
        view = attach(handle)[1:]
        pipe.send((int(view.numpy().sum(dtype="int64")), handle_of(view)))
        pipe.recv()
        del view
        pipe.send("let go")


class Reader:
    """A process that reads segments of this one. Forked, for it is quick and has no threads."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=_reader, args=(theirs,))
        self.process.start()

    def hear(self) -> object:
        assert self.pipe.poll(SECONDS), "the reader is silent"
        return self.pipe.recv()

    def read(self, segment: torch.Tensor) -> object:
        self.pipe.send(handle_of(segment))
        found, own = self.hear()  # type: ignore[misc]
        assert own is None, "a view is no segment"
        return found

    def let_go(self) -> None:
        self.pipe.send("let go")
        assert self.hear() == "let go"


@pytest.fixture
def reader() -> Reader:
    reader = Reader()
    yield reader
    reader.process.kill()
    reader.process.join()


def test_what_is_read_is_not_written_until_it_is_let_go(reader: Reader) -> None:
    pool = Pool()
    [first] = pool.take([SIZE])
    first.fill_(2)
    assert reader.read(first) == 2 * (SIZE - 1)
    [second] = pool.take([SIZE])
    assert second.data_ptr() != first.data_ptr()
    second.fill_(3)
    reader.let_go()
    # Both are free now, and no third is made.
    assert {each.data_ptr() for each in pool.take([SIZE, SIZE])} == {
        first.data_ptr(),
        second.data_ptr(),
    }
    # What the process has mapped once, it finds again, with what is in it now.
    second.fill_(4)
    assert reader.read(second) == 4 * (SIZE - 1)
    reader.let_go()
    second.fill_(5)
    assert reader.read(second) == 5 * (SIZE - 1)


def test_a_reader_that_is_killed_keeps_nothing(reader: Reader) -> None:
    pool = Pool()
    [first] = pool.take([SIZE])
    reader.read(first)
    assert pool.take([SIZE])[0].data_ptr() != first.data_ptr()
    os.kill(reader.process.pid or 0, signal.SIGKILL)
    reader.process.join(SECONDS)
    assert len({each.data_ptr() for each in pool.take([SIZE, SIZE])} & {first.data_ptr()}) == 1


def test_who_keeps_it_for_others_keeps_it_when_its_owner_has_let_go() -> None:
    segment = Segment(SIZE)
    segment.tensor.fill_(7)
    told = handle_of(segment.tensor)
    assert told is not None
    kept = attach(told, is_read=False)
    ours = handle_of(kept)
    assert ours is not None and ours.descriptor != told.descriptor and ours.owner == told.owner
    del segment
    with pytest.raises(OSError):
        attach(told)
    assert int(attach(ours).sum()) == 7 * SIZE


def test_another_file_under_the_same_number_is_refused() -> None:
    segment = Segment(SIZE)
    told = handle_of(segment.tensor)
    assert told is not None
    for wrong in (
        Handle(pid=told.pid, descriptor=told.descriptor, inode=told.inode + 1, size_bytes=SIZE, owner=1),
        Handle(pid=told.pid, descriptor=told.descriptor, inode=told.inode, size_bytes=SIZE + 1, owner=1),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"process {told.pid} no longer has the memory"):
            attach(wrong)
    assert segment.is_free


def test_a_pool_keeps_no_more_than_two_versions() -> None:
    pool = Pool()
    sizes = [SIZE, 2 * SIZE]
    versions = []
    for _ in range(5):
        buckets = pool.take(sizes)
        told = [handle_of(bucket) for bucket in buckets]
        versions.append([attach(each) for each in told if each is not None])
        del versions[:-2]
    assert len(pool._segments) <= 3 * len(sizes)
    versions.clear()
    pool.take(sizes)
    assert len(pool._segments) == 2 * len(sizes)
    pool.take([7])
    pool.take([7])
    assert pool._segments[0].tensor.numel() == 7
    assert len(pool._segments) == 2
