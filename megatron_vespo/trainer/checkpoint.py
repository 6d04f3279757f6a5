"""Checkpoints that any layout resumes: one file per rank, one manifest, all or nothing.

    <root>/step_000040/rank-00003.safetensors   pieces of master weights and Adam moments, generator states (uint8)
    <root>/step_000040/manifest.json            step, the caller's state, model, layout and versions that wrote it,
                                                and size and sha256 of every file

Saving needs no communication: a rank copies what it alone holds to host memory, and writes it from there while
training goes on.  Everything is written under `step_000040.tmp`, which gets its name when all of it is on disk.

Nothing in the files names a layout (see pieces.py), so a run may resume with any tensor, pipeline, virtual pipeline,
context, data, expert and expert-tensor sizes, with the distributed optimizer or without, in another dtype, and with
either layer implementation.  Low-precision weights are not stored: they are the master weights, rounded.
The learning rate is a function of the step.  Random generators continue where the layout and the device are the
same, else they stay as the run seeded them: nothing depends on them while dropout is 0, as it always is here.

The functions need no ranks; `RankCheckpoint` is what each rank has.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from megatron_vespo.trainer.adam_state import MOMENTS, Held, held_ranges, master_to_model
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.hf_weights import Cut
from megatron_vespo.trainer.layout import Groups
from megatron_vespo.trainer.pieces import (
    WEIGHT,
    Piece,
    PieceFiles,
    Snapshot,
    piece_of,
    read_tensors,
    represents,
)
from megatron_vespo.types import RunError

MANIFEST = "manifest.json"
FORMAT = 2
GENERATOR = "generator."

# ------------------------------------------------------------------------------------------- directories


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


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root` that is not damaged."""
    return next((one.directory for one in found(root) if one.damage is None), None)


def read_state(directory: Path) -> tuple[int, dict[str, Any]]:
    """(step, the caller's state) of a checkpoint.

    Raises:
        RunError: its manifest is missing or damaged, or of another format.
    """
    manifest = _read_manifest(directory)
    return manifest["step"], manifest["state"]


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Delete checkpoints, and what unfinished ones left behind.

    Those of the newest `keep` steps stay, and those whose step `keep_every` divides (0: none).  Damaged ones do not
    count, and are left to be looked at.
    """
    intact = [one for one in found(root) if one.damage is None]
    for one in intact[keep:]:
        if not keep_every or one.step % keep_every:
            _delete(one.directory)
    for partial in root.glob("*.tmp"):
        shutil.rmtree(partial)


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
        _partial(directory).mkdir(parents=True)
    except OSError as err:
        raise _cannot_write(directory, "the driver", err) from err


def discard(directory: Path) -> None:
    """Remove what an unfinished save has written."""
    shutil.rmtree(_partial(directory), ignore_errors=True)


# ------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True, kw_only=True)
class Written:
    """One rank's file, on disk."""

    bytes: int
    sha256: str
    pieces: int
    adam_steps: int | None
    """None where this rank's file has no trained parameters."""


@dataclass(frozen=True)
class _Holding:
    """A piece that this rank has in memory."""

    piece: Piece
    parameter: Tensor
    held: Held | None
    """Where the optimizer has it; None for a frozen parameter."""
    is_ours: bool
    """This rank writes it, of those that hold equal values."""

    def values(self) -> dict[str, Tensor | int]:
        """What is stored of it; numbers are that many zeros."""
        key = self.piece.key
        if self.held is None:
            return {key(WEIGHT): self.parameter}
        size = self.held.end - self.held.start
        moments = {name: self.held.moment(name) for name in MOMENTS}
        return {key(WEIGHT): self.held.weight} | {
            key(name): size if value is None else value for name, value in moments.items()
        }


