"""What kind of checkpoint a directory is, and what a trainer needs to read it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.checkpoint import MANIFEST, read_state

_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights on disk, in one of three formats."""

    path: Path
    model: Path
    """Hugging Face directory: shape and tokenizer, and the weights where they are no others."""
    version: int = 0
    """Of a checkpoint of ours, which lies beside those of other versions; 0: it is none."""
    megatron: Path | None = None
    """Megatron-Core's directory of one iteration, where the weights are in its format."""

    @property
    def describe(self) -> str:
        if self.megatron:
            return f"Megatron-Core checkpoint '{self.megatron}', shaped as '{self.model}'"
        if self.version:
            return f"checkpoint '{self.path}' of version {self.version}"
        return f"Hugging Face directory '{self.path}'"


def find_checkpoint(path: Path, shape: Path | None = None) -> Checkpoint:
    """Look at a directory.

    Args:
        path: a Hugging Face directory, RUN/checkpoints/step_NNNNNN, or a checkpoint of Megatron-Core (torch_dist).
        shape: Hugging Face directory of the architecture, where the checkpoint does not name one.

    Raises:
        ConfigError: it is none of these, or its shape is not known.
        RunError: a checkpoint of ours that is damaged.
    """
    path = path.resolve()
    if (path / MANIFEST).is_file():
        version, _ = read_state(path)
        return Checkpoint(path=path, model=shape or _model_of_run(path), version=version)
    if megatron := _megatron_directory(path):
        if shape is None:
            raise ConfigError(
                f"checkpoint = '{path}': is Megatron-Core's, which names no architecture; give the Hugging Face directory of "
                "the model that was trained with --model-shape"
            )
        return Checkpoint(path=path, model=shape.resolve(), megatron=megatron)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"checkpoint = '{path}': expected a Hugging Face directory (config.json), a checkpoint of a run "
            f"({MANIFEST}), or one of Megatron-Core ({_LATEST} or metadata.json); give the path of one"
        )
    return Checkpoint(path=path, model=path)


def _model_of_run(path: Path) -> Path:
    """The model that the run of a checkpoint started from."""
    config = path.parent.parent / "config.toml"
    if not config.is_file():
        raise ConfigError(
            f"checkpoint = '{path}': expected the run's config.toml at '{config}', it is not there; give the Hugging Face "
            "directory of the model with --model-shape"
        )
    model = Path(tomllib.loads(config.read_text())["model"])
    if not model.is_dir():
        raise ConfigError(
            f"checkpoint = '{path}': its run started from model '{model}', which is not there (seen from here); give the "
            "Hugging Face directory of the model with --model-shape"
        )
    return model.resolve()


def _megatron_directory(path: Path) -> Path | None:
    """That of the newest iteration where `path` holds several; None where it is no checkpoint of Megatron-Core."""
    if (path / "metadata.json").is_file():
        return path
    if not (path / _LATEST).is_file():
        return None
    newest = (path / _LATEST).read_text().strip()
    return path / (newest if newest == "release" else f"iter_{int(newest):07d}")
