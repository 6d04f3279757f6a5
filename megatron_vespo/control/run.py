"""One run from its first process to its last: what starts, in which order, and how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from megatron_vespo.config import AlgorithmConfig, ConfigError, SftConfig, TrainConfig, to_toml
from megatron_vespo.control import loop
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.observer import Observer, Progress
from megatron_vespo.control.plan import TrainPlan, plan_sft, plan_train
from megatron_vespo.data.prompts import EpochStream
from megatron_vespo.data.verifiers import MathVerifier
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rollout.client import SGLangEngine
from megatron_vespo.rollout.server import Server
from megatron_vespo.rundir import RunDirectory
from megatron_vespo.trainer.checkpoint import latest, read_state
from megatron_vespo.types import Interrupted, RunError, TrainSequence

logger = logging.getLogger(__name__)
T = TypeVar("T")


def train(cfg: TrainConfig, *, resume: bool) -> None:
    """Run `megatron-vespo train` to its end."""
    plan = plan_train(cfg)
    with RunDirectory(cfg.run_dir, to_toml(cfg), resume=resume) as run:
        start = _rewind(run, cfg.loop.num_steps)
        view = LiveView(f"train {cfg.run_dir}", cfg.loop.num_steps, max_staleness=cfg.loop.max_staleness)
        verifier = _verifier(cfg)
        with RunLog(run, cfg.wandb_project) as log, view, _logging(run, view), contextlib.closing(verifier):
            observer = Observer(cfg, run, log, view, plan.heldout, verifier, start)
            _run(lambda stop: _train(plan, run, verifier, observer, view, stop), view.event)


def finetune(cfg: SftConfig, *, resume: bool) -> None:
    """Run `megatron-vespo sft` to its end."""
    demonstrations = plan_sft(cfg)
    with RunDirectory(cfg.run_dir, to_toml(cfg), resume=resume) as run:
        start = _rewind(run, cfg.num_steps)
        stream = EpochStream(demonstrations, cfg.seed, cfg.data.shuffle, start.prompts_consumed)
        view = LiveView(f"sft {cfg.run_dir}", cfg.num_steps)
        with RunLog(run, cfg.wandb_project) as log, view, _logging(run, view):
            _run(lambda stop: _finetune(cfg, stream, start, run, log, view, stop), view.event)


def evaluate(cfg: TrainConfig, log_file: Path) -> list[float]:
    """Rewards of the held-out prompts' responses, sampled by the engine from cfg.model.

    Raises:
        ConfigError: no held-out file is configured.
    """
    plan = plan_train(cfg)
    if not plan.heldout:
        raise ConfigError(
            "prompts.heldout is not set: expected the file to evaluate on; set prompts.heldout=FILE"
        )

    async def sample_and_verify(stop: Stop) -> list[float]:
        async with (
            Server(cfg.rollout, cfg.model, log_file, seed=cfg.seed) as server,
            _engine(plan, server) as engine,
        ):
            with contextlib.closing(_verifier(cfg)) as verifier:
                return await loop.evaluate(plan.heldout, engine, verifier, cfg.loop.eval_samples)

    return _run(sample_and_verify, logger.warning)


async def _train(
    plan: TrainPlan, run: RunDirectory, verifier: MathVerifier, observer: Observer, view: LiveView, stop: Stop
) -> None:
    cfg, start = plan.cfg, observer.progress
    async with contextlib.AsyncExitStack() as stack:
        view.event("starting the SGLang server and the trainer's ranks")
        server = Server(cfg.rollout, cfg.model, run.logs / "sglang.log", seed=cfg.seed, progress=view.event)
        spec = PolicySpec(
            cfg=cfg.trainer,
            model=cfg.model.resolve(),
            algorithm=cfg.algorithm,
            temperature=cfg.sampling.temperature,
            seed=cfg.seed,
        )
        async with asyncio.TaskGroup() as starting:
            ranks = _trainer(spec, run, start, records_experts=plan.records_experts)
            ready = starting.create_task(stack.enter_async_context(ranks))
            starting.create_task(stack.enter_async_context(server))
        trainer = ready.result()
        engine = await stack.enter_async_context(_engine(plan, server))
        await trainer.connect(engine, server.url, cfg.rollout, plan.canary)

        prompts = EpochStream(plan.prompts, cfg.seed, cfg.prompts.shuffle, start.prompts_consumed)
        buffer = GroupBuffer(
            prompts_per_step=cfg.loop.prompts_per_step,
            max_staleness=cfg.loop.max_staleness,
            version=start.version,
        )
        stop.gently = lambda: asyncio.ensure_future(buffer.close())
        try:
            await loop.train(cfg, prompts, engine, verifier, trainer, observer, buffer)
        except Exception as error:
            await _rescue(trainer, observer.progress, view)
            if report := server.death_report():  # whatever else failed, failed because of it
                raise RunError(f"engine {server.url} = dead: the run cannot go on without it; it {report}") from error
            raise
        await _finish(trainer, observer.progress, cfg.loop.num_steps, run, view)


async def _finetune(
    cfg: SftConfig,
    demonstrations: EpochStream[TrainSequence],
    progress: Progress,
    run: RunDirectory,
    log: RunLog,
    view: LiveView,
    stop: Stop,
) -> None:
    """Supervised fine-tuning: REINFORCE on demonstrations, whose coefficient and advantage are 1."""
    view.event("starting the trainer's ranks")
    algorithm = AlgorithmConfig(name="reinforce")
    spec = PolicySpec(cfg=cfg.trainer, model=cfg.model.resolve(), algorithm=algorithm, temperature=1.0, seed=cfg.seed)
    async with _trainer(spec, run, progress, records_experts=False) as trainer:
        stop.gently = lambda: None  # looked at between steps
        while progress.version < cfg.num_steps and not stop.requested:
            clock = StepClock(progress.version + 1, cfg.step_timeout_s)
            batch = demonstrations.take(cfg.batch_size)
            output = await clock.lap("train", trainer.step(batch))
            progress = Progress(version=progress.version + 1, prompts_consumed=demonstrations.position)
            record = log.log(progress.version, {
                "optim/loss": output.loss,
                "optim/grad_norm": output.grad_norm,
                "optim/learning_rate": output.learning_rate,
                "time/step_s": clock.elapsed_s,
                "throughput/tokens_per_s": sum(len(s.token_ids) for s in batch) / clock.elapsed_s,
            })  # fmt: skip
            if progress.version % cfg.log_every == 0 or progress.version == cfg.num_steps:
                view.step(record)
            if cfg.save_every and progress.version % cfg.save_every == 0:
                await trainer.save(progress.version, asdict(progress))
        await _finish(trainer, progress, cfg.num_steps, run, view)


async def _finish(
    trainer: TrainerGroup, progress: Progress, num_steps: int, run: RunDirectory, view: LiveView
) -> None:
    """Save what is not saved; export the final model, or say how to go on where the run was stopped early."""
    if progress.version > trainer.saved_version:
        await trainer.save(progress.version, asdict(progress))
    if progress.version < num_steps:
        raise Interrupted(
            f"stopped after step {progress.version} of {num_steps}, whose checkpoint is saved; "
            "the same command with --resume continues"
        )
    await trainer.save_hf(run.final)
    view.event(f"final model in Hugging Face format: {run.final}")


async def _rescue(trainer: TrainerGroup, progress: Progress, view: LiveView) -> None:
    """After a failure: save the steps that are done, if the ranks are still able to."""
    if progress.version == trainer.saved_version:
        return
    if not await trainer.is_idle():
        view.event(
            f"steps {trainer.saved_version + 1} to {progress.version} are not saved: ranks hang in a collective"
        )
        return
    await trainer.save(progress.version, asdict(progress))
    view.event(f"the steps done so far are saved: checkpoint of version {progress.version}")


def _rewind(run: RunDirectory, num_steps: int) -> Progress:
    """Where the run starts: at its newest checkpoint, or at 0; what it logged after that is set aside.

    Raises:
        ConfigError: there is no step left to do.
    """
    checkpoint = latest(run.checkpoints)
    progress = Progress(**read_state(checkpoint)[1]) if checkpoint else Progress()
    if progress.version >= num_steps:
        raise ConfigError(
            f"num_steps = {num_steps}: '{run.path}' holds a run of {progress.version} steps already; raise it to go on"
        )
    if run.resumed:
        run.rewind(progress.version if checkpoint else -1)
    return progress


@contextlib.asynccontextmanager
async def _trainer(
    spec: PolicySpec, run: RunDirectory, progress: Progress, *, records_experts: bool
) -> AsyncIterator[TrainerGroup]:
    async with TrainerGroup(spec, run.checkpoints, run.logs, records_experts=records_experts) as trainer:
        if progress.version:
            await trainer.load(progress.version)
        yield trainer


@contextlib.asynccontextmanager
async def _engine(plan: TrainPlan, server: Server) -> AsyncIterator[SGLangEngine]:
    cfg = plan.cfg
    engine = SGLangEngine(server.url, cfg.model, cfg.rollout, cfg.sampling, server.death_report)
    try:
        yield engine
    finally:
        await engine.close()


def _verifier(cfg: TrainConfig) -> MathVerifier:
    return MathVerifier(timeout_s=cfg.reward.timeout_s, num_processes=cfg.reward.num_processes)


class Stop:
    """SIGINT and SIGTERM: the first ends the run after the step in progress, the second at once."""

    def __init__(self) -> None:
        self.requested = False
        self.gently: Callable[[], object] | None = None
        """How to ask for the gentle end; None while no step is in progress: the first signal then ends at once."""

    def on_signals(self, at_once: Callable[[], object], tell: Callable[[str], None]) -> None:
        def handle(number: signal.Signals) -> None:
            if self.requested or self.gently is None:
                at_once()
                return
            self.requested = True
            tell(f"{number.name}: ending after the step in progress, then saving; once more to end at once")
            self.gently()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, handle, number)


def _run(main: Callable[[Stop], Awaitable[T]], tell: Callable[[str], None]) -> T:
    """asyncio.run with our signals, and the first real cause instead of an exception group."""

    async def guarded() -> T:
        stop, task = Stop(), asyncio.current_task()
        assert task is not None
        stop.on_signals(task.cancel, tell)
        try:
            return await main(stop)
        except asyncio.CancelledError:
            raise Interrupted(
                "stopped at once; the last checkpoint is kept, --resume continues from it"
            ) from None

    try:
        return asyncio.run(guarded())
    except BaseExceptionGroup as group:
        logger.exception("the run failed")
        raise _cause(group) from group


def _cause(error: BaseException) -> BaseException:
    """The first RunError or ConfigError among the leaves of an exception group, else its first leaf."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, RunError | ConfigError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error


@contextlib.contextmanager
def _logging(run: RunDirectory, view: LiveView) -> Iterator[None]:
    """Our own log goes to logs/driver.log; its warnings also to the live view."""

    class ToView(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            view.event(record.getMessage())

    file, warnings = logging.FileHandler(run.logs / "driver.log"), ToView(logging.WARNING)
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    ours = logging.getLogger("megatron_vespo")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for handler in (file, warnings):
        ours.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, warnings):
            ours.removeHandler(handler)
