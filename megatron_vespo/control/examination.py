"""What the examined sequences of one step tell: their columns of an evidence file, and the live metrics of causes.

The offline report (diagnose/) computes all that evidence allows; this is the part that stands in metrics.jsonl, under
the same names.

Shape key:  S sampled tokens of all cases, R rows (processed tokens), L layers, K experts per token.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.algo.decomposition import Passes, decompose, floor_verdict, routing_verdict
from megatron_vespo.algo.mismatch import finite_only, token_gap
from megatron_vespo.algo.routers import MarginCurve, RouterGap, cascade, expert_overlap
from megatron_vespo.config import TrainConfig
from megatron_vespo.evidence import Facts, write_evidence
from megatron_vespo.rundir import RunDirectory, step_file
from megatron_vespo.trainer.hf_config import ModelShape
from megatron_vespo.types import Examined, Experts, Floats, Ints, Mask, Rollout, Scored

Column = Callable[["Case"], Floats | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examined sequence, and all that was said about it."""

    rollout: Rollout
    examined: Examined
    policy: Scored
    """Of the step that trained on it."""
    engine: Scored | None
    """Of the re-scoring pass; None where no engine served."""
    train_version: int

    @property
    def gap(self) -> Ints:
        """[T] versions that each token is older than the weights it trains."""
        return self.train_version - self.rollout.response.versions

    @property
    def sampled(self) -> Mask:
        """[T]"""
        sampled = self.rollout.response.sampled
        return np.ones(len(self.rollout.response.token_ids), np.bool_) if sampled is None else sampled

    @property
    def first_row(self) -> int:
        """The row on which the first response token's log-prob hangs."""
        return len(self.rollout.prompt.token_ids) - 1

    @property
    def is_fresh(self) -> bool:
        """Whether the weights that are trained sampled all of it: only then its experts belong to them."""
        return not self.gap.any()

    @property
    def behavior_experts(self) -> Experts | None:
        return self.rollout.response.experts

    def columns(self) -> dict[str, Any]:
        """Of an evidence file, over those of a rollout file."""
        return {
            **trainer_columns(self.examined),
            "behavior_experts": self.behavior_experts,
            "engine_experts": None if self.engine is None else self.engine.experts,
        }


def trainer_columns(examined: Examined) -> dict[str, Any]:
    """What the trainer's passes say of one sequence, by column of an evidence file."""
    natural, replayed = examined.natural, examined.replayed
    return {
        "natural_logp": natural.logp,
        "repeat_logp": examined.repeat,
        "replayed_logp": None if replayed is None else replayed.logp,
        "entropy": natural.entropy,
        "natural_experts": natural.experts,
        "shadow_experts": None if replayed is None else replayed.experts,
        "margin": examined.margin,
    }


def facts_of(cfg: TrainConfig, shape: ModelShape, run: RunDirectory) -> Facts:
    """What is the same for all evidence files of a run."""
    return Facts(
        model=str(cfg.model),
        num_experts=shape.num_experts,
        temperature=cfg.sampling.temperature,
        router_replay=cfg.trainer.router_replay,
        trainer_dtype=cfg.trainer.dtype,
        engine_dtype=cfg.rollout.dtype,
        versions=json.loads(run.environment.read_text())["versions"],
    )


def write_cases(folder: Path, rows: Sequence[dict[str, Any]], cases: Sequence[Case], facts: Facts) -> Path:
    """Write the evidence file of one step.

    Args:
        rows: of the cases in the step's rollout file.
    """
    whole = [row | case.columns() for row, case in zip(rows, cases, strict=True)]
    return write_evidence(step_file(folder, rows[0]["step"]), whole, facts)


def case_metrics(cases: Sequence[Case], facts: Facts) -> dict[str, float]:
    """The live metrics of causes; names and definitions are those of diagnose/examination.py, and

    cause/engine_... holds the router's part too for sequences that older weights sampled, unless the trainer repeats their experts
    cause/routing_r, router/free, router/local      of sequences that the trainer's weights sampled
    router/replayed_tokens          sampled tokens in whose row the trainer's own experts are not those that it replayed
    router/replay_effect_max_nats   largest change of their log-prob by the replay
    """
    engine = [case for case in cases if case.engine is not None]
    return {
        **_causes(engine or cases, facts),
        **_verdicts(cases, engine),
        **_same_weights_routers(engine, facts),
        **_replay([case for case in cases if case.examined.replayed is not None], facts),
    }


def _causes(cases: Sequence[Case], facts: Facts) -> dict[str, float]:
    """Parts of policy - behavior, which add up."""
    known = [case for case in cases if case.examined.replayed is not None] or cases
    passes = Passes(
        behavior=_tokens(known, _behavior),
        engine=_tokens_or_none(known, _engine),
        replayed=_tokens_or_none(known, _replayed if facts.router_replay == "engine" else _replayed_if_fresh),
        natural=_tokens(known, _natural),
        policy=_tokens(known, lambda case: case.policy.logp),
        version_gap=_gaps(known),
        is_replayed=facts.router_replay == "engine",
    )
    parts = decompose(passes)
    sequence = np.repeat(np.arange(len(known)), [int(case.sampled.sum()) for case in known])
    whole = parts.by_sequence(sequence.astype(np.int32), len(known))
    numbers = {"nats": parts.means(), "share": parts.shares(), "seq_share": whole.shares()}
    return {f"cause/{part}_{name}": value for name, of in numbers.items() for part, value in of.items()}