class RankCheckpoint:
    """One rank's part in checkpoints.

    Args:
        parameters: all of this rank, with their cuts (`hf_weights.described`).
        optimizer: Megatron's, around Adam.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[Cut, Tensor]],
        optimizer: Any,
        shape: ModelShape,
        groups: Groups,
        *,
        dtype: str,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer, self._shape, self._groups, self._dtype = optimizer, shape, groups, dtype
        self._snapshot = Snapshot(pinned=groups.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Written] | None = None
        self._path = Path()

    # ---------------------------------------------------------------------------------------------- save

    def begin_save(self, directory: Path) -> None:
        """Copy this rank's state to host memory, and write it from there in the background; no communication.

        `prepare` comes before, then `written` on all ranks until nobody answers None, then `commit` on one.
        """
        if self._writing is not None:
            self._writing.exception()  # waits: its memory is about to be used again
        holdings = [holding for holding in self._holdings() if holding.is_ours]
        values: dict[str, Tensor | int] = {}
        for holding in holdings:
            values |= holding.values()
        pieces = [holding.piece for holding in holdings]
        self._snapshot.take(values | _generators(), pieces)
        self._path = _partial(directory) / _file(self._groups.rank)
        adam_steps = _common_steps(holding.held for holding in holdings)
        self._writing = self._thread.submit(self._write, self._path, len(pieces), adam_steps)

    def written(self, directory: Path) -> Written | None:
        """What `begin_save` has put on disk; None while it is still writing.

        Raises:
            RunError: it could not, or has not begun.
        """
        if self._writing is None or self._path.parent != _partial(directory):
            raise RunError(f"'{directory}': its save was never begun on {self._groups.name}; save again")
        if not self._writing.done():
            return None
        try:
            return self._writing.result()
        except OSError as err:
            raise _cannot_write(self._path, self._groups.name, err) from err

    def commit(self, directory: Path, step: int, state: Mapping[str, Any], files: Sequence[Written]) -> None:
        """Write the manifest and give the directory its name; on one rank, when the files of all ranks are written.

        Args:
            state: whatever else the caller must remember, as JSON values.
            files: what `written` has given, in rank order.

        Raises:
            RunError: it could not be written.
        """
        partial = _partial(directory)
        if directory.exists() and not partial.exists():
            return  # a driver that was interrupted asks again
        manifest = {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "adam_steps": _one({file.adam_steps for file in files} - {None}),
            **self._facts(),
            "files": {_file(rank): _entry(file) for rank, file in enumerate(files)},
        }
        try:
            with open(partial / MANIFEST, "w") as file:
                json.dump(manifest | {"sha256": _digest(manifest)}, file, indent=1)
                _to_disk(file)
            _sync_directory(partial)
            os.rename(partial, directory)
            _sync_directory(directory.parent)
        except OSError as err:
            raise _cannot_write(directory, self._groups.name, err) from err

    def _write(self, path: Path, num_pieces: int, adam_steps: int | None) -> Written:
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            self._snapshot.write(file, digest.update)
            _to_disk(file)
            size = file.tell()
        return Written(bytes=size, sha256=digest.hexdigest(), pieces=num_pieces, adam_steps=adam_steps)

    # ---------------------------------------------------------------------------------------------- load

    def load(self, directory: Path) -> tuple[int, dict[str, Any]]:
        """Collective: continue from a checkpoint of any layout; gives its step and the caller's state.

        Raises:
            RunError: it is damaged or incomplete, or of another model; on all ranks, and nothing has changed.
        """
        rank, num_ranks = self._groups.rank, self._groups.layout.world_size
        with _together():
            manifest = _read_manifest(directory)
            self._check_model(directory, manifest["model"])
            for name in sorted(manifest["files"])[rank::num_ranks]:  # every file by one rank
                _check_file(directory / name, manifest["files"][name])
        holdings = list(self._holdings())
        with _together():
            files = PieceFiles([directory / name for name in manifest["files"]])
            for holding in holdings:
                files.check(holding.piece)
        with _together():  # what fails now is the file system
            for holding in holdings:
                self._restore(holding, files, manifest["adam_steps"])
            if {name: manifest[name] for name in ("layout", "device")} == self._place():
                _load_generators(directory / _file(rank))
        master_to_model(self._optimizer)
        return manifest["step"], manifest["state"]

    @torch.no_grad()
    def _restore(self, holding: _Holding, files: PieceFiles, adam_steps: int) -> None:
        values = {kind: files.read(holding.piece, kind, self._shape) for kind in holding.piece.kinds}
        weight = values.pop(WEIGHT)
        if holding.held is None:
            holding.parameter.copy_(weight.view(holding.parameter.shape))
        else:
            holding.held.restore(weight, values, adam_steps)

    def _check_model(self, directory: Path, written: Mapping[str, Any]) -> None:
        ours = _as_json(asdict(self._shape))
        for name in ours:
            if written.get(name) != ours[name]:
                raise RunError(
                    f"checkpoint '{directory}': its model has {name} = {written.get(name)}, this run's has {ours[name]}; "
                    "resume with the same model, or start a new run from an exported Hugging Face directory"
                )

    # -------------------------------------------------------------------------------------------- common

    def _holdings(self) -> Iterator[_Holding]:
        """Everything that this rank has a copy of, in the order of its parameters."""
        ranges: dict[Tensor, list[Held]] = {}
        for held in held_ranges(self._optimizer):
            ranges.setdefault(held.parameter, []).append(held)
        at = self._groups.at
        for cut, parameter in self._parameters:
            for held in ranges.get(parameter, ()):
                piece = piece_of(cut, parameter, self._groups, held.start, held.end, (WEIGHT, *MOMENTS))
                # A range under ZeRO-1 has no equal on another data rank.
                where = replace(at, data=0, context=0, expert_data=0) if held.is_sharded else at
                yield _Holding(piece, parameter, held, represents(cut, where, self._shape))
            if not parameter.requires_grad:
                piece = piece_of(cut, parameter, self._groups, 0, parameter.numel(), (WEIGHT,))
                yield _Holding(piece, parameter, None, represents(cut, at, self._shape))

    def _place(self) -> dict[str, Any]:
        """Where the same generators are on the same ranks."""
        layout = self._groups.layout
        resolved = layout.model_copy(update={"expert_tensor": layout.resolved_expert_tensor})
        return {"layout": _as_json(resolved.model_dump()), "device": self._groups.device.type}

    def _facts(self) -> dict[str, Any]:
        """Of the run that writes a checkpoint."""
        packages = ("megatron-vespo", "megatron-core", "torch")
        versions = {package: importlib.metadata.version(package) for package in packages}
        return {"model": asdict(self._shape), "dtype": self._dtype, **self._place(), "versions": versions}


def _common_steps(ranges: Iterable[Held | None]) -> int | None:
    return _one({held.num_steps for held in ranges if held is not None})


def _one(steps: set[int | None]) -> int | None:
    if len(steps) > 1:
        raise RunError(
            f"Adam steps = {sorted(map(str, steps))}: expected the same for all parameters; an update was torn"
        )
    return next(iter(steps), None)


def _generators() -> dict[str, Tensor]:
    """States of all random generators of this rank."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"megatron.{name}": state for name, state in _megatron_generators().get_states().items()}
    return {GENERATOR + name: state for name, state in states.items()}


