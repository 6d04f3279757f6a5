"""Hugging Face weights <-> this rank's Megatron parameters: one name table, import, export, save.

Every Megatron parameter is a *cut* of one or several Hugging Face tensors.  `describe` is the table; the other
functions only follow it.  Sub-names of both layer implementations (local and Transformer Engine) stand in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.layout import Groups, layers_of_stage
from megatron_vespo.types import RunError

BLOCK_BYTES = 256 * 1024**2
"""Weights that rank 0 receives in one round of an export (more only where one parameter is larger)."""
FILE_BYTES = 4 * 1024**3
"""Weights in one safetensors file."""


@dataclass(frozen=True)
class Cut:
    """How one Megatron parameter relates to Hugging Face tensors."""

    names: tuple[str, ...]
    """Hugging Face names; several where Megatron fuses them."""
    how: str
    """"whole" (replicated), "rows" or "columns" (divided in dim 0 or 1), "qkv" (rows, by key/value group),
    "gate_up" (rows of each, one below the other)."""
    is_expert: bool = False
    """Divided over expert_tensor rather than tensor, and held by one expert rank."""


_TOP = {
    "embedding.word_embeddings.weight": Cut(("model.embed_tokens.weight",), "rows"),
    "decoder.final_layernorm.weight": Cut(("model.norm.weight",), "whole"),
    "output_layer.weight": Cut(("lm_head.weight",), "rows"),
}
_LAYER = {  # Megatron name within a layer -> Hugging Face names within a layer, how
    "input_layernorm.weight": (("input_layernorm.weight",), "whole"),
    "self_attention.linear_qkv.layer_norm_weight": (("input_layernorm.weight",), "whole"),  # TE fuses it
    "self_attention.linear_qkv.weight": (tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "whole"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "whole"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "whole"),
    "mlp.linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), "whole"),  # TE fuses it
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
    "mlp.router.weight": (("mlp.gate.weight",), "whole"),
}
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.linear_fc(?P<a>[12])\.weight"
    r"|linear_fc(?P<b>[12])\.weight(?P<grouped>\d+))"  # TE: all experts of a rank in one module
)


def describe(name: str, *, first_layer: int, first_expert: int) -> Cut:
    """The cut that a parameter of this rank is; layers and experts are counted from the given ones."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    assert match, f"parameter {name} has no Hugging Face counterpart"
    prefix, rest = f"model.layers.{int(match[1]) + first_layer}.", match[2]
    if rest in _LAYER:
        names, how = _LAYER[rest]
        return Cut(tuple(prefix + n for n in names), how)
    expert = _EXPERT.fullmatch(rest)
    assert expert, f"parameter {name} has no Hugging Face counterpart"
    prefix += f"mlp.experts.{int(expert['local'] or expert['grouped'] or 0) + first_expert}."
    if (expert["a"] or expert["b"]) == "1":
        return Cut((prefix + "gate_proj.weight", prefix + "up_proj.weight"), "gate_up", is_expert=True)
    return Cut((prefix + "down_proj.weight",), "columns", is_expert=True)


