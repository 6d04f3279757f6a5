"""A stream of named tensors, checked against the model and cut into flat buckets, some of them ahead of their use.

A bucket is the tensors' bytes one after the other in one storage, described by names, dtypes and shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_vespo.rollout.model import read_shapes, ties_embeddings
from megatron_vespo.types import RunError

Named = tuple[str, Tensor]
T = TypeVar("T")


class Bucket(NamedTuple):
    flat: Tensor
    """[bytes], uint8; empty where the transport has already put them elsewhere."""
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    """Name, dtype and shape of each tensor, in the order of the bytes."""


class Expected:
    """What the engine's model consists of.  SGLang ignores unknown names and answers 200, so that is checked here."""

    def __init__(self, model: Path) -> None:
        """
        Raises:
            ConfigError: the Hugging Face directory is incomplete.
        """
        self._shapes = read_shapes(model)
        self._optional = {"lm_head.weight"} if ties_embeddings(model) else set()

    def checked(self, named_tensors: Iterable[Named]) -> Iterator[Named]:
        """The same stream.

        Raises:
            RunError: on a tensor that the checkpoint lacks, or has otherwise, or that came already; at the end, if some did
                not come.
        """
        seen: set[str] = set()
        for name, tensor in named_tensors:
            if name in seen or self._shapes.get(name) != tuple(tensor.shape):
                expected = "once" if name in seen else self._shapes.get(name, "no tensor of that name")
                raise RunError(
                    f"weights = '{name}' {tuple(tensor.shape)}: the checkpoint has {expected}; mend the export"
                )
            seen.add(name)
            yield name, tensor
        missing = sorted(self._shapes.keys() - seen - self._optional)
        if missing:
            raise RunError(
                f"weights = {len(missing)} tensors missing, first '{missing[0]}': expected all {len(self._shapes)} of the "
                "checkpoint, because an engine keeps old ones in silence; mend the export"
            )


def cut(named_tensors: Iterable[Named], bucket_bytes: int) -> Iterator[list[Named]]:
    """Cut a stream of tensors into lists of at most `bucket_bytes` (one tensor, if it alone is larger).

    Within a bucket larger items come first: the receiver views the bytes in place, and every offset must be a
    multiple of the item size.
    """
    bucket: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield _emptied(bucket)
            size = 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield _emptied(bucket)


def pack(named: list[Named], allocate: Callable[[int], Tensor]) -> Bucket:
    """Copy tensors into one flat buffer; returns when they are there.

    Args:
        allocate: makes a uint8 tensor of so many bytes, on any device.
    """
    flat = allocate(sum(tensor.nbytes for _, tensor in named))
    pieces = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in named]
    if all(piece.device == flat.device for piece in pieces):
        torch.cat(pieces, out=flat)
    else:
        flat.copy_(torch.cat(pieces))  # joined where they are: one copy between devices
    if pieces[0].is_cuda:
        torch.cuda.synchronize(pieces[0].device)
    return Bucket(flat, tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named))


def host_memory(device: torch.device) -> Callable[[int], Tensor]:
    """Allocator of buckets on the host, from which copies to `device` are fast."""
    return functools.partial(torch.empty, dtype=torch.uint8, pin_memory=device.type == "cuda")


def spans(bucket: Bucket) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """Name, dtype, shape, first byte and end of each tensor in a bucket."""
    end = 0
    for name, dtype, shape in bucket.layout:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        yield name, dtype, shape, start, end


