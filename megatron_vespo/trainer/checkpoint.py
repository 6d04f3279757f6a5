"""Checkpoints from which a run resumes with the same layout: one file per rank, one manifest, all or nothing.

    <directory>/rank-00003.pt     model, optimizer and generator state of one rank
    <directory>/manifest.json     step, layout, versions, the caller's state, and size and sha256 of every file

The directory gets its name only when every file is on disk; `latest` never sees an unfinished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import Groups
from megatron_vespo.types import RunError

MANIFEST = "manifest.json"
FORMAT = 1


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, by its step."""
    return max(_complete(root), key=_step, default=None)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what unfinished ones left behind."""
    for old in sorted(_complete(root), key=_step)[:-keep]:
        shutil.rmtree(old)
    for partial in root.glob("*.tmp"):
        shutil.rmtree(partial)


def read_state(directory: Path) -> tuple[int, dict[str, Any]]:
    """(step, the caller's state) of a checkpoint; no rank is needed."""
    manifest = _read_manifest(directory)
    return manifest["step"], manifest["state"]


def save(directory: Path, rank_state: dict[str, Any], facts: dict[str, Any], groups: Groups) -> None:
    """Collective: write every rank's state, then the manifest, then give the directory its name.

    Args:
        facts: what the manifest records beside the files: `step`, `state`, and what `same_run_facts` gives.

    Raises:
        RunError: the directory exists, or a rank could not write.
    """
    partial = directory.with_name(directory.name + ".tmp")
    problem = None
    if groups.rank == 0:
        problem = (
            f"'{directory}': exists already; a checkpoint is never overwritten"
            if directory.exists()
            else None
        )
        shutil.rmtree(partial, ignore_errors=True)
    _stop_together(problem)
    entry: dict[str, Any] = {}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        entry = _write(partial / _file(groups.rank), rank_state)
    except OSError as err:  # one rank's full disk must stop all ranks, not leave them waiting
        problem = (
            f"'{partial}': {groups.name} cannot write its checkpoint ({err}); make room, or mend the path"
        )
    _stop_together(problem)
    entries: list[Any] = [None] * groups.layout.world_size
    dist.all_gather_object(entries, entry)
    if groups.rank == 0:
        manifest = {"format": FORMAT, **facts, "files": {_file(rank): e for rank, e in enumerate(entries)}}
        with open(partial / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=2)
            _to_disk(file)
        os.replace(partial, directory)
        _sync_directory(directory.parent)
    dist.barrier()


def load(
    directory: Path, facts: dict[str, Any], groups: Groups
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Collective: this rank's state, the step and the caller's state.

    Raises:
        RunError: the checkpoint is of another layout, model or dtype, or a file is missing or damaged; on all ranks.
    """
    problem, rank_state, manifest = None, {}, {}
    try:
        manifest = _read_manifest(directory)
        _check_facts(directory, manifest, facts)
        rank_state = _read(directory / _file(groups.rank), manifest["files"].get(_file(groups.rank)))
    except RunError as err:
        problem = str(err)
    _stop_together(problem)
    return rank_state, manifest["step"], manifest["state"]


def same_run_facts(
    shape: ModelShape, groups: Groups, dtype: str, distributed_optimizer: bool
) -> dict[str, Any]:
    """What must be equal in the run that wrote a checkpoint and the one that loads it."""
    layout = groups.layout.model_dump(exclude={"expert_tensor"})
    return {
        "layout": layout | {"expert_tensor": groups.layout.resolved_expert_tensor},
        "model": asdict(shape),
        "numerics": {"dtype": dtype, "distributed_optimizer": distributed_optimizer},
    }


def optimizer_state(optimizer: Any, *, with_main_weights: bool) -> list[Any]:
    """State of Megatron's optimizers, taken from the torch optimizers inside; the same for every kind of them.

    (Upstream's own state dicts differ by kind, and leave out the shards of the distributed optimizer.)
    """
    return [
        {
            "settings": {name: value for name, value in group.items() if name != "params"},
            "params": [
                {"state": dict(inner.state[p]), "main": p.detach() if with_main_weights else None}
                for p in group["params"]
            ],
        }
        for inner in _inner(optimizer)
        for group in inner.param_groups
    ]


def load_optimizer_state(optimizer: Any, saved: list[Any]) -> None:
    """Put `optimizer_state` back, in place."""
    groups = [(inner, group) for inner in _inner(optimizer) for group in inner.param_groups]
    for (inner, group), old in zip(groups, saved, strict=True):
        group.update(old["settings"])
        for parameter, entry in zip(group["params"], old["params"], strict=True):
            inner.state[parameter] = {
                name: value.to(parameter.device) if torch.is_tensor(value) and value.dim() else value
                for name, value in entry["state"].items()
            }
            if entry["main"] is not None:
                parameter.data.copy_(entry["main"])


def generator_state() -> dict[str, Any]:
    """All random generators of this rank."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "megatron": _megatron_generators().get_states()}


def load_generator_state(saved: dict[str, Any]) -> None:
    """Put `generator_state` back."""
    torch.set_rng_state(saved["cpu"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    _megatron_generators().set_states(saved["megatron"])


def _megatron_generators() -> Any:
    # Imported here: a driver uses `latest` and `prune` without megatron.
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _inner(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one.optimizer for one in chained if one.optimizer is not None]


def _complete(root: Path) -> list[Path]:
    return [manifest.parent for manifest in root.glob(f"*/{MANIFEST}") if manifest.parent.suffix != ".tmp"]


def _step(directory: Path) -> int:
    return int(_read_manifest(directory)["step"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as err:
        raise RunError(
            f"checkpoint '{directory}': cannot read {MANIFEST} ({err}); resume from another one"
        ) from err


def _check_facts(directory: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for section, wanted in facts.items():
        found = manifest.get(section, {})
        for name, value in wanted.items():
            if found.get(name) != value:
                raise RunError(
                    f"checkpoint '{directory}': {section}.{name} = {found.get(name)}, this run has {value}; resume with the "
                    "same layout and model, or start a new run from an exported Hugging Face directory"
                )


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _write(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    with open(path, "wb") as file:
        torch.save(state, file)
        _to_disk(file)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _read(path: Path, entry: dict[str, Any] | None) -> dict[str, Any]:
    found = {"bytes": path.stat().st_size, "sha256": _sha256(path)} if path.is_file() else None
    if entry is None or found != entry:
        raise RunError(
            f"checkpoint file '{path}': is missing or damaged (found {found}, manifest says {entry}); resume from another one"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stop_together(problem: str | None) -> None:
    """If any rank has a problem, every rank raises it."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p), None)
    if first:
        raise RunError(first)