def _load_generators(path: Path) -> None:
    states = {name: state.clone() for name, state in read_tensors(path, GENERATOR)}
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    _megatron_generators().set_states({name.removeprefix("megatron."): s for name, s in states.items()})


def _megatron_generators() -> Any:
    # Imported here: a driver uses this module without megatron.
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What goes wrong inside on any rank is raised on every rank."""
    problem: str | None = None
    try:
        yield
    except (RunError, OSError, SafetensorError) as err:
        problem = str(err)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next((p for p in problems if p), None):
        raise RunError(first)


# ------------------------------------------------------------------------------------------------- files


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".tmp")


def _delete(directory: Path) -> None:
    """The name goes first, so that nobody sees a half-deleted checkpoint."""
    shutil.rmtree(directory.rename(_partial(directory)))


def _cannot_write(path: Path, who: str, err: OSError) -> RunError:
    return RunError(f"'{path}': {who} cannot write its checkpoint ({err}); make room, or mend the path")


def _entry(file: Written) -> dict[str, Any]:
    return {"bytes": file.bytes, "sha256": file.sha256, "pieces": file.pieces}


def _read_manifest(directory: Path) -> dict[str, Any]:
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
        manifest = _read_manifest(directory)
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


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    _check_size(path, entry)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise RunError(
            f"checkpoint file '{path}': is damaged: its sha256 is {digest} (written was {entry['sha256']}); "
            "resume from another one"
        )


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_as_json(manifest), sort_keys=True).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
