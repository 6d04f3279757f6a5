"""Reinforcement learning, and evaluation alone: what starts, in which order, and how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.control import evaluation, loop, session
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.cluster import Cluster
from megatron_vespo.control.desk import Desk, Report, finish, is_complete, open_desk
from megatron_vespo.control.engines import RayEngine
from megatron_vespo.control.evaluation import Evaluated
from megatron_vespo.control.observer import Observer, Sources
from megatron_vespo.control.plan import TrainPlan, plan_train
from megatron_vespo.control.progress import Progress, Resume, ledger_of, name_of_stream, rescue, start_of
from megatron_vespo.control.publisher import FleetPublisher
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.data.verifiers import make_verifier, overlong
from megatron_vespo.metrics import LiveView
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.server import EngineProcess, External
from megatron_vespo.types import RunError

logger = logging.getLogger(__name__)


def train(cfg: TrainConfig, *, resume: Resume | None, report: Report) -> None:
    """Run `megatron-vespo train` to its end."""
    plan = plan_train(cfg)
    stream = name_of_stream("train", cfg.seed, cfg.prompts.shuffle, (prompt.uid for prompt in plan.prompts))
    start = start_of(cfg.run_dir, stream, resume=resume)
    num_steps = cfg.loop.num_steps
    if not is_complete(cfg.run_dir, start, num_steps):
        view = LiveView(f"train {cfg.run_dir}", num_steps, max_staleness=cfg.loop.max_staleness)
        with open_desk(cfg, start, view, report, resume=resume is not None) as desk:
            session.run(lambda stop: _train(plan, start, desk, stop), desk.tell)


def evaluate(cfg: TrainConfig, logs: Path) -> list[Evaluated]:
    """Sample and judge the held-out sets with cfg.model, on engines that are started for it; no trainer.

    Raises:
        ConfigError: no set is configured.
    """
    plan = plan_train(cfg)
    if not plan.heldout:
        raise ConfigError(
            "evaluation.sets = {}: expected the files to evaluate on; set evaluation.sets.NAME=FILE"
        )
    logs.mkdir(parents=True, exist_ok=True)

    async def sample_and_verify(stop: session.Stop) -> list[Evaluated]:
        async with contextlib.AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(Cluster(cfg.trainer, cfg.rollout, trains=False))
            fleet = Fleet(cfg.rollout, cfg.model, _engines(cfg, cluster, logs), logger.warning)
            await stack.enter_async_context(fleet)
            for member in await fleet.to_update(0):
                fleet.confirm(member.name, 0)  # the weights that it was started with are those that are meant
            judge = await stack.enter_async_context(make_verifier(cfg.reward))
            sampler = Sampler(cfg, fleet, judge, plan.environment)
            return await evaluation.evaluate(cfg, plan.heldout, sampler)

    return session.run(sample_and_verify, logger.warning)


async def _train(plan: TrainPlan, start: Progress, desk: Desk, stop: session.Stop) -> None:
    cfg = plan.cfg
    async with contextlib.AsyncExitStack() as stack:
        desk.tell("starting the engines and the trainer's ranks")
        cluster = await stack.enter_async_context(Cluster(cfg.trainer, cfg.rollout))
        ranks = TrainerGroup(
            cluster,
            PolicySpec.of(cfg),
            desk.run,
            version=start.version,
            records_experts=plan.records_experts,
        )
        trainer, fleet = await _start(cfg, cluster, ranks, desk, stack)
        await trainer.prepare_to_push(cfg.rollout)
        publisher = FleetPublisher(trainer, fleet, plan.canary, cfg.rollout)
        judge = await stack.enter_async_context(make_verifier(cfg.reward))
        sampler = Sampler(cfg, fleet, overlong(judge, cfg), plan.environment)
        prompts = EpochStream(
            plan.prompts, cfg.seed, cfg.prompts.shuffle, ledger_of(start, len(plan.prompts))
        )
        buffer = GroupBuffer(
            prompts_per_step=cfg.loop.prompts_per_step,
            max_staleness=cfg.loop.max_staleness,
            window=cfg.loop.window,
            oversampling=cfg.loop.oversampling,
        )
        examiner = Sampler(cfg, fleet, judge, plan.environment)  # its rewards are those of the verifier alone
        sources = Sources(
            prompts=prompts,
            verifier_failures=lambda: judge.failures,
            engine_metrics=fleet.metrics,
            evaluate=(lambda: evaluation.evaluate(cfg, plan.heldout, examiner)) if plan.heldout else None,
        )
        observer = Observer(cfg, desk.run, desk.log, desk.view, sources, start)
        stop.gently = buffer.close
        try:
            await loop.train(cfg, prompts, sampler, trainer, publisher, buffer, observer)
        except Exception:
            await rescue(trainer, observer.progress.version, observer.progress_at, desk.tell)
            with contextlib.suppress(RunError, OSError):  # the failure is the news
                observer.flush()
            raise
        desk.tell(prompts.report())
        await finish(trainer, observer.progress, cfg.loop.num_steps, desk)


async def _start(
    cfg: TrainConfig,
    cluster: Cluster,
    ranks: TrainerGroup,
    desk: Desk,
    stack: contextlib.AsyncExitStack,
) -> tuple[TrainerGroup, Fleet]:
    """Ranks and engines, side by side; colocated engines need to know the GPUs that the ranks have got."""

    async def start_fleet(gpus: Sequence[int] = ()) -> Fleet:
        engines = _engines(cfg, cluster, desk.run.logs, gpus)
        return await stack.enter_async_context(
            Fleet(cfg.rollout, cfg.model, engines, desk.tell, temperature=cfg.sampling.temperature)
        )

    if cfg.rollout.placement == "colocated":
        trainer = await stack.enter_async_context(ranks)
        return trainer, await start_fleet(await trainer.gpus())
    async with asyncio.TaskGroup() as starting:
        ready = starting.create_task(stack.enter_async_context(ranks))
        started = starting.create_task(start_fleet())
    return ready.result(), started.result()


def _engines(cfg: TrainConfig, cluster: Cluster, logs: Path, gpus: Sequence[int] = ()) -> list[EngineProcess]:
    """Those that are started here, one actor each, and those that run elsewhere."""
    rollout, num = cfg.rollout, cfg.rollout.resolved_gpus_per_engine
    ours = [
        RayEngine(
            f"engine {index}",
            rollout,
            cfg.model,
            logs,
            cluster.engine_options(index),
            is_local=cluster.is_local,
            seed=cfg.seed + index,
            gpus=tuple(gpus[index * num : (index + 1) * num]),
        )
        for index in range(rollout.engines)
    ]
    theirs = [External(f"external {index}", url) for index, url in enumerate(rollout.external)]
    return [*ours, *theirs]
