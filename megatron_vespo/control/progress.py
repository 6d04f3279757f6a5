"""How far a run has come, and how that survives its end: resume, and rescue after a failure."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_vespo.config import ConfigError
from megatron_vespo.data.stream import Ledger
from megatron_vespo.trainer.checkpoint import Found, found, read_state
from megatron_vespo.types import RunError

if TYPE_CHECKING:
    from megatron_vespo.control.actors import TrainerGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a resumed run must know besides the trainer's checkpoint."""

    stream: str
    """Names what is consumed and in which order (`name_of_stream`); a resume must consume the same."""
    version: int = 0
    """Batches trained on."""
    ledger: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Which items of the stream are done (`data.stream.Ledger`); what was in flight is sampled again."""


def ledger_of(start: Progress, num_items: int) -> Ledger:
    """Of the stream, where the run starts."""
    return Ledger.from_state(start.ledger) if start.ledger else Ledger(num_items)


def name_of_stream(command: str, seed: int, shuffle: bool, uids: Iterable[str]) -> str:
    """Equal exactly where the same items come in the same order."""
    digest = hashlib.sha256("\n".join(uids).encode()).hexdigest()[:16]
    return f"{command} seed={seed} shuffle={shuffle} uids={digest}"


Resume = Literal["auto"] | int
"""From the newest checkpoint that is not damaged (or at 0 where there is none), or from that of one step."""


def start_of(run_dir: Path, stream: str, *, resume: Resume | None) -> Progress:
    """Where a run starts: at a checkpoint if it resumes one, else at 0; changes nothing.

    Raises:
        ConfigError: there is no such checkpoint, or it is of a run that consumes something else, or in another order.
        RunError: there are checkpoints, and all of them are damaged.
    """
    checkpoint = None if resume is None else _chosen(run_dir / "checkpoints", resume)
    if checkpoint is None:
        return Progress(stream=stream)
    state = read_state(checkpoint)[1]
    if state.keys() != {field.name for field in fields(Progress)}:
        raise ConfigError(
            f"resume from '{checkpoint}': was written by another version of this program, which remembered "
            f"{', '.join(state)}; resume it with that, or start a new run from its final/ or from the model"
        )
    progress = Progress(**state)
    if progress.stream != stream:
        raise ConfigError(
            f"resume from '{checkpoint}': it consumed [{progress.stream}], this run would consume [{stream}], so items "
            "would be repeated or skipped; keep command, seed, shuffle and data as they were, or start a new run"
        )
    return progress


def _chosen(root: Path, resume: Resume) -> Path | None:
    present = found(root)
    if resume == "auto":
        return _newest_intact(root, present)
    one = next((one for one in present if one.step == resume), None)
    if one is None:
        steps = ", ".join(str(one.step) for one in present) or "none"
        raise ConfigError(
            f"--resume {resume}: no checkpoint of that step in '{root}' (there are: {steps}); name one of those, or say auto"
        )
    if one.damage is not None:
        raise ConfigError(f"--resume {resume}: {one.damage}")
    return one.directory


def _newest_intact(root: Path, present: list[Found]) -> Path | None:
    for one in present:
        if one.damage is None:
            return one.directory
        logger.warning("the checkpoint of step %d is passed over: %s", one.step, one.damage)
    if present:
        raise RunError(
            f"--resume auto: all {len(present)} checkpoint(s) in '{root}' are damaged ({present[0].damage}); restore one, "
            "or move them away to start anew"
        )
    return None


async def keep(trainer: TrainerGroup, progress: Progress) -> None:
    """Have a checkpoint of `progress` on disk."""
    await trainer.saved()
    if progress.version > trainer.saved_version:
        await trainer.save(progress.version, asdict(progress))
        await trainer.saved()


async def rescue(
    trainer: TrainerGroup, version: int, progress_at: Callable[[int], Progress], tell: Callable[[str], None]
) -> None:
    """After a failure: save every step that is in the weights, if the ranks still can; raises nothing.

    The driver may have been torn away in the middle of a step that the ranks completed: their count of steps is
    the truth, and the checkpoint says which items they have seen.

    Args:
        version: the steps that the driver has seen end.
        progress_at: the progress at that version, or with the step in progress.
    """
    try:
        versions, before = set(await trainer.versions()), trainer.saved_version
        await _settle(trainer, tell)
        if len(versions) != 1:
            tell(
                f"steps after {trainer.saved_version} are not saved: ranks are at versions {sorted(versions)}"
            )
            return
        (reached,) = versions
        if reached - version not in (0, 1):
            tell(
                f"steps after {trainer.saved_version} are not saved: ranks are at version {reached}, the driver at {version}"
            )
            return
        await keep(trainer, progress_at(reached))
        if trainer.saved_version > before:
            tell(f"saved after the failure: checkpoint of version {trainer.saved_version}")
    except (RunError, ConfigError, OSError) as err:
        tell(f"steps after {trainer.saved_version} are not saved: {err}")


async def _settle(trainer: TrainerGroup, tell: Callable[[str], None]) -> None:
    """End the save in progress; that it fails must not keep the next one from being tried."""
    try:
        await trainer.saved()
    except RunError as err:
        tell(f"a checkpoint could not be written: {err}")
