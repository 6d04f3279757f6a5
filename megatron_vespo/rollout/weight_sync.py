"""The trainer's weights, pushed into a running SGLang server over a process group of their own.

Runs in the process of the trainer's rank 0, which may not have SGLang installed: this file speaks the wire format.
Control goes over HTTP; the bytes go through one broadcast per bucket, from rank 0 to the engine's ranks 1 .. R.
A bucket is the tensors' bytes one after the other, described by names, dtypes and shapes in the HTTP request.
"""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    ProcessGroup,
    Store,
    _new_process_group_helper,
    _world,
)

from megatron_vespo.rollout.model import read_shapes, ties_embeddings
from megatron_vespo.types import RunError

Named = tuple[str, torch.Tensor]

POLL_S = 0.002
BREAK_WITHIN_S = 10.0


class WeightSync:
    """A standing connection between the trainer's rank 0 and one engine; `connect` makes it."""

    def __init__(
        self, control: _Control, group: _Group, model: Path, device: torch.device, bucket_bytes: int
    ) -> None:
        self._control = control
        self._group = group
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._shapes = read_shapes(model)
        self._optional = {"lm_head.weight"} if ties_embeddings(model) else set()
        self._broken = False

    @classmethod
    def connect(
        cls,
        url: str,
        model: Path,
        *,
        backend: Literal["gloo", "nccl"],
        device: torch.device,
        bucket_bytes: int,
        timeout_s: float,
    ) -> WeightSync:
        """Form the group with the engine; a default process group may exist and is left alone.

        Args:
            model: Hugging Face directory that the engine serves; names and shapes are checked against it.
            device: this trainer rank's; NCCL's buckets are made there, gloo's on the CPU.
            bucket_bytes: most bytes of one broadcast, and extra memory on both sides (or one tensor, if larger).
            timeout_s: deadline of the connection, and of every whole push.

        Raises:
            RunError: the engine refused, is not there, or did not come to the meeting point in time.
        """
        control = _Control(url, timeout_s)
        control.start_deadline()
        info = control.get("/server_info")
        for size in ("dp_size", "pp_size"):
            if info[size] != 1:
                raise RunError(
                    f"engine {url}: {size} = {info[size]}: weights can be pushed to 1 only; start it so"
                )
        control.has_session = control.status("/begin_weight_update") != 404
        control.has_radix_cache = not info["disable_radix_cache"]
        group = _Group.meet(control, backend, num_engine_ranks=info["tp_size"])
        return cls(control, group, model, torch.device("cpu") if backend == "gloo" else device, bucket_bytes)

    def push(self, named_tensors: Iterator[Named], version: int) -> tuple[int, dict[str, float]]:
        """Replace all weights of the engine, and return once it has taken every tensor and carries the label `version`.

        Requests in flight are retracted and go on under the new weights, labelled as such.

        The label is our own word: the engine says no more than that it answered every request of the push.  Scoring
        a canary there shows weights that are grossly wrong, not a tensor that moved less than its tolerance.

        Args:
            named_tensors: every tensor of the model, full, under its Hugging Face name, in any order.

        Returns:
            Bytes broadcast, and seconds: total, gather (waiting for the iterator), transfer (bytes and loading).

        Raises:
            RunError: any step failed.  Generation stays paused, since the weights may be mixed: end the engine.
        """
        if self._broken:
            raise RunError(
                f"engine {self._control.url} = half updated: an earlier push failed; start a new engine"
            )
        self._broken = True  # until the end is reached
        began = time.monotonic()
        self._control.start_deadline()
        self._begin()
        num_bytes, gather_s, transfer_s = self._send(named_tensors)
        self._finish(version)
        self._broken = False
        return num_bytes, {"total": time.monotonic() - began, "gather": gather_s, "transfer": transfer_s}

    def close(self) -> None:
        """Destroy the group on both ends; an engine that is gone already is fine.  Safe to call twice."""
        self._control.start_deadline(BREAK_WITHIN_S)
        self._group.destroy(self._control)

    def _begin(self) -> None:
        self._control.post("/pause_generation", {"mode": "retract"})
        if self._control.has_session:
            self._control.post("/begin_weight_update", {})

    def _send(self, named_tensors: Iterator[Named]) -> tuple[int, float, float]:
        num_bytes, transfer_s, began = 0, 0.0, time.monotonic()
        seen: set[str] = set()
        for bucket in buckets(self._checked(named_tensors, seen), self._bucket_bytes):
            started = time.monotonic()
            flat = flatten(bucket, self._device)
            self._group.broadcast(self._control, flat, describe(bucket))
            num_bytes += flat.numel()
            transfer_s += time.monotonic() - started
        missing = sorted(self._shapes.keys() - seen - self._optional)
        if missing:
            raise RunError(
                f"weight push to {self._control.url}: {len(missing)} tensors missing, first '{missing[0]}': expected "
                f"all {len(self._shapes)} of the checkpoint, because the engine keeps old ones in silence; mend the export"
            )
        return num_bytes, time.monotonic() - began - transfer_s, transfer_s

    def _checked(self, named_tensors: Iterator[Named], seen: set[str]) -> Iterator[Named]:
        """SGLang ignores unknown names and answers 200, so names and shapes are checked here."""
        for name, tensor in named_tensors:
            if name in seen or self._shapes.get(name) != tuple(tensor.shape):
                expected = "once" if name in seen else self._shapes.get(name, "no tensor of that name")
                raise RunError(
                    f"weight push to {self._control.url}: '{name}' {tuple(tensor.shape)}: the checkpoint has {expected}; "
                    "mend the export"
                )
            seen.add(name)
            yield name, tensor

    def _finish(self, version: int) -> None:
        """Close the update, label it, forget cached keys of the old weights, and go on only when confirmed."""
        control = self._control
        if control.has_session:
            control.post("/end_weight_update", {})
        control.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        if control.has_radix_cache:
            control.post("/flush_cache", {})
        served = control.get("/model_info")["weight_version"]
        if served != str(version):
            raise RunError(
                f"engine {control.url} = weight version {served}: expected {version} after the push; generation stays "
                "paused, start a new engine"
            )
        control.post("/continue_generation", {})


