"""What one rank does for a checkpoint: copy its state to host memory, write it from there, and load from any layout.

Saving needs no communication: a rank writes what it alone holds (of ranks with equal copies, one writes), while
training goes on.

Nothing in the files names a layout (see pieces.py), so a run may resume with any tensor, pipeline, virtual pipeline,
context, data, expert and expert-tensor sizes, with the distributed optimizer or without, in another dtype, and with
either layer implementation.  Low-precision weights are not stored: they are the master weights, rounded.
The learning rate is a function of the step.  Random generators continue where the layout and the device are the
same, else they stay as the run seeded them: nothing depends on them while dropout is 0, as it always is here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_vespo.trainer.adam_state import MOMENTS, Held, held_ranges, master_to_model
from megatron_vespo.trainer.checkpoint import (
    FORMAT,
    Written,
    as_json,
    cannot_write,
    check_file,
    partial_of,
    publish,
    rank_file,
    read_manifest,
)
from megatron_vespo.trainer.disk import to_disk
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.hf_weights import Cut, represents
from megatron_vespo.trainer.layout import Groups
from megatron_vespo.trainer.pieces import (
    WEIGHT,
    Piece,
    PieceFiles,
    Snapshot,
    piece_of,
    read_tensors,
)
from megatron_vespo.trainer.together import together
from megatron_vespo.types import RunError

GENERATOR = "generator."


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


class Loaded(NamedTuple):
    """What a checkpoint says besides tensors."""

    step: int
    state: dict[str, Any]
    """The caller's."""
    num_updates: int


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
        self._path = partial_of(directory) / rank_file(self._groups.rank)
        adam_steps = _common_steps(holding.held for holding in holdings)
        self._writing = self._thread.submit(self._write, self._path, len(pieces), adam_steps)

    def written(self, directory: Path) -> Written | None:
        """What `begin_save` has put on disk; None while it is still writing.

        Raises:
            RunError: it could not, or has not begun.
        """
        if self._writing is None or self._path.parent != partial_of(directory):
            raise RunError(f"'{directory}': its save was never begun on {self._groups.name}; save again")
        if not self._writing.done():
            return None
        try:
            return self._writing.result()
        except OSError as err:
            raise cannot_write(self._path, self._groups.name, err) from err

    def commit(self, directory: Path, step: int, state: Mapping[str, Any], files: Sequence[Written]) -> None:
        """On one rank, when the files of all are written: make them a checkpoint.

        Args:
            state: whatever else the caller must remember, as JSON values.
            files: what `written` has given, in rank order.

        Raises:
            RunError: it could not be written.
        """
        manifest = {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "adam_steps": _one({file.adam_steps for file in files} - {None}),
            **self._facts(),
            "files": {
                rank_file(rank): {"bytes": file.bytes, "sha256": file.sha256, "pieces": file.pieces}
                for rank, file in enumerate(files)
            },
        }
        publish(directory, manifest, self._groups.name)

    def _write(self, path: Path, num_pieces: int, adam_steps: int | None) -> Written:
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            self._snapshot.write(file, digest.update)
            to_disk(file)
            size = file.tell()
        return Written(bytes=size, sha256=digest.hexdigest(), pieces=num_pieces, adam_steps=adam_steps)

    # ---------------------------------------------------------------------------------------------- load

    def load(self, directory: Path) -> Loaded:
        """Collective: continue from a checkpoint of any layout.

        Raises:
            RunError: it is damaged or incomplete, or of another model; on all ranks, and nothing has changed.  (A file
                that cannot be read any more after it was verified leaves weights of no step.)
        """
        rank, num_ranks = self._groups.rank, self._groups.layout.world_size
        told = (RunError, Exception, f"checkpoint '{directory}': cannot be loaded", "resume from another one")
        with together(*told):
            manifest = read_manifest(directory)
            self._check_model(directory, manifest["model"])
            for name in sorted(manifest["files"])[rank::num_ranks]:  # every file by one rank
                check_file(directory / name, manifest["files"][name])
        holdings = list(self._holdings())
        with together(*told):
            files = PieceFiles([directory / name for name in manifest["files"]])
            for holding in holdings:
                files.check(holding.piece)
        with together(*told):  # what fails now is the file system
            for holding in holdings:
                self._restore(holding, files, manifest["adam_steps"])
            if {name: manifest[name] for name in ("layout", "device")} == self._place():
                _load_generators(directory / rank_file(rank))
        master_to_model(self._optimizer)
        return Loaded(manifest["step"], manifest["state"], int(manifest["adam_steps"] or 0))

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)

    @torch.no_grad()
    def _restore(self, holding: _Holding, files: PieceFiles, adam_steps: int) -> None:
        values = {kind: files.read(holding.piece, kind, self._shape) for kind in holding.piece.kinds}
        weight = values.pop(WEIGHT)
        if holding.held is None:
            holding.parameter.copy_(weight.view(holding.parameter.shape))
        else:
            holding.held.restore(weight, values, adam_steps)

    def _check_model(self, directory: Path, written: Mapping[str, Any]) -> None:
        ours = as_json(asdict(self._shape))
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
        return {"layout": as_json(resolved.model_dump()), "device": self._groups.device.type}

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
    # Imported here: a driver imports this module, by way of step.py, without megatron.
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
