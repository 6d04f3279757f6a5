"""How far a run has come, and how that survives its end: resume, and rescue after a failure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.checkpoint import latest, read_state
from megatron_vespo.types import RunError

if TYPE_CHECKING:
    from megatron_vespo.control.actors import TrainerGroup


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a resumed run must know besides the trainer's checkpoint."""

    stream: str
    """Names what is consumed and in which order (`name_of_stream`); a resume must consume the same."""
    version: int = 0
    """Optimizer steps done."""
    consumed: int = 0
    """Items of the stream (prompts, demonstrations) trained on; what was in flight is sampled again."""

    def after(self, num_steps: int, num_items: int) -> Progress:
        return replace(self, version=self.version + num_steps, consumed=self.consumed + num_items)


def name_of_stream(command: str, seed: int, shuffle: bool, uids: Iterable[str]) -> str:
    """Equal exactly where the same items come in the same order."""
    digest = hashlib.sha256("\n".join(uids).encode()).hexdigest()[:16]
    return f"{command} seed={seed} shuffle={shuffle} uids={digest}"


def start_of(run_dir: Path, stream: str, *, resume: bool) -> Progress:
    """Where a run starts: at the newest checkpoint if it resumes one, else at 0; changes nothing.

    Raises:
        ConfigError: the checkpoint is of a run that consumes something else, or in another order.
    """
    checkpoint = latest(run_dir / "checkpoints") if resume else None
    if checkpoint is None:
        return Progress(stream=stream)
    progress = Progress(**read_state(checkpoint)[1])
    if progress.stream != stream:
        raise ConfigError(
            f"resume from '{checkpoint}': it consumed [{progress.stream}], this run would consume [{stream}], so items "
            "would be repeated or skipped; keep command, seed, shuffle and data as they were, or start a new run"
        )
    return progress


async def keep(trainer: TrainerGroup, progress: Progress) -> None:
    """Save a checkpoint of `progress` unless there is one."""
    if progress.version > trainer.saved_version:
        await trainer.save(progress.version, asdict(progress))


async def rescue(
    trainer: TrainerGroup, progress: Progress, items_per_step: int, tell: Callable[[str], None]
) -> None:
    """After a failure: save every step that is in the weights, if the ranks still can; raises nothing.

    The driver may have been torn away in the middle of a step that the ranks completed: their count of steps is
    the truth, and the checkpoint says which items they have seen.
    """
    try:
        versions = set(await trainer.versions())
        if len(versions) != 1:
            tell(
                f"steps after {trainer.saved_version} are not saved: ranks are at versions {sorted(versions)}"
            )
            return
        extra, before = versions.pop() - progress.version, trainer.saved_version
        await keep(trainer, progress.after(extra, extra * items_per_step))
        if trainer.saved_version > before:
            tell(f"saved after the failure: checkpoint of version {trainer.saved_version}")
    except (RunError, OSError) as err:
        tell(f"steps after {trainer.saved_version} are not saved: {err}")
