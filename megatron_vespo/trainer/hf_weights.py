"""Hugging Face weights <-> the ranks' Megatron parameters: one name table per family, import, export.

Every Megatron parameter is a *cut* of one or several Hugging Face tensors.  `TABLES` says of which, for both layer
implementations (local and Transformer Engine); all else follows it: what a rank reads, what it sends, what a
checkpoint must hold.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.trainer.hf_files import HfReader, Size, begin_directory, publish, write_weights
from megatron_vespo.trainer.layout import Coordinates, Groups, layers_of_chunk
from megatron_vespo.trainer.together import together
from megatron_vespo.types import RunError

BLOCK_BYTES = 256 * 1024**2
"""Weights that rank 0 receives in one round of an export (more only where one parameter is larger)."""
FILE_BYTES = 1024**3
"""Weights in one safetensors file (more only where one tensor is larger)."""

# ---------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Row:
    """One kind of Megatron parameter."""

    megatron: str | tuple[str, str]
    """Its name within a layer, or (of the local spec, of Transformer Engine, which fuses modules); {e} counts experts."""
    how: str
    """Which part of the Hugging Face tensors a rank holds: `Cut.how`."""
    hf: dict[str, str]
    """Hugging Face names within a layer, each with its shape in the letters below; several where Megatron fuses them."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.megatron,) if isinstance(self.megatron, str) else self.megatron

    @property
    def is_expert(self) -> bool:
        return "{e}" in self.names[0]


def _letters(shape: ModelShape) -> dict[str, int]:
    return {
        "V": shape.vocab_size, "h": shape.hidden_size, "d": shape.head_dim,
        "Q": shape.num_heads * shape.head_dim, "K": shape.num_groups * shape.head_dim,
        "f": shape.ffn_size, "E": shape.num_experts, "m": shape.expert_ffn_size,
    }  # fmt: skip


# fmt: off
_EMBEDDING = Row("embedding.word_embeddings.weight", "rows", {"model.embed_tokens.weight": "Vh"})
_FINAL_NORM = Row("decoder.final_layernorm.weight", "whole", {"model.norm.weight": "h"})
_HEAD = Row("output_layer.weight", "rows", {"lm_head.weight": "Vh"})
_ATTENTION = (
    Row(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "whole", {"input_layernorm.weight": "h"}),
    Row("self_attention.linear_qkv.weight", "qkv",
        {"self_attn.q_proj.weight": "Qh", "self_attn.k_proj.weight": "Kh", "self_attn.v_proj.weight": "Kh"}),
    Row("self_attention.linear_proj.weight", "columns", {"self_attn.o_proj.weight": "hQ"}),
)
_QK_NORM = (
    Row("self_attention.q_layernorm.weight", "whole", {"self_attn.q_norm.weight": "d"}),
    Row("self_attention.k_layernorm.weight", "whole", {"self_attn.k_norm.weight": "d"}),
)
_DENSE = (
    Row(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "whole", {"post_attention_layernorm.weight": "h"}),
    Row("mlp.linear_fc1.weight", "gate_up", {"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"}),
    Row("mlp.linear_fc2.weight", "columns", {"mlp.down_proj.weight": "hf"}),
)
_EXPERTS = (
    Row("pre_mlp_layernorm.weight", "whole", {"post_attention_layernorm.weight": "h"}),
    Row("mlp.router.weight", "whole", {"mlp.gate.weight": "Eh"}),
    Row(("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{e}"), "gate_up",
        {"mlp.experts.{e}.gate_proj.weight": "mh", "mlp.experts.{e}.up_proj.weight": "mh"}),
    Row(("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{e}"), "columns",
        {"mlp.experts.{e}.down_proj.weight": "hm"}),
)
# fmt: on
TABLES: dict[str, tuple[Row, ...]] = {
    "llama": _ATTENTION + _DENSE,
    "qwen3": _ATTENTION + _QK_NORM + _DENSE,
    "qwen3_moe": _ATTENTION + _QK_NORM + _EXPERTS,
}
"""One layer of each family; `_EMBEDDING`, `_FINAL_NORM` and `_HEAD` are the same for all of them."""


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


@cache
def hf_tensors(shape: ModelShape) -> Mapping[str, Size]:
    """Name and shape of every Hugging Face tensor of the model, in the order in which an export yields them."""
    letters, rows = _letters(shape), TABLES[shape.family]
    dense, experts = [r for r in rows if not r.is_expert], [r for r in rows if r.is_expert]

    def sizes(row: Row, prefix: str = "", e: int = 0) -> dict[str, Size]:
        return {prefix + name.format(e=e): tuple(letters[x] for x in dims) for name, dims in row.hf.items()}

    tensors = sizes(_EMBEDDING)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for row in dense:
            tensors |= sizes(row, prefix)
        for e in range(shape.num_experts):
            for row in experts:
                tensors |= sizes(row, prefix, e)
    return tensors | sizes(_FINAL_NORM) | ({} if shape.tied_embeddings else sizes(_HEAD))