def buckets(named_tensors: Iterable[Named], bucket_bytes: int) -> Iterator[list[Named]]:
    """Cut a stream of tensors into lists of at most `bucket_bytes` (one tensor, if it alone is larger).

    Within a bucket larger items come first: the receiver views the bytes in place, and every offset must be a
    multiple of the item size.
    """
    bucket: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield sorted(bucket, key=_item_size, reverse=True)
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield sorted(bucket, key=_item_size, reverse=True)


def flatten(bucket: list[Named], device: torch.device) -> torch.Tensor:
    """The bytes of a bucket's tensors, one after the other, as uint8 on `device`."""
    return torch.cat(
        [tensor.detach().to(device).contiguous().view(-1).view(torch.uint8) for _, tensor in bucket]
    )


def describe(bucket: list[Named]) -> dict[str, list[Any]]:
    """What the engine must know to take a flat bucket apart."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def _item_size(named: Named) -> int:
    return named[1].element_size()


class _Control:
    """The engine's HTTP side: plain blocking requests under one deadline."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.has_session = True
        """SGLang >= 0.5.23 takes updates between begin_weight_update and end_weight_update only."""
        self.has_radix_cache = True
        self._deadline = 0.0
        # The engine is asked directly even where the environment names an HTTP proxy.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start_deadline(self, timeout_s: float | None = None) -> None:
        self._deadline = time.monotonic() + (timeout_s or self.timeout_s)

    @property
    def left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def get(self, path: str) -> dict[str, Any]:
        return self._json(urllib.request.Request(self.url + path))

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        body, kind = json.dumps(payload).encode(), {"Content-Type": "application/json"}
        return self._json(urllib.request.Request(self.url + path, data=body, headers=kind, method="POST"))

    def status(self, path: str) -> int:
        """The status of a GET, which changes nothing: 404 where the path does not exist, 405 where it wants a POST."""
        try:
            with self._opener.open(self.url + path, timeout=self.left_s) as answer:
                return answer.status
        except urllib.error.HTTPError as err:
            return err.code

    def _json(self, request: urllib.request.Request) -> dict[str, Any]:
        """The answer; plain text (flush_cache) and nothing count as an empty object."""
        try:
            with self._opener.open(request, timeout=self.left_s) as answer:
                body = answer.read()
        except urllib.error.HTTPError as err:
            why = err.read().decode(errors="replace")[:500]
            raise RunError(
                f"engine {request.full_url} = HTTP {err.code}: refused the weight push, {why}; see its log"
            ) from err
        except OSError as err:  # URLError, a timeout or a lost connection
            raise RunError(
                f"engine {request.full_url} = {err}: the trainer waited for its answer (rollout.sync_timeout_s = "
                f"{self.timeout_s:.0f}); see the server's log"
            ) from err
        return json.loads(body) if body.startswith(b"{") else {}


