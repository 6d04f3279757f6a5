"""Choices of experts as bytes: narrow, a sixth of what engines send or less, and readable alone.

A blob is a header and one zstd frame.  Experts of a token and layer are a set: what replay and comparison need.  By default
they are stored sorted, as differences, which takes 5.3 bytes for 8 of 128 (the engine's base64 of int32: 42.7); with
`ordered` they keep their order.  Sorting and summing run over planes, one for each of the K places, because numpy is
many times faster along whole planes than along a last axis of 8.

Shape key:  R rows (processed tokens), L layers with a router, K experts per token, E experts.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pybase64
from numpy.typing import NDArray

from megatron_vespo.types import Experts, Mask, RunError

_VERSION = 1
_HEADER = struct.Struct("<4sBBHIIII")
"""Magic, version, flags, K, R, L, E, and the checksum of all that stands before it and after it."""
_MAGIC = b"MVRT"
_ORDERED, _HAS_MISSING = 1, 2
_ZSTD = pa.Codec("zstd", compression_level=1)
"""Differences leave nothing to find but their frequencies; higher levels search longer for the same size."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a blob says about itself."""

    num_rows: int
    num_layers: int
    topk: int
    num_experts: int
    ordered: bool
    """Whether the order of a token's experts was kept; else they ascend."""
    has_missing: bool
    """Whether rows are missing: they decode to zeros."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every id."""
        return narrowest(self.num_experts)

    @property
    def num_bytes(self) -> int:
        """Of the body before compression."""
        ids = self.num_rows * self.num_layers * self.topk * self.dtype.itemsize
        return ids + (-(-self.num_rows // 8) if self.has_missing else 0)


def narrowest(num_experts: int) -> np.dtype[Any]:
    """uint8 up to 256 experts, else uint16."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def encode(experts_RLK: NDArray[np.integer[Any]], num_experts: int, *, ordered: bool = False) -> bytes:
    """The blob of choices of experts; a row that holds a negative id, as some frameworks mark it, is missing as a whole.

    Raises:
        RunError: not [R, L, K], or an id that does not exist.
    """
    experts = np.asarray(experts_RLK)
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise RunError(
            f"experts = {experts.dtype} {list(experts.shape)}: expected whole numbers [rows, layers, experts]"
        )
    if num_experts > 1 << 16:
        raise RunError(f"num_experts = {num_experts}: expected at most 65536, what uint16 holds")
    experts, missing = without_sentinels(experts)
    header = Header(
        num_rows=experts.shape[0],
        num_layers=experts.shape[1],
        topk=experts.shape[2],
        num_experts=num_experts,
        ordered=ordered,
        has_missing=missing is not None,
    )  # fmt: skip
    planes = np.ascontiguousarray(np.moveaxis(narrow(experts, num_experts), -1, 0))
    if not ordered:
        _sort(planes)
        for place in range(header.topk - 1, 0, -1):
            planes[place] -= planes[place - 1]
    bitmap = b"" if missing is None else np.packbits(missing).tobytes()
    body = _ZSTD.compress(bitmap + _bytes_of(planes), asbytes=True)
    flags = _ORDERED * ordered | _HAS_MISSING * header.has_missing
    head = (_MAGIC, _VERSION, flags, header.topk, header.num_rows, header.num_layers, num_experts)
    return _HEADER.pack(*head, _checksum(_HEADER.pack(*head, 0), body)) + body


def read_header(blob: bytes) -> Header:
    """What a blob holds, without decoding it.

    Raises:
        RunError: no such blob, or one of another version.
    """
    if len(blob) < _HEADER.size or blob[: len(_MAGIC)] != _MAGIC:
        raise RunError(
            f"routes = {blob[:8]!r}... ({len(blob)} bytes): expected a blob of routes.py, which begins with {_MAGIC!r}"
        )
    _, version, flags, topk, num_rows, num_layers, num_experts, _ = _HEADER.unpack_from(blob)
    if version != _VERSION:
        raise RunError(
            f"routes of version {version}: this package reads version {_VERSION}; read them with the package that wrote them"
        )
    return Header(
        num_rows=num_rows,
        num_layers=num_layers,
        topk=topk,
        num_experts=num_experts,
        ordered=bool(flags & _ORDERED),
        has_missing=bool(flags & _HAS_MISSING),
    )


def decode(blob: bytes) -> Experts:
    """[R, L, K] in the narrowest type; missing rows are zeros, which no router chooses.

    Raises:
        RunError: no such blob, one of another version, cut short or changed.
    """
    header, body = read_header(blob), _intact(blob)
    planes = _planes(body, header)
    experts = np.empty((header.num_rows, header.num_layers, header.topk), header.dtype)
    total = np.zeros(experts.shape[:2], header.dtype)
    for place in range(header.topk):
        if header.ordered:
            experts[..., place] = planes[place]
        else:
            total += planes[place]
            experts[..., place] = total
    return experts


def missing_rows(blob: bytes) -> Mask:
    """[R] which rows were marked as missing when the blob was written.

    Raises:
        RunError: as `decode`.
    """
    header, body = read_header(blob), _intact(blob)
    if not header.has_missing:
        return np.zeros(header.num_rows, np.bool_)
    content = np.frombuffer(_ZSTD.decompress(body, header.num_bytes), np.uint8)
    return np.unpackbits(content, count=header.num_rows).astype(np.bool_)


def narrow(experts: NDArray[np.integer[Any]], num_experts: int) -> Experts:
    """The same ids in the narrowest type, C-contiguous.

    Raises:
        RunError: an id that does not exist.
    """
    if experts.size and not (experts.min() >= 0 and experts.max() < num_experts):
        raise RunError(f"expert ids {experts.min()}..{experts.max()}: expected 0..{num_experts - 1}")
    return np.ascontiguousarray(experts, narrowest(num_experts))


def without_sentinels(experts_RLK: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], Mask | None]:
    """The same with zeros in rows that hold a negative id, and [R] which rows those are; None where there are none."""
    if not experts_RLK.size or experts_RLK.min() >= 0:
        return experts_RLK, None
    missing: Mask = np.any(experts_RLK < 0, axis=(1, 2))
    return np.where(missing[:, None, None], 0, experts_RLK), missing


def from_base64(text: str, num_layers: int, topk: int) -> NDArray[np.int32]:
    """[R, num_layers, topk] of what SGLang sends: base64 of int32, without its shape; all layers, dense ones as zeros.

    Raises:
        RunError: no base64, or no whole number of rows.
    """
    try:
        flat = np.frombuffer(pybase64.b64decode(text, validate=True), "<i4")
    except ValueError as err:  # binascii.Error is one
        raise RunError(f"routed experts that are no base64 int32 ({err}): expected them") from err
    if flat.size % (num_layers * topk):
        raise RunError(
            f"{flat.size} routed experts: expected a multiple of {num_layers} layers x {topk} experts"
        )
    return flat.reshape(-1, num_layers, topk)


def _sort(planes_KRL: NDArray[Any]) -> None:
    """Ascending along the first axis, in place, by Batcher's merge exchange: a fixed list of comparisons of planes."""
    smaller = np.empty_like(planes_KRL[0]) if len(planes_KRL) else planes_KRL
    for low, high in _exchanges(len(planes_KRL)):
        np.minimum(planes_KRL[low], planes_KRL[high], out=smaller)
        np.maximum(planes_KRL[low], planes_KRL[high], out=planes_KRL[high])
        planes_KRL[low] = smaller


def _exchanges(num: int) -> Iterator[tuple[int, int]]:
    """Pairs of places to compare and exchange, in order (Knuth, The Art of Computer Programming 3, algorithm 5.2.2M)."""
    stride = top = (1 << (num - 1).bit_length()) >> 1
    while stride:
        merge, rest, distance = top, 0, stride
        while True:
            yield from ((i, i + distance) for i in range(num - distance) if i & stride == rest)
            if merge == stride:
                break
            distance, merge, rest = merge - stride, merge >> 1, stride
        stride >>= 1


def _bytes_of(planes: NDArray[Any]) -> bytes:
    """All low bytes, then all high bytes (nearly all zero in differences)."""
    if planes.itemsize == 1:
        return planes.tobytes()
    return b"".join((planes >> shift).astype(np.uint8).tobytes() for shift in (0, 8))


def _planes(body: memoryview, header: Header) -> NDArray[Any]:
    """[K, R, L]"""
    try:
        content = np.frombuffer(_ZSTD.decompress(body, header.num_bytes), np.uint8)
    except (OSError, ValueError) as err:  # ArrowInvalid is a ValueError
        raise RunError(
            f"routes of {header.num_rows} rows: do not unpack ({err}); the writer is at fault"
        ) from err
    shape = (header.dtype.itemsize, header.topk, header.num_rows, header.num_layers)
    byte_planes = content[len(content) - int(np.prod(shape)) :].reshape(shape)
    if header.dtype.itemsize == 1:
        return byte_planes[0]
    return byte_planes[0] | byte_planes[1].astype(header.dtype) << 8


def _intact(blob: bytes) -> memoryview:
    """The body, if it is what was written."""
    *head, checksum = _HEADER.unpack_from(blob)
    body = memoryview(blob)[_HEADER.size :]
    if _checksum(_HEADER.pack(*head, 0), body) != checksum:
        raise RunError(
            f"routes of {len(blob)} bytes: cut short or changed since they were written; write the file again"
        )
    return body


def _checksum(head: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))
