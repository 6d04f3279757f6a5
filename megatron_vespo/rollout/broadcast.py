"""Weights through a process group of the trainer's rank 0 and the engines' ranks: one broadcast a bucket.

With NCCL there is one group for all engines, whose time does not grow with their number; when it breaks, all in it need
another push.  With gloo every engine has its own: a gloo broadcast that has lost a receiver cannot be interrupted, and in a
common group the receivers behind that one would hang as long as it does.  A group stands until its engines change or it
breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    ProcessGroup,
    Store,
    _new_process_group_helper,
    _world,
)

from megatron_vespo.rollout.buckets import Bucket, Named, forget, host_memory, in_thread, pack, wire
from megatron_vespo.rollout.engine_control import (
    EngineControl,
    Identity,
    Interrupted,
    Lost,
    Receivers,
    Refused,
    left_s,
)
from megatron_vespo.types import RunError

POLL_S = 0.002
NOT_RECEIVED = "Failed to receive weights"
"""How SGLang's refusal begins when the group broke under it, and not the loading."""

_Key = tuple[Identity, ...]


class Broadcast:
    """The transport for engines anywhere."""

    reaches_replicas = False
    in_session = True

    def __init__(self, backend: str, device: torch.device, staging_bytes: int) -> None:
        """
        Args:
            backend: "gloo" or "nccl".
            device: NCCL's, of this rank.
        """
        self.staging_bytes: float = staging_bytes
        self._backend = backend
        self._device = torch.device("cpu") if backend == "gloo" else device
        self._groups: dict[_Key, _Group] = {}
        self._broken: list[_Group] = []
        """Given up here; their engines may still hold them."""

    async def connect(self, receivers: Receivers) -> None:
        """Meet the engines that have no group yet; of a group of several, as often as some of them do not come."""
        while missing := {
            key: part for key, part in self._parts(receivers).items() if key not in self._groups
        }:
            await self._leave_outdated(receivers)
            meetings = {key: _Group.meet(part, self._backend, receivers) for key, part in missing.items()}
            for key, group in (await receivers.answers(meetings, math.inf)).items():  # each has its deadline
                if isinstance(group, RunError):
                    _drop(receivers, missing[key], group)
                else:
                    self._groups[key] = group

    async def prepare(self, named: list[Named], staged: bool) -> Bucket:
        """Staged buckets are in host memory, from which they go to the device of the broadcast one by one."""
        return await in_thread(pack, named, host_memory(self._device) if staged else self._empty)

    async def transfer(self, buckets: AsyncIterator[Bucket], receivers: Receivers) -> None:
        async for bucket in buckets:
            parts = self._parts(receivers)
            for key in [key for key in parts if key not in self._groups]:
                why = Interrupted("process group = of more engines: one of them was lost before the transfer")
                _drop(receivers, parts.pop(key), why)
            sends = {
                key: self._groups[key].broadcast(part, bucket, self._device, receivers)
                for key, part in parts.items()
            }
            for key, problem in (await receivers.answers(sends, math.inf)).items():  # each has its deadline
                if problem is not None:
                    self._broken.append(self._groups.pop(key))
                    _drop(receivers, parts[key], problem)
            if not receivers.active:
                return

    async def close(self, receivers: Receivers) -> None:
        await asyncio.gather(*(group.leave(receivers) for group in (*self._groups.values(), *self._broken)))
        self._groups.clear()
        self._broken.clear()

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _parts(self, receivers: Receivers) -> dict[_Key, list[EngineControl]]:
        """The active engines by group."""
        parts = [[engine] for engine in receivers.active] if self._backend == "gloo" else [receivers.active]
        return {tuple(engine.identity for engine in part): part for part in parts if part}

    async def _leave_outdated(self, receivers: Receivers) -> None:
        """Leave the groups of engines that are to be in another now; those of engines that are not asked for stand."""
        wanted, names = self._parts(receivers), {engine.name for engine in receivers.active}
        for key in list(self._groups):
            if key not in wanted and names & {identity.name for identity in key}:
                self._broken.append(self._groups.pop(key))
        await asyncio.gather(*(group.leave(receivers) for group in self._broken))
        self._broken = [group for group in self._broken if group.untold]


