"""The trainer's ranks as Ray actors, and the Trainer that drives them in lock step."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo.config import AlgorithmConfig, ConfigError, RolloutConfig, TrainerConfig
from megatron_vespo.rollout.weight_sync import WeightSync
from megatron_vespo.trainer.checkpoint import prune
from megatron_vespo.trainer.layout import Place, rank_name
from megatron_vespo.trainer.outputs import RankOutput, merge_scores, merge_step
from megatron_vespo.trainer.step import TrainerRank
from megatron_vespo.types import Engine, RunError, StepOutput, SyncReport, TrainSequence

logger = logging.getLogger(__name__)

_LOG_TAIL_LINES = 15
_SETTLE_S = 10.0
_CAUSE_S = 3.0
_OBJECT_STORE_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """What every rank is built from."""

    cfg: TrainerConfig
    model: Path
    algorithm: AlgorithmConfig
    temperature: float
    seed: int


@ray.remote
class RankActor:
    """One process, one rank."""

    def __init__(self, log_file: str) -> None:
        """Everything this process prints, foreign libraries included, goes to `log_file`."""
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True
        )
        self._sync: WeightSync | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and free port of this process, for the process groups that rank 0 hosts."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def start(self, spec: PolicySpec, place: Place) -> None:
        """Join the other ranks and load the model."""
        self._rank = TrainerRank(
            spec.cfg, spec.model, spec.algorithm, temperature=spec.temperature, seed=spec.seed, place=place
        )

    def connect(self, engine_url: str, model: Path, cfg: RolloutConfig) -> None:
        """Join the engine's weight-transfer group (rank 0 only)."""
        device = self._rank.groups.device
        backend = (
            cfg.sync_backend if cfg.sync_backend != "auto" else "gloo" if device.type == "cpu" else "nccl"
        )
        self._sync = WeightSync.connect(
            engine_url,
            model,
            backend=backend,
            device=device,
            bucket_bytes=cfg.sync_bucket_bytes,
            timeout_s=cfg.sync_timeout_s,
        )

    def step(self, sequences: Sequence[TrainSequence], step_number: int, capture_experts: bool) -> RankOutput:
        return self._rank.step(sequences, step_number, capture_experts=capture_experts)

    def score(self, sequences: Sequence[TrainSequence], capture_experts: bool) -> RankOutput:
        return self._rank.score(sequences, capture_experts=capture_experts)

    def publish(
        self, version: int, canary: Sequence[TrainSequence]
    ) -> tuple[RankOutput, int, dict[str, float]]:
        """Gather the weights on all ranks, push them from rank 0, score the canary under them."""
        tensors = self._rank.export()
        num_bytes, time_s = 0, {}
        try:
            if self._sync is not None:
                num_bytes, time_s = self._sync.push(tensors, version)
        finally:
            for _ in (
                tensors
            ):  # the gathers are collective: every rank sees them to the end, also after a failed push
                pass
        return self._rank.score(canary, capture_experts=False), num_bytes, time_s

    def save(self, directory: Path, version: int, state: Mapping[str, Any]) -> None:
        self._rank.save(directory, version, state)

    def load(self, directory: Path) -> None:
        self._rank.load(directory)

    def save_hf(self, directory: Path) -> None:
        self._rank.save_hf(directory)