class BucketStream(AsyncIterator[Bucket]):
    """Buckets in the order of the tensors.  `staging_bytes` of them, and one more, are gathered ahead of their use.

    Tensors are taken from the iterator one bucket at a time, in a thread: its collectives may take long, or hang.
    """

    def __init__(
        self,
        buckets: Iterator[list[Named]],
        prepare: Callable[[list[Named], bool], Awaitable[Bucket]],
        staging_bytes: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            buckets: checked tensors, cut (`Expected.checked`, `cut`).
            prepare: packs a bucket; told whether it is one that waits in the staging memory.
            device: on which the iterator's collectives run.
        """
        self._buckets = buckets
        self._prepare = prepare
        self._staging_bytes = staging_bytes
        self._device = device
        self._ready: deque[Bucket] = deque()
        self._held_bytes = 0
        self._exhausted = False
        self._problem: RunError | None = None
        self._changed = asyncio.Condition()
        self._reading: asyncio.Future[Any] | None = None
        self.num_bytes = 0
        """So far, of all buckets."""
        self.gather_s = 0.0
        """Spent waiting for the iterator."""
        self.started = False
        """Whether a bucket was handed out."""
        self._filling = asyncio.ensure_future(self._fill())

    async def staged(self) -> None:
        """Return when nothing more can be gathered ahead; raise what the iterator raised, or what was wrong with it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._exhausted or not self._has_room())
        if self._problem:
            raise self._problem

    async def __anext__(self) -> Bucket:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready or self._exhausted)
            if self._problem:
                raise self._problem
            if not self._ready:
                raise StopAsyncIteration
            bucket = self._ready.popleft()
            self._held_bytes -= bucket.flat.nbytes
            self.started = True
            self._changed.notify_all()
            return bucket

    async def stop(self, until: float) -> bool:
        """Read no further; whether the iterator is free again, which takes as long as its step under way, or the deadline."""
        self._filling.cancel()
        if self._reading is None:
            return True
        await asyncio.wait([self._reading], timeout=max(until - time.monotonic(), 0))
        return self._reading.done()

    async def _fill(self) -> None:
        try:
            while named := await self._next():
                staged = not self.started and self._held_bytes < self._staging_bytes
                bucket = await self._prepare(named, staged)
                self.num_bytes += sum(tensor.nbytes for _, tensor in named)
                del named  # or it would live until the next bucket is complete
                await self._append(bucket)
        except RunError as err:
            self._problem = err
        except Exception as err:  # noqa: BLE001  # whatever the trainer's collectives raise
            self._problem = RunError(f"weights = {err!r}: gathering them failed; see the log of the trainer")
            self._problem.__cause__ = err
        async with self._changed:
            self._exhausted = True
            self._changed.notify_all()

    async def _next(self) -> list[Named] | None:
        began = time.monotonic()
        self._reading = in_thread(self._read)
        try:
            named = await asyncio.shield(self._reading)
        finally:
            self.gather_s += time.monotonic() - began
        self._reading = None  # it would keep the tensors alive
        return named

    @torch.no_grad()
    def _read(self) -> list[Named] | None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        return next(self._buckets, None)

    async def _append(self, bucket: Bucket) -> None:
        async with self._changed:
            self._ready.append(bucket)
            self._held_bytes += bucket.flat.nbytes
            self._changed.notify_all()
            await self._changed.wait_for(self._has_room)

    def _has_room(self) -> bool:
        return not self._ready or self._held_bytes < self._staging_bytes


def in_thread(work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Do something that blocks in a thread of its own, which does not keep the program from ending should it hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(forget)

    def settle(result: T | None, err: BaseException | None) -> None:
        if future.cancelled():
            return
        if err is not None:
            future.set_exception(err)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result, err = None, None
        try:
            result = work(*args)
        except BaseException as raised:  # noqa: BLE001  # belongs to whoever awaits the future
            err = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, result, err)

    threading.Thread(target=run, daemon=True, name=getattr(work, "__name__", "work")).start()
    return future


def forget(future: asyncio.Future[Any]) -> None:
    """Done callback of what may fail when nobody waits for it any more."""
    if not future.cancelled():
        future.exception()


def wire(bucket: Bucket) -> Mapping[str, list[Any]]:
    """A bucket's layout as SGLang's requests spell it."""
    return {
        "names": [name for name, _, _ in bucket.layout],
        "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, _ in bucket.layout],
        "shapes": [list(shape) for _, _, shape in bucket.layout],
    }


def _emptied(bucket: list[Named]) -> list[Named]:
    """What was in it, larger items first; whoever takes that is the only one to keep the tensors alive."""
    content = sorted(bucket, key=lambda named: named[1].element_size(), reverse=True)
    bucket.clear()
    return content
