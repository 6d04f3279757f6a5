"""The reference policy of the KL penalty: a second set of weights in host memory, which scores in the policy's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_config import ModelShape, read_model_shape
from megatron_vespo.trainer.layout import Groups


class Reference:
    """This rank's part of the reference, loaded once; it costs host memory alone and three copies a batch."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], source: Path, shape: ModelShape, groups: Groups
    ) -> None:
        """Read the reference's weights; the chunks hold them afterwards, so load the policy next.

        Raises:
            ConfigError: it is another architecture than the policy, or its files are unusable.
        """
        from megatron_vespo.trainer.hf_weights import load_hf

        check_same_shape(source, shape)
        load_hf(chunks, source, shape, groups)
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._weights = self._copied()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the reference's; afterwards the policy's again, bit for bit."""
        policy = self._copied()
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(policy)

    def _copied(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)


def check_same_shape(source: Path, shape: ModelShape) -> None:
    """Refuse a reference that cannot stand in the policy's place.

    Raises:
        ConfigError: its config.json describes another model.
    """
    if read_model_shape(source) != shape:
        raise ConfigError(
            f"algorithm.kl_reference = '{source}': its config.json describes another model than the policy's; both must have "
            "one shape, because the reference is scored in the policy's place; choose a checkpoint of the same model"
        )