def _verdicts(cases: Sequence[Case], engine: Sequence[Case]) -> dict[str, float]:
    """The routing share R, of fresh sequences, and the floor quotient Z."""
    found: dict[str, float | None] = {}
    if fresh := [case for case in cases if case.is_fresh and case.examined.replayed is not None]:
        a, b, m = (_tokens(fresh, column) for column in (_natural, _replayed, _behavior))
        found["cause/routing_r"] = routing_verdict(a, b, m)
    floor = token_gap(_tokens(cases, _natural), _tokens(cases, lambda case: case.examined.repeat))
    found["floor/k3_nats"] = floor["k3_nats"]
    found["floor/abs_mean_nats"] = floor["abs_mean_nats"]
    if engine:
        natural = token_gap(_tokens(engine, _natural), _tokens(engine, _engine))
        found["natural/k3_nats"] = natural["k3_nats"]
        found["cause/floor_z"] = floor_verdict(natural["k3_nats"], floor["k3_nats"])
    return finite_only(found)


def _same_weights_routers(cases: Sequence[Case], facts: Facts) -> dict[str, float]:
    """The trainer's free choices against those of the engine's prefill."""
    pairs = [
        (case.examined.natural.experts, case.engine.experts, case.examined.margin)
        for case in cases
        if case.engine is not None and case.engine.experts is not None
    ]
    known = [
        (ours, theirs, margin) for ours, theirs, margin in pairs if ours is not None and margin is not None
    ]
    if not known:
        return {}
    ours, theirs, margin = (np.concatenate(column) for column in zip(*known, strict=True))
    found = RouterGap.of(ours, theirs, facts.num_experts).statistics()
    curve = MarginCurve.of(margin, expert_overlap(ours, theirs) < 1)
    return {f"router/{name}": value for name, value in (found | curve.statistics()).items()}


def _replay(cases: Sequence[Case], facts: Facts) -> dict[str, float]:
    """Flips that the trainer makes by itself against those that follow from earlier layers, and what replaying does."""
    gaps = list[tuple[RouterGap, RouterGap]]()
    effects = [np.zeros(0, np.float32)]
    for case in cases:
        natural, replayed, behavior = case.examined.natural, case.examined.replayed, case.behavior_experts
        assert replayed is not None and replayed.experts is not None and natural.experts is not None
        assert behavior is not None, "there is nothing to replay without"
        if case.is_fresh:
            free, local = (
                RouterGap.of(ours, behavior, facts.num_experts)
                for ours in (natural.experts, replayed.experts)
            )
            gaps.append((free, local))
        flips = (expert_overlap(natural.experts[case.first_row :], behavior[case.first_row :]) < 1).any(-1)
        effects.append(np.abs(replayed.logp - natural.logp)[flips & case.sampled])
    effect = np.concatenate(effects)
    found: dict[str, float] = {"router/replayed_tokens": float(len(effect))} if cases else {}
    if len(effect):
        found["router/replay_effect_max_nats"] = float(effect.max())
    if gaps:
        free, local = (functools.reduce(operator.add, column) for column in zip(*gaps, strict=True))
        found |= {f"router/{name}": value for name, value in cascade(free, local)[0].items()}
    return found


def _behavior(case: Case) -> Floats:
    return case.rollout.response.behavior_logp


def _natural(case: Case) -> Floats:
    return case.examined.natural.logp


def _engine(case: Case) -> Floats | None:
    return None if case.engine is None else case.engine.logp


def _replayed(case: Case) -> Floats | None:
    return None if case.examined.replayed is None else case.examined.replayed.logp


def _replayed_if_fresh(case: Case) -> Floats | None:
    """Experts of older weights do not tell router from engine: the two stay together, in the engine's part."""
    return _replayed(case) if case.is_fresh or case.examined.replayed is None else _natural(case)


def _gaps(cases: Sequence[Case]) -> Ints:
    """[S]"""
    return np.concatenate([case.gap[case.sampled] for case in cases] or [np.zeros(0, np.int32)])


def _tokens_or_none(cases: Sequence[Case], column: Column) -> Floats | None:
    """[S], or None where a case lacks the column: those that have it were chosen before, if there are any."""
    values = [(column(case), case.sampled) for case in cases]
    known = [value[sampled] for value, sampled in values if value is not None]
    return np.concatenate(known) if len(known) == len(cases) else None


def _tokens(cases: Sequence[Case], column: Column) -> Floats:
    """[S] of cases that all have the column."""
    values = _tokens_or_none(cases, column)
    assert values is not None
    return values
