"""The trainer's weights, pushed into running SGLang engines.

Runs in the process of the trainer's rank 0.  Weights are gathered while the engines still generate, as far as memory allows;
then the engines pause, and the gathering of one bucket, the transfer of the next and its loading go on at once.  A lost engine
costs the push that engine, or the others another push, and never more than the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout.buckets import BucketStream, Expected, Named, cut
from megatron_vespo.rollout.engine_control import (
    EngineControl,
    Interrupted,
    Mode,
    Receivers,
    Target,
    left_s,
)
from megatron_vespo.rollout.transports import Transport, make_transport
from megatron_vespo.types import RunError

CLOSE_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class PushOutcome:
    """What became of the targets of one push; those that neither failed nor are incomplete serve `version`, and generate."""

    version: int
    num_bytes: int
    """Of all tensors, once."""
    time_s: Mapping[str, float]
    """Seconds: total; gather, waiting for the iterator; transfer, bytes and loading; paused, from the first engine's pause to
    the last one's return.  Gather and transfer overlap."""
    failures: Mapping[str, str]
    """Engines that cannot be used any more (dead, hanging, refusing), and why: restart them."""
    incomplete: frozenset[str]
    """Engines that live with mixed or old weights, paused: push to them again."""
    digests: Mapping[str, str]
    """Of each engine that is done: its layout, a space, and one digest of all weights, equal for equal ones in that layout."""


class PushError(RunError):
    """A push failed through no fault of the engines; `outcome` says how it left them."""

    def __init__(self, message: str, outcome: PushOutcome) -> None:
        super().__init__(message, outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return self.args[0]


class WeightSync:
    """The way from the trainer to its engines; connects to nothing before the first push."""

    def __init__(self, model: Path, cfg: RolloutConfig, device: torch.device) -> None:
        """
        Args:
            model: Hugging Face directory that the engines serve; names and shapes are checked against it.
            device: of this rank.

        Raises:
            ConfigError: the directory is incomplete.
        """
        self._cfg = cfg
        self._device = device
        self._expected = Expected(model)
        self._transport = make_transport(cfg, device)
        self._targets: dict[str, Target] = {}

    def push(self, named_tensors: Iterator[Named], version: int, targets: Sequence[Target]) -> PushOutcome:
        """Replace all weights of the targets, and return once those that can have taken them and generate again.

        What the pause does to requests under way is rollout.partial_rollouts.  It all takes rollout.sync_timeout_s at most.
        The iterator is read in other threads, one at a time; afterwards nobody reads it (unless it hangs), and it need not be
        exhausted.  Not to be called in a thread that runs an event loop.

        Args:
            named_tensors: every tensor of the model, full, under its Hugging Face name, in any order.
            version: the label that the engines give to what they sample.

        Raises:
            PushError: the tensors are not those of the model, the iterator failed or hangs, or there is no room to send from.
        """
        return asyncio.run(self._push(named_tensors, version, targets))

    def close(self) -> None:
        """Give back what stands between pushes; engines that are gone already are fine.  Safe to call twice."""
        asyncio.run(self._close())

    async def _push(
        self, named_tensors: Iterator[Named], version: int, targets: Sequence[Target]
    ) -> PushOutcome:
        self._targets |= {target.name: target for target in targets}
        buckets = cut(self._expected.checked(named_tensors), self._cfg.sync_bucket_bytes)
        async with _http() as http:
            receivers = Receivers(
                [EngineControl(target, http) for target in targets], version, self._cfg.sync_timeout_s
            )
            return await _Push(self._transport, self._cfg, receivers).run(buckets, self._device)

    async def _close(self) -> None:
        async with _http() as http:
            engines = [EngineControl(target, http) for target in self._targets.values()]
            await self._transport.close(Receivers(engines, 0, CLOSE_WITHIN_S))


def _http() -> aiohttp.ClientSession:
    """Without timeouts of its own: whoever asks has a deadline."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(), connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


class _Push:
    """One push, from the first look at the engines to the outcome."""

    def __init__(self, transport: Transport, cfg: RolloutConfig, receivers: Receivers) -> None:
        self._transport = transport
        self._mode: Mode = cfg.partial_rollouts
        self._fleet = receivers
        self._began = time.monotonic()
        self._transfer_s = 0.0
        self._paused_at: float | None = None
        self._resumed_at = 0.0
        self._done: dict[EngineControl, str | None] = {}
        """Engines that serve the new weights, with their digest."""

    async def run(self, buckets: Iterator[list[Named]], device: torch.device) -> PushOutcome:
        receivers, transport = self._fleet, self._transport
        await receivers.each(lambda engine: engine.inspect(replicas=transport.reaches_replicas))
        await transport.connect(receivers)
        stream = BucketStream(buckets, transport.prepare, transport.staging_bytes, device)
        problem = None
        try:
            # The transport drops engines that miss the deadline; beyond that only the iterator can be late.
            async with asyncio.timeout(left_s(receivers.until) + 1.5 * receivers.grace_s):
                await self._switch(stream)
        except RunError as err:
            problem = err
        except TimeoutError:
            problem = self._late()
        if not await stream.stop(receivers.until + 2 * receivers.grace_s):
            problem = self._late()
        await self._release()
        outcome = self._outcome(stream)
        if problem:
            raise PushError(str(problem), outcome) from problem
        return outcome

    def _late(self) -> RunError:
        return RunError(
            f"weights = not all within {time.monotonic() - self._began:.0f} s: rank 0 waits for the trainer's export; raise "
            f"rollout.sync_timeout_s = {self._fleet.timeout_s:g}, or see the logs of the other ranks"
        )

    async def _switch(self, stream: BucketStream) -> None:
        """Pause, transfer, go on; every engine whose weights are replaced to the end goes on by itself."""
        receivers = self._fleet
        if receivers.active:
            await stream.staged()
            self._paused_at = time.monotonic()
            await receivers.each(self._open)
        if receivers.active:
            began = time.monotonic()
            await self._transport.transfer(stream, receivers)
            self._transfer_s = time.monotonic() - began
            await receivers.each(self._finish)

    async def _open(self, engine: EngineControl) -> None:
        await engine.pause(self._mode)
        if self._transport.in_session:
            await engine.begin()

    async def _finish(self, engine: EngineControl) -> None:
        if self._transport.in_session:
            await engine.end()
        digest = await engine.confirm(self._fleet.version, self._mode)
        await engine.resume()
        self._resumed_at = time.monotonic()
        self._done[engine] = digest

    async def _release(self) -> None:
        """Leave engines that are paused and not done such that the next push finds them ready; who does not answer is lost."""
        receivers = self._fleet
        if self._paused_at is not None:
            for engine in [engine for engine in receivers.active if engine not in self._done]:
                receivers.drop(engine, Interrupted("no push has come to its end"))
        if self._transport.in_session:
            ends = {engine: engine.end() for engine in receivers.incomplete}
            receivers.sort_out(await receivers.answers(ends, time.monotonic() + receivers.grace_s))

    def _outcome(self, stream: BucketStream) -> PushOutcome:
        receivers, now = self._fleet, time.monotonic()
        return PushOutcome(
            version=receivers.version,
            num_bytes=stream.num_bytes,
            time_s={
                "total": now - self._began,
                "gather": stream.gather_s,
                "transfer": self._transfer_s,
                "paused": 0.0 if self._paused_at is None else (self._resumed_at or now) - self._paused_at,
            },
            failures=dict(receivers.failures),
            incomplete=frozenset(engine.name for engine in receivers.incomplete),
            digests={engine.name: digest for engine, digest in self._done.items() if digest is not None},
        )
