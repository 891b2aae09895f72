"""The digest of a checkpoint's weights, recomputed from its files alone.

A safetensors file is read as what it is, a JSON header before raw bytes: so nothing of torch is needed, and no
tensor is ever copied.

    8 bytes: length n of the header │ n bytes: {"name": {"dtype", "shape", "data_offsets"}, …} │ bytes
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What torch calls them, which is how the digest names them."""


_XXH3 = "xxh3-"
"""What a digest begins with that is made with it."""


class WeightsDigest:
    """Digest over names, dtypes, shapes and bytes of tensors, whatever their order and their files.

    Equal to the one that the trainer logs: made with XXH3, or with SHA-256 where `told`, what the log says, was. A tied
    tensor is stored once and counts under each of its names.

    Example:
        digest = WeightsDigest(fact.weights_digest, tied={"lm_head.weight": "model.embed_tokens.weight"})
        digest.add(key, data)
        digest.hexdigest()
    """

    def __init__(self, told: str, tied: Mapping[str, str]) -> None:
        self._is_sha256 = not told.startswith(_XXH3)
        self._aliases: dict[str, list[str]] = {}
        for alias, stored in tied.items():
            self._aliases.setdefault(stored, []).append(alias)
        self._by_name: dict[str, bytes] = {}

    def add(self, key: str, data: bytes) -> None:
        """Take the tensors of a file. Raises ValueError if it is no safetensors file."""
        for name, dtype, shape, content in _tensors(key, data):
            checksum = None if self._is_sha256 else xxhash.xxh3_128(content).hexdigest()
            for each in (name, *self._aliases.get(name, ())):
                head = f"{each}|{dtype}|{shape}|"
                if checksum is None:
                    own = hashlib.sha256(head.encode())
                    own.update(content)
                    self._by_name[each] = own.digest()
                else:
                    self._by_name[head] = f"{head}{checksum}\n".encode()

    def hexdigest(self) -> str:
        """The digest of all tensors so far."""
        parts = b"".join(self._by_name[name] for name in sorted(self._by_name))
        if self._is_sha256:
            return hashlib.sha256(parts).hexdigest()
        return _XXH3 + xxhash.xxh3_128(parts).hexdigest()


def _tensors(key: str, data: bytes) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    """Name, dtype, shape and bytes of each tensor of a file."""
    length = int.from_bytes(data[:8], "little")
    try:
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise TypeError("its header is no table of tensors")
        header.pop("__metadata__", None)
        content = memoryview(data)[8 + length :]
        for name, told in header.items():
            begin, end = told["data_offsets"]
            if not 0 <= begin <= end <= len(content):
                raise ValueError(f"tensor {name} lies outside of the file")
            shape = tuple(int(size) for size in told["shape"])
            yield name, _DTYPES[told["dtype"]], shape, content[begin:end]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{key} is no safetensors file: {error}") from error
