"""How the bytes of new weights come from the trainer's rank 0 into the engines.

Rank 0 may not have SGLang installed: these files speak its wire formats.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import shutil
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.broadcast import Broadcast, address_seen_by
from megatron_vespo.rollout.buckets import Bucket, Named, host_memory, in_thread, pack, spans
from megatron_vespo.rollout.engine_control import EngineControl, Receivers, Refused
from megatron_vespo.types import RunError

SHARED_MEMORY = Path("/dev/shm")
BUCKETS_BEYOND_STAGING = 3
"""In transfer, waiting, and being packed."""


class Transport(Protocol):
    """One way into the engines; lives as long as the trainer."""

    reaches_replicas: bool
    """Whether it also serves engines with data-parallel replicas."""
    in_session: bool
    """Whether SGLang (>= 0.5.23) takes its weights between begin_weight_update and end_weight_update."""
    staging_bytes: float
    """Most bytes of packed buckets that wait in memory until the engines pause; infinite if all are put elsewhere."""

    async def connect(self, receivers: Receivers) -> None:
        """Do what can be done with the engines of one push before they pause."""
        ...

    async def prepare(self, named: list[Named], staged: bool) -> Bucket:
        """Put tensors where they can be sent from."""
        ...

    async def transfer(self, buckets: AsyncIterator[Bucket], receivers: Receivers) -> None:
        """Bring all buckets into the paused engines; the receivers drops those that do not take part to the end."""
        ...

    async def close(self, receivers: Receivers) -> None:
        """Give back what stands between pushes; `receivers` has the engines that may still be there."""
        ...


def make_transport(cfg: RolloutConfig, device: torch.device) -> Transport:
    """The transport that a configuration asks for.

    Args:
        device: of the trainer's rank 0, where the tensors come from.
    """
    if cfg.sync_transport == "disk":
        assert cfg.sync_directory is not None  # checked by the configuration
        return Disk(cfg.sync_directory)
    if cfg.sync_transport == "shared_memory":
        return SharedMemory(cfg.sync_staging_bytes, cfg.sync_bucket_bytes, device)
    automatic = "nccl" if device.type == "cuda" else "gloo"
    return Broadcast(
        automatic if cfg.sync_backend == "auto" else cfg.sync_backend, device, cfg.sync_staging_bytes
    )


class SharedMemory:
    """Engines on this machine map the buckets: POSIX shared memory, or, from a GPU, its memory through CUDA IPC."""

    reaches_replicas = False
    in_session = True

    def __init__(self, staging_bytes: int, bucket_bytes: int, device: torch.device) -> None:
        self.staging_bytes: float = staging_bytes
        self._wanted_bytes = staging_bytes
        self._bucket_bytes = bucket_bytes
        self._device = device

    async def connect(self, receivers: Receivers) -> None:
        """Stage no more than there is room for; a file system that is written beyond its room kills the writer."""
        for engine in [engine for engine in receivers.active if not _is_here(engine.url)]:
            elsewhere = "rollout.sync_transport = 'shared_memory' reaches engines of rank 0's machine only; choose another"
            receivers.drop(engine, Refused(f"{engine.name} = at {engine.url}: {elsewhere}"))
        if self._device.type == "cpu":
            room = _free_bytes() - BUCKETS_BEYOND_STAGING * self._bucket_bytes
            self.staging_bytes = max(0, min(self._wanted_bytes, room))

    async def prepare(self, named: list[Named], staged: bool) -> Bucket:
        if self._device.type == "cpu":
            return await in_thread(pack, named, _shared)
        return await in_thread(pack, named, host_memory(self._device) if staged else self._on_device)

    async def transfer(self, buckets: AsyncIterator[Bucket], receivers: Receivers) -> None:
        async for bucket in buckets:
            num_ranks = sum(engine.num_ranks for engine in receivers.active)
            with self._offered(bucket.flat, num_ranks) as handles:
                payloads = _payloads(bucket, handles)
                requests = {
                    engine: [next(payloads) for _ in range(engine.num_ranks)] for engine in receivers.active
                }
                await receivers.each(lambda engine, requests=requests: _load(engine, requests[engine]))
            if not receivers.active:
                return

    async def close(self, receivers: Receivers) -> None:
        pass  # nothing stands

    def _on_device(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    @contextlib.contextmanager
    def _offered(self, flat: Tensor, num_readers: int) -> Iterator[list[_Rebuilt]]:
        """One handle for each reader, good for as long as the context."""
        if self._device.type == "cpu":
            with _named(flat, num_readers) as handle:
                yield [handle] * num_readers
            return
        flat = flat.to(self._device)
        torch.cuda.synchronize(self._device)
        yield [_ipc_handle(flat) for _ in range(num_readers)]  # each carries a count of its own


class _Rebuilt:
    """Pickles as a call, and so arrives as what the call returns."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


