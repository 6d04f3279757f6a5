"""The weights of a simulated engine: digests of the bytes that it was given, and the groups through which they come.

What arrives is real: broadcasts are received in real process groups.  Nothing is computed with it.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import ProcessGroupGloo

GROUP_TIMEOUT = timedelta(minutes=30)
ROLES = {
    "tp_rank": 0,
    "tp_size": 1,
    "dp_rank": 0,
    "dp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "rank": 0,
    "size": 1,
}


class Refused(Exception):
    """Answered with HTTP 400; the message is the engine's."""


class Weights:
    """What one engine holds.  Call the methods that move bytes from a thread of its own."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._groups: dict[str, ProcessGroupGloo] = {}
        self.num_bytes = 0
        """Received since the start."""

    @cached_property
    def _checksums(self) -> dict[str, str]:
        return _of_directory(self._model)

    def report(self) -> dict[str, Any]:
        """As SGLang's weights checker, but under the names of the checkpoint: nothing is fused here."""
        checksum = _overall(self._checksums)
        rank = {
            "checksums": dict(self._checksums),
            "per_gpu_checksum": checksum,
            "parallelism_info": [{"role": "target", **ROLES}],
        }
        return {"ranks": [rank], "per_engine_checksum": hashlib.sha256(checksum.encode()).hexdigest()}

    def load(self, model: Path) -> None:
        """
        Raises:
            Refused: there are no weights.
        """
        if not any(model.glob("*.safetensors")):
            raise Refused(f"Failed to get weights iterator: no weights at '{model}'.")
        self._checksums |= _of_directory(model)

    def join(self, invitation: Mapping[str, Any]) -> None:
        """Become rank `rank_offset` of a group; blocks until all its ranks are there.

        Raises:
            Refused: the group cannot be joined.
        """
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.distributed_c10d import Backend, BackendConfig, ProcessGroupGloo

        name, size = invitation["group_name"], invitation["world_size"]
        if invitation.get("backend", "nccl") != "gloo":
            raise Refused(f"Failed to initialize custom process group: backend {invitation.get('backend')}.")
        # The key prefixes of init_process_group; its own bookkeeping allows one rank of a group in a process, and
        # several engines may live in this one.
        device = next(iter(BackendConfig(Backend(Backend.GLOO)).get_device_backend_map()))
        try:
            store = TCPStore(
                invitation["master_address"], invitation["master_port"], size, False, GROUP_TIMEOUT
            )
            for prefix in (name, f"{name}/", f"{device}/"):
                store = PrefixStore(prefix, store)
            group = ProcessGroupGloo(store, invitation["rank_offset"], size, GROUP_TIMEOUT)
        except RuntimeError as err:
            raise Refused(f"Failed to initialize custom process group: {err}.") from err
        self._groups[name] = group

    def leave(self, name: str) -> None:
        """
        Raises:
            Refused: there is no such group.
        """
        if self._groups.pop(name, None) is None:
            raise Refused("The group to be destroyed does not exist.")

    def receive(self, bucket: Mapping[str, Any], *, keep: bool) -> None:
        """Take one broadcast, a flat bucket or every tensor on its own, and forget it unless told to `keep` it.

        Raises:
            Refused: no such group, an unknown type, or the other side went away.
        """
        import torch

        group = self._groups.get(bucket["group_name"])
        if group is None:
            raise Refused(
                f"Failed to receive weights: Group {bucket['group_name']} not in {list(self._groups)}. "
                "Please call `init_weights_update_group` first."
            )
        try:
            sizes = [
                prod(shape) * getattr(torch, dtype).itemsize
                for dtype, shape in zip(bucket["dtypes"], bucket["shapes"], strict=True)
            ]
            flat = bucket.get("load_format") == "flattened_bucket"
            parts = [torch.empty(n, dtype=torch.uint8) for n in ([sum(sizes)] if flat else sizes)]
            for part in parts:
                _broadcast(group, part)
        except (AttributeError, RuntimeError, ValueError) as err:
            raise Refused(f"Failed to receive weights: {err}") from err
        tensors = parts[0].split(sizes) if flat else parts
        self._take(zip(bucket["names"], tensors, strict=True), keep)

    def unpack(self, serialized: Sequence[str], load_format: str | None, *, keep: bool) -> None:
        """Take tensors that were pickled by the sender, which is trusted: it started us.

        Raises:
            Refused: they are not readable.
        """
        try:
            content = pickle.loads(base64.b64decode(serialized[0]))
        except (pickle.UnpicklingError, ValueError, OSError) as err:
            raise Refused(f"Failed to deserialize weights: {err}") from err
        if load_format == "flattened_bucket":
            flat = content["flattened_tensor"].view(-1).view(_uint8())
            content = [(m.name, flat[m.start_idx : m.end_idx]) for m in content["metadata"]]
        self._take(content, keep)

    def _take(self, named_tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> None:
        for name, tensor in named_tensors:
            data = tensor.detach().contiguous().view(-1).view(_uint8()).numpy()
            self.num_bytes += data.nbytes
            if keep:
                self._checksums[name] = _checksum(data)


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def _broadcast(group: ProcessGroupGloo, part: torch.Tensor) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([part], options).wait()


def _checksum(data: Any) -> str:
    """SGLang's on CPU: the first 8 bytes of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def _overall(checksums: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    for name in sorted(checksums):
        whole.update(name.encode())
        whole.update(checksums[name].encode())
    return whole.hexdigest()


def _of_directory(model: Path) -> dict[str, str]:
    checksums = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                data = tensors.get_tensor(name).view(-1).view(_uint8()).numpy()
                checksums[name] = _checksum(data)
    return checksums
