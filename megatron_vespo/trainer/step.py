"""One rank of the trainer: forward and backward over its microbatches, clip, optimizer step.

A `TrainerRank` knows nothing of Ray.  All ranks are told the same thing in lock step; each plans the same
microbatches and works on its own.

Megatron is imported inside functions: `cpu.install()` must come first, and a driver imports this module without it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.algo.loss import policy_loss, token_weights
from megatron_vespo.config import AlgorithmConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.trainer import cpu
from megatron_vespo.trainer.checkpoint import Written
from megatron_vespo.trainer.hf_config import read_model_shape
from megatron_vespo.trainer.layout import (
    Place,
    check_layout,
    destroy_process_groups,
    init_process_groups,
    layers_of_stage,
    rank_name,
)
from megatron_vespo.trainer.outputs import RankOutput, RouterRows
from megatron_vespo.trainer.packing import DUMMY, Inputs, Microbatch, cut, input_numbers, plan, zigzag
from megatron_vespo.trainer.rank_checkpoint import RankCheckpoint
from megatron_vespo.types import RunError, TrainSequence

PROBLEMS = ("loss", "log W", "log-prob")
"""Numbers that are checked, each the cause of those before it."""


class TrainerRank:
    """pi on one rank: its part of the weights and of their optimizer.

    Args:
        model: Hugging Face directory from which the weights are read.
        temperature: log-probs are those of softmax(logits / temperature), as the engine samples.
    """

    def __init__(
        self,
        cfg: TrainerConfig,
        model: Path,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        seed: int,
        place: Place,
    ) -> None:
        cpu.install() if cfg.device == "cpu" else cpu.require_cuda()
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        from megatron_vespo.trainer.hf_weights import Export, load_hf
        from megatron_vespo.trainer.logprobs import Head
        from megatron_vespo.trainer.model import build_model

        self.shape = read_model_shape(model)
        check_layout(cfg.layout, self.shape)
        self._cfg, self._source, self._algorithm = cfg, model, algorithm
        self._num_steps, self._torn = 0, False
        self.groups = init_process_groups(
            cfg.layout, place, device=cfg.device, timeout_s=cfg.collective_timeout_s
        )
        model_parallel_cuda_manual_seed(seed)
        self.model = build_model(cfg, self.shape, stage=self.groups.at.pipeline).to(self.groups.device)
        load_hf(self.model, model, self.shape, self.groups)
        self._ddp, self._optimizer = _with_optimizer(self.model, cfg)
        self._export = Export(self.model, self.shape, self.groups)
        self._router = _RouterCapture(
            self.model, layers_of_stage(cfg.layout, self.shape, self.groups.at.pipeline)
        )
        self._head = Head(
            group=self.groups.tensor,
            sequence_parallel=self.model.config.sequence_parallel,
            temperature=temperature,
            chunk_tokens=cfg.logprob_chunk_tokens,
        )

    # ------------------------------------------------------------------------------------------- training

    def step(
        self, sequences: Sequence[TrainSequence], step_number: int, *, capture_experts: bool = True
    ) -> RankOutput:
        """One optimizer step on the whole batch.

        Args:
            sequences: the batch of all ranks, the same on each.
            step_number: optimizer steps taken before this one; sets the learning rate, and stands in errors.

        Returns:
            This rank's share; `outputs.merge_step` puts all shares together.

        Raises:
            RunError: a log-prob, a log W, the loss or the gradient is not finite; on every rank, and no weight has
                changed.
        """
        started = time.perf_counter()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        store = self._run(sequences, step_number, train=True, capture_experts=capture_experts)
        computed = time.perf_counter()
        learning_rate = _set_learning_rate(self._optimizer, self._cfg.optimizer, step_number)
        grad_norm = self._update(step_number)
        self._num_steps += 1
        time_s = {"forward_backward": computed - started, "optimizer": time.perf_counter() - computed}
        return store.output(time_s, grad_norm=grad_norm, learning_rate=learning_rate)

    def score(self, sequences: Sequence[TrainSequence], *, capture_experts: bool = True) -> RankOutput:
        """Log-probs, entropies and experts of given sequences under the current weights; no gradient.

        Returns:
            This rank's share; `outputs.merge_scores` puts all shares together.

        Raises:
            RunError: a log-prob is not finite; on every rank.
        """
        started = time.perf_counter()
        store = self._run(sequences, None, train=False, capture_experts=capture_experts)
        return store.output({"forward": time.perf_counter() - started})

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the weights.

        Raises:
            RunError: an update failed half-way (out of memory, say): these weights are of no step.
        """
        if self._torn:
            raise RunError(
                f"weights of {self.groups.name} = half updated by step {self._num_steps}: of no use; "
                "resume from a checkpoint"
            )
        return self._num_steps

    def _run(
        self,
        sequences: Sequence[TrainSequence],
        step_number: int | None,
        *,
        train: bool,
        capture_experts: bool,
    ) -> _Store:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        _check_batch(sequences, self.shape.vocab_size)
        microbatches = plan(sequences, self._cfg.layout, max_tokens=self._cfg.max_tokens_per_microbatch)[
            self.groups.at.data
        ]
        store = _Store(
            sequences=sequences,
            weight=token_weights([s.num_response_tokens for s in sequences], self._algorithm.aggregation),
            train=train,
            capture_experts=capture_experts and self._router.num_layers > 0,
        )
        config: Any = self.model.config
        config.finalize_model_grads_func = _sum_gradients
        # Ranks otherwise send each other the shape of every activation before the activation.
        config.variable_seq_lengths = len({(mb.length, len(mb.rows)) for mb in microbatches}) > 1
        with nullcontext() if train else torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=functools.partial(self._forward, store),
                data_iterator=iter(microbatches),
                model=[self._ddp],
                num_microbatches=len(microbatches),
                seq_length=microbatches[0].length,
                micro_batch_size=len(microbatches[0].rows),
                forward_only=not train,
            )
        self._stop_if_not_finite(store, step_number)
        return store

    def _forward(self, store: _Store, microbatches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        """Megatron's forward_step: hidden states of one microbatch, and the closure that makes its loss."""
        microbatch, layout, at = next(microbatches), self._cfg.layout, self.groups.at
        inputs = cut(store.sequences, microbatch, context=layout.context, context_rank=at.context)
        tokens, positions = (
            torch.from_numpy(x).to(self.groups.device) for x in (inputs.tokens, inputs.positions)
        )
        if store.capture_experts:
            self._router.start()
        hidden = model(tokens, positions, None)
        if store.capture_experts:
            store.routing.append(self._router.stop(self._router_numbers(store.sequences, microbatch)))
        return hidden, functools.partial(self._loss, store, microbatch, inputs)

    def _router_numbers(self, sequences: Sequence[TrainSequence], microbatch: Microbatch) -> np.ndarray:
        """Which input of the batch each row of this rank's routers is; under sequence parallelism it has a slice."""
        at, layout = self.groups.at, self._cfg.layout
        columns = zigzag(microbatch.length, layout.context, at.context)
        return input_numbers(sequences, microbatch, np.split(columns, layout.tensor)[at.tensor])

    def _loss(
        self, store: _Store, microbatch: Microbatch, inputs: Inputs, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        """This microbatch's share of the loss, on the last stage.

        The three-value form with calculate_per_token_loss makes Megatron neither multiply nor divide: see
        `_sum_gradients`.
        """
        from megatron_vespo.trainer.logprobs import token_logp
        from megatron_vespo.trainer.model import head_weight

        at, label, row = (
            torch.from_numpy(x).to(hidden.device) for x in (inputs.at, inputs.label, inputs.row)
        )
        logp, entropy = token_logp(hidden, head_weight(self.model), at, label, self._head)
        loss = logp.double().sum() * 0  # scoring: nothing to differentiate
        c, log_w = torch.zeros(0), torch.zeros(0)
        if store.train:
            log_ratio = _log_ratio(logp, inputs.behavior_logp)
            log_w = self._sequence_sums(log_ratio, row, len(microbatch.rows))
            loss, c = self._policy_loss(
                store, microbatch, logp, Ratios(log_ratio_S=log_ratio, log_w_N=log_w, seq_S=row)
            )
        store.note_problems(microbatch, inputs, logp.detach(), log_w, loss.detach())
        if self.groups.at.tensor == 0:  # the other tensor ranks computed the same
            store.tokens.append(
                (inputs.token, *(x.detach().double().cpu().numpy() for x in (logp, entropy, c)))
            )
            store.sequences_done.append(_known(microbatch, log_w))
            store.loss += float(loss.detach())
        return loss, torch.tensor(0, dtype=torch.int), {}

    def _sequence_sums(self, log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
        """[b] float64 log W of each row, complete: other context ranks hold other tokens of the same response.

        The numbers are detached, so that no collective is differentiated; tensor ranks hold equal ones.
        """
        log_w = log_ratio.new_zeros(num_rows).index_add_(0, row, log_ratio)
        if self._cfg.layout.context > 1:
            dist.all_reduce(log_w, group=self.groups.context)
        return log_w

    def _policy_loss(
        self, store: _Store, microbatch: Microbatch, logp: Tensor, ratios: Ratios
    ) -> tuple[Tensor, Tensor]:
        def per_row(values: Mapping[int, float]) -> Tensor:
            return torch.tensor(
                [values.get(i, 0.0) for i in microbatch.rows], dtype=torch.float64, device=logp.device
            )

        advantage = per_row({i: store.sequences[i].advantage for i in microbatch.rows if i != DUMMY})
        weight = per_row({i: float(store.weight[i]) for i in microbatch.rows if i != DUMMY})
        c = coefficient(self._algorithm, ratios, advantage)
        return policy_loss(logp.double(), c, advantage[ratios.seq_S], weight[ratios.seq_S]), c

    def _update(self, step_number: int) -> float:
        """Clip and apply the gradients; they are checked between the two."""
        norm_of = type(self._optimizer).get_grad_norm
        checked: list[float] = []

        def checked_norm() -> float:
            norm = float(norm_of(self._optimizer))  # the same on every rank, so all of them stop here
            checked.append(norm)
            if not np.isfinite(norm):
                raise RunError(
                    f"gradient norm = {norm} at step {step_number} (found by {self.groups.name}): must be finite; no weight "
                    "was changed; resume from a checkpoint with a smaller learning rate"
                )
            self._torn = True
            return norm

        self._optimizer.get_grad_norm = checked_norm
        self._optimizer.step()
        self._torn = False
        assert checked, "megatron's optimizer no longer asks for the norm before it steps: adapt _update"
        return checked[-1]

    def _stop_if_not_finite(self, store: _Store, step_number: int | None) -> None:
        """Ranks that found nothing must stop too, or they wait for ever in the next collective."""
        num, world_size = len(store.sequences), self._cfg.layout.world_size
        code = -1
        if store.problem is not None:
            depth, index = store.problem  # the deepest cause has the highest code, whatever the rank
            code = (depth * world_size + self.groups.rank) * num + index
        found = torch.tensor(code, dtype=torch.int64, device=self.groups.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found >= 0:
            (depth, rank), index = divmod(int(found) // num, world_size), int(found) % num
            when = "found while scoring" if step_number is None else f"at step {step_number}"
            unharmed = "" if step_number is None else "no weight was changed; "
            raise RunError(
                f"sequence {store.sequences[index].uid}: its {PROBLEMS[depth]} is not finite, {when} on "
                f"{rank_name(self._cfg.layout, rank)}; {unharmed}resume from a checkpoint, with a smaller "
                "learning rate where it happens again"
            )

    # -------------------------------------------------------------------------------------------- weights

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank must exhaust it; rank 0 alone gets (Hugging Face name, whole tensor)."""
        return self._export.run()

    def save_hf(self, directory: Path) -> None:
        """Collective: write the current weights as a new Hugging Face directory."""
        from megatron_vespo.trainer.hf_weights import save_hf

        save_hf(self._export, self._source, directory, rank=self.groups.rank)

    def begin_save(self, directory: Path) -> None:
        """Copy this rank's state to host memory; it is written in the background (see rank_checkpoint)."""
        self._checkpoint.begin_save(directory)

    def written(self, directory: Path) -> Written | None:
        """This rank's part of the checkpoint, when it is on disk; None before."""
        return self._checkpoint.written(directory)

    def commit(
        self, directory: Path, step_number: int, state: Mapping[str, Any], files: Sequence[Written]
    ) -> None:
        """On one rank: make what all ranks have written a checkpoint after `step_number` steps.

        Args:
            state: whatever else the caller must remember, as JSON values.
        """
        self._checkpoint.commit(directory, step_number, state, files)

    def load(self, directory: Path) -> tuple[int, dict[str, Any]]:
        """Collective: continue from a checkpoint of any layout; gives its step number and the caller's state."""
        step_number, state = self._checkpoint.load(directory)
        self._num_steps = step_number
        return step_number, state

    def close(self) -> None:
        """Leave the other ranks."""
        destroy_process_groups()

    @functools.cached_property
    def _checkpoint(self) -> RankCheckpoint:
        from megatron_vespo.trainer.hf_weights import described

        parameters = described(self.model, self.shape, self.groups)
        return RankCheckpoint(parameters, self._optimizer, self.shape, self.groups, dtype=self._cfg.dtype)


@dataclass
class _Store:
    """What one pass over the microbatches collects on this rank."""

    sequences: Sequence[TrainSequence]
    weight: np.ndarray
    """[B] weight of every token of a sequence: 1 / the global denominator."""
    train: bool
    capture_experts: bool
    tokens: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    sequences_done: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    routing: list[RouterRows] = field(default_factory=list)
    loss: float = 0.0
    problem: tuple[int, int] | None = None
    """The deepest non-finite number: its place in PROBLEMS, and the index of its sequence."""

    def note_problems(
        self, microbatch: Microbatch, inputs: Inputs, logp: Tensor, log_w: Tensor, loss: Tensor
    ) -> None:
        """Remember non-finite numbers; the pass goes on, because other ranks are in the middle of it."""
        if len(bad := _not_finite(logp)):
            self._note("log-prob", microbatch.rows[inputs.row[bad[0]]])
        elif len(bad := _not_finite(log_w)):  # a log-prob of another context rank
            self._note("log W", microbatch.rows[bad[0]])
        elif len(_not_finite(loss[None])):  # an advantage has overflowed it
            real = [i for i in microbatch.rows if i != DUMMY]
            self._note("loss", max(real, key=lambda i: abs(self.sequences[i].advantage)))

    def _note(self, what: str, sequence: int) -> None:
        depth = PROBLEMS.index(what)
        if self.problem is None or depth > self.problem[0]:
            self.problem = depth, sequence

    def output(
        self, time_s: dict[str, float], *, grad_norm: float = 0.0, learning_rate: float = 0.0
    ) -> RankOutput:
        token, logp, entropy, c = _columns(self.tokens, 4)
        sequence, log_w = _columns(self.sequences_done, 2)
        return RankOutput(
            token=token.astype(np.int64),
            logp=logp.astype(np.float32),
            entropy=entropy.astype(np.float32),
            coefficient=c,
            sequence=sequence.astype(np.int64),
            log_w=log_w,
            routing=tuple(self.routing),
            loss=self.loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            time_s=time_s,
        )


class _RouterCapture:
    """Reads which experts this stage's routers choose, between `start` and `stop` (so not during recomputation)."""

    def __init__(self, model: torch.nn.Module, layers: range) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        for router in routers:
            router.register_forward_hook(self._note)
        self.num_layers = len(routers)
        self._layers = np.array(layers, np.int32)
        self._chosen: list[Tensor] | None = None

    def start(self) -> None:
        self._chosen = []

    def stop(self, number: np.ndarray) -> RouterRows:
        """The chosen experts of the rows that `number` does not mark as padding (-1)."""
        assert self._chosen is not None and len(self._chosen) == self.num_layers
        experts = torch.stack(self._chosen, 1).to(torch.int16).cpu().numpy()
        self._chosen = None
        assert len(experts) == len(number), "router rows and the packing plan disagree"
        return RouterRows(number=number[number >= 0], layers=self._layers, experts=experts[number >= 0])

    def _note(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._chosen is not None:
            routing_map = output[1]  # [rows, experts], True where chosen
            self._chosen.append(routing_map.nonzero()[:, 1].view(len(routing_map), -1))


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
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


def _with_optimizer(model: Any, cfg: TrainerConfig) -> tuple[Any, Any]:
    """The model in Megatron's gradient buffers, and Adam on them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=cfg.optimizer.distributed
        ),
        model,
    )
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.optimizer.learning_rate,
        weight_decay=cfg.optimizer.weight_decay,
        adam_beta1=cfg.optimizer.betas[0],
        adam_beta2=cfg.optimizer.betas[1],
        adam_eps=cfg.optimizer.eps,
        clip_grad=cfg.optimizer.clip_grad_norm,
        bf16=cfg.dtype == "bfloat16",
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=cfg.optimizer.distributed,
    )
    # The overrides exempt vectors (norms) from weight decay; 0.16 does so only when they are given.
    overrides = get_standard_config_overrides(config)
    return ddp, get_megatron_optimizer(config, [ddp], overrides, use_gloo_process_groups=False)


def _set_learning_rate(optimizer: Any, cfg: OptimizerConfig, step_number: int) -> float:
    """Linear warm-up from 0, then constant."""
    share = min(1.0, (step_number + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = cfg.learning_rate * share
    return cfg.learning_rate * share


def _log_ratio(logp: Tensor, behavior_logp: np.ndarray) -> Tensor:
    """[S] float64, detached: policy - behavior; 0 where there is no behavior (nan)."""
    behavior = torch.from_numpy(behavior_logp).to(logp.device).double()
    return torch.where(behavior.isnan(), 0.0, logp.detach().double() - behavior)


def _not_finite(values: Tensor) -> np.ndarray:
    return np.flatnonzero(~torch.isfinite(values).cpu().numpy())


def _known(microbatch: Microbatch, log_w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of a microbatch and their log W, without dummies; no log W after scoring."""
    rows = np.array(microbatch.rows, np.int64)
    return rows[rows != DUMMY], log_w.cpu().numpy()[rows != DUMMY] if len(log_w) else np.zeros(0)


def _check_batch(sequences: Sequence[TrainSequence], vocab_size: int) -> None:
    """What would otherwise surface as a wrong number or a hang deep inside."""
    if not sequences:
        raise RunError("batch = []: expected at least one sequence; check the data")
    for s in sequences:
        if not 1 <= s.num_prompt_tokens < len(s.token_ids):
            raise RunError(
                f"sequence {s.uid}: {s.num_prompt_tokens} prompt tokens of {len(s.token_ids)}, expected at least one prompt "
                "and one response token; check the data"
            )
        if s.token_ids.min() < 0 or s.token_ids.max() >= vocab_size:
            raise RunError(
                f"sequence {s.uid}: token {s.token_ids.max()}, expected 0 .. {vocab_size - 1}; tokenizer and model disagree"
            )
        if not np.isfinite(s.advantage):
            raise RunError(f"sequence {s.uid}: advantage = {s.advantage}, must be finite; check the rewards")
        _check_behavior(s)


def _check_behavior(s: TrainSequence) -> None:
    if s.behavior_logp is None:
        return
    if len(s.behavior_logp) != s.num_response_tokens or not np.isfinite(s.behavior_logp).all():
        raise RunError(
            f"sequence {s.uid}: behavior_logp must hold {s.num_response_tokens} finite numbers, one for each response "
            f"token, and holds {len(s.behavior_logp)} ({int(np.isfinite(s.behavior_logp).sum())} finite); check the engine"
        )


def _columns(rows: list[tuple[np.ndarray, ...]], num: int) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate([row[i] for row in rows]) if rows else np.zeros(0) for i in range(num))