async def _load(engine: EngineControl, payloads: list[str]) -> None:
    request = {
        "serialized_named_tensors": payloads,
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    await engine.post("/update_weights_from_tensor", request)


def _payloads(bucket: Bucket, handles: list[_Rebuilt]) -> Iterator[str]:
    """For each handle SGLang's description of a flat bucket, whose classes SGLang lets through."""
    metadata = [
        SimpleNamespace(
            name=name, dtype=dtype, shape=torch.Size(shape), start_idx=start, end_idx=end, numel=end - start
        )
        for name, dtype, shape, start, end in spans(bucket)
    ]
    payloads: dict[_Rebuilt, str] = {}
    for handle in handles:
        if handle not in payloads:
            pickled = pickle.dumps({"flattened_tensor": handle, "metadata": metadata})
            payloads[handle] = base64.b64encode(pickled).decode()
        yield payloads[handle]


def _shared(num_bytes: int) -> Tensor:
    """Bytes in shared memory that other processes find by name; file descriptors would need a secret of both sides."""
    free = _free_bytes()
    if num_bytes > free:
        raise RunError(
            f"{SHARED_MEMORY} = {free:,} bytes free: a bucket of weights needs {num_bytes:,}; enlarge it (docker: --shm-size), "
            "lower rollout.sync_bucket_bytes, or choose another rollout.sync_transport"
        )
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def _named(flat: Tensor, num_readers: int) -> Iterator[_Rebuilt]:
    """The bytes under their name, which is gone afterwards even if a reader died before it looked.

    torch counts the readers, each of which must come exactly once, and the last one unlinks the name.  With one too many
    counted that is left to us.
    """
    storage: Any = flat.untyped_storage()
    manager, name, size = storage._share_filename_cpu_()
    for _ in range(num_readers + 1):
        storage._shared_incref()
    untyped = _Rebuilt(reductions.rebuild_storage_filename, torch.UntypedStorage, manager, name, size)
    typed = _Rebuilt(reductions.rebuild_typed_storage, untyped, torch.uint8)
    try:
        yield _Rebuilt(
            reductions.rebuild_tensor, torch.Tensor, typed, (0, torch.Size([len(flat)]), (1,), False)
        )
    finally:
        (SHARED_MEMORY / name.decode().lstrip("/")).unlink(missing_ok=True)


def _ipc_handle(flat: Tensor) -> _Rebuilt:
    """A CUDA tensor; SGLang looks for its device by uuid, since each process numbers the devices that it sees."""
    function: Any
    args: Any
    function, args = reductions.reduce_tensor(flat)
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    assert args[6] == flat.device.index, args  # torch's device argument
    return _Rebuilt(function, *args[:6], uuid, *args[7:])


def _is_here(url: str) -> bool:
    """Whether a server runs on this machine: our address on the way to it is then its own."""
    host = urlsplit(url).hostname or ""
    return socket.gethostbyname(host) == address_seen_by(url)


def _free_bytes() -> int:
    stat = os.statvfs(SHARED_MEMORY)
    return stat.f_bavail * stat.f_frsize


class Disk:
    """Safetensors files in a directory that every engine sees, for instance on a shared file system.

    Everything is written before the engines pause, under a name that comes into being when it is complete.  The directory
    belongs to one run: what it holds of earlier pushes is removed after each.
    """

    reaches_replicas = True
    in_session = False
    staging_bytes = float("inf")

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._partial = self._directory / ".partial"
        self._num_files = 0

    async def connect(self, receivers: Receivers) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._num_files = 0

    async def prepare(self, named: list[Named], staged: bool) -> Bucket:
        file = self._partial / f"model-{self._num_files:05d}.safetensors"
        self._num_files += 1
        return await in_thread(_write, file, named)

    async def transfer(self, buckets: AsyncIterator[Bucket], receivers: Receivers) -> None:
        async for _ in buckets:
            pass  # they are written
        complete = self._directory / f"version-{receivers.version:08d}-{uuid.uuid4().hex[:8]}"
        self._partial.rename(complete)
        request = {"model_path": str(complete), "flush_cache": False}
        await receivers.each(lambda engine: engine.post("/update_weights_from_disk", request))
        for older in self._directory.glob("version-*"):
            if older != complete:
                shutil.rmtree(
                    older, ignore_errors=True
                )  # one that hangs may hold it open: the next push tries again

    async def close(self, receivers: Receivers) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""As safetensors names them."""


def _write(file: Path, named: list[Named]) -> Bucket:
    """Write a bucket as one file, and return it without its bytes, which safetensors' layout takes as they are."""
    bucket = pack(named, host_memory(torch.device("cpu")))
    header = json.dumps(
        {
            name: {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
            for name, dtype, shape, start, end in spans(bucket)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.write(bucket.flat.numpy().data)
    return bucket._replace(flat=torch.empty(0, dtype=torch.uint8))