def described(model: torch.nn.Module, shape: ModelShape, groups: Groups) -> Iterator[tuple[Cut, Tensor]]:
    """Every parameter of this rank with its cut.  `model` is the bare model, without DDP."""
    layers = layers_of_stage(groups.layout, shape, groups.at.pipeline)
    first_expert = groups.at.expert * (shape.num_experts // groups.layout.expert)
    for name, parameter in model.named_parameters():
        cut = describe(name, first_layer=layers[0], first_expert=first_expert)
        if shape.tied_embeddings and cut.names == ("lm_head.weight",):
            cut = _TOP["embedding.word_embeddings.weight"]  # the last stage's copy of the embedding
        yield cut, parameter


def join(how: str, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    """Whole Hugging Face tensors from the shards of all ranks, in rank order; `_split` is its inverse."""
    if how == "whole":
        return [shards[0]]
    if how == "gate_up":
        return [torch.cat(half) for half in zip(*(shard.chunk(2) for shard in shards), strict=True)]
    if how == "qkv":
        per_group = shape.num_heads // shape.num_groups
        fused = torch.cat(list(shards)).view(shape.num_groups, per_group + 2, shape.head_dim, -1)
        return [part.flatten(0, 2) for part in fused.split([per_group, 1, 1], dim=1)]
    return [torch.cat(list(shards), dim=0 if how == "rows" else 1)]


def _fuse(how: str, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """One rank's Megatron parameter from this rank's slice of each Hugging Face tensor."""
    if how == "qkv":
        width = shape.head_dim * parts[1].shape[-1]
        groups = parts[1].numel() // width
        return torch.cat([part.reshape(groups, -1, width) for part in parts], 1).reshape(
            -1, parts[1].shape[-1]
        )
    return torch.cat(list(parts)) if how == "gate_up" else parts[0]


# ------------------------------------------------------------------------------------------------- import


def load_hf(model: torch.nn.Module, source: Path, shape: ModelShape, groups: Groups) -> None:
    """Fill this rank's parameters from safetensors, reading only its own slices.

    Raises:
        ConfigError: files or tensors are missing, unreadable, or do not have the shapes that config.json says.
    """
    files = _HfFiles(source)
    at, layout = groups.at, groups.layout
    with torch.no_grad():
        for cut, parameter in described(model, shape, groups):
            index, size = (at.tensor, layout.tensor)
            if cut.is_expert:
                index, size = (at.expert_tensor, layout.resolved_expert_tensor)
            parts = [files.slice(name, cut.how, index, size) for name in cut.names]
            width = parameter.shape[-1]
            if sum(p.numel() for p in parts) != parameter.numel() or any(p.shape[-1] != width for p in parts):
                raise ConfigError(
                    f"model = '{source}': {' + '.join(cut.names)} of {[list(p.shape) for p in parts]} on {groups.name}; "
                    f"config.json implies {list(parameter.shape)}; mend config.json or the weights"
                )
            parameter.copy_(_fuse(cut.how, parts, shape))


class _HfFiles:
    """The tensors of a Hugging Face directory, by name."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._handles: dict[str, Any] = {}
        index = source / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (source / "model.safetensors").is_file():
            self._file_of = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"model = '{source}': expected model.safetensors or model.safetensors.index.json with the weights; "
                "download them, or convert the checkpoint to safetensors"
            )

    def slice(self, name: str, how: str, index: int, size: int) -> Tensor:
        """Part `index` of `size` of a tensor, divided in the dim that `how` says."""
        if name not in self._file_of:
            raise ConfigError(
                f"model = '{self.source}': no tensor '{name}' in its safetensors; the download is incomplete"
            )
        whole = self._open(self._file_of[name]).get_slice(name)
        if how == "whole":
            return whole[:]
        dim = 1 if how == "columns" else 0
        each, rest = divmod(whole.get_shape()[dim], size)
        if rest:
            raise ConfigError(
                f"model = '{self.source}': '{name}' has shape {whole.get_shape()}, which {size} ranks cannot divide evenly "
                "although config.json's sizes can be; mend config.json or the weights"
            )
        mine = slice(index * each, (index + 1) * each)
        return whole[:, mine] if dim else whole[mine]

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.source / file, framework="pt")
            except (OSError, SafetensorError) as err:
                raise ConfigError(
                    f"model = '{self.source}': cannot read {file} ({err}); download it again"
                ) from err
        return self._handles[file]


# ------------------------------------------------------------------------------------------------- export


class Export:
    """Brings whole Hugging Face tensors to global rank 0, a bounded block at a time.

    All ranks construct it together once, and call `run` together each time.
    """

    def __init__(self, model: torch.nn.Module, shape: ModelShape, groups: Groups) -> None:
        self._shape, self._groups = shape, groups
        self._mine = {
            cut.names: tensor
            for cut, tensor in described(model, shape, groups)
            if _represents(cut, groups, shape)
        }
        entries = [
            (cut, tuple(t.shape)) for cut, t in described(model, shape, groups) if cut.names in self._mine
        ]
        everyone: list[Any] = [None] * groups.layout.world_size
        dist.all_gather_object(everyone, entries)
        self.dtype = next(iter(model.parameters())).dtype
        self._blocks = _plan_blocks(everyone, self.dtype.itemsize)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(part.num_bytes(self.dtype.itemsize) for block in self._blocks for part in block)

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank must exhaust it.  Rank 0 gets (Hugging Face name, whole tensor) in the order of
        the layers, ready to send on; the others get nothing while they send their parts."""
        for block in self._blocks:
            shards = self._bring(block)
            if self._groups.rank == 0:
                for part in block:
                    whole = join(
                        part.cut.how, [shards[rank, part.cut.names] for rank, _ in part.shards], self._shape
                    )
                    yield from zip(part.cut.names, whole, strict=True)

    def _bring(self, block: list[_Part]) -> dict[tuple[int, tuple[str, ...]], Tensor]:
        """Send this rank's shards of a block to rank 0 in one message; there, receive everybody's."""
        contents: dict[int, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
        for part in block:
            for rank, size in part.shards:
                contents.setdefault(rank, []).append((part.cut.names, size))
        me = self._groups.rank
        if me != 0:
            if me in contents:
                mine = torch.cat([self._mine[names].detach().flatten() for names, _ in contents[me]])
                _exchange([dist.P2POp(dist.isend, mine, 0)])
            return {}
        shards: dict[tuple[int, tuple[str, ...]], Tensor] = {}
        buffers = {
            rank: torch.empty(
                sum(_numel(size) for _, size in entries), dtype=self.dtype, device=self._groups.device
            )
            for rank, entries in contents.items()
            if rank != 0
        }
        _exchange([dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in buffers.items()])
        for rank, entries in contents.items():
            flat = buffers[rank].split([_numel(size) for _, size in entries]) if rank else None
            for i, (names, size) in enumerate(entries):
                # A copy of rank 0's own: a tensor already handed on must not change in the next step.
                shards[rank, names] = flat[i].view(size) if flat else self._mine[names].detach().clone()
        return shards


def _exchange(operations: list[dist.P2POp]) -> None:
    """Both ends must come here: NCCL meets a batch on another communicator than a plain send."""
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()


@dataclass(frozen=True)
class _Part:
    """One Megatron parameter, whole: its cut, and which ranks hold its shards, in shard order."""

    cut: Cut
    shards: tuple[tuple[int, tuple[int, ...]], ...]

    def num_bytes(self, itemsize: int) -> int:
        return sum(_numel(size) for _, size in self.shards) * itemsize


def _represents(cut: Cut, groups: Groups, shape: ModelShape) -> bool:
    """Whether this rank, of those that hold equal copies, is the one that sends."""
    at = groups.at
    if shape.tied_embeddings and cut.names == ("model.embed_tokens.weight",) and at.pipeline != 0:
        return False
    if cut.is_expert:
        return at.expert_data == 0
    return at.data == 0 and at.context == 0 and (cut.how != "whole" or at.tensor == 0)


def _plan_blocks(everyone: list[list[tuple[Cut, tuple[int, ...]]]], itemsize: int) -> list[list[_Part]]:
    """The same blocks on every rank: parameters in the order of the layers, cut where BLOCK_BYTES are reached."""
    holders: dict[Cut, list[tuple[int, tuple[int, ...]]]] = {}
    for rank, entries in enumerate(everyone):
        for cut, size in entries:
            holders.setdefault(cut, []).append((rank, size))
    parts = [
        _Part(cut, tuple(shards)) for cut, shards in sorted(holders.items(), key=lambda item: _order(item[0]))
    ]
    blocks: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        if blocks[-1] and filled + part.num_bytes(itemsize) > BLOCK_BYTES:
            blocks.append([])
            filled = 0
        blocks[-1].append(part)
        filled += part.num_bytes(itemsize)
    return blocks


def _order(cut: Cut) -> tuple[Any, ...]:
    name = cut.names[0]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return (-1,) if "embed_tokens" in name else (10**9, name != "model.norm.weight")
    expert = re.search(r"experts\.(\d+)\.", name)
    return int(layer[1]), int(expert[1]) if expert else -1, name


def _numel(size: tuple[int, ...]) -> int:
    return int(torch.Size(size).numel())


# --------------------------------------------------------------------------------------------------- save


def save_hf(export: Export, source: Path, target: Path, *, rank: int) -> None:
    """Collective: write a Hugging Face directory (weights, config.json and tokenizer files of `source`).

    It appears under its name only when it is complete.

    Raises:
        RunError: `target` exists already.
    """
    exists: list[Any] = [target.exists() if rank == 0 else None]
    dist.broadcast_object_list(exists, src=0)  # so that all ranks stop, not rank 0 alone
    if exists[0]:
        raise RunError(f"'{target}': exists already and is never overwritten; give another directory")
    partial = target.with_name(f".{target.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_side_files(source, partial, export.dtype)
    writer = _HfWriter(partial)
    for name, tensor in export.run():
        writer.add(name, tensor)
    if rank == 0:
        writer.finish()
        os.replace(partial, target)
    dist.barrier()


class _HfWriter:
    """Collects tensors into safetensors files of bounded size, and an index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > FILE_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous().cpu()

    def finish(self) -> None:
        self._flush()
        num = len(self._files)
        weight_map = {}
        for i, names in enumerate(self._files):
            final = f"model-{i + 1:05d}-of-{num:05d}.safetensors" if num > 1 else "model.safetensors"
            os.replace(self._directory / f"part-{i}", self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        if num > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        part = self._directory / f"part-{len(self._files)}"
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it private; an engine under another account must read it
        self._files.append(list(self._pending))
        self._total += sum(t.nbytes for t in self._pending.values())
        self._pending = {}


def _copy_side_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Everything small beside the weights: tokenizer, chat template, generation config, licence."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(weights):
            shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # transformers 4's name of the same field
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
