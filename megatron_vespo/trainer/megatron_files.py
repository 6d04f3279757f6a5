"""Weights from a distributed checkpoint of Megatron-Core (torch_dist), as Megatron-LM and its relatives write it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.types import RunError

_SYNONYMS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
"""What Megatron's local layers and those of Transformer Engine call the norm before experts."""
_LONGEST = 200
"""Characters of upstream's messages, which list all that is in a checkpoint."""


def load_megatron(chunks: Sequence[Any], directory: Path) -> None:
    """Collective: read every weight of this rank's chunks, whatever layout wrote them.

    Only weights are read: no optimizer, and of Transformer Engine's extra states none, which scale FP8.

    Raises:
        RunError: it is damaged, of another architecture, or of a format that this megatron-core does not read.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        metadata = dist_checkpointing.load_content_metadata(str(directory))
        known = dist_checkpointing.load_tensors_metadata(str(directory))
        wanted = {str(i): _weights(chunk, metadata, known) for i, chunk in enumerate(chunks)}
        found: Any = dist_checkpointing.load(wanted, str(directory))
        for i, chunk in enumerate(chunks):
            result = chunk.load_state_dict(found[str(i)], strict=False)
            if left := [name for name in result.missing_keys if not _is_extra(name)]:
                raise CheckpointingException(f"no {left[0]}")
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError, ValueError, OSError) as err:
        why = (
            next((failure for failure, _ in err.failures.values()), err)
            if isinstance(err, CheckpointException)
            else err
        )
        raise RunError(
            f"checkpoint '{directory}': cannot be read as this model's ({type(why).__name__}: {str(why)[:_LONGEST]}); give as "
            "shape the Hugging Face directory of the very model that was trained, and a checkpoint in the format torch_dist"
        ) from err


def _weights(chunk: Any, metadata: dict[str, Any] | None, known: Container[str]) -> dict[str, Any]:
    """What is to be read, in Megatron's terms; `known` are the names in the checkpoint."""
    state = chunk.sharded_state_dict(metadata=metadata)
    weights = {name: part for name, part in state.items() if not _is_extra(name)}
    for part in weights.values():
        for one, other in (_SYNONYMS, _SYNONYMS[::-1]):
            if part.key not in known and (named := part.key.replace(one, other)) in known:
                part.key = named
    return weights


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")
