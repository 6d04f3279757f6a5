"""Watches one run: the schedules of evaluation and checkpoints, and everything that is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_vespo.config import TrainConfig
from megatron_vespo.control.clock import StepClock
from megatron_vespo.control.measurements import Metrics, step_metrics
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rundir import RunDirectory, rollout_rows, write_rollouts
from megatron_vespo.types import Group, Prompt, Rollout, Scored, StepOutput, SyncReport, Verifier


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a resumed run needs to know besides the trainer's checkpoint."""

    version: int = 0
    prompts_consumed: int = 0
    """Prompts whose groups were trained on; the stream resumes here, in-flight prompts are sampled again."""


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
        self.cfg = cfg
        self.heldout = heldout
        self.progress = start
        self._run, self._log, self._view, self._verifier = run, log, view, verifier
        self._num_tokens = 0
        self._pending: Metrics = {}

    def started(self, report: SyncReport) -> None:
        """The engine serves the weights with which the run starts."""
        self._view.event(
            f"engine serves version {report.version}, confirmed: canary within {report.canary_abs_max:.1e} nats "
            f"of the trainer, {report.num_bytes / 1e6:.1f} MB pushed"
        )

    async def step(
        self, groups: Sequence[Group], output: StepOutput, rescored: Sequence[Scored], sync: SyncReport
    ) -> None:
        """One optimizer step is done and its weights are served."""
        version = self.progress.version + 1
        rollouts: list[Rollout] = [rollout for group in groups for rollout in group.rollouts]
        self._pending |= step_metrics(version, rollouts, output, rescored, sync)
        rows = rollout_rows(rollouts, output, rescored, step=version)
        await asyncio.to_thread(write_rollouts, self._run.rollouts, rows)
        self.progress = Progress(
            version=version, prompts_consumed=self.progress.prompts_consumed + len(groups)
        )
        self._num_tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)

    def finish(self, clock: StepClock) -> None:
        """Write the step down."""
        self._pending |= {f"time/{phase}_s": seconds for phase, seconds in clock.laps_s.items()}
        self._pending["verifier/timeouts"] = self._verifier.num_timeouts
        self._pending["time/step_s"] = clock.elapsed_s
        self._pending["throughput/tokens_per_s"] = self._num_tokens / clock.elapsed_s
        self._view.step(self._log.log(self.progress.version, self._pending))
        self._pending = {}

    def heldout_reward(self, rewards: Sequence[float]) -> None:
        """A held-out evaluation of the current version ended."""
        mean = sum(rewards) / len(rewards)
        self._view.event(
            f"version {self.progress.version}: held-out reward {mean:.3f} ({len(rewards)} responses)"
        )
        if self.progress.version == 0:  # before the first step there is no record to join
            self._view.step(self._log.log(0, {"reward/heldout_mean": mean}))
        else:
            self._pending["reward/heldout_mean"] = mean

    def saved(self) -> None:
        """A checkpoint of the current version is on disk."""
        self._view.event(f"version {self.progress.version}: checkpoint saved")

    @property
    def first_evaluation_is_due(self) -> bool:
        return bool(self.heldout) and self.progress.version == 0

    @property
    def evaluation_is_due(self) -> bool:
        return bool(self.heldout) and self._due(self.cfg.loop.eval_every)

    @property
    def checkpoint_is_due(self) -> bool:
        return self._due(self.cfg.loop.save_every)

    def state(self) -> dict[str, int]:
        """What `Progress(**state)` needs after a resume."""
        return asdict(self.progress)

    def _due(self, every: int) -> bool:
        version = self.progress.version
        return version == self.cfg.loop.num_steps or (every > 0 and version % every == 0)