_EXPERT_NUMBER = re.compile(r"(?<=local_experts\.)\d+|(?<=fc[12]\.weight)\d+$")


def describe(name: str, shape: ModelShape, *, first_layer: int = 0, first_expert: int = 0) -> Cut:
    """The cut that a parameter of a model chunk is; its layers and experts are counted from the given ones."""
    rows = _rows_by_name(shape)
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    expert = _EXPERT_NUMBER.search(name)
    key = _EXPERT_NUMBER.sub("{e}", layer[2]) if layer else name
    assert key in rows, f"parameter {name} has no Hugging Face counterpart in a {shape.family} model"
    prefix = f"model.layers.{int(layer[1]) + first_layer}." if layer else ""
    e = int(expert[0]) + first_expert if expert else 0
    return Cut(tuple(prefix + n.format(e=e) for n in rows[key].hf), rows[key].how, rows[key].is_expert)


@cache
def _rows_by_name(shape: ModelShape) -> dict[str, Row]:
    rows = {
        name: row for row in (_EMBEDDING, _FINAL_NORM, _HEAD, *TABLES[shape.family]) for name in row.names
    }
    # Where embeddings are tied, the last stage's copy is called an output layer.
    return rows | (dict.fromkeys(_HEAD.names, _EMBEDDING) if shape.tied_embeddings else {})


