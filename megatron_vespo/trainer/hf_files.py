"""Hugging Face directories on disk: tensors by name out of safetensors files, and new directories that appear whole.

model.safetensors, or model-00001-of-00016.safetensors ... and model.safetensors.index.json
a safetensors file: 8 bytes n | n bytes of JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.disk import give_name, sync, to_disk

INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json",
)  # fmt: skip

Size = tuple[int, ...]


class HfReader:
    """The tensors of a Hugging Face directory, of which only the parts asked for are read.

    Raises:
        ConfigError: in every method: a file or a tensor is missing, damaged, or not what was expected.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._handles: dict[str, Any] = {}
        self.files: dict[str, str]
        """File of each tensor."""
        if (source / INDEX).is_file():
            self.files = _read_index(source)
        elif (source / "model.safetensors").is_file():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"model = '{source}': expected model.safetensors or {INDEX} with the weights; download them, "
                "or convert the checkpoint to safetensors"
            )

    def check(self, name: str, size: Size) -> None:
        """Refuse a tensor that is missing, of another shape, or not of floating-point numbers; reads headers only."""
        header = self._header(name)
        if tuple(header.get_shape()) != size:
            raise ConfigError(
                f"model = '{self.source}': '{name}' in {self.files[name]} has shape {header.get_shape()}, config.json "
                f"implies {list(size)}; one of them is another model's"
            )
        if header.get_dtype() not in DTYPE_NAMES.values():
            raise ConfigError(
                f"model = '{self.source}': '{name}' in {self.files[name]} holds {header.get_dtype()}, expected one of "
                f"{', '.join(DTYPE_NAMES.values())}; take the checkpoint that is not quantized"
            )

    def read(self, name: str, size: Size, window: tuple[slice, ...]) -> Tensor:
        """The part `window` of a tensor that is `size` as a whole; NaN and infinity are refused."""
        self.check(name, size)
        part = self._header(name)[window]
        if not torch.stack(part.aminmax()).isfinite().all():
            raise ConfigError(
                f"model = '{self.source}': '{name}' in {self.files[name]} holds NaN or infinity; the checkpoint is "
                "damaged: download it again, or take an earlier one"
            )
        return part

    def _header(self, name: str) -> Any:
        if name not in self.files:
            raise ConfigError(
                f"model = '{self.source}': no tensor '{name}' in its safetensors; the download is incomplete"
            )
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as err:
            raise ConfigError(
                f"model = '{self.source}': {INDEX} places '{name}' in {self.files[name]}, which lacks it; download "
                "both again"
            ) from err

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.source / file
            try:
                self._handles[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as err:
                reason = "it is a Git LFS pointer" if _is_lfs_pointer(path) else " ".join(str(err).split())
                raise ConfigError(
                    f"model = '{self.source}': cannot read {file} ({reason}); download it again"
                ) from err
        return self._handles[file]


def _read_index(source: Path) -> dict[str, str]:
    try:
        files = json.loads((source / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"model = '{source}': {INDEX} holds no weight_map ({err}); download it again"
        ) from err
    missing = sorted(file for file in set(files.values()) if not (source / file).is_file())
    if missing:
        raise ConfigError(
            f"model = '{source}': {len(missing)} of the {len(set(files.values()))} files that {INDEX} names are missing, "
            f"the first is {missing[0]}; the download is incomplete"
        )
    return files


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


# ------------------------------------------------------------------------------------------------ writing


def begin_directory(partial: Path, source: Path, dtype: torch.dtype) -> None:
    """Make a new directory with everything small of `source`: tokenizer, chat template, licence, and config.json,
    which tells the dtype of the new weights."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy(file, partial / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # transformers 4's name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(
    directory: Path,
    stream: Iterator[tuple[str, Tensor]],
    sizes: Mapping[str, Size],
    dtype: torch.dtype,
    file_bytes: int,
) -> None:
    """Write tensors to safetensors files while they arrive, one tensor in host memory at a time.

    Args:
        sizes: of all tensors, in the order of the stream; the files' headers precede the tensors.
        file_bytes: most weights in one file; a larger tensor has one to itself.
    """
    parts = _plan_files(sizes, dtype.itemsize, file_bytes)
    files: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        several = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path = directory / (several if len(parts) > 1 else "model.safetensors")
        files |= dict.fromkeys(names, path.name)
        with path.open("wb") as file:
            file.write(_header_bytes(names, sizes, dtype))
            for name in names:
                _write_next(file, stream, (name, sizes[name], dtype))
            to_disk(file)
    if len(parts) > 1:
        total = sum(math.prod(size) for size in sizes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_next(
    file: BinaryIO, stream: Iterator[tuple[str, Tensor]], expected: tuple[str, Size, torch.dtype]
) -> None:
    # A function of its own, so that no tensor outlives it: the stream brings its next block only after the last one is gone.
    name, tensor = next(stream)
    assert (name, tuple(tensor.shape), tensor.dtype) == expected, f"{name} arrived, expected {expected}"
    file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def publish(partial: Path, target: Path) -> None:
    """Give a finished directory its name, once all of it is on disk."""
    for path in partial.iterdir():
        sync(path)
    give_name(partial, target)


def _plan_files(sizes: Mapping[str, Size], itemsize: int, file_bytes: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        num_bytes = math.prod(size) * itemsize
        if parts[-1] and filled + num_bytes > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += num_bytes
    return parts


def _header_bytes(names: list[str], sizes: Mapping[str, Size], dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(sizes[name]) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": sizes[name], "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
