"""One pass of this rank's microbatches through Megatron's schedule: log-probs, losses, gradients, expert choices.

Megatron is imported inside functions: `cpu.install()` must come first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.algo.coefficients import Ratios, coefficient
from megatron_vespo.algo.loss import kl_penalty, policy_loss
from megatron_vespo.config import AlgorithmConfig, TrainerConfig
from megatron_vespo.trainer.layout import Groups, rank_name
from megatron_vespo.trainer.outputs import RouterRows
from megatron_vespo.trainer.packing import Inputs, Microbatch, cut, input_numbers, input_offsets
from megatron_vespo.trainer.shaping import Shaped, shape
from megatron_vespo.types import Doubles, Experts, Mask, RunError, TrainSequence

PROBLEMS = ("loss", "log W", "log-prob", "row of expert choices")
"""Numbers that are checked, each the cause of those before it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass does, the same on every rank but for the microbatches."""

    sequences: Sequence[TrainSequence]
    """The whole batch."""
    share: slice
    """The sequences of this pass."""
    microbatches: Sequence[Microbatch]
    """This data rank's."""
    num_packed: int
    """Packed tokens of all data ranks together, padding included."""
    weight: Doubles
    """[B] weight of every trained token of a sequence: 1 / the global denominator of the update."""
    first_token: int
    """Number of the share's first response token in the batch (`response_offsets`)."""
    noise_variance: float = 0.0
    """sigma^2 of one token's behavior log-prob by the engine's arithmetic, nats^2."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a pass goes."""

    train: bool
    """Forward, loss and backward; else forward alone."""
    routed: Mask | None = None
    """[B] sequences for which the routers' own choices are part of the rank's output; None: for none."""
    measures_margins: bool = False
    """Whether the output also says by how much those choices were made."""
    keeps_experts: bool = False
    """Whether all choices stay on the device, for another pass to repeat."""
    replays_engine: bool = False
    """Whether the engine's expert choices are used (R3)."""
    replayed: Outcome | None = None
    """A pass over the same work whose expert choices are used (R2)."""
    start: Outcome | None = None
    """A pass over the same work under the weights at the start of the batch, where they are below pi in the ratios."""
    shaped: Shaped | None = None
    """Coefficients and advantages that were found beforehand."""
    kl_reference: Outcome | None = None
    """A pass over the same work under the weights of the KL penalty's model."""


@dataclass(kw_only=True)
class Outcome:
    """What one pass collected on this rank."""

    tokens: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """By microbatch, on the ranks that report: which response tokens of the batch, log-prob, entropy, top-k mass."""
    logp: dict[int, Tensor] = field(default_factory=dict)
    """By microbatch: [S] log-probs on this rank's device, detached."""
    routing: list[RouterRows] = field(default_factory=list)
    choices: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By (chunk, microbatch): [t, l, K], what the routers chose by themselves."""
    margins: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By (chunk, microbatch): [t, l] float16, by how much."""
    sums: Doubles
    """[3] loss, entropy, k3 of the reference, of trained tokens; summed over all ranks at the end."""
    log_w: Doubles
    """[B]; on every rank at the end; 0 outside of the pass."""
    coefficient: Doubles
    """[B], summed over the trained tokens of each sequence; on every rank at the end."""


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """What the training loss of one microbatch leaves, on this rank's device."""

    loss: Tensor
    log_w: Tensor
    """[n] complete."""
    coefficient: Tensor
    """[n] summed over the trained tokens that this context rank predicts."""
    kl: Tensor | None
    """Summed over those tokens."""


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """One microbatch on the last stage, on this rank's device: nothing is fetched before the pass is over."""

    sequences: tuple[int, ...]
    inputs: Inputs
    logp: Tensor
    entropy: Tensor
    top_k_mass: Tensor | None
    losses: _Losses | None


