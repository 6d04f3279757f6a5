"""Master weights and Adam moments, wherever Megatron's optimizers keep them, as flat ranges of model parameters.

Read and run in megatron-core 0.16 and 0.19.  Three wrappers (FP32Optimizer, Float16OptimizerWithFloat16Params,
DistributedOptimizer) lie around an Adam of torch or of Transformer Engine; CPU offloading (HybridDeviceOptimizer)
puts several Adams and a second copy of the master weights in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.types import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """Values [start, end) of a flattened model parameter, which this rank's optimizer updates."""

    parameter: Tensor
    start: int
    end: int
    is_sharded: bool
    """Divided over the data ranks (ZeRO-1); else all of them hold equal values."""
    _held: Tensor
    """Its master weight, as the Adam that updates it knows it."""
    _adam: Any
    _group: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """[end - start] the master weight itself, not a copy."""
        return self._held.detach().view(-1)

    def moment(self, name: str) -> Tensor | None:
        """[end - start] one of MOMENTS, not a copy; None before the first step."""
        moment = self._adam.state.get(self._held, {}).get(name)
        return None if moment is None else moment.view(-1)

    @property
    def num_steps(self) -> int:
        """Adam steps taken: torch counts them for each parameter, Transformer Engine for each group."""
        where = self._adam.state.get(self._held, {}) if _is_torch(self._adam) else self._group
        return int(where.get("step", 0))

    def restore(self, weight: Tensor, moments: dict[str, Tensor], num_steps: int) -> None:
        """Put values back, from any device and of any float type."""
        self.weight.copy_(weight)
        state = {
            name: torch.empty_like(self._held.detach()).copy_(value.view(self._held.shape))
            for name, value in moments.items()
        }
        if _is_torch(self._adam):
            on_device = self._group.get("fused") or self._group.get("capturable")
            state["step"] = torch.tensor(float(num_steps), device=self._held.device if on_device else "cpu")
        else:
            self._group["step"] = num_steps
        self._adam.state[self._held] = state


def held_ranges(optimizer: Any) -> Iterator[Held]:
    """Everything that a Megatron optimizer updates on this rank.

    Raises:
        RunError: the optimizer is of a kind that is not known here, or keeps its parameters in another way.
    """
    for wrapper in _wrappers(optimizer):
        found = list(_held_by(wrapper))
        expected = {held for group in wrapper.optimizer.param_groups for held in group["params"]}
        if {held for _, held, _ in found} != expected:
            raise RunError(
                f"{type(wrapper).__name__}: its model parameters no longer match those of the Adam inside; megatron-core "
                "has changed: adapt trainer/adam_state.py"
            )
        places = _places(wrapper.optimizer)
        for parameter, held, start in found:
            is_sharded = start is not None
            one = Held(parameter, start or 0, (start or 0) + held.numel(), is_sharded, *places[held])
            if one.weight.dtype != torch.float32:
                raise RunError(
                    f"{type(wrapper).__name__}: has no float32 master weights outside of its Adam (use_precision_aware_"
                    "optimizer); a checkpoint would lose precision: take that option out"
                )
            yield one


@torch.no_grad()
def master_to_model(optimizer: Any) -> None:
    """Collective: after `Held.restore`, give the model its weights, each on all of the data ranks that share it."""
    for wrapper in _wrappers(optimizer):
        if hasattr(wrapper.optimizer, "sub_optimizers"):
            for held, (inner, _, _) in _places(wrapper.optimizer).items():
                held.data.copy_(inner.data)
            wrapper.optimizer._sync_sub_optimizers_state_to_hdo()
        if hasattr(wrapper, "_copy_main_params_to_model_params"):  # an FP32Optimizer updates the model itself
            wrapper._copy_main_params_to_model_params()
    for chunk in getattr(optimizer, "model_chunks", ()):
        chunk.start_param_sync(force_sync=True)


def _wrappers(optimizer: Any) -> list[Any]:
    """One for all parameters, or one for the experts and one for the rest; without those that have nothing to update."""
    return [one for one in getattr(optimizer, "chained_optimizers", [optimizer]) if not one.is_stub_optimizer]


def _held_by(wrapper: Any) -> Iterator[tuple[Any, Tensor, int | None]]:
    """(model parameter, what the inner optimizer has in its place, where that begins if it is only a range)."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if isinstance(wrapper, DistributedOptimizer):
        inside_adam = wrapper.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        low = wrapper.shard_float16_groups if inside_adam else wrapper.shard_fp32_from_float16_groups
        for parameter, held in chain(
            _pairs(wrapper.model_float16_groups, low),
            _pairs(wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
        ):
            yield parameter, held, wrapper._get_model_param_range_map(parameter)["param"].start
    elif isinstance(wrapper, Float16OptimizerWithFloat16Params):
        for parameter, held in _pairs(wrapper.float16_groups, wrapper.fp32_from_float16_groups):
            yield parameter, held, None
        for parameter in chain(*wrapper.fp32_from_fp32_groups):
            yield parameter, parameter, None
    elif isinstance(wrapper, FP32Optimizer):
        for group in wrapper.optimizer.param_groups:
            yield from ((parameter, parameter, None) for parameter in group["params"])
    else:
        raise RunError(
            f"optimizer = {type(wrapper).__name__}: where it keeps its state is not known; extend trainer/adam_state.py"
        )


def _pairs(left: Iterable[list[Any]], right: Iterable[list[Any]]) -> Iterator[tuple[Any, Any]]:
    for some, others in zip(left, right, strict=True):
        yield from zip(some, others, strict=True)


def _places(inner: Any) -> dict[Tensor, tuple[Tensor, Any, dict[str, Any]]]:
    """For each parameter of a torch optimizer: the tensor that is really updated, its Adam, and its group there."""
    adams = getattr(inner, "sub_optimizers", [inner])
    below = {p: (p, adam, group) for adam in adams for group in adam.param_groups for p in group["params"]}
    offloaded = getattr(inner, "param_to_inner_param", {})
    return {p: below[offloaded.get(p, p)] for group in inner.param_groups for p in group["params"]}


def _is_torch(adam: Any) -> bool:
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
