"""Watches one run: the schedules of evaluation and checkpoints, and everything that is written down."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from megatron_vespo.config import TrainConfig
from megatron_vespo.control.alerts import Watch
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.evaluation import Evaluated
from megatron_vespo.control.examination import Case, case_metrics, write_cases
from megatron_vespo.control.measurements import Filtered, Metrics, filter_metrics, step_metrics, sync_metrics
from megatron_vespo.control.progress import Progress
from megatron_vespo.control.selection import Selection
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.evidence import Facts
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rundir import RunDirectory, read_metrics, rollout_rows, write_rollouts
from megatron_vespo.types import (
    Examined,
    Group,
    Prompt,
    Rollout,
    Scored,
    StepOutput,
    SyncReport,
    Trainer,
    TrainSequence,
)

logger = logging.getLogger(__name__)

Evaluate = Callable[[], Awaitable[Sequence[Evaluated]]]


class Sources(NamedTuple):
    """What is watched besides the loop's own events."""

    prompts: EpochStream[Prompt]
    failures: Callable[[], Mapping[str, int]]
    """Of verifier and environment: totals so far, by metric."""
    engine_metrics: Callable[[], Mapping[str, float]]
    """Of this moment."""
    evaluate: Evaluate | None
    """Samples the held-out sets; None without any."""
    facts: Facts
    """What evidence files say of the run as a whole."""
    begun: Callable[[], object] = lambda: None
    """Told when training begins, so that from then on a run can end after a step."""