class Chunk(Protocol):
    """What is asked of a model chunk: the bare model, without DDP."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]: ...


def described(chunks: Sequence[Chunk], shape: ModelShape, groups: Groups) -> Iterator[tuple[Cut, Tensor]]:
    """Every parameter of this rank with its cut; `chunks` are its parts of the model, in the order of the pipeline."""
    assert len(chunks) == groups.layout.virtual_pipeline, f"{len(chunks)} model chunks on {groups.name}"
    first_expert = groups.at.expert * (shape.num_experts // groups.layout.expert)
    for number, chunk in enumerate(chunks):
        layers = layers_of_chunk(groups.layout, shape, groups.at.pipeline, number)
        for name, parameter in chunk.named_parameters():
            yield describe(name, shape, first_layer=layers.start, first_expert=first_expert), parameter


def shard_of(cut: Cut, groups: Groups) -> tuple[int, int]:
    """(index, size): which of how many shards of a parameter this rank holds."""
    if cut.how == "whole":
        return 0, 1
    if cut.is_expert:
        return groups.at.expert_tensor, groups.layout.resolved_expert_tensor
    return groups.at.tensor, groups.layout.tensor


def represents(cut: Cut, at: Coordinates, shape: ModelShape) -> bool:
    """Whether the rank at a place, of those that hold equal copies of a shard, is the one that speaks for them."""
    if shape.tied_embeddings and cut.names == tuple(_EMBEDDING.hf) and at.pipeline != 0:
        return False
    if cut.is_expert:
        return at.expert_data == 0
    return at.data == 0 and at.context == 0 and (cut.how != "whole" or at.tensor == 0)


# --------------------------------------------------------------------------------------- shards and wholes


def join(how: str, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
    """Whole Hugging Face tensors from the shards of all ranks, in rank order; the inverse of `split`.

    They may be views of the shards.
    """
    if how == "gate_up":
        return [_cat(half, 0) for half in zip(*(shard.chunk(2) for shard in shards), strict=True)]
    if how == "qkv":
        rows = _group_rows(shape)
        fused = _cat(shards, 0).reshape(shape.num_groups, sum(rows), -1)
        return [part.flatten(0, 1) for part in fused.split(rows, dim=1)]
    return [shards[0] if how == "whole" else _cat(shards, 0 if how == "rows" else 1)]


def split(how: str, wholes: Sequence[Tensor], index: int, size: int, shape: ModelShape) -> Tensor:
    """Shard `index` of `size` of a Megatron parameter, from whole Hugging Face tensors in the order of `Cut.names`."""
    return _fuse(how, [x[_window(tuple(x.shape), how, index, size)] for x in wholes], shape)


def _window(whole: Size, how: str, index: int, size: int) -> tuple[slice, ...]:
    """Where shard `index` of `size` lies in a Hugging Face tensor."""
    if how == "whole":
        return (slice(None),)
    dim = 1 if how == "columns" else 0
    each, rest = divmod(whole[dim], size)
    assert rest == 0, f"{size} ranks cannot divide {whole}: check_layout comes first"
    return (*[slice(None)] * dim, slice(index * each, (index + 1) * each))


def _fuse(how: str, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """One rank's Megatron parameter from this rank's part of each Hugging Face tensor."""
    if how == "qkv":  # a key/value group's queries, its key, its value; then the next group's
        by_group = [
            part.reshape(-1, rows, part.shape[-1])
            for part, rows in zip(parts, _group_rows(shape), strict=True)
        ]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    return _cat(parts, 0)


def _group_rows(shape: ModelShape) -> tuple[int, int, int]:
    """Rows of q, k and v in one key/value group."""
    return shape.num_heads // shape.num_groups * shape.head_dim, shape.head_dim, shape.head_dim


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


# ------------------------------------------------------------------------------------------------- import


def check_weights(source: Path, shape: ModelShape) -> None:
    """Refuse weights that are not, name by name, those that config.json implies; only headers are read.

    Raises:
        ConfigError: files are missing or truncated, or tensors missing, unknown, of another shape, or quantized.
    """
    reader, expected = HfReader(source), hf_tensors(shape)
    missing = [name for name in expected if name not in reader.files]
    unknown = [name for name in sorted(reader.files) if name not in expected and not _is_ignored(name, shape)]
    problems = [f"{len(missing)} are missing (first: '{missing[0]}')"] if missing else []
    problems += [f"{len(unknown)} others are there (first: '{unknown[0]}')"] if unknown else []
    if problems:
        experts = f" and {shape.num_experts} experts" if shape.num_experts else ""
        raise ConfigError(
            f"model = '{source}': expected the {len(expected)} tensors of a {shape.family} model of {shape.num_layers} "
            f"layers{experts}, as config.json says, but {' and '.join(problems)}; the download is incomplete, or "
            "config.json and weights are of different models"
        )
    for name, size in expected.items():
        reader.check(name, size)


def _is_ignored(name: str, shape: ModelShape) -> bool:
    """What transformers ignores too: a tied head saved a second time, constants of older versions."""
    return (shape.tied_embeddings and name in _HEAD.hf) or name.endswith(".rotary_emb.inv_freq")


def load_hf(chunks: Sequence[Chunk], source: Path, shape: ModelShape, groups: Groups) -> None:
    """Collective: fill this rank's parameters from safetensors, one after the other, reading only its own slices.

    Raises:
        ConfigError: on every rank, where one of them finds a file or tensor missing, unreadable, not of the shape that
            config.json implies, or with NaN or infinity in it.
    """
    with together(ConfigError, Exception, f"model = '{source}': cannot be read", "download it again"):
        reader = HfReader(source)
        for cut, parameter in described(chunks, shape, groups):
            _load(cut, parameter, reader, shape, groups)


@torch.no_grad()
def _load(cut: Cut, parameter: Tensor, reader: HfReader, shape: ModelShape, groups: Groups) -> None:
    index, size = shard_of(cut, groups)
    wholes = [hf_tensors(shape)[name] for name in cut.names]
    windows = [_window(whole, cut.how, index, size) for whole in wholes]
    parts = [reader.read(*tensor) for tensor in zip(cut.names, wholes, windows, strict=True)]
    if shape.tied_embeddings and cut.names == tuple(_EMBEDDING.hf):
        for head in _HEAD.hf.keys() & reader.files.keys():
            if not torch.equal(reader.read(head, wholes[0], windows[0]), parts[0]):
                raise ConfigError(
                    f"model = '{reader.source}': '{head}' differs from '{cut.names[0]}' although config.json ties them; set "
                    "tie_word_embeddings = false there, or take the checkpoint that it belongs to"
                )
    fused = _fuse(cut.how, parts, shape)
    assert fused.shape == parameter.shape, f"{cut}: {tuple(fused.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(fused)


# ------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class _Part:
    """One Megatron parameter, whole: its cut, and which ranks hold its shards, in shard order."""

    cut: Cut
    shards: tuple[tuple[int, Size], ...]

    @property
    def numel(self) -> int:
        return sum(math.prod(size) for _, size in self.shards)


class Export:
    """Brings whole Hugging Face tensors to global rank 0, a bounded block at a time.

    All ranks construct it together once, and call `run` together each time.  Rank 0 then holds, beside its own weights,
    one block (`block_bytes`, or one parameter that is larger) and the whole tensors of one parameter.
    """

    def __init__(
        self, chunks: Sequence[Chunk], shape: ModelShape, groups: Groups, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.shape, self._groups = shape, groups
        own = list(described(chunks, shape, groups))
        (self.dtype,) = {tensor.dtype for _, tensor in own}
        self._mine = {cut: tensor for cut, tensor in own if represents(cut, groups.at, shape)}
        everyone: list[Any] = [None] * groups.layout.world_size
        dist.all_gather_object(everyone, [(cut, tuple(tensor.shape)) for cut, tensor in self._mine.items()])
        parts = _in_order(everyone, shape)
        self.num_bytes = sum(part.numel for part in parts) * self.dtype.itemsize
        """Size of all tensors together."""
        self._blocks = _blocks(parts, block_bytes // self.dtype.itemsize)

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank must exhaust it.  Rank 0 gets (Hugging Face name, whole tensor) in the order of
        `hf_tensors`, ready to send on; the others get nothing while they send their parts."""
        for block in self._blocks:
            shards = self._bring(block)
            for part in block if self._groups.rank == 0 else ():
                wholes = join(
                    part.cut.how, [shards.pop((rank, part.cut)) for rank, _ in part.shards], self.shape
                )
                yield from zip(part.cut.names, wholes, strict=True)
                del wholes  # or the last of a block would keep it alive while the next one arrives

    def _bring(self, block: list[_Part]) -> dict[tuple[int, Cut], Tensor]:
        """Send this rank's shards of a block to rank 0 in one message; there, receive everybody's."""
        contents: dict[int, list[tuple[Cut, Size]]] = {}
        for part in block:
            for rank, size in part.shards:
                contents.setdefault(rank, []).append((part.cut, size))
        me, device = self._groups.rank, self._groups.device
        if me != 0:
            if me in contents:
                mine = torch.cat([self._mine[cut].detach().flatten() for cut, _ in contents[me]])
                _exchange([dist.P2POp(dist.isend, mine, 0)])
            return {}
        # A copy of rank 0's own: a tensor already handed on must not change in the next step.
        shards = {(0, cut): self._mine[cut].detach().clone() for cut, _ in contents.pop(0, [])}
        buffers = {
            rank: torch.empty(sum(math.prod(size) for _, size in entries), dtype=self.dtype, device=device)
            for rank, entries in contents.items()
        }
        _exchange([dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in buffers.items()])
        for rank, entries in contents.items():
            flat = buffers[rank].split([math.prod(size) for _, size in entries])
            shards |= {(rank, cut): x.view(size) for (cut, size), x in zip(entries, flat, strict=True)}
        return shards