class TrainerGroup:
    """types.Trainer over Ray: every call goes to all ranks; the first failure of any rank ends it.

    `async with` starts Ray (or joins the cluster), places one actor per rank, joins them in their process groups
    and loads the model; leaving it ends every actor.
    """

    def __init__(self, spec: PolicySpec, checkpoints: Path, logs: Path, *, records_experts: bool) -> None:
        self.saved_version = 0
        self._version = 0
        self._spec = spec
        self._checkpoints = checkpoints
        self._logs = logs
        self._records_experts = records_experts
        self._actors: list[Any] = []
        self._pending: list[Any] = []

    async def __aenter__(self) -> TrainerGroup:
        try:
            await asyncio.to_thread(_start_ray, self._spec.cfg)
            options = await _reserve(self._spec.cfg)
            self._actors = [
                RankActor.options(**rank_options).remote(str(self._log(rank)))  # type: ignore[attr-defined]
                for rank, rank_options in enumerate(options)
            ]
            address, port = (await self._gather([self._actors[0].rendezvous.remote()]))[0]
            num = len(self._actors)
            places = [
                Place(rank=r, world_size=num, master_addr=address, master_port=port) for r in range(num)
            ]
            await self._gather([
                actor.start.remote(self._spec, place) for actor, place in zip(self._actors, places, strict=True)
            ])  # fmt: skip
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        await asyncio.to_thread(ray.shutdown)

    async def connect(
        self, engine: Engine, url: str, cfg: RolloutConfig, canary: Sequence[TrainSequence]
    ) -> None:
        """Open the path on which `publish` sends weights to the engine at `url`.

        Args:
            engine: the same engine, asked to score `canary` after every push.
            canary: fixed sequences on whose log-probs both engines must agree within cfg.canary_tolerance.
        """
        self._engine, self._canary, self._tolerance = engine, list(canary), cfg.canary_tolerance
        await self._gather([self._actors[0].connect.remote(url, self._spec.model, cfg)])

    async def step(self, sequences: Sequence[TrainSequence]) -> StepOutput:
        outputs = await self._all("step", ray.put(list(sequences)), self._version, self._records_experts)
        self._version += 1
        return merge_step(outputs, sequences)

    async def publish(self, version: int) -> SyncReport:
        pushes = await self._all("publish", version, self._canary)
        _, num_bytes, time_s = pushes[0]
        trained = merge_scores([output for output, _, _ in pushes], self._canary)
        served = await self._engine.score(self._canary)
        gap = max(
            float(np.abs(ours.logp - theirs.logp).max()) for ours, theirs in zip(trained, served, strict=True)
        )
        if not gap <= self._tolerance:
            raise RunError(
                f"canary after the push of version {version} = {gap:.3g} nats apart: trainer and engine must agree within "
                f"rollout.canary_tolerance = {self._tolerance:g} on the same weights; the engine serves other weights, "
                "or computes in another precision: compare dtypes, and see docs/numerics.md"
            )
        return SyncReport(version=version, num_bytes=num_bytes, time_s=time_s, canary_abs_max=gap)

    async def save(self, version: int, state: Mapping[str, Any]) -> None:
        """A checkpoint named after `version`; older ones beyond the configured number are deleted."""
        await self._all("save", self._checkpoint(version), version, dict(state))
        await asyncio.to_thread(prune, self._checkpoints, self._spec.cfg.keep_checkpoints)
        self.saved_version = version

    async def load(self, version: int) -> None:
        """Continue from the checkpoint of `version`."""
        await self._all("load", self._checkpoint(version))
        self._version = self.saved_version = version

    async def save_hf(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory."""
        await self._all("save_hf", directory.resolve())

    async def is_idle(self) -> bool:
        """Whether every rank has come back from its last call, waiting a few seconds for stragglers.

        A rank that fails may leave the others in a collective: then they can do nothing more.
        """
        if not self._pending:
            return True
        _, busy = await asyncio.to_thread(
            ray.wait, self._pending, num_returns=len(self._pending), timeout=_SETTLE_S, fetch_local=False
        )
        return not busy

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """One call on every rank, all at once."""
        return await self._gather([getattr(actor, method).remote(*args) for actor in self._actors])

    async def _gather(self, calls: Sequence[Any]) -> list[Any]:
        """Results in rank order.  The first failure is raised without waiting for the ranks that it leaves hanging.

        When one rank dies, gloo tells its neighbours first: a moment is given to the rank that knows the cause.
        """
        self._pending = list(calls)
        tasks = [asyncio.ensure_future(_result(call)) for call in calls]
        try:
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                done |= (await asyncio.wait(waiting, timeout=_CAUSE_S))[0]
            failures = {
                rank: error
                for rank, task in enumerate(tasks)
                if task in done and (error := task.exception()) is not None
            }
            if failures:
                rank = min(failures, key=lambda rank: _remoteness(failures[rank]))
                raise self._explain(failures[rank], rank) from failures[rank]
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def _explain(self, error: BaseException, rank: int) -> Exception:
        if isinstance(error, RayTaskError) and isinstance(error.cause, RunError | ConfigError):
            return error.cause
        what = (
            repr(error.cause)
            if isinstance(error, RayTaskError)
            else f"its process died ({type(error).__name__})"
        )
        log = self._log(rank)
        return RunError(
            f"trainer {rank_name(self._spec.cfg.layout, rank)}: {what}; the end of {log}:\n{_tail(log)}"
        )

    def _checkpoint(self, version: int) -> Path:
        return self._checkpoints.resolve() / f"step_{version:06d}"

    def _log(self, rank: int) -> Path:
        return self._logs.resolve() / f"trainer-rank{rank}.log"


async def _result(call: Any) -> Any:
    return await call


def _remoteness(error: BaseException) -> int:
    """How far an exception is from the cause: our own words, a dead process, an echo in another rank."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, RunError | ConfigError):
        return 0
    return 1 if isinstance(error, RayActorError) else 2


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(empty)"


def _start_ray(cfg: TrainerConfig) -> None:
    """A Ray of our own on this machine, loopback only; or the running cluster that the configuration names."""
    environment = {"OMP_NUM_THREADS": "1"} if cfg.device == "cpu" else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    shared: dict[str, Any] = {
        "log_to_driver": False,
        "runtime_env": {"env_vars": environment},
        "logging_level": logging.ERROR,
    }
    if cfg.ray_address != "local":
        ray.init(address=cfg.ray_address, **shared)
        return
    ranks = cfg.layout.world_size
    ray.init(
        address="local",
        num_cpus=ranks,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **shared,
    )


async def _reserve(cfg: TrainerConfig) -> list[dict[str, Any]]:
    """Actor options of every rank, in a placement group that holds all of them or nothing.

    Raises:
        RunError: the cluster did not have the resources within cfg.placement_timeout_s.
    """
    bundle = {"CPU": 1.0, "GPU": 1.0} if cfg.device == "cuda" else {"CPU": 1.0}
    group = placement_group([bundle] * cfg.layout.world_size, strategy="PACK")
    if not await asyncio.to_thread(group.wait, cfg.placement_timeout_s):
        raise RunError(
            f"placement of {cfg.layout.world_size} trainer ranks with {bundle} each: waited "
            f"{cfg.placement_timeout_s:g} s for Ray, which has {ray.available_resources()}; "
            "add nodes, or make trainer.layout smaller"
        )
    return [
        {
            "num_cpus": 1,
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        }
        for rank in range(cfg.layout.world_size)
    ]