class Observer:
    """Turns the loop's events into metrics.jsonl, TensorBoard, rollout and evidence files, alerts and the live view."""

    def __init__(
        self,
        cfg: TrainConfig,
        run: RunDirectory,
        log: RunLog,
        view: LiveView,
        sources: Sources,
        start: Progress,
    ) -> None:
        self._cfg = cfg
        self._stream, self._version = start.stream, start.version
        self._run, self._log, self._view, self._sources = run, log, view, sources
        self._failed_before: Mapping[str, int] = {}
        self._in_training: Sequence[Group] = ()
        self._batch: Sequence[TrainSequence] = ()
        self._chosen = Selection()
        self._examined: Sequence[Examined] = ()
        self._watch = Watch(cfg)
        for record in read_metrics(run.metrics) if run.metrics.exists() else []:  # of a run that is resumed
            self._watch.see(record["step"], record)
        self._taken: Metrics = {}
        self._filtered: list[Filtered] = []
        self._num_expired = 0
        self._evaluation: asyncio.Task[Sequence[Evaluated]] | None = None
        self._pending: Metrics = {}
        self.noise_variance: float = 0.0
        """sigma^2 of one token's behavior log-prob by the engine's arithmetic, nats^2, as last measured."""

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return Progress(
            stream=self._stream, version=self._version, ledger=self._sources.prompts.ledger.state()
        )

    def progress_at(self, version: int) -> Progress:
        """The progress if the trainer's weights are at `version`: of the last step, or of the batch in training, too."""
        if version == self._version + 1:
            self._sources.prompts.done([group.ordinal for group in self._in_training], "trained")
            self._version += 1
        return self.progress

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers: `Progress(**state)`."""
        return asdict(self.progress)

    def started(self, report: SyncReport) -> None:
        """The engines serve the weights with which the run starts."""
        self.noise_variance = report.canary_variance
        self._view.event(
            f"{report.num_engines} engine(s) serve version {report.version}, confirmed: canary within "
            f"{report.canary_abs_max:.1e} nats of the trainer, {report.num_bytes / 1e6:.1f} MB pushed"
        )

    def taken(
        self, groups: Sequence[Group], batch: Sequence[TrainSequence], buffer: GroupBuffer
    ) -> Selection:
        """A batch goes to the trainer; which of its sequences are measured more closely."""
        self._in_training, self._batch = groups, batch
        self._taken = {
            "loop/overtaken_groups": buffer.num_overtaken,
            "loop/waiting_groups": buffer.num_finished,
        }
        self._chosen = Selection.of(self._cfg, self._version + 1, batch)
        return self._chosen

    async def examine(self, trainer: Trainer, clock: StepClock) -> None:
        """If evidence is due: the passes that tell causes apart, under the weights that are about to be trained."""
        rollouts = _rollouts(self._in_training)
        sequences = [
            replace(self._batch[i], experts=rollouts[i].response.experts) for i in self._chosen.examined
        ]
        self._examined = await clock.lap("examine", trainer.examine(sequences)) if sequences else ()

    def filtered(self, group: Group) -> None:
        """A group without signal was dropped."""
        self._filtered.append(Filtered.of(group))

    def expired(self) -> None:
        """A prompt that oversampling had admitted was not needed in time, and is sampled again."""
        self._num_expired += 1

    async def measure(
        self, groups: Sequence[Group], output: StepOutput, rescored: Sequence[Scored | None]
    ) -> Metrics:
        """The numbers of a step whose weights are not served yet; in a thread, for nobody need wait for them."""
        metrics = await asyncio.to_thread(
            step_metrics, self._version + 1, groups, output, rescored, self._cfg.algorithm
        )
        if cases := self._cases(groups, output, rescored):
            metrics |= await asyncio.to_thread(case_metrics, cases, self._sources.facts)
        return metrics

    async def step(
        self,
        groups: Sequence[Group],
        output: StepOutput,
        rescored: Sequence[Scored | None],
        sync: SyncReport,
        measuring: Awaitable[Metrics],
    ) -> None:
        """One optimizer step is done and its weights are served."""
        self._pending |= self._taken | await measuring | sync_metrics(sync)
        cases = self._cases(groups, output, rescored)
        self._version += 1
        self._in_training = self._batch = ()
        # Both engines saw the same tokens under the same weights and, in replay, with the same experts.
        if isinstance(measured := self._pending.get("mismatch/square_mean_nats2"), float):
            self.noise_variance = measured
        self._pending |= self._failures() | _prompt_metrics(self._sources.prompts)
        self._pending |= self._sources.engine_metrics()
        if self._cfg.loop.filter_groups:
            self._pending |= filter_metrics(groups, self._filtered)
            self._pending["filter/expired_groups"] = self._num_expired
            self._filtered, self._num_expired = [], 0
        if sync.num_lost:
            self._view.event(
                f"version {self._version}: {sync.num_lost} engine(s) lost during the push; {sync.num_engines} serve it"
            )
        rows = rollout_rows(groups, output, rescored, step=self._version)
        await asyncio.to_thread(write_rollouts, self._run.rollouts, rows)
        if cases:
            theirs = [rows[i] for i in self._chosen.examined]
            await asyncio.to_thread(write_cases, self._run.evidence, theirs, cases, self._sources.facts)

    def begin(self) -> None:
        """Training begins."""
        self._sources.begun()

    async def first_evaluation(self, clock: StepClock) -> None:
        """Of the weights before any training; a resumed run had it."""
        if self._sources.evaluate and self._version == 0:
            self._evaluated(await clock.lap("eval", self._sources.evaluate()))

    async def evaluate(self, tasks: asyncio.TaskGroup, clock: StepClock) -> None:
        """Evaluate if it is due: now, or (evaluation.waits = false) beside the next steps, one evaluation at a time."""
        due = self._sources.evaluate is not None and self._is_due(self._cfg.evaluation.every)
        is_last = self._version == self._cfg.loop.num_steps
        if self._evaluation is not None and (due or self._evaluation.done()):
            earlier, self._evaluation = await clock.lap("eval", self._evaluation), None
            if not is_last:  # else it would stand where the last one will
                self._evaluated(earlier)
            else:
                self._tell(earlier)
        if not due or self._sources.evaluate is None:
            return
        if self._cfg.evaluation.waits or is_last:
            self._evaluated(await clock.lap("eval", self._sources.evaluate()))
        else:
            self._evaluation = tasks.create_task(_of(self._sources.evaluate))

    def ended(self) -> None:
        """The loop is over: an evaluation that still runs, because the run was stopped early, is given up."""
        if self._evaluation is not None:
            self._evaluation.cancel()

    def finish(self, clock: StepClock, num_tokens: int) -> None:
        """Write the step down."""
        self._pending |= {f"time/{phase}_s": seconds for phase, seconds in clock.laps_s.items()}
        self._pending["time/step_s"] = clock.elapsed_s
        self._pending["throughput/tokens_per_s"] = num_tokens / clock.elapsed_s
        self._alert()
        self.flush()

    def saved(self, seconds: float) -> None:
        """A checkpoint of the current version is on disk, or on its way; the time is written down with the next step."""
        how = "copied, and is being written" if self._cfg.trainer.async_save else "saved"
        self._view.event(f"version {self._version}: checkpoint {how} ({seconds:.1f} s)")
        self._pending["time/save_s"] = seconds

    def flush(self) -> None:
        """Write down what is known of the current version, if anything is."""
        if self._pending.keys() - {"time/save_s"}:
            metrics, self._pending = self._pending, {}
            self._view.step(self._log.log(self._version, metrics))

    @property
    def checkpoint_is_due(self) -> bool:
        return self._is_due(self._cfg.loop.save_every)

    def _is_due(self, every: int) -> bool:
        return self._version == self._cfg.loop.num_steps or (every > 0 and self._version % every == 0)

    def _tell(self, sets: Sequence[Evaluated]) -> None:
        for one in sets:
            self._view.event(f"version {_versions(one)}: {one.describe()}")

    def _evaluated(self, sets: Sequence[Evaluated]) -> None:
        self._tell(sets)
        for one in sets:
            self._pending |= one.metrics()
        self._pending["reward/heldout_mean"] = sum(one.avg for one in sets) / len(sets)
        if self._version == 0:  # there is no step to join
            self.flush()

    def _cases(
        self, groups: Sequence[Group], output: StepOutput, rescored: Sequence[Scored | None]
    ) -> list[Case]:
        """Of a step that is not counted yet."""
        rollouts = _rollouts(groups)
        return [
            Case(
                rollout=rollouts[i],
                examined=examined,
                policy=output.scored[i],
                engine=rescored[i],
                train_version=self._version,
            )
            for i, examined in zip(self._chosen.examined, self._examined, strict=True)
        ]

    def _alert(self) -> None:
        """Tell of what begins and of what is over, once each."""
        changes = self._watch.see(self._version, self._pending)
        self._pending["alerts/active"] = len(self._watch.active)
        for alert in changes:
            if alert.begins:
                logger.warning("alert at step %d: %s", alert.step, alert.message)
            else:
                self._view.event(f"version {alert.step}: the alert '{alert.rule}' is over")
        with self._run.alerts.open("a") as file:
            file.writelines(json.dumps({"time": time.time(), **asdict(alert)}) + "\n" for alert in changes)

    def _failures(self) -> Metrics:
        """Since the last step."""
        now, before = dict(self._sources.failures()), self._failed_before
        self._failed_before = now
        return {metric: num - before.get(metric, 0) for metric, num in now.items()}


def _rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def _prompt_metrics(prompts: EpochStream[Prompt]) -> Metrics:
    ledger = prompts.ledger
    return {
        "prompts/epochs_complete": ledger.frontier // ledger.size,
        "prompts/trained": ledger.count("trained"),
        "prompts/filtered": ledger.count("filtered"),
        "prompts/under_way": prompts.num_under_way,
    }


async def _of(evaluate: Evaluate) -> Sequence[Evaluated]:
    return await evaluate()


def _versions(one: Evaluated) -> str:
    oldest, newest = one.versions
    return str(newest) if oldest == newest else f"{oldest} to {newest}"
