"""One run from its first process to its last: what starts, in which order, and how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from megatron_vespo.config import AlgorithmConfig, ConfigError, SftConfig, TrainConfig, to_toml
from megatron_vespo.control import loop, session
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.measurements import optimizer_metrics
from megatron_vespo.control.observer import Observer
from megatron_vespo.control.plan import TrainPlan, plan_sft, plan_train
from megatron_vespo.control.progress import Progress, Resume, keep, name_of_stream, rescue, start_of
from megatron_vespo.data.prompts import EpochStream
from megatron_vespo.data.verifiers import MathVerifier
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rollout.client import SGLangEngine
from megatron_vespo.rollout.server import Server
from megatron_vespo.rundir import RunDirectory
from megatron_vespo.trainer.checkpoint import set_aside
from megatron_vespo.types import Interrupted, RunError, TrainSequence

logger = logging.getLogger(__name__)

Report = Callable[[Path], Path]
"""Explains a run directory in a file, whose path it returns."""


class Desk(NamedTuple):
    """Where a run writes, and what a person sees of it."""

    run: RunDirectory
    log: RunLog
    view: LiveView

    def tell(self, text: str) -> None:
        """To the log file and to the person."""
        logger.info(text)
        self.view.event(text)


def train(cfg: TrainConfig, *, resume: Resume | None, report: Report) -> None:
    """Run `megatron-vespo train` to its end."""
    plan = plan_train(cfg)
    stream = name_of_stream("train", cfg.seed, cfg.prompts.shuffle, (prompt.uid for prompt in plan.prompts))
    start = start_of(cfg.run_dir, stream, resume=resume)
    num_steps = cfg.loop.num_steps
    if not _is_complete(cfg.run_dir, start, num_steps):
        view = LiveView(f"train {cfg.run_dir}", num_steps, max_staleness=cfg.loop.max_staleness)
        with _desk(cfg, start, view, report, resume=resume is not None) as desk:
            session.run(lambda stop: _train(plan, start, desk, stop), desk.tell)


def finetune(cfg: SftConfig, *, resume: Resume | None, report: Report) -> None:
    """Run `megatron-vespo sft` to its end."""
    demonstrations = plan_sft(cfg)
    stream = name_of_stream("sft", cfg.seed, cfg.data.shuffle, (sequence.uid for sequence in demonstrations))
    start = start_of(cfg.run_dir, stream, resume=resume)
    if not _is_complete(cfg.run_dir, start, cfg.num_steps):
        deck = EpochStream(demonstrations, cfg.seed, cfg.data.shuffle, start.consumed)
        view = LiveView(f"sft {cfg.run_dir}", cfg.num_steps)
        with _desk(cfg, start, view, report, resume=resume is not None) as desk:
            session.run(lambda stop: _finetune(cfg, deck, start, desk, stop), desk.tell)


def evaluate(cfg: TrainConfig, log_file: Path) -> list[float]:
    """Mean reward of each held-out prompt, its responses sampled by the engine from cfg.model.

    Raises:
        ConfigError: no held-out file is configured.
    """
    plan = plan_train(cfg)
    if not plan.heldout:
        raise ConfigError(
            "prompts.heldout is not set: expected the file to evaluate on; set prompts.heldout=FILE"
        )

    async def sample_and_verify(stop: session.Stop) -> list[float]:
        server = Server(cfg.rollout, cfg.model, log_file, seed=cfg.seed)
        async with server, _engine(cfg, server) as engine:
            with contextlib.closing(_verifier(cfg)) as verifier:
                return await loop.evaluate(plan.heldout, engine, verifier, cfg.loop.eval_samples)

    return session.run(sample_and_verify, logger.warning)


async def _train(plan: TrainPlan, start: Progress, desk: Desk, stop: session.Stop) -> None:
    cfg = plan.cfg
    async with contextlib.AsyncExitStack() as stack:
        desk.tell("starting the SGLang server and the trainer's ranks")
        server = Server(
            cfg.rollout, cfg.model, desk.run.logs / "sglang.log", seed=cfg.seed, progress=desk.tell
        )
        ranks = _trainer(cfg, cfg.algorithm, desk.run, start, records=plan.records_experts)
        async with asyncio.TaskGroup() as starting:
            ready = starting.create_task(stack.enter_async_context(ranks))
            starting.create_task(stack.enter_async_context(server))
        trainer = ready.result()
        engine = await stack.enter_async_context(_engine(cfg, server))
        verifier = stack.enter_context(contextlib.closing(_verifier(cfg)))
        await trainer.connect(engine, server.url, cfg.rollout, plan.canary)

        prompts = EpochStream(plan.prompts, cfg.seed, cfg.prompts.shuffle, start.consumed)
        buffer = GroupBuffer(prompts_per_step=cfg.loop.prompts_per_step, max_staleness=cfg.loop.max_staleness)
        observer = Observer(cfg, desk.run, desk.log, desk.view, plan.heldout, verifier, start)
        stop.gently = lambda: asyncio.ensure_future(buffer.close())
        try:
            await loop.train(cfg, prompts, engine, verifier, trainer, observer, buffer)
        except Exception as error:
            await rescue(trainer, observer.progress, cfg.loop.prompts_per_step, desk.tell)
            with contextlib.suppress(RunError, OSError):  # the failure is the news
                observer.flush()
            if report := server.death_report():  # whatever else failed, failed because of it
                raise RunError(
                    f"engine {server.url} = dead: the run cannot go on without it; it {report}"
                ) from error
            raise
        await _finish(trainer, observer.progress, cfg.loop.num_steps, desk)


async def _finetune(
    cfg: SftConfig,
    demonstrations: EpochStream[TrainSequence],
    progress: Progress,
    desk: Desk,
    stop: session.Stop,
) -> None:
    """Supervised fine-tuning: REINFORCE on demonstrations, whose coefficient and advantage are 1."""
    desk.tell("starting the trainer's ranks")
    async with _trainer(cfg, AlgorithmConfig(name="reinforce"), desk.run, progress, records=False) as trainer:
        stop.gently = lambda: None  # looked at between steps
        try:
            while progress.version < cfg.num_steps and not stop.requested:
                clock = StepClock(progress.version + 1, cfg.step_timeout_s, "step_timeout_s")
                batch = demonstrations.take(cfg.batch_size)
                output = await clock.lap("train", trainer.step(batch))
                progress = progress.after(1, len(batch))
                record = desk.log.log(progress.version, {
                    **optimizer_metrics(output),
                    "time/step_s": clock.elapsed_s,
                    "throughput/tokens_per_s": sum(len(s.token_ids) for s in batch) / clock.elapsed_s,
                })  # fmt: skip
                if progress.version % cfg.log_every == 0 or progress.version == cfg.num_steps:
                    desk.view.step(record)
                if cfg.save_every and progress.version % cfg.save_every == 0:
                    await trainer.save(progress.version, asdict(progress))
        except Exception:
            await rescue(trainer, progress, cfg.batch_size, desk.tell)
            raise
        await _finish(trainer, progress, cfg.num_steps, desk)


async def _finish(trainer: TrainerGroup, progress: Progress, num_steps: int, desk: Desk) -> None:
    """Save what is not saved; export the final model, or say how to go on where the run was stopped early."""
    await keep(trainer, progress)
    if progress.version < num_steps:
        kept = (
            f"the checkpoint of step {progress.version} is saved" if progress.version else "no step was done"
        )
        raise Interrupted(
            f"stopped after step {progress.version} of {num_steps}: {kept}; "
            "the same command with --resume auto continues"
        )
    await trainer.save_hf(desk.run.final)
    desk.tell(f"final model in Hugging Face format: {desk.run.final}")


def _is_complete(run_dir: Path, start: Progress, num_steps: int) -> bool:
    """Whether a resumed run has nothing left to do.

    Raises:
        ConfigError: it did more steps than are asked for.
    """
    if start.version > num_steps:
        raise ConfigError(
            f"num_steps = {num_steps}: '{run_dir}' holds a run of {start.version} steps already; raise it to go on"
        )
    complete = start.version == num_steps and (run_dir / "final").exists()
    if complete:
        logger.warning("%s: complete, all %d steps are done; nothing to do", run_dir, num_steps)
    return complete


@contextlib.contextmanager
def _desk(
    cfg: TrainConfig | SftConfig, start: Progress, view: LiveView, report: Report, *, resume: bool
) -> Iterator[Desk]:
    """The open run directory; what a resume replaces is set aside, and a report is written however the run ends."""
    run = RunDirectory(cfg.run_dir, to_toml(cfg), resume=resume)  # what it refuses is left as it is
    try:
        with run:
            if run.resumed:
                run.rewind(start.version if start.version else -1)
                for place in set_aside(run.checkpoints, start.version):
                    logger.warning(
                        "the run goes back to step %d: a later checkpoint is now %s", start.version, place
                    )
            logs = session.logging_to(run.logs / "driver.log", view.event)
            with RunLog(run, cfg.wandb_project) as log, view, logs:
                yield Desk(run, log, view)
    finally:
        _explain(run.path, report, view)


def _explain(path: Path, report: Report, view: LiveView) -> None:
    """Write the report of a run that is over; a report that fails must not hide how the run ended."""
    try:
        view.event(f"report: {report(path)}")
    except (ConfigError, RunError, OSError, ValueError, KeyError) as err:
        view.event(f"no report: {err}")


@contextlib.asynccontextmanager
async def _trainer(
    cfg: TrainConfig | SftConfig,
    algorithm: AlgorithmConfig,
    run: RunDirectory,
    start: Progress,
    *,
    records: bool,
) -> AsyncIterator[TrainerGroup]:
    rl = isinstance(cfg, TrainConfig)
    spec = PolicySpec(
        cfg=cfg.trainer,
        model=cfg.model.resolve(),
        algorithm=algorithm,
        temperature=cfg.sampling.temperature if rl else 1.0,
        seed=cfg.seed,
        updates_per_batch=cfg.loop.updates_per_batch if rl else 1,
    )
    async with TrainerGroup(spec, run.checkpoints, run.logs, records_experts=records) as trainer:
        if start.version:
            await trainer.load(start.version)
        yield trainer


@contextlib.asynccontextmanager
async def _engine(cfg: TrainConfig, server: Server) -> AsyncIterator[SGLangEngine]:
    engine = SGLangEngine(server.url, cfg.model, cfg.rollout, cfg.sampling, server.death_report)
    try:
        yield engine
    finally:
        await engine.close()


def _verifier(cfg: TrainConfig) -> MathVerifier:
    return MathVerifier(timeout_s=cfg.reward.timeout_s, num_processes=cfg.reward.num_processes)
