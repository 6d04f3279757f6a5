"""Pieces of parameters in safetensors files: written by the ranks of one layout, read by those of any other.

A Megatron parameter is shard `index` of `size` of one or several Hugging Face tensors, and a rank may hold only a
range of that shard.  A piece says so in these words, which name no rank and no axis of a layout: from all pieces of
a parameter its Hugging Face tensors can be put together, and cut again in another way.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.hf_weights import Cut, join, shard_of, split
from megatron_vespo.trainer.layout import Groups
from megatron_vespo.types import RunError

WEIGHT = "weight"
"""The values of a piece that every piece has: the master weight, or the weight itself where nothing trains it."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_CHUNK_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Piece:
    """Values [start, end) of a flattened shard of a parameter."""

    names: tuple[str, ...]
    """Hugging Face names."""
    how: str
    """As in `hf_weights.Cut`."""
    index: int
    size: int
    """Which shard of how many."""
    shape: tuple[int, ...]
    """Of the shard."""
    start: int
    end: int
    kinds: tuple[str, ...]
    """What is stored of it, each under `key(kind)`."""

    def key(self, kind: str) -> str:
        return f"{'+'.join(self.names)}[{self.index}/{self.size}][{self.start}:{self.end}].{kind}"

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of all shards together."""
        rows, *columns = self.shape
        if self.how == "columns":
            return rows, columns[0] * self.size
        return rows * self.size, *columns


def piece_of(
    cut: Cut, parameter: Tensor, groups: Groups, start: int, end: int, kinds: tuple[str, ...]
) -> Piece:
    """The piece that [start, end) of this rank's `parameter` is."""
    index, size = shard_of(cut, groups)
    return Piece(cut.names, cut.how, index, size, tuple(parameter.shape), start, end, kinds)


# -------------------------------------------------------------------------------------------------- writing


class Snapshot:
    """A copy of tensors in host memory, laid out as the safetensors file that `write` makes of it.

    The memory is kept for the next `take`, which is usually of the same size.  It is pinned where tensors come from a
    GPU, which is several times as fast; torch rounds such memory up to a power of two.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._num_bytes = 0

    def take(self, tensors: Mapping[str, Tensor | int], pieces: Sequence[Piece]) -> None:
        """Copy `tensors`; a number stands for as many float32 zeros."""
        entries = sorted(tensors.items(), key=lambda entry: -_itemsize(entry[1]))  # so that each is aligned
        ends = []
        for _, tensor in entries:
            size = tensor if isinstance(tensor, int) else tensor.numel()
            ends.append((ends[-1] if ends else 0) + size * _itemsize(tensor))
        self._num_bytes = ends[-1] if ends else 0
        if len(self._memory) < self._num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is made
            self._memory = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        header: dict[str, Any] = {"__metadata__": {"pieces": json.dumps([asdict(piece) for piece in pieces])}}
        for (name, tensor), begin, end in zip(entries, [0, *ends], ends, strict=False):
            target = self._memory[begin:end]
            dtype = torch.float32 if isinstance(tensor, int) else tensor.dtype
            size = (end - begin) // dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": [size], "data_offsets": [begin, end]}
            if isinstance(tensor, int):
                target.zero_()
            else:
                target.view(dtype).copy_(tensor.detach().view(-1), non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        encoded = json.dumps(header).encode()
        padded = encoded + b" " * (-len(encoded) % 8)
        self._header = struct.pack("<Q", len(padded)) + padded

    def write(self, file: BinaryIO, see: Callable[[Any], object]) -> None:
        """Write a safetensors file; `see` gets the same bytes, to count or hash them."""
        content: Any = (
            self._memory.numpy()
        )  # a buffer, which numpy's annotations do not say before Python 3.12
        for data, size in (
            (memoryview(self._header), len(self._header)),
            (memoryview(content), self._num_bytes),
        ):
            for begin in range(0, size, _CHUNK_BYTES):
                chunk = data[begin : min(begin + _CHUNK_BYTES, size)]
                file.write(chunk)
                see(chunk)


def _itemsize(tensor: Tensor | int) -> int:
    return 4 if isinstance(tensor, int) else tensor.element_size()


# -------------------------------------------------------------------------------------------------- reading


class PieceFiles:
    """All pieces in a set of safetensors files, and what can be put together from them.

    Raises:
        RunError: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._at: dict[tuple[str, ...], list[tuple[Piece, Any]]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                pieces = json.loads(file.metadata()["pieces"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
                raise RunError(
                    f"checkpoint file '{path}': cannot be read ({err}); resume from another one"
                ) from err
            for fields in pieces:
                piece = Piece(**fields | {n: tuple(fields[n]) for n in ("names", "shape", "kinds")})
                self._at.setdefault(piece.names, []).append((piece, file))

    def check(self, wanted: Piece) -> None:
        """Whether `read` can give the wanted piece.

        Raises:
            RunError: parts of the parameter are missing, stored twice, or of another shape.
        """
        stored = [piece for piece, _ in self._at.get(wanted.names, ())]
        name = " + ".join(wanted.names)
        if not stored:
            raise RunError(f"parameter {name}: is not in the checkpoint; it is of another model")
        if odd := next(
            (p for p in stored if (p.how, p.whole_shape) != (wanted.how, wanted.whole_shape)), None
        ):
            raise RunError(
                f"parameter {name}: has shape {odd.whole_shape} ({odd.how}) in the checkpoint, this model has "
                f"{wanted.whole_shape} ({wanted.how}); it is of another model"
            )
        if missing := next((kind for p in stored for kind in wanted.kinds if kind not in p.kinds), None):
            raise RunError(
                f"parameter {name}: its {missing} is not in the checkpoint, because it was frozen in the run that wrote it; "
                "freeze it again"
            )
        size = stored[0].size
        for index in range(size):
            ranges = sorted((p.start, p.end) for p in stored if (p.index, p.size) == (index, size))
            end = math.prod(stored[0].shape)
            if [0, *(b for _, b in ranges)] != [*(a for a, _ in ranges), end]:
                raise RunError(
                    f"parameter {name}: the checkpoint has {ranges} of shard {index} of {size}, expected all of [0, {end}) "
                    "once; resume from another one"
                )
        if any(p.size != size for p in stored):
            raise RunError(
                f"parameter {name}: the checkpoint has shards of several divisions; resume from another one"
            )

    def read(self, wanted: Piece, kind: str, shape: ModelShape) -> Tensor:
        """[end - start] of a piece that `check` has passed; it may lie in the file, so it is to be copied."""
        some = self._at[wanted.names][0][0]
        if some.size == wanted.size:
            return self._of_shard(wanted.names, wanted.index, wanted.start, wanted.end, kind)
        shards = [
            self._of_shard(wanted.names, index, 0, math.prod(some.shape), kind).view(some.shape)
            for index in range(some.size)
        ]
        wholes = join(wanted.how, shards, shape)
        mine = split(wanted.how, wholes, wanted.index, wanted.size, shape)
        return mine.reshape(-1)[wanted.start : wanted.end]

    def _of_shard(self, names: tuple[str, ...], index: int, start: int, end: int, kind: str) -> Tensor:
        """[start, end) of a flattened shard."""
        pieces = sorted((p for p in self._at[names] if p[0].index == index), key=lambda p: p[0].start)
        parts = [
            file.get_slice(p.key(kind))[max(start, p.start) - p.start : min(end, p.end) - p.start]
            for p, file in pieces
            if p.start < end and start < p.end
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_tensors(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file whose names begin with `prefix`, without it."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            if name.startswith(prefix):
                yield name.removeprefix(prefix), file.get_tensor(name)
