"""The trainer's ranks as Ray actors, and the Trainer that drives them in lock step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from megatron_vespo.config import (
    AlgorithmConfig,
    ConfigError,
    RolloutConfig,
    SftConfig,
    TrainConfig,
    TrainerConfig,
)
from megatron_vespo.control.clock import bounded
from megatron_vespo.control.cluster import Cluster, print_to
from megatron_vespo.rollout.server import free_port
from megatron_vespo.rollout.weight_sync import PushOutcome, Target, WeightSync
from megatron_vespo.trainer import checkpoint
from megatron_vespo.trainer.layout import Place, rank_name
from megatron_vespo.trainer.outputs import (
    RankExamination,
    RankOutput,
    merge_examined,
    merge_scores,
    merge_step,
)
from megatron_vespo.trainer.step import TrainerRank
from megatron_vespo.types import Examined, RunError, Scored, StepOutput, TrainSequence

logger = logging.getLogger(__name__)

_LOG_TAIL_LINES = 15
_SETTLE_S = 10.0
_CAUSE_S = 3.0
_POLL_S, _LONGEST_POLL_S = 0.05, 1.0


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """What every rank is built from."""

    cfg: TrainerConfig
    model: Path
    algorithm: AlgorithmConfig
    temperature: float
    seed: int
    updates_per_batch: int
    megatron: Path | None = None
    """Distributed checkpoint of Megatron-Core, whose weights take the place of the model's."""

    @classmethod
    def of(cls, cfg: TrainConfig | SftConfig) -> PolicySpec:
        """Supervised fine-tuning is REINFORCE on demonstrations, whose coefficient and advantage are 1."""
        rl = isinstance(cfg, TrainConfig)
        return cls(
            cfg=cfg.trainer,
            model=cfg.model.resolve(),
            algorithm=cfg.algorithm if rl else AlgorithmConfig(name="reinforce"),
            temperature=cfg.sampling.temperature if rl else 1.0,
            seed=cfg.seed,
            updates_per_batch=cfg.loop.updates_per_batch if rl else 1,
        )


@ray.remote
class RankActor:
    """One process, one rank."""

    def __init__(self, log_file: str) -> None:
        print_to(log_file)
        self._sync: WeightSync | None = None

    def gpus(self) -> tuple[str, tuple[int, ...]]:
        """The node of this rank, and its GPUs, as that numbers them."""
        return ray.get_runtime_context().get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids())

    def rendezvous(self) -> tuple[str, int]:
        """Address and free port of this process, for the process groups that rank 0 hosts."""
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def start(self, spec: PolicySpec, place: Place) -> None:
        """Join the other ranks and load the model."""
        self._rank = TrainerRank(
            spec.cfg,
            spec.model,
            spec.algorithm,
            temperature=spec.temperature,
            seed=spec.seed,
            place=place,
            updates_per_batch=spec.updates_per_batch,
        )
        if spec.megatron:
            self._rank.load_megatron(spec.megatron)

    def prepare_to_push(self, model: Path, cfg: RolloutConfig) -> None:
        """Make this the rank that pushes (rank 0 only)."""
        self._sync = WeightSync(model, cfg, self._rank.groups.device)

    def step(
        self,
        sequences: Sequence[TrainSequence],
        step_number: int,
        routed: Sequence[int] | None,
        noise_variance: float,
    ) -> RankOutput:
        return self._rank.step(sequences, step_number, routed=routed, noise_variance=noise_variance)

    def score(self, sequences: Sequence[TrainSequence], routed: Sequence[int] | None) -> RankOutput:
        return self._rank.score(sequences, routed=routed)

    def examine(self, sequences: Sequence[TrainSequence]) -> RankExamination:
        return self._rank.examine(sequences)

    def push(self, targets: Sequence[Target], version: int) -> PushOutcome | None:
        """Gather the weights on all ranks, and push them from rank 0 (the others: None)."""
        tensors = self._rank.export()
        try:
            return self._sync.push(tensors, version, targets) if self._sync else None
        finally:
            # The gathers are collective: every rank sees them to the end, also after a failed push.  A thread that still hangs in
            # one has them already, which is what the push then failed of.
            with contextlib.suppress(ValueError):
                for _ in tensors:
                    pass

    def num_steps(self) -> int:
        """Batches whose updates are in this rank's weights."""
        return self._rank.num_steps

    def begin_save(self, directory: Path) -> None:
        self._rank.begin_save(directory)

    def written(self, directory: Path) -> checkpoint.Written | None:
        return self._rank.written(directory)

    def commit(
        self, directory: Path, version: int, state: Mapping[str, Any], files: Sequence[checkpoint.Written]
    ) -> None:
        """Make a checkpoint of what all ranks have written (one rank only)."""
        self._rank.commit(directory, version, state, files)

    def load(self, directory: Path) -> None:
        self._rank.load(directory)

    def save_hf(self, directory: Path) -> None:
        self._rank.save_hf(directory)


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that the ranks are writing."""

    version: int
    state: Mapping[str, Any]
    directory: Path


class Folders(Protocol):
    """Where the ranks' files are; a RunDirectory, say."""

    @property
    def checkpoints(self) -> Path: ...

    @property
    def logs(self) -> Path: ...