@dataclass
class _Pass:
    """One pass under way."""

    work: Work
    mode: Mode
    outcome: Outcome
    scores: dict[int, _Scores] = field(default_factory=dict)
    """By microbatch."""
    problem: tuple[int, int] | None = None
    """The deepest unusable number: its place in PROBLEMS, and the index of its sequence."""

    def note(self, what: str, sequence: int) -> None:
        """Remember a problem; the pass goes on, because other ranks are in the middle of it."""
        depth = PROBLEMS.index(what)
        if self.problem is None or depth > self.problem[0]:
            self.problem = depth, sequence

    def note_unusable(self, scores: _Scores) -> None:
        if len(bad := _not_finite(scores.logp)):
            self.note("log-prob", scores.sequences[scores.inputs.segment[bad[0]]])
        if scores.losses is None:
            return
        if len(bad := _not_finite(scores.losses.log_w)):  # a log-prob, here or on another context rank
            self.note("log W", scores.sequences[bad[0]])
        elif (
            len(_not_finite(scores.losses.loss[None])) and scores.sequences
        ):  # an advantage has overflowed it
            self.note("loss", max(scores.sequences, key=lambda i: abs(self.work.sequences[i].advantage)))


class Runner:
    """Everything that a pass needs besides its work."""

    def __init__(
        self,
        cfg: TrainerConfig,
        algorithm: AlgorithmConfig,
        groups: Groups,
        ddp_chunks: Sequence[Any],
        routing: Any,
        head: Any,
    ) -> None:
        """`routing` is a routing.Routing, or None for a dense model; `head` a logprobs.Head."""
        self._cfg, self._algorithm, self._groups = cfg, algorithm, groups
        self._ddp_chunks, self._routing, self._head = list(ddp_chunks), routing, head
        self._number_of_chunk = {id(ddp): number for number, ddp in enumerate(ddp_chunks)}
        self._aux_loss_coeff = cfg.moe_aux_loss_coeff
        if self._aux_loss_coeff:
            from megatron_vespo.trainer.routing import ranks_left_out_of_aux_loss

            self._aux_loss_coeff *= ranks_left_out_of_aux_loss(cfg.layout)

    def run(self, work: Work, mode: Mode, *, step_number: int | None = None) -> Outcome:
        """Forward, and in training backward, over all microbatches.

        Args:
            step_number: stands in errors.

        Raises:
            RunError: a log-prob, log W, the loss or an expert choice is unusable; on every rank.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        num = len(work.sequences)
        outcome = Outcome(sums=np.zeros(3), log_w=np.zeros(num), coefficient=np.zeros(num))
        one = _Pass(work, mode, outcome)
        iterators: list[Any] = [iter(enumerate(work.microbatches)) for _ in self._ddp_chunks]
        self._scale_aux_loss(work)
        try:
            with nullcontext() if mode.train else torch.no_grad():
                get_forward_backward_func()(
                    forward_step_func=functools.partial(self._forward, one),
                    data_iterator=iterators if len(iterators) > 1 else iterators[0],
                    model=self._ddp_chunks,
                    num_microbatches=len(work.microbatches),
                    seq_length=work.microbatches[0].length,
                    micro_batch_size=1,
                    forward_only=not mode.train,
                )
        finally:
            if self._routing:
                self._routing.clear()
        if mode.routed is not None:
            outcome.routing = [self._router_rows(one, *place) for place in outcome.choices]
        outcome.margins.clear()
        if not mode.keeps_experts:
            outcome.choices.clear()
        for index, scores in one.scores.items():
            one.note_unusable(scores)
            outcome.logp[index] = scores.logp
            if self._groups.at.tensor == 0:  # the other tensor ranks computed the same
                self._collect(outcome, scores)
        self._stop_if_unusable(one, step_number)
        self._sum_over_ranks(one)
        return outcome

    def _scale_aux_loss(self, work: Work) -> None:
        """Make the load-balancing loss that of one rank, averaged over tokens.

        Under calculate_per_token_loss Megatron sums it over tokens, and expects a division by all of them that
        `optimizer._sum_gradients` does not do.
        """
        if self._aux_loss_coeff:
            self._ddp_chunks[0].config.moe_aux_loss_coeff = self._aux_loss_coeff / work.num_packed

    def _forward(
        self, one: _Pass, microbatches: Iterator[tuple[int, Microbatch]], ddp: Any
    ) -> tuple[Tensor, Any]:
        """Megatron's forward_step: hidden states of one microbatch, and the closure that makes its loss."""
        from megatron_vespo.trainer.model import packed

        (index, microbatch), chunk = next(microbatches), self._number_of_chunk[id(ddp)]
        layout, device = self._cfg.layout, self._groups.device
        inputs = cut(one.work.sequences, microbatch, layout, context_rank=self._groups.at.context)
        routed = one.mode.routed
        reports = routed is not None and bool(routed[list(microbatch.sequences)].any())
        records, measures = reports or one.mode.keeps_experts, reports and one.mode.measures_margins
        if self._routing:
            choices = self._choices(one, index, microbatch, chunk)
            self._routing.begin(chunk, choices, records=records, measures=measures, train=one.mode.train)
        tokens, positions = (torch.from_numpy(x).to(device) for x in (inputs.tokens, inputs.positions))
        description = packed(inputs.cu_seqlens.tolist(), inputs.max_seqlen, layout.context, device)
        hidden = ddp(tokens, positions, None, packed_seq_params=description)
        if self._routing and records:
            one.outcome.choices[chunk, index] = self._routing.own_choices(chunk)
        if self._routing and measures:
            one.outcome.margins[chunk, index] = self._routing.margins(chunk)
        return hidden, functools.partial(self._loss, one, index, microbatch, inputs)

    def _choices(self, one: _Pass, index: int, microbatch: Microbatch, chunk: int) -> Tensor | None:
        """[t, l, K] int64: the expert choices to use, or None where the routers choose."""
        if one.mode.replayed is not None:
            return one.mode.replayed.choices[chunk, index].long()
        if not one.mode.replays_engine:
            return None
        numbers = self._router_numbers(one, microbatch)
        rows, bad = self._routing.rows(one.work.sequences, microbatch.sequences, numbers, chunk)
        if bad is not None:
            one.note("row of expert choices", bad)
        return torch.from_numpy(rows.view(np.int16)).to(self._groups.device).long()

    def _router_numbers(self, one: _Pass, microbatch: Microbatch) -> np.ndarray:
        """Which input of the batch each row of this rank's routers is; under sequence parallelism it has a slice."""
        at, layout = self._groups.at, self._cfg.layout
        whole = input_numbers(one.work.sequences, microbatch, layout, context_rank=at.context)
        return np.split(whole, layout.tensor)[at.tensor]

    def _router_rows(self, one: _Pass, chunk: int, index: int) -> RouterRows:
        """The recorded choices of one chunk and microbatch, for the sequences that are asked for."""
        number = self._router_numbers(one, one.work.microbatches[index])
        sequence = np.searchsorted(input_offsets(one.work.sequences), number, side="right") - 1
        assert one.mode.routed is not None
        is_wanted = (number >= 0) & one.mode.routed[sequence]
        margins = one.outcome.margins.get((chunk, index))
        return RouterRows(
            number=number[is_wanted],
            layers=self._routing.layers(chunk),
            experts=_unsigned(one.outcome.choices[chunk, index].cpu().numpy()[is_wanted]),
            margin=None if margins is None else margins.cpu().numpy()[is_wanted],
        )

    def _loss(
        self, one: _Pass, index: int, microbatch: Microbatch, inputs: Inputs, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        """This microbatch's share of the loss, on the last stage.

        The three-value form with calculate_per_token_loss makes Megatron neither multiply nor divide: see
        `optimizer._sum_gradients`.
        """
        from megatron_vespo.trainer.logprobs import token_stats
        from megatron_vespo.trainer.model import head_weight

        at, label = (torch.from_numpy(x).to(hidden.device) for x in (inputs.at, inputs.label))
        stats = token_stats(hidden, head_weight(self._ddp_chunks[-1].module), at, label, self._head)
        losses = None
        loss = stats.logp.double().sum() * 0  # scoring: nothing to differentiate
        if one.mode.train:
            loss, losses = self._training_loss(one, index, microbatch, inputs, stats.logp)
        one.scores[index] = _Scores(
            sequences=microbatch.sequences,
            inputs=inputs,
            logp=stats.logp.detach(),
            entropy=stats.entropy.detach(),
            top_k_mass=stats.top_k_mass,
            losses=losses,
        )
        return loss, torch.tensor(0, dtype=torch.int), {}

    def _training_loss(
        self, one: _Pass, index: int, microbatch: Microbatch, inputs: Inputs, logp: Tensor
    ) -> tuple[Tensor, _Losses]:
        """Of [S] log-probs; from here on there are only the [R] trained ones, so the others have no gradient."""
        chosen = list(microbatch.sequences)
        trained, segment = (
            torch.from_numpy(x).to(logp.device) for x in (inputs.trained, inputs.segment[inputs.trained])
        )
        logp = logp[trained].double()

        def on_device(values: Sequence[float] | np.ndarray) -> Tensor:
            return torch.tensor(np.asarray(values), dtype=torch.float64, device=logp.device)

        start = None if one.mode.start is None else one.mode.start.logp[index][trained].double()
        num_tokens = on_device([one.work.sequences[i].num_trained_tokens for i in chosen])
        ratios = self._ratios(one.work, inputs, logp.detach(), start, segment, num_tokens)
        if (shaped := one.mode.shaped) is not None:
            advantage = on_device(shaped.advantage[np.array(chosen, int) - one.work.share.start])
            c = on_device(shaped.coefficient[inputs.token[inputs.trained] - one.work.first_token])
        else:
            advantage = on_device([one.work.sequences[i].advantage for i in chosen])
            c = coefficient(self._algorithm, ratios, advantage)
        weight = on_device(one.work.weight[chosen])[segment]
        loss, kl = policy_loss(logp, c, advantage[segment], weight), None
        if one.mode.kl_reference is not None:
            kl = kl_penalty(logp, one.mode.kl_reference.logp[index][trained].double())
            loss = loss + self._algorithm.kl_coeff * (weight * kl).sum()
        losses = _Losses(
            loss=loss.detach(),
            log_w=ratios.log_w_N,
            coefficient=advantage.new_zeros(len(chosen)).index_add_(0, segment, c),
            kl=None if kl is None else kl.detach().sum(),
        )
        return loss, losses

    def _ratios(
        self,
        work: Work,
        inputs: Inputs,
        logp: Tensor,
        start: Tensor | None,
        segment: Tensor,
        num_tokens: Tensor,
    ) -> Ratios:
        """Of the [R] trained tokens: pi / behavior, or pi / start and then start / behavior apart from it."""
        behavior = torch.from_numpy(inputs.behavior_logp).to(logp)
        log_ratio = _difference(logp, behavior if start is None else start)
        log_rho = torch.zeros_like(log_ratio) if start is None else _difference(start, behavior)
        sums = log_ratio.new_zeros(len(num_tokens), 2)
        sums.index_add_(0, segment, torch.stack([log_ratio, log_rho], 1))
        if self._cfg.layout.context > 1:
            # Other context ranks hold other tokens of the same response.  The numbers are detached, so that no collective
            # is differentiated; tensor ranks hold equal ones.
            dist.all_reduce(sums, group=self._groups.context)
        return Ratios(
            log_ratio_S=log_ratio,
            log_w_N=sums[:, 0],
            num_tokens_N=num_tokens,
            seq_S=segment,
            log_rho_S=log_rho,
            log_rho_N=sums[:, 1],
            noise_variance=work.noise_variance,
        )

    def shaped(self, work: Work, survey: Outcome, start: Outcome | None) -> Shaped:
        """Collective: what the whole update trains with, from the log-probs of a pass under the weights before it.

        Args:
            start: as in `Mode`.
        """
        return shape(
            self._algorithm,
            work.sequences[work.share],
            self._everywhere(work, survey),
            None if start is None else self._everywhere(work, start),
            work.noise_variance,
        )

    def _everywhere(self, work: Work, outcome: Outcome) -> Doubles:
        """Collective: the pass's log-prob of every response token of its sequences, on every rank."""
        whole = np.zeros(sum(s.num_response_tokens for s in work.sequences[work.share]))
        for token, logp, *_ in outcome.tokens:  # on one rank alone for each token
            whole[token - work.first_token] = logp
        summed = torch.from_numpy(whole).to(self._groups.device)
        dist.all_reduce(summed)
        return summed.cpu().numpy()

    def _collect(self, outcome: Outcome, scores: _Scores) -> None:
        """Fetch the numbers of one microbatch."""
        mass = torch.zeros(0) if scores.top_k_mass is None else scores.top_k_mass
        logp, entropy, mass = (x.cpu().numpy() for x in (scores.logp, scores.entropy, mass))
        outcome.tokens.append((scores.inputs.token, logp, entropy, mass))
        outcome.sums[1] += entropy[scores.inputs.trained].sum(dtype=np.float64)
        if scores.losses is None:
            return
        losses, chosen = scores.losses, list(scores.sequences)
        outcome.sums[0] += float(losses.loss)
        outcome.sums[2] += 0.0 if losses.kl is None else float(losses.kl)
        outcome.coefficient[chosen] = losses.coefficient.cpu().numpy()
        if self._groups.at.context == 0:  # complete on every context rank
            outcome.log_w[chosen] = losses.log_w.cpu().numpy()

    def _sum_over_ranks(self, one: _Pass) -> None:
        """One all-reduce of the pass's sums, log W and coefficients: afterwards every rank and stage has them all."""
        share, outcome = one.work.share, one.outcome
        parts = (outcome.sums, outcome.log_w[share], outcome.coefficient[share])
        flat = torch.from_numpy(np.concatenate(parts)).to(self._groups.device)
        dist.all_reduce(flat)
        whole = flat.cpu().numpy()
        num = share.stop - share.start
        outcome.sums = whole[:3]
        outcome.log_w[share], outcome.coefficient[share] = whole[3 : 3 + num], whole[3 + num :]

    def _stop_if_unusable(self, one: _Pass, step_number: int | None) -> None:
        """Ranks that found nothing must stop too, or they wait for ever in the next collective."""
        num, world_size = len(one.work.sequences), self._cfg.layout.world_size
        code = -1
        if one.problem is not None:
            depth, index = one.problem  # the deepest cause has the highest code, whatever the rank
            code = (depth * world_size + self._groups.rank) * num + index
        found = torch.tensor(code, dtype=torch.int64, device=self._groups.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found < 0:
            return
        (depth, rank), index = divmod(int(found) // num, world_size), int(found) % num
        what, uid = PROBLEMS[depth], one.work.sequences[index].uid
        when = "found while scoring" if step_number is None else f"at step {step_number}"
        where = rank_name(self._cfg.layout, rank)
        unharmed = "" if step_number is None else "this update changed no weight; "
        if what == "row of expert choices":
            raise RunError(
                f"sequence {uid}: a {what} names one expert twice, {when} on {where}: each token has {what}s for every layer, "
                f"all different, and a row of zeros was never written by the engine; {unharmed}do not train on it, or set "
                "trainer.router_replay = 'off'"
            )
        raise RunError(
            f"sequence {uid}: its {what} is not finite, {when} on {where}; {unharmed}resume from a checkpoint, with a "
            "smaller learning rate where it happens again"
        )


def _unsigned(experts: np.ndarray) -> Experts:
    return experts.view(f"u{experts.itemsize}")


def _difference(logp: Tensor, reference: Tensor) -> Tensor:
    """[R] 0 where there is no reference (nan)."""
    return torch.where(reference.isnan(), 0.0, logp - reference)


def _not_finite(values: Tensor) -> np.ndarray:
    return np.flatnonzero(~torch.isfinite(values.detach()).cpu().numpy())
