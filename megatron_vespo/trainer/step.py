"""One rank of the trainer: what happens with one batch.

A `TrainerRank` knows nothing of Ray.  All ranks are told the same thing in lock step; each plans the same
microbatches and works on its own.

Megatron is imported inside functions: `cpu.install()` must come first, and a driver imports this module without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.algo.loss import token_weights
from megatron_vespo.algo.pace import is_spent, rate_factor
from megatron_vespo.config import AlgorithmConfig, TrainerConfig
from megatron_vespo.trainer import cpu
from megatron_vespo.trainer.checkpoint import Written
from megatron_vespo.trainer.forward_backward import Mode, Outcome, Runner, Work
from megatron_vespo.trainer.hf_config import read_model_shape
from megatron_vespo.trainer.layout import (
    Place,
    check_layout,
    destroy_process_groups,
    init_process_groups,
    layers_of_chunk,
)
from megatron_vespo.trainer.optimizer import Optimizer
from megatron_vespo.trainer.outputs import RankExamination, RankOutput
from megatron_vespo.trainer.packing import (
    Microbatch,
    crossover_tokens,
    padded_length,
    plan,
    response_offsets,
)
from megatron_vespo.trainer.phases import Phases
from megatron_vespo.trainer.rank_checkpoint import RankCheckpoint
from megatron_vespo.trainer.reference import Reference
from megatron_vespo.trainer.step_time import known_peak_flops, training_flops
from megatron_vespo.types import Doubles, Mask, RunError, TrainSequence, Update


class TrainerRank:
    """pi on one rank: its part of the weights and of their optimizer.

    Args:
        model: Hugging Face directory from which the weights are read.
        temperature: log-probs are those of softmax(logits / temperature), as the engine samples.
        updates_per_batch: optimizer updates that `step` takes on one batch.
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
        updates_per_batch: int = 1,
    ) -> None:
        cpu.install() if cfg.device == "cpu" else cpu.require_cuda()
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        from megatron_vespo.trainer.hf_weights import Export, load_hf
        from megatron_vespo.trainer.logprobs import Head
        from megatron_vespo.trainer.model import build_model, token_dispatcher

        self.shape = read_model_shape(model)
        check_layout(cfg.layout, self.shape)
        self._cfg, self._source, self._algorithm = cfg, model, algorithm
        self._num_steps, self._num_updates, self._updates_per_batch = 0, 0, updates_per_batch
        self._between_updates = False
        self._crossover = crossover_tokens(self.shape)
        # Pipeline stages receive activations of one shape, and ranks that gather each other's tokens equal parts.
        self._uniform = cfg.layout.pipeline > 1 or token_dispatcher(cfg) == "allgather"
        self._peak_flops_s = known_peak_flops(torch.cuda.get_device_name()) if cfg.device == "cuda" else None
        self.groups = init_process_groups(
            cfg.layout, place, device=cfg.device, timeout_s=cfg.collective_timeout_s
        )
        model_parallel_cuda_manual_seed(seed)
        self.chunks = [
            chunk.to(self.groups.device)
            for chunk in build_model(cfg, self.shape, stage=self.groups.at.pipeline)
        ]
        self._reference = None
        if algorithm.kl_coeff:
            source = algorithm.kl_reference or model
            self._reference = Reference(self.chunks, source, self.shape, self.groups)
        load_hf(self.chunks, model, self.shape, self.groups)
        self._optimizer = Optimizer(self.chunks, cfg, self.groups.name)
        self._export = Export(self.chunks, self.shape, self.groups)
        head = Head(
            group=self.groups.tensor,
            sequence_parallel=cfg.layout.tensor > 1,
            temperature=temperature,
            chunk_tokens=cfg.logprob_chunk_tokens,
            top_k=cfg.logprob_top_k,
        )
        self._runner = Runner(cfg, algorithm, self.groups, self._optimizer.ddp_chunks, self._routing(), head)

    def _routing(self) -> Any:
        from megatron_vespo.trainer.routing import Routing

        if not self.shape.num_experts:
            return None
        layers = [
            layers_of_chunk(self._cfg.layout, self.shape, self.groups.at.pipeline, chunk)
            for chunk in range(self._cfg.layout.virtual_pipeline)
        ]
        return Routing(self.chunks, layers, self.shape, recompute=self._cfg.recompute != "none")

    # ------------------------------------------------------------------------------------------- training

    def step(
        self,
        sequences: Sequence[TrainSequence],
        step_number: int,
        *,
        routed: Sequence[int] | None = None,
        noise_variance: float = 0.0,
    ) -> RankOutput:
        """The optimizer updates on one batch: each on an equal share of it, in order.

        Several updates, a proximal reference and methods that look at whole updates are preceded by a forward pass under
        the weights of the batch's start, whose log-probs and expert choices are what is reported (and replayed).

        Args:
            sequences: the batch of all ranks, the same on each.
            step_number: batches before this one; stands in errors.
            routed: places of the sequences for which the routers' choices are reported; None: for all.
            noise_variance: of one token's behavior log-prob by the engine's arithmetic, nats^2.

        Returns:
            This rank's share; `outputs.merge_step` puts all shares together.

        Raises:
            RunError: the batch is unusable, or a log-prob, a log W, the loss or the gradient is not finite; on every
                rank, and the update in which it happened has changed no weight.  Or an earlier update was torn.
        """
        _ = self.num_steps
        check_batch(sequences, self.shape.vocab_size)
        if self._cfg.router_replay == "engine":
            from megatron_vespo.trainer.routing import check_experts

            check_experts(sequences, self.shape)
        phases, reported = Phases(self.groups.device), _places(routed, len(sequences))
        works = self._works(sequences, noise_variance)
        before = self._before(works, step_number, phases, reported)
        kl_references: list[Outcome | None] = [None] * len(works)
        if self._reference is not None:
            self._optimizer.complete_weights()
            with phases("reference"), self._reference.in_place():
                kl_references = [self._runner.run(work, Mode(train=False)) for work in works]

        outcomes, updates = [], []
        for i, work in enumerate(works):
            mode = Mode(
                train=True,
                routed=reported if before[i] is None else None,
                start=before[i] if self._algorithm.reference == "proximal" else None,
                kl_reference=kl_references[i],
                **self._replay(before[i]),
            )
            if self._algorithm.needs_whole_update:
                with phases("survey"):
                    # The weights before the first update are those of the batch's start.
                    survey = before[i] if i == 0 else self._survey(work, before[i], step_number)
                    assert survey is not None
                    mode = dataclasses.replace(mode, shaped=self._runner.shaped(work, survey, mode.start))
            with phases("forward_backward"):
                self._optimizer.zero_grad()
                outcome = self._runner.run(work, mode, step_number=step_number)
            factor = rate_factor(self._algorithm, outcome.log_w[work.share])
            with phases("optimizer"):
                norm, rate = self._optimizer.update(self._num_updates, factor)
            self._num_updates += 1
            outcomes.append(outcome)
            updates.append(self._update(work, outcome, norm, rate))
            is_last = i + 1 == len(works) or is_spent(self._algorithm, self._coefficients(work, outcome))
            self._between_updates = not is_last
            if is_last:
                break
        self._num_steps += 1
        num_trained = works[len(updates) - 1].share.stop
        return RankOutput(
            **_shares([first for first in before if first is not None] or outcomes),
            log_w=np.sum([outcome.log_w for outcome in outcomes], 0)[:num_trained],
            coefficient=np.sum([outcome.coefficient for outcome in outcomes], 0)[:num_trained],
            updates=tuple(updates),
            time_s=phases.time_s,
            memory_bytes=phases.memory_bytes,
            model_flops=self._flops(sequences[:num_trained]),
            peak_flops_s=self._peak_flops_s,
        )

    def _before(
        self, works: Sequence[Work], step_number: int, phases: Phases, routed: Mask | None
    ) -> Sequence[Outcome | None]:
        """Of each update, a pass under the weights of the batch's start, where anything needs one."""
        if len(works) == 1 and not self._algorithm.needs_start:
            return [None]
        mode = Mode(
            train=False,
            routed=routed,
            keeps_experts=self._cfg.router_replay == "trainer",
            replays_engine=self._cfg.router_replay == "engine",
        )
        with phases("forward"):
            return [self._runner.run(work, mode, step_number=step_number) for work in works]

    def _replay(self, before: Outcome | None) -> dict[str, Any]:
        """Which expert choices an update repeats, as fields of a `Mode`."""
        replay = self._cfg.router_replay
        return {
            "replays_engine": replay == "engine",
            "replayed": before if replay == "trainer" else None,
        }

    def _survey(self, work: Work, before: Outcome | None, step_number: int) -> Outcome:
        """A pass under the weights before an update that is not the first."""
        mode = Mode(train=False, **self._replay(before))
        return self._runner.run(work, mode, step_number=step_number)

    def _coefficients(self, work: Work, outcome: Outcome) -> Doubles:
        """Mean over the trained tokens, of the update's sequences that have an advantage."""
        num_tokens = np.array([s.num_trained_tokens for s in work.sequences[work.share]])
        has_signal = np.array([s.advantage != 0 for s in work.sequences[work.share]])
        return (outcome.coefficient[work.share] / num_tokens)[has_signal]

    def score(self, sequences: Sequence[TrainSequence], *, routed: Sequence[int] | None = None) -> RankOutput:
        """Log-probs, entropies and experts of given sequences under the current weights; no gradient.

        Args:
            routed: as in `step`.

        Returns:
            This rank's share; `outputs.merge_scores` puts all shares together.

        Raises:
            RunError: the batch is unusable, or a log-prob is not finite; on every rank.
        """
        check_batch(sequences, self.shape.vocab_size)
        return self._pass("forward", sequences, Mode(train=False, routed=_places(routed, len(sequences))))

    def examine(self, sequences: Sequence[TrainSequence]) -> RankExamination:
        """Passes over given sequences that tell causes apart (`types.Examined`), under the current weights; no gradient.

        The repeat is packed as tightly as its longest sequence allows, so that kernels meet other shapes than in the
        first pass: its differences are those between one packing of a batch and another.

        Args:
            sequences: with the engine's experts where those are to be replayed; what cannot be is logged, and left out.

        Returns:
            This rank's share; `outputs.merge_examined` puts all shares together.

        Raises:
            RunError: the batch is unusable, or a log-prob is not finite; on every rank.
        """
        check_batch(sequences, self.shape.vocab_size)
        longest = max(padded_length(len(s.token_ids), self._cfg.layout) for s in sequences)
        places, replayed = tuple(self._replayable(sequences)), None
        free = Mode(train=False, routed=_places(None, len(sequences)), measures_margins=True)
        natural = self._pass("natural", sequences, free)
        repeat = self._pass("repeat", sequences, Mode(train=False), max_tokens=longest)
        if places:
            mode = Mode(train=False, routed=_places(None, len(places)), replays_engine=True)
            replayed = self._pass("replayed", [sequences[i] for i in places], mode)
        return RankExamination(natural=natural, repeat=repeat, replayed=replayed, replayable=places)

    def _replayable(self, sequences: Sequence[TrainSequence]) -> list[int]:
        if not self.shape.num_experts:
            return []
        from megatron_vespo.trainer.routing import replayable

        return replayable(sequences, self.shape)

    def _pass(
        self, phase: str, sequences: Sequence[TrainSequence], mode: Mode, *, max_tokens: int | None = None
    ) -> RankOutput:
        """One pass over all of them, as this rank's output."""
        phases = Phases(self.groups.device)
        with phases(phase):
            work = self._work(sequences, slice(0, len(sequences)), max_tokens=max_tokens)
            outcome = self._runner.run(work, mode)
        return RankOutput(**_shares([outcome]), time_s=phases.time_s, memory_bytes=phases.memory_bytes)

    @property
    def num_steps(self) -> int:
        """Batches whose updates are in the weights.

        Raises:
            RunError: an update failed half-way (out of memory, say), or between the updates on one batch: these
                weights are of no version.
        """
        if self._optimizer.torn or self._between_updates:
            raise RunError(
                f"weights of {self.groups.name} = part of the updates of step {self._num_steps}: of no version; "
                "resume from a checkpoint"
            )
        return self._num_steps

    def _works(self, sequences: Sequence[TrainSequence], noise_variance: float) -> list[Work]:
        """One for each update: equal shares of the batch, whose groups stand one after another."""
        num, parts = len(sequences), self._updates_per_batch
        if num % parts:
            raise RunError(
                f"batch = {num} sequences: cannot be divided into {parts} equal shares, one for each update "
                "(loop.updates_per_batch); change one of the two"
            )
        each = num // parts
        return [self._work(sequences, slice(i * each, (i + 1) * each), noise_variance) for i in range(parts)]

    def _work(
        self,
        sequences: Sequence[TrainSequence],
        share: slice,
        noise_variance: float = 0.0,
        *,
        max_tokens: int | None = None,
    ) -> Work:
        ranks = plan(
            sequences[share],
            self._cfg.layout,
            max_tokens=max_tokens or self._cfg.max_tokens_per_microbatch,
            uniform=self._uniform,
            crossover=self._crossover,
        )
        weight = np.zeros(len(sequences))
        num_trained = [s.num_trained_tokens for s in sequences[share]]
        weight[share] = token_weights(num_trained, self._algorithm.resolved_aggregation)
        return Work(
            sequences=sequences,
            share=share,
            microbatches=[
                Microbatch(tuple(i + share.start for i in mb.sequences), mb.length)
                for mb in ranks[self.groups.at.data]
            ],
            num_packed=sum(mb.length for rank in ranks for mb in rank),
            weight=weight,
            first_token=int(response_offsets(sequences)[share.start]),
            noise_variance=noise_variance,
        )

    def _update(self, work: Work, outcome: Outcome, norm: float, rate: float) -> Update:
        """The update in numbers, each a quotient of sums over all ranks."""
        share = work.sequences[work.share]
        num_tokens = sum(s.num_trained_tokens for s in share)
        num_inputs = sum(len(s.token_ids) - 1 for s in share)
        loss, entropy, kl = outcome.sums.tolist()
        return Update(
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            entropy=entropy / num_tokens,
            kl=kl / num_tokens if self._reference is not None else None,
            num_tokens=num_tokens,
            num_microbatches=len(work.microbatches),
            num_inputs=num_inputs,
            num_packed=work.num_packed,
        )

    def _flops(self, sequences: Sequence[TrainSequence]) -> float:
        num_inputs = np.array([len(s.token_ids) - 1 for s in sequences], np.float64)
        num_trained = sum(s.num_trained_tokens for s in sequences)
        return training_flops(self.shape, num_inputs.sum(), np.square(num_inputs).sum(), num_trained)

    # -------------------------------------------------------------------------------------------- weights

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: every rank must exhaust it; rank 0 alone gets (Hugging Face name, whole tensor)."""
        self._optimizer.complete_weights()
        return self._export.run()

    def save_hf(self, directory: Path) -> None:
        """Collective: write the current weights as a new Hugging Face directory."""
        from megatron_vespo.trainer.hf_weights import save_hf

        self._optimizer.complete_weights()
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
        loaded = self._checkpoint.load(directory)
        # Updates, not steps, set the learning rate: their number on a batch may change where a run resumes.
        self._num_steps, self._num_updates = loaded.step, loaded.num_updates
        self._between_updates = self._optimizer.torn = False
        return loaded.step, loaded.state

    def load_megatron(self, directory: Path) -> None:
        """Collective: the weights of a distributed checkpoint of Megatron-Core; training begins anew from them.

        Raises:
            RunError: it cannot be read as this model's; the weights are then of no step.
        """
        from megatron_vespo.trainer.megatron_files import load_megatron

        load_megatron(self.chunks, directory)
        self._optimizer.megatron.reload_model_params()

    @functools.cached_property
    def _checkpoint(self) -> RankCheckpoint:
        from megatron_vespo.trainer.hf_weights import described

        parameters = described(self.chunks, self.shape, self.groups)
        return RankCheckpoint(
            parameters, self._optimizer.megatron, self.shape, self.groups, dtype=self._cfg.dtype
        )

    def close(self) -> None:
        """Leave the other ranks; the process may join a new grid when this object is gone."""
        if "_checkpoint" in self.__dict__:
            self._checkpoint.close()
        self._optimizer.close()
        destroy_process_groups()


def _places(chosen: Sequence[int] | None, num: int) -> Mask | None:
    """[num] whether each place is among the chosen ones (None: all are); None where there are none."""
    mask = np.full(num, chosen is None)
    mask[list(chosen or ())] = True
    return mask if mask.any() else None


def check_batch(sequences: Sequence[TrainSequence], vocab_size: int) -> None:
    """Refuse what would otherwise surface as a wrong number or a hang deep inside.

    Raises:
        RunError: naming the sequence and what is wrong with it.
    """
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
        _check_mask(s)
        _check_behavior(s)


def _check_mask(s: TrainSequence) -> None:
    if s.sampled is None:
        return
    if s.sampled.shape != (s.num_response_tokens,) or s.sampled.dtype != np.bool_:
        raise RunError(
            f"sequence {s.uid}: sampled must hold {s.num_response_tokens} booleans, one for each response token, and holds "
            f"{s.sampled.dtype} of shape {list(s.sampled.shape)}; check how its turns were joined"
        )
    if not s.num_trained_tokens:
        raise RunError(
            f"sequence {s.uid}: none of its {s.num_response_tokens} response tokens was sampled, so there is nothing to "
            "train on; leave it out of the batch"
        )


def _check_behavior(s: TrainSequence) -> None:
    if s.behavior_logp is None:
        return
    if len(s.behavior_logp) == s.num_response_tokens:
        sampled = s.behavior_logp if s.sampled is None else s.behavior_logp[s.sampled]
        if np.isfinite(sampled).all():
            return
    raise RunError(
        f"sequence {s.uid}: behavior_logp must hold {s.num_response_tokens} finite numbers, one for each response "
        f"token, and holds {len(s.behavior_logp)} ({int(np.isfinite(s.behavior_logp).sum())} finite); check the engine"
    )


def _shares(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What this rank knows of tokens and expert choices, from passes over different sequences."""
    columns = list(zip(*(row for outcome in outcomes for row in outcome.tokens), strict=True))
    token, logp, entropy, mass = (
        (np.concatenate(column) for column in columns) if columns else [np.zeros(0)] * 4
    )
    return {
        "token": token.astype(np.int64),
        "logp": logp.astype(np.float32),
        "entropy": entropy.astype(np.float32),
        "top_k_mass": mass.astype(np.float32),
        "routing": tuple(rows for outcome in outcomes for rows in outcome.routing),
    }