def _exchange(operations: list[dist.P2POp]) -> None:
    """Both ends must come here: NCCL meets a batch on another communicator than a plain send."""
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()


def _in_order(everyone: list[list[tuple[Cut, Size]]], shape: ModelShape) -> list[_Part]:
    """All parameters of the model, each once, in the order of `hf_tensors`, whatever the layout."""
    holders: dict[Cut, list[tuple[int, Size]]] = {}
    for rank, entries in enumerate(everyone):
        for cut, size in entries:
            holders.setdefault(cut, []).append((rank, size))
    order = {name: i for i, name in enumerate(hf_tensors(shape))}
    parts = [_Part(cut, tuple(holders[cut])) for cut in sorted(holders, key=lambda cut: order[cut.names[0]])]
    held = [name for part in parts for name in part.cut.names]
    assert held == list(order), f"the ranks hold {len(held)} tensors, the model has {len(order)}"
    return parts


def _blocks(parts: list[_Part], most: int) -> list[list[_Part]]:
    """Consecutive parts of at most `most` numbers together."""
    blocks: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        if blocks[-1] and filled + part.numel > most:
            blocks.append([])
            filled = 0
        blocks[-1].append(part)
        filled += part.numel
    return blocks


def save_hf(export: Export, source: Path, target: Path, *, rank: int, file_bytes: int = FILE_BYTES) -> None:
    """Collective: write a Hugging Face directory (weights, config.json and tokenizer files of `source`).

    It appears under its name only when it is complete; tensors go to disk as they arrive.

    Raises:
        RunError: on every rank, where `target` exists already or rank 0 cannot write; nothing is left behind.
    """
    partial = target.with_name(f".{target.name}.partial")
    told = (
        RunError,
        OSError,
        f"'{target}': cannot write the model there",
        "make room, or give another directory",
    )
    try:
        with together(*told):
            if rank == 0:
                _begin(partial, source, target, export.dtype)
        with together(*told):
            _write(partial, target, export, file_bytes, rank)
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _begin(partial: Path, source: Path, target: Path, dtype: torch.dtype) -> None:
    if target.exists():
        raise RunError(f"'{target}': exists already and is never overwritten; give another directory")
    begin_directory(partial, source, dtype)


def _write(partial: Path, target: Path, export: Export, file_bytes: int, rank: int) -> None:
    stream = export.run()
    try:
        if rank == 0:
            write_weights(partial, stream, hf_tensors(export.shape), export.dtype, file_bytes)
    finally:
        for _ in stream:  # the other ranks' part; on rank 0, after a failed write, what they still send
            pass
    if rank == 0:
        publish(partial, target)
