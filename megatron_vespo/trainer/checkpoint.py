"""Checkpoint directories that any layout resumes: one file per rank, one manifest, all or nothing.

    <root>/step_000040/rank-00003.safetensors   pieces of master weights and Adam moments, generator states (uint8)
    <root>/step_000040/manifest.json            step, the caller's state, model, layout and versions that wrote it,
                                                and size and sha256 of every file and of the manifest itself

Everything is written under `step_000040.tmp`, which gets its name when all of it is on disk; rank_checkpoint.py is
what each rank does.  A driver uses this module without ranks and without megatron.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.trainer.disk import give_name, to_disk
from megatron_vespo.types import RunError

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Written:
    """One rank's file, on disk."""

    bytes: int
    sha256: str
    pieces: int
    adam_steps: int | None
    """None where this rank's file has no trained parameters."""


@dataclass(frozen=True)
class Found:
    """A checkpoint directory; `damage` says what is missing in it, as far as sizes tell."""

    step: int
    directory: Path
    damage: str | None


def directory_of(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def found(root: Path) -> list[Found]:
    """All checkpoints under `root`, the newest first; unfinished ones have no name yet and are not seen."""
    steps = [
        (int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [Found(step, path, _damage(path, step)) for step, path in sorted(steps, reverse=True)]


def read_state(directory: Path) -> tuple[int, dict[str, Any]]:
    """(step, the caller's state) of a checkpoint.

    Raises:
        RunError: its manifest is missing or damaged, or of another format.
    """
    manifest = read_manifest(directory)
    return manifest["step"], manifest["state"]


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints, and what unfinished ones left behind.

    Those of the newest `keep` steps stay, and those whose step `keep_every` divides (0: none).  Damaged ones do not
    count, and are left to be looked at.
    """
    for partial in root.glob("*.tmp"):
        shutil.rmtree(partial)
    intact = [one for one in found(root) if one.damage is None]
    for one in intact[keep:]:
        if not keep_every or one.step % keep_every:
            # The name goes first, so that nobody sees a half-deleted checkpoint.
            shutil.rmtree(one.directory.rename(partial_of(one.directory)))


def set_aside(root: Path, after: int) -> list[Path]:
    """Move the checkpoints of later steps than `after`, which a run that goes back there will write anew, to
    superseded/ below `root`; gives their new places."""
    moved = []
    for one in found(root):
        if one.step > after:
            target = root / "superseded" / one.directory.name
            while target.exists():
                target = target.with_name(target.name + "+")
            target.parent.mkdir(exist_ok=True)
            moved.append(one.directory.rename(target))
    return moved


def prepare(directory: Path) -> None:
    """Before any rank begins to save.

    Raises:
        RunError: the directory exists, or cannot be made.
    """
    if directory.exists():
        raise RunError(f"'{directory}': exists already; a checkpoint is never overwritten")
    discard(directory)
    try:
        partial_of(directory).mkdir(parents=True)
    except OSError as err:
        raise cannot_write(directory, "the driver", err) from err


def discard(directory: Path) -> None:
    """Remove what an unfinished save has written."""
    shutil.rmtree(partial_of(directory), ignore_errors=True)


def publish(directory: Path, manifest: Mapping[str, Any], who: str) -> None:
    """Write the manifest, and give the directory its name.

    Raises:
        RunError: `who` could not.
    """
    partial = partial_of(directory)
    if directory.exists() and not partial.exists():
        return  # a driver that was interrupted asks again
    try:
        with open(partial / MANIFEST, "w") as file:
            json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
            to_disk(file)
        give_name(partial, directory)
    except OSError as err:
        raise cannot_write(directory, who, err) from err


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def partial_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".tmp")


def cannot_write(path: Path, who: str, err: OSError) -> RunError:
    return RunError(f"'{path}': {who} cannot write its checkpoint ({err}); make room, or mend the path")


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `publish` was given.

    Raises:
        RunError: the manifest is missing or damaged, or of another format.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        digest = manifest.pop("sha256", None)
    except (OSError, ValueError, AttributeError) as err:
        raise RunError(
            f"checkpoint '{directory}': cannot read {MANIFEST} ({err}); resume from another one"
        ) from err
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"checkpoint '{directory}': format = {manifest.get('format')}, expected {FORMAT}; resume with the version of "
            "megatron-vespo that wrote it, or from another one"
        )
    if digest != _digest(manifest):
        raise RunError(
            f"checkpoint '{directory}': {MANIFEST} was changed or damaged; resume from another one"
        )
    return manifest


def _damage(directory: Path, step: int) -> str | None:
    """What a look at the manifest and the sizes of the files finds."""
    try:
        manifest = read_manifest(directory)
        for name, entry in manifest["files"].items():
            _check_size(directory / name, entry)
    except RunError as err:
        return str(err)
    if manifest["step"] != step:
        return f"checkpoint '{directory}': holds step {manifest['step']}; give it back its name"
    return None


def _check_size(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        what = "is missing" if size is None else f"is damaged: it has {size} bytes"
        raise RunError(
            f"checkpoint file '{path}': {what} (written were {entry['bytes']}); resume from another one"
        )


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file with its entry in the manifest, which takes as long as reading all of it.

    Raises:
        RunError: it is missing or damaged.
    """
    _check_size(path, entry)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise RunError(
            f"checkpoint file '{path}': is damaged: its sha256 is {digest} (written was {entry['sha256']}); "
            "resume from another one"
        )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(as_json(manifest), sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """As it will look when it is read back."""
    return json.loads(json.dumps(value))