class TrainerGroup:
    """types.Trainer over Ray: every call goes to all ranks; the first failure of any rank ends it.

    `async with` places one actor per rank, joins them in their process groups and loads the model, or a checkpoint;
    leaving it ends every actor.
    """

    def __init__(
        self, cluster: Cluster, spec: PolicySpec, run: Folders, *, version: int, records_experts: bool
    ) -> None:
        """
        Args:
            version: of the checkpoint to continue from; 0: start from the model.
            records_experts: whether the routers' choices are ever reported.
        """
        self._cluster, self._start_version = cluster, version
        self.saved_version = 0
        self._version = 0
        self._spec = spec
        self._checkpoints = run.checkpoints.resolve()
        self._logs = run.logs.resolve()
        self._records_experts = records_experts
        self._actors: list[Any] = []
        self._a_rank_failed = False
        self._saving: _Saving | None = None
        self._turn = asyncio.Lock()
        """Of what works on the weights: a deadline runs while the ranks do it, not while they do something else first."""

    async def __aenter__(self) -> TrainerGroup:
        try:
            self._actors = [
                RankActor.options(**self._cluster.rank_options(rank)).remote(str(self._log(rank)))  # type: ignore[attr-defined]
                for rank in range(self._spec.cfg.layout.world_size)
            ]
            ((address, port),) = await self._gather("rendezvous", [self._actors[0].rendezvous.remote()])
            num = len(self._actors)
            places = [
                Place(rank=r, world_size=num, master_addr=address, master_port=port) for r in range(num)
            ]
            starts = [
                actor.start.remote(self._spec, place)
                for actor, place in zip(self._actors, places, strict=True)
            ]
            await self._gather("start", starts)
            if self._start_version:
                await self._load(self._start_version)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    async def gpus_of_engines(self, cfg: RolloutConfig) -> dict[int, tuple[int, ...]]:
        """The GPUs that each colocated engine shares with ranks, by its index.

        Raises:
            RunError: the ranks of an engine are on several nodes.
        """
        places, num = await self._all("gpus"), cfg.resolved_gpus_per_engine
        shared = {}
        for index in range(cfg.engines):
            mine = places[index * num : (index + 1) * num]
            if len({node for node, _ in mine}) > 1:
                raise RunError(
                    f"engine {index} = GPUs of trainer ranks {index * num}..{(index + 1) * num - 1}, on several nodes: a colocated "
                    "engine needs all of its GPUs on one; free whole nodes for the run, or make rollout.tensor_parallel smaller"
                )
            shared[index] = tuple(gpu for _, gpus in mine for gpu in gpus)
        return shared

    async def prepare_to_push(self, cfg: RolloutConfig) -> None:
        """Make `push` possible, which connects to the engines when it first meets them."""
        await self._gather("prepare_to_push", [self._actors[0].prepare_to_push.remote(self._spec.model, cfg)])

    async def push(self, targets: Sequence[Target], version: int) -> PushOutcome | None:
        """Push the ranks' weights as `version`; None if a step was in progress, which ends first and makes a newer one."""
        async with self._turn:
            return (await self._all("push", list(targets), version))[0] if version == self._version else None

    async def score(self, sequences: Sequence[TrainSequence]) -> tuple[Scored, ...]:
        """Log-probs, and the routers' choices, under the weights that the ranks hold."""
        async with self._turn:
            outputs = await self._all("score", list(sequences), self._reported(None))
            return merge_scores(outputs, sequences)

    async def examine(self, sequences: Sequence[TrainSequence]) -> tuple[Examined, ...]:
        batch = ray.put(list(sequences))
        async with self._turn:
            return merge_examined(await self._all("examine", batch), sequences)

    async def step(
        self,
        sequences: Sequence[TrainSequence],
        noise_variance: float = 0.0,
        routed: Sequence[int] | None = None,
    ) -> StepOutput:
        batch = ray.put(list(sequences))
        async with self._turn:
            calls = [
                actor.step.remote(batch, self._version, self._reported(routed), noise_variance)
                for actor in self._actors
            ]
            outputs = await self._gather("step", calls, deadline_s=math.inf)  # the loop's clock bounds it
            self._version += 1
        await self._commit_if_written()  # the ranks have time to answer, and the files had time to be written
        return merge_step(outputs, sequences)

    def _reported(self, routed: Sequence[int] | None) -> Sequence[int] | None:
        return routed if self._records_experts else ()

    async def save(self, version: int, state: Mapping[str, Any]) -> None:
        """Begin a checkpoint named after `version`, after the one before is on disk.

        Training may go on while it is written (with cfg.async_save; else this waits for `saved`).  When it is on disk,
        `saved_version` says so, and older ones that cfg does not keep are deleted.

        Raises:
            RunError: a rank cannot write, here or in the next `step`, `save` or `saved`; older checkpoints stay.  What a
                rank has not written when it dies is no checkpoint.
        """
        await self.saved()
        directory = checkpoint.directory_of(self._checkpoints, version)
        await asyncio.to_thread(checkpoint.prepare, directory)
        self._saving = _Saving(version, dict(state), directory)
        try:
            await self._all("begin_save", directory)
        except RunError:
            await self._abandon_save()
            raise
        if not self._spec.cfg.async_save:
            await self.saved()

    async def saved(self) -> None:
        """Wait until the checkpoint that is being written is on disk."""

        async def until_committed() -> None:
            pause_s = _POLL_S
            while not await self._commit_if_written():
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)

        await bounded(
            until_committed(),
            lambda: f"trainer ranks, writing of {self._saving.directory if self._saving else 'a checkpoint'}",
            deadline_s=self._spec.cfg.call_timeout_s,
            limit="trainer.call_timeout_s",
        )

    async def _commit_if_written(self) -> bool:
        """Whether nothing is being written any more."""
        if (saving := self._saving) is None:
            return True
        try:
            files = await self._all("written", saving.directory)
            if None in files:
                return False
            arguments = (saving.directory, saving.version, saving.state, files)
            await self._gather("commit", [self._actors[0].commit.remote(*arguments)])
        except RunError:
            await self._abandon_save()
            raise
        self._saving, self.saved_version = None, saving.version
        cfg = self._spec.cfg
        try:
            await asyncio.to_thread(checkpoint.prune, self._checkpoints, cfg.keep_checkpoints, cfg.keep_every)
        except OSError as err:  # the new checkpoint is what counts
            logger.warning("old checkpoints in %s could not be deleted: %s", self._checkpoints, err)
        return True

    async def _abandon_save(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            await asyncio.to_thread(checkpoint.discard, saving.directory)

    async def _load(self, version: int) -> None:
        """Continue from the checkpoint of `version`."""
        await self._all("load", checkpoint.directory_of(self._checkpoints, version))
        self._version = self.saved_version = version

    async def save_hf(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory."""
        await self._all("save_hf", directory.resolve())

    async def versions(self) -> list[int]:
        """Batches whose updates are in every rank's weights.

        Raises:
            RunError: a rank does not answer.  After the failure of a rank the others may hang in a collective that
                it left, and are given seconds; otherwise the step in progress may end.
        """
        calls = [actor.num_steps.remote() for actor in self._actors]
        if self._a_rank_failed:
            return await self._gather(
                "num_steps", calls, _SETTLE_S, "the seconds given to ranks after a failure"
            )
        return await self._gather("num_steps", calls)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """One call on every rank, all at once."""
        return await self._gather(method, [getattr(actor, method).remote(*args) for actor in self._actors])

    async def _gather(
        self,
        what: str,
        calls: Sequence[Any],
        deadline_s: float | None = None,
        limit: str = "trainer.call_timeout_s",
    ) -> list[Any]:
        """Results in rank order.  The first failure is raised without waiting for the ranks that it leaves hanging.

        When one rank dies, gloo tells its neighbours first: a moment is given to the rank that knows the cause.
        """
        tasks = [asyncio.ensure_future(_result(call)) for call in calls]

        def describe() -> str:
            return f"trainer ranks, '{what}' ({sum(task.done() for task in tasks)} of {len(tasks)} are done)"

        try:
            done, waiting = await bounded(
                asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION),
                describe,
                deadline_s=deadline_s or self._spec.cfg.call_timeout_s,
                limit=limit,
            )
            if waiting:
                done |= (await asyncio.wait(waiting, timeout=_CAUSE_S))[0]
            failures = {
                rank: error
                for rank, task in enumerate(tasks)
                if task in done and (error := task.exception()) is not None
            }
            if failures:
                self._a_rank_failed = True
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

    def _log(self, rank: int) -> Path:
        return self._logs / f"trainer-rank{rank}.log"


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
