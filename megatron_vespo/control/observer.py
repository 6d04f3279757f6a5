"""Watches one run: the schedules of evaluation and checkpoints, and everything that is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

from megatron_vespo.config import TrainConfig
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.measurements import Metrics, step_metrics
from megatron_vespo.control.progress import Progress
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rundir import RunDirectory, rollout_rows, write_rollouts
from megatron_vespo.types import Group, Prompt, Scored, StepOutput, SyncReport, Verifier


class Observer:
    """Turns the loop's events into metrics.jsonl, TensorBoard, rollout files and the live view."""

    def __init__(
        self,
        cfg: TrainConfig,
        run: RunDirectory,
        log: RunLog,
        view: LiveView,
        heldout: Sequence[Prompt],
        verifier: Verifier,
        start: Progress,
    ) -> None:
        self.heldout = heldout
        self.progress = start
        self._cfg = cfg.loop
        self._writes_in_background = cfg.trainer.async_save
        self._run, self._log, self._view, self._verifier = run, log, view, verifier
        self._failed_before = (0, 0)
        self._pending: Metrics = {}

    def started(self, report: SyncReport) -> None:
        """The engine serves the weights with which the run starts."""
        self._view.event(
            f"engine serves version {report.version}, confirmed: canary within {report.canary_abs_max:.1e} nats "
            f"of the trainer, {report.num_bytes / 1e6:.1f} MB pushed"
        )

    async def step(
        self, groups: Sequence[Group], output: StepOutput, rescored: Sequence[Scored | None], sync: SyncReport
    ) -> None:
        """One optimizer step is done and its weights are served."""
        self.progress = self.progress.after(1, len(groups))
        version = self.progress.version
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self._pending |= step_metrics(version, rollouts, output, rescored, sync)
        self._pending |= self._verifier_failures()
        rows = rollout_rows(rollouts, output, rescored, step=version)
        await asyncio.to_thread(write_rollouts, self._run.rollouts, rows)

    def heldout_reward(self, reward_P: Sequence[float]) -> None:
        """A held-out evaluation of the current version ended: one mean reward per prompt."""
        mean = sum(reward_P) / len(reward_P)
        version = self.progress.version
        self._view.event(f"version {version}: held-out reward {mean:.3f} ({len(reward_P)} prompts)")
        self._pending["reward/heldout_mean"] = mean
        if version == 0:  # there is no step to join
            self.flush()

    def finish(self, clock: StepClock, num_tokens: int) -> None:
        """Write the step down."""
        self._pending |= {f"time/{phase}_s": seconds for phase, seconds in clock.laps_s.items()}
        self._pending["time/step_s"] = clock.elapsed_s
        self._pending["throughput/tokens_per_s"] = num_tokens / clock.elapsed_s
        self.flush()

    def saved(self, seconds: float) -> None:
        """A checkpoint of the current version is on disk, or on its way; the time is written down with the next step."""
        how = "copied, and is being written" if self._writes_in_background else "saved"
        self._view.event(f"version {self.progress.version}: checkpoint {how} ({seconds:.1f} s)")
        self._pending["time/save_s"] = seconds

    def flush(self) -> None:
        """Write down what is known of the current version, if anything is."""
        if self._pending.keys() - {"time/save_s"}:
            metrics, self._pending = self._pending, {}
            self._view.step(self._log.log(self.progress.version, metrics))

    @property
    def first_evaluation_is_due(self) -> bool:
        return bool(self.heldout) and self.progress.version == 0

    @property
    def evaluation_is_due(self) -> bool:
        return bool(self.heldout) and self._is_due(self._cfg.eval_every)

    @property
    def checkpoint_is_due(self) -> bool:
        return self._is_due(self._cfg.save_every)

    def state(self) -> dict[str, str | int]:
        """What a checkpoint remembers: `Progress(**state)`."""
        return asdict(self.progress)

    def _is_due(self, every: int) -> bool:
        version = self.progress.version
        return version == self._cfg.num_steps or (every > 0 and version % every == 0)

    def _verifier_failures(self) -> Metrics:
        """Responses that got reward 0 since the last step because they could not be verified."""
        now = (self._verifier.num_timeouts, self._verifier.num_deaths)
        timeouts, deaths = (after - before for after, before in zip(now, self._failed_before, strict=True))
        self._failed_before = now
        return {"verifier/timeouts": timeouts, "verifier/deaths": deaths}
