"""A run's place on disk and before a person: opened, written to, and closed with a report however the run ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_vespo.config import ConfigError, SftConfig, TrainConfig, to_toml
from megatron_vespo.control import session
from megatron_vespo.control.actors import TrainerGroup
from megatron_vespo.control.progress import Progress, keep
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rundir import RunDirectory
from megatron_vespo.trainer.checkpoint import set_aside
from megatron_vespo.types import Interrupted, RunError

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


@contextlib.contextmanager
def open_desk(
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
            with RunLog(run, cfg.wandb_project, cfg.prometheus) as log, view, logs:
                yield Desk(run, log, view)
    finally:
        _explain(run.path, report, view)


def _explain(path: Path, report: Report, view: LiveView) -> None:
    """Write the report of a run that is over; a report that fails must not hide how the run ended."""
    try:
        view.event(f"report: {report(path)}")
    except (ConfigError, RunError, OSError, ValueError, KeyError) as err:
        view.event(f"no report: {err}")


def is_complete(run_dir: Path, start: Progress, num_steps: int) -> bool:
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


async def finish(trainer: TrainerGroup, progress: Progress, num_steps: int, desk: Desk) -> None:
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