class _Group(NamedTuple):
    """The process group: we are rank 0, the engine's tensor-parallel ranks are 1 .. R."""

    name: str
    process_group: ProcessGroup
    store: TCPStore
    threads: ThreadPoolExecutor
    backend: str

    @classmethod
    def meet(cls, control: _Control, backend: str, num_engine_ranks: int) -> _Group:
        """Open a TCP store, invite the engine, and form the group once it has come or raise what it answered."""
        name = f"megatron_vespo_{uuid.uuid4().hex}"
        size, timeout = 1 + num_engine_ranks, timedelta(seconds=control.timeout_s)
        address = _address_seen_by(control.url)
        store = TCPStore(address, 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
        threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="weight-sync")
        invitation = {
            "master_address": address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": name,
            "backend": backend,
        }
        invited = threads.submit(control.post, "/init_weights_update_group", invitation)
        while (
            not invited.done() and store.num_keys() == 0
        ):  # a refused engine never joins: do not wait for it
            time.sleep(POLL_S)
        if invited.done():
            invited.result()
        process_group = _form(backend, PrefixStore(name, store), size, name, timeout)
        invited.result()
        return cls(name, process_group, store, threads, backend)

    def broadcast(self, control: _Control, flat: torch.Tensor, description: dict[str, list[Any]]) -> None:
        """Send one bucket; leaves neither side waiting, whoever fails."""
        request = {
            **description,
            "group_name": self.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        both = [
            self.threads.submit(control.post, "/update_weights_from_distributed", request),
            self.threads.submit(self._send, flat),
        ]
        done, pending = wait(both, timeout=control.left_s, return_when=FIRST_EXCEPTION)
        if pending or any(future.exception() for future in done):
            self._give_up(control, both, len(description["names"]))

    def _send(self, flat: torch.Tensor) -> None:
        """Return when the bytes are through.  NCCL blocks already here, when its communicator is first made."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.process_group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()

    def _give_up(self, control: _Control, both: list[Future[Any]], num_tensors: int) -> None:
        """Break the group so that a pending broadcast ends, and say who waited for whom."""
        control.start_deadline(BREAK_WITHIN_S)
        error = next((future.exception() for future in both if future.done() and future.exception()), None)
        self._leave_engine(control)
        if self.backend == "nccl":
            self.process_group.abort()  # else our own kernel waits for the engine's for ever
        raise RunError(
            f"weight push to {control.url}: a bucket of {num_tensors} tensors was not taken: "
            f"{error or f'trainer rank 0 waited {control.timeout_s:.0f} s for the engine to receive it'}; "
            "generation stays paused, start a new engine"
        ) from error

    def _leave_engine(self, control: _Control) -> None:
        try:
            control.post("/destroy_weights_update_group", {"group_name": self.name})
        except RunError:
            return  # it is gone, and its end of the group with it

    def destroy(self, control: _Control) -> None:
        if self.process_group not in _world.pg_map:
            return
        self._leave_engine(control)
        dist.destroy_process_group(self.process_group)
        self.threads.shutdown(wait=True)


def _form(backend: str, store: Store, size: int, name: str, timeout: timedelta) -> ProcessGroup:
    """Join as rank 0 a group outside the default one.

    torch has no public call for a group with processes of another world; SGLang's side is made by the same private
    helper, whose key prefixes in the store both sides must share.
    """
    make: Any = _new_process_group_helper  # its types differ between torch versions
    group, _ = make(size, 0, [], Backend(backend), store, group_name=name, timeout=timeout)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}  # destroy_process_group looks there
    return group


def _address_seen_by(url: str) -> str:
    """Our own address on the route to the engine; connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
