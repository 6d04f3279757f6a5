"""Adam over Megatron's gradient buffers: what is summed, what is clipped, how fast it learns.

Megatron is imported inside functions: `cpu.install()` must come first, and a driver imports this module without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vespo.config import OptimizerConfig, TrainerConfig
from megatron_vespo.types import RunError


class Optimizer:
    """The rank's model chunks in gradient buffers, and Megatron's optimizer on them."""

    def __init__(self, chunks: Sequence[Any], cfg: TrainerConfig, rank_name: str) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

        self._cfg, self._rank_name = cfg.optimizer, rank_name
        self._weights_are_whole = True
        self.torn = False
        """Whether an update failed half-way (out of memory, say): these weights are of no step."""
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=cfg.optimizer.distributed,
            overlap_grad_reduce=cfg.optimizer.overlap,
            overlap_param_gather=cfg.optimizer.overlap,
        )
        self.ddp_chunks: list[Any] = [
            # Only the first chunk's buckets overlap with something.
            DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
        self._connect(chunks[0].config)
        config = _megatron_config(cfg, chunks[0].config.params_dtype)
        # The overrides exempt vectors (norms) from weight decay; 0.16 does so only when they are given.
        overrides = get_standard_config_overrides(config)
        self.megatron: Any = get_megatron_optimizer(
            config, self.ddp_chunks, overrides, use_gloo_process_groups=False
        )

    def _connect(self, model_config: Any) -> None:
        """Tell Megatron's schedules how this trainer sums gradients, and when it may overlap that."""
        model_config.finalize_model_grads_func = _sum_gradients
        if self._cfg.overlap:
            no_sync = [ddp.no_sync for ddp in self.ddp_chunks]
            model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def zero_grad(self) -> None:
        """Before the first backward of an update."""
        for ddp in self.ddp_chunks:
            ddp.zero_grad_buffer()
        self.megatron.zero_grad()

    def update(self, number: int, rate_factor: float = 1.0) -> tuple[float, float]:
        """Check, clip and apply the gradients.

        Args:
            number: updates before this one; sets the learning rate.
            rate_factor: what that is multiplied by.

        Returns:
            Norm of the whole gradient before clipping, and the learning rate.

        Raises:
            RunError: the norm is not finite; on every rank, and no weight has changed.
        """
        rate = rate_factor * learning_rate(self._cfg, number)
        for group in self.megatron.param_groups:
            group["lr"] = rate
        norm_of = type(self.megatron).get_grad_norm
        checked: list[float] = []

        def checked_norm() -> float:
            norm = float(norm_of(self.megatron))  # the same on every rank, so all of them stop here
            checked.append(norm)
            if not np.isfinite(norm):
                raise RunError(
                    f"gradient norm = {norm} at update {number} (found by {self._rank_name}): must be finite; this update "
                    "changed no weight; resume from a checkpoint with a smaller learning rate"
                )
            self.torn = True
            return norm

        self.megatron.get_grad_norm = checked_norm
        self.megatron.step()
        self.torn, self._weights_are_whole = False, not self._cfg.overlap
        assert checked, (
            "megatron's optimizer no longer asks for the norm before it steps: adapt Optimizer.update"
        )
        return checked[-1], rate

    def complete_weights(self) -> None:
        """Collective: have every weight up to date before it is read outside of a forward pass.

        With `overlap` an update leaves each rank with the weights that it updated itself; the next forward pass would
        gather the others.
        """
        if not self._weights_are_whole:
            for ddp in self.ddp_chunks:
                ddp.start_param_sync(force_sync=True)
            self._weights_are_whole = True

    def close(self) -> None:
        """Let go of the model, and with it of process groups and their threads.

        Token dispatchers keep tensors of the last forward, whose graph ends in gradient hooks, which keep the DDP object,
        which keeps the model: a cycle that Python's collector cannot see.
        """
        for ddp in self.ddp_chunks:
            if self._cfg.overlap:
                ddp.disable_forward_pre_hook(param_sync=False)
            del ddp.module


def learning_rate(cfg: OptimizerConfig, number: int) -> float:
    """Learning rate of an update: a linear warm-up from 0, then constant, or falling to `min_learning_rate`.

        share = (n - warmup) / (decay - warmup) in [0, 1]      linear: 1 - share      cosine: (1 + cos(pi share)) / 2

    Args:
        number: updates before this one.
    """
    if number < cfg.warmup_steps:
        return cfg.learning_rate * (number + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    share = min(1.0, (number - cfg.warmup_steps) / (cfg.decay_steps - cfg.warmup_steps))
    height = 1 - share if cfg.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return cfg.min_learning_rate + (cfg.learning_rate - cfg.min_learning_rate) * height


def _megatron_config(cfg: TrainerConfig, params_dtype: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    ours = cfg.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=ours.learning_rate,
        weight_decay=ours.weight_decay,
        adam_beta1=ours.betas[0],
        adam_beta2=ours.betas[1],
        adam_eps=ours.eps,
        clip_grad=ours.clip_grad_norm,
        bf16=cfg.dtype == "bfloat16",
        params_dtype=params_dtype,
        use_distributed_optimizer=ours.distributed,
        overlap_param_gather=ours.overlap,
        optimizer_cpu_offload=ours.cpu_offload > 0,
        optimizer_offload_fraction=ours.cpu_offload,
        overlap_cpu_optimizer_d2h_h2d=ours.cpu_offload > 0,
    )


def _sum_gradients(model: list[Any], num_tokens: Any = None, **options: Any) -> None:
    """Megatron's finalize_model_grads, made to sum and never to divide.

    Let l(r, m) be the loss share of data-and-context rank r and microbatch m, whose token weights are already
    divided by the one global denominator.  We need grad = sum_r sum_m grad l(r, m).  Megatron's factors:
      * schedules.py divides a loss by microbatches and multiplies it by context ranks, except for the three-value
        form under calculate_per_token_loss: factor 1.
      * DistributedDataParallel scales by 1 / (data * context) ranks before it sums over them, except under
        calculate_per_token_loss: factor 1, for dense and for expert parameters.
      * finalize_model_grads divides by num_tokens summed over ranks, unless it is None: so we give None.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **options)
