"""Reinforcement learning, and evaluation alone: what starts, in which order, and how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.control import evaluation, loop, session
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.cluster import Cluster
from megatron_vespo.control.desk import Desk, Report, finish, is_complete, open_desk
from megatron_vespo.control.engines import RayEngine
from megatron_vespo.control.evaluation import Evaluated
from megatron_vespo.control.examination import facts_of
from megatron_vespo.control.observer import Observer, Sources
from megatron_vespo.control.plan import TrainPlan, plan_train
from megatron_vespo.control.progress import Progress, Resume, ledger_of, name_of_stream, rescue, start_of
from megatron_vespo.control.publisher import FleetPublisher
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.data.conversation import Conversations
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.data.verifiers import make_verifier, punish_overlong
from megatron_vespo.metrics import LiveView
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.server import External
from megatron_vespo.types import Engine, Environment, RunError, Verifier

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
    alone = {"placement": "apart", "external": (), "engines": max(1, cfg.rollout.engines)}
    if cfg.rollout.external:
        logger.warning(
            "rollout.external is left alone: an evaluation starts engines of its own, with the weights of `model`"
        )
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=alone)})
    plan = plan_train(cfg)
    if not plan.heldout:
        raise ConfigError(
            "evaluation.sets = {}: expected the files to evaluate on; set evaluation.sets.NAME=FILE"
        )
    logs.mkdir(parents=True, exist_ok=True)

    async def sample_and_verify(stop: session.Stop) -> list[Evaluated]:
        async with contextlib.AsyncExitStack() as stack:
            judge = await stack.enter_async_context(make_verifier(cfg.reward))
            cluster = await stack.enter_async_context(Cluster(cfg.trainer, cfg.rollout, trains=False))
            fleet = await stack.enter_async_context(_fleet(cfg, cluster, logs, logger.warning))
            serving = asyncio.ensure_future(_serve_the_model(fleet))
            stack.callback(serving.cancel)
            sampler = Sampler(cfg, _speaking(cfg, fleet, plan.environment), judge)
            return await evaluation.evaluate(cfg, plan.heldout, sampler)

    return session.run(sample_and_verify, logger.warning)


async def _serve_the_model(fleet: Fleet) -> None:
    """For ever: the weights with which an engine was started are those that are meant."""
    while True:
        await fleet.newcomer()
        for member in await fleet.to_update(0):
            fleet.confirm(member.name, 0)


async def _train(plan: TrainPlan, start: Progress, desk: Desk, stop: session.Stop) -> None:
    cfg = plan.cfg
    async with contextlib.AsyncExitStack() as stack:
        judge = await stack.enter_async_context(make_verifier(cfg.reward))  # the quickest to fail comes first
        desk.tell("starting the engines and the trainer's ranks")
        cluster = await stack.enter_async_context(Cluster(cfg.trainer, cfg.rollout))
        trainer, fleet = await _start(plan, start, cluster, desk, stack)
        engine = _speaking(cfg, fleet, plan.environment)
        prompts = EpochStream(
            plan.prompts, cfg.seed, cfg.prompts.shuffle, ledger_of(start, len(plan.prompts))
        )
        buffer = GroupBuffer.of(cfg.loop)
        examiner = Sampler(cfg, engine, judge)  # its rewards are the verifier's alone
        sources = Sources(
            prompts=prompts,
            failures=lambda: _failures(judge, engine),
            engine_metrics=fleet.metrics,
            begun=lambda: setattr(stop, "gently", buffer.close),
            facts=facts_of(cfg, plan.shape, desk.run),
            evaluate=(lambda: evaluation.evaluate(cfg, plan.heldout, examiner)) if plan.heldout else None,
        )
        observer = Observer(cfg, desk.run, desk.log, desk.view, sources, start)
        try:
            await loop.train(
                cfg,
                prompts,
                Sampler(cfg, engine, punish_overlong(judge, cfg.reward, cfg.sampling.max_response_tokens)),
                trainer,
                FleetPublisher(trainer, fleet, plan.canary, cfg.rollout),
                buffer,
                observer,
            )
        except Exception:
            await rescue(trainer, observer.progress.version, observer.progress_at, desk.tell)
            with contextlib.suppress(RunError, OSError):  # the failure is the news
                observer.flush()
            raise
        desk.tell(f"prompts: {prompts.report()}")
        await finish(trainer, observer.progress, cfg.loop.num_steps, desk)


async def _start(
    plan: TrainPlan, start: Progress, cluster: Cluster, desk: Desk, stack: contextlib.AsyncExitStack
) -> tuple[TrainerGroup, Fleet]:
    """Ranks and engines, side by side; colocated engines need to know the GPUs that the ranks have got."""
    cfg, spec = plan.cfg, PolicySpec.of(plan.cfg)
    ranks = TrainerGroup(cluster, spec, desk.run, version=start.version, records_experts=plan.records_experts)
    if cfg.rollout.placement == "colocated":
        trainer = await stack.enter_async_context(ranks)
        fleet = _fleet(cfg, cluster, desk.run.logs, desk.tell, await trainer.gpus_of_engines(cfg.rollout))
        await stack.enter_async_context(fleet)
    else:
        fleet = await stack.enter_async_context(_fleet(cfg, cluster, desk.run.logs, desk.tell))
        trainer = await stack.enter_async_context(ranks)
    await trainer.prepare_to_push(cfg.rollout)
    await fleet.all_started()
    return trainer, fleet


def _fleet(
    cfg: TrainConfig,
    cluster: Cluster,
    logs: Path,
    tell: Callable[[str], None],
    gpus: Mapping[int, tuple[int, ...]] | None = None,
) -> Fleet:
    """Engines that are started here, one actor each, and those that run elsewhere."""
    rollout, gpus = (
        cfg.rollout,
        gpus or {},
    )  # where Ray gives an engine GPUs of its own, it also says so to it
    ours = [
        RayEngine(
            f"engine {index}",
            rollout,
            cfg.model,
            logs,
            cluster.engine_options(index),
            is_local=cluster.is_local,
            seed=cfg.seed + index,
            gpus=gpus.get(index),
        )
        for index in range(rollout.engines)
    ]
    theirs = [
        External(f"external {index}", url, rollout.start_timeout_s)
        for index, url in enumerate(rollout.external)
    ]
    return Fleet(rollout, cfg.model, [*ours, *theirs], tell, temperature=cfg.sampling.temperature)


def _speaking(cfg: TrainConfig, fleet: Fleet, environment: Environment | None) -> Engine:
    """The fleet, in conversation with the environment if there is one."""
    if environment is None:
        return fleet
    talk = cfg.environment
    return Conversations(fleet, environment, max_turns=talk.max_turns, reply_timeout_s=talk.timeout_s)


def _failures(judge: Verifier, engine: Engine) -> dict[str, int]:
    """Responses that were not judged, and conversations that ended because the environment failed; so far."""
    counts = {f"verifier/{kind}": num for kind, num in judge.failures.items()}
    if isinstance(engine, Conversations):
        counts |= {f"environment/{kind}": num for kind, num in engine.failures.items()}
    return counts