class _Broken(RunError):
    """A group failed, and each of its engines has its own part in that."""

    def __init__(self, parts: Mapping[EngineControl, RunError]) -> None:
        super().__init__("; ".join(map(str, parts.values())))
        self.parts = parts


def _drop(receivers: Receivers, engines: Sequence[EngineControl], problem: RunError) -> None:
    parts = problem.parts if isinstance(problem, _Broken) else dict.fromkeys(engines, problem)
    for engine, part in parts.items():
        receivers.drop(engine, part)


class _Group:
    """We are rank 0, the engines' tensor-parallel ranks are 1 .. R."""

    def __init__(self, name: str, members: _Key, process_group: ProcessGroup, store: TCPStore) -> None:
        self._name = name
        self.untold = set(members)
        """Engines that still hold their end of it."""
        self._process_group: ProcessGroup | None = process_group
        self._store = store  # the engines may still look into it

    @classmethod
    async def meet(cls, engines: Sequence[EngineControl], backend: str, receivers: Receivers) -> _Group:
        """Open a TCP store, invite the engines, and form the group once somebody has come.

        Raises:
            _Broken: naming those that declined or did not come.
        """
        name, size = f"megatron_vespo_{uuid.uuid4().hex}", 1 + sum(engine.num_ranks for engine in engines)
        timeout = timedelta(seconds=2 * receivers.timeout_s)  # never the first to run out
        host = address_seen_by(engines[0].url)
        store = TCPStore(host, 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
        invitations, offset = {}, 1
        for engine in engines:
            place = {"master_address": address_seen_by(engine.url), "master_port": store.port}
            terms = {"rank_offset": offset, "world_size": size, "group_name": name, "backend": backend}
            invitations[engine] = engine.post("/init_weights_update_group", place | terms)
            offset += engine.num_ranks
        answering = asyncio.ensure_future(receivers.answers(invitations, receivers.until))
        while store.num_keys() == 0 and not answering.done():
            await asyncio.sleep(POLL_S)
        if answering.done():  # an engine that declines never joins, and forming a group would wait for it
            _raise_problems(await answering)
        forming = in_thread(_form, backend, PrefixStore(name, store), size, name, timeout)
        _raise_problems(await answering)
        await asyncio.wait([forming], timeout=left_s(receivers.until))
        if not _is_well(forming):
            why = forming.exception() if forming.done() else "it did not come"
            raise _Broken(dict.fromkeys(engines, Lost(f"process group = not formed: {why}; see its log")))
        return cls(name, tuple(engine.identity for engine in engines), forming.result(), store)

    async def broadcast(
        self, engines: Sequence[EngineControl], bucket: Bucket, device: torch.device, receivers: Receivers
    ) -> None:
        """Send one bucket and have it loaded.

        Raises:
            _Broken: the group must not be used any more.
        """
        request = {
            **wire(bucket),
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        asked = {engine: _ask(engine, "/update_weights_from_distributed", request) for engine in engines}
        sending = in_thread(self._send, bucket.flat, device, left_s(receivers.until))
        well, first = False, []
        try:
            well = await _done_together(sending, list(asked.values()), receivers)
        finally:
            if not well:  # or cut off, because it lags behind other groups
                first = [engine for engine, ask in asked.items() if ask.done()]
                self.abort()
        if not well:
            raise _Broken(await _parts_in(asked, receivers.grace_s, first))

    def _send(self, flat: Tensor, device: torch.device, timeout_s: float) -> None:
        """Return when the bytes are through.  NCCL blocks already here, when its communicator is first made."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=timeout_s)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        flat = flat.to(device, non_blocking=True)
        assert self._process_group is not None, "a group that was given up"
        self._process_group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.current_stream(device).synchronize()

    def abort(self) -> asyncio.Future[None]:
        """Give the group up; its connections close, which frees engines that wait for us, unless gloo has something under way.

        That cannot be interrupted and ends at its deadline.  Hence the thread, for which nobody need wait.
        """
        return in_thread(self._destroy)

    def _destroy(self) -> None:
        group, self._process_group = self._process_group, None
        if group is None:
            return
        if group.name() == "nccl":
            group.abort()  # else our own kernel waits for the engines' for ever
        if group in _world.pg_map:  # else the trainer has destroyed all groups before us
            dist.destroy_process_group(group)
        # The last reference is dropped here: gloo then waits for what is under way.

    async def leave(self, receivers: Receivers) -> None:
        """Destroy the group on both ends, or tell those engines of it that are there now; who is gone has destroyed it."""
        request, here = {"group_name": self._name}, {engine.name: engine for engine in receivers.active}
        told = [identity for identity in self.untold if identity.name in here]
        asks = {
            here[identity.name]: here[identity.name].post("/destroy_weights_update_group", request)
            for identity in told
            if here[identity.name].url == identity.url
        }
        self.untold.difference_update(told)
        await receivers.answers(asks, time.monotonic() + receivers.grace_s)
        await asyncio.wait([self.abort()], timeout=receivers.grace_s)


def _raise_problems(answers: Mapping[EngineControl, Any]) -> None:
    problems = {engine: answer for engine, answer in answers.items() if isinstance(answer, RunError)}
    if problems:
        raise _Broken(problems)


def _ask(engine: EngineControl, path: str, payload: Mapping[str, Any]) -> asyncio.Future[Any]:
    asked = asyncio.ensure_future(engine.post(path, payload))
    asked.add_done_callback(forget)
    return asked


async def _done_together(
    sending: asyncio.Future[Any], asked: list[asyncio.Future[Any]], receivers: Receivers
) -> bool:
    """Whether the bytes are through and all engines have loaded them; returns as soon as that cannot be any more."""
    loading = asyncio.ensure_future(receivers.in_step(asked, receivers.until, together=True))
    await asyncio.wait([sending, loading], return_when=asyncio.FIRST_COMPLETED)
    if _is_well(sending):
        await loading
    elif all(map(_is_well, asked)):
        await asyncio.wait([sending], timeout=left_s(receivers.until))
    return all(map(_is_well, (sending, *asked)))


def _is_well(future: asyncio.Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


async def _parts_in(
    asked: Mapping[EngineControl, asyncio.Future[Any]], grace_s: float, first: Sequence[EngineControl]
) -> dict[EngineControl, RunError]:
    """What each engine has to do with a group that broke.

    Args:
        first: those that had answered before we gave it up: if nobody else is to blame, they are.
    """
    await asyncio.wait(asked.values(), timeout=grace_s)
    parts = {engine: _part_in(engine, ask) for engine, ask in asked.items()}
    if all(isinstance(part, Interrupted) for part in parts.values()):
        refusals = {engine: asked[engine].exception() for engine in first}
        parts |= {engine: err for engine, err in refusals.items() if isinstance(err, Refused)}
    return parts


def _part_in(engine: EngineControl, ask: asyncio.Future[Any]) -> RunError:
    if not ask.done():
        ask.cancel()
        return Lost(f"{engine.name} = no answer: it hangs in a weight transfer; see its log")
    err = ask.exception()
    if isinstance(err, Refused) and NOT_RECEIVED not in str(err):
        return err
    if isinstance(err, Lost):
        return err
    return Interrupted(f"{engine.name} = half updated: the transfer to it broke off ({err})")


def _form(backend: str, store: Store, size: int, name: str, timeout: timedelta) -> ProcessGroup:
    """Join as rank 0 a group outside the default one.

    torch has no public call for a group with processes of another world; SGLang's side is made by the same private
    helper, whose key prefixes in the store both sides must share.
    """
    make: Any = _new_process_group_helper  # its types differ between torch versions
    with _survives_lost_engines(backend):
        group, _ = make(size, 0, [], Backend(backend), store, group_name=name, timeout=timeout)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}  # destroy_process_group looks there
    return group


@contextlib.contextmanager
def _survives_lost_engines(backend: str) -> Iterator[None]:
    """NCCL's watchdog ends the process when a peer is gone, unless it is told at the group's making to clean up only.

    That is right for the trainer's own groups, hence for this one alone.
    """
    if backend != "nccl":
        yield
        return
    variable, clean_up_only = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
    before = os.environ.get(variable)
    os.environ[variable] = clean_up_only
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def address_seen_by(url: str) -> str:
    """Our own address on the route to the engine; connecting a UDP socket sends nothing."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
