"""The doctor: evidence in, verdicts out, as text, as JSON and as a page.

Each axis has one finding: its worst number, with bounds, their source and the next step.  Causes (causes.py) say why.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vespo.algo.norms import NORMS, Condition, level
from megatron_vespo.diagnose.aligned import Aligned
from megatron_vespo.diagnose.causes import Cause, diagnose
from megatron_vespo.diagnose.examination import Examination, examine
from megatron_vespo.diagnose.examined_experts import structure
from megatron_vespo.evidence import Evidence, read_evidence

Verdict = Literal["broken", "warn", "insufficient", "healthy", "unknown"]
WORST_FIRST: tuple[Verdict, ...] = ("broken", "warn", "insufficient", "healthy", "unknown")
EXIT_STATUS: Mapping[Verdict, int] = {"healthy": 0, "unknown": 0, "warn": 1, "broken": 2, "insufficient": 3}
LEAST_SEQUENCES, LEAST_TOKENS = 16, 2000
"""Below either there is no verdict but on the record and on failures that are found all the same."""
WANTED_TOKENS = 16_384
"""Below it k3 is known to 5 % at best."""
_WIDTH = 100

AXES: Mapping[str, tuple[str, ...]] = {
    "structure": tuple(name for name in NORMS if name.startswith("structure/")),
    "semantics": ("semantics/bf16_behavior_fraction",),
    "engine": (
        "mismatch/k3_nats", "mismatch/abs_mean_nats", "mismatch/k1_nats", "mismatch/mult_err", "mismatch/prob_abs_mean",
        "mismatch/pearson", "mismatch/f_2", "mismatch/ess_token", "mismatch/seq_outlier_fraction",
    ),
    "routing": ("router/mismatch", "router/overlap", "router/local", "router/zero_overlap_fraction"),
    "staleness": ("total/phi_pos_mean",),
    "sequence budget": ("mismatch/seq_budget_nats",),
}  # fmt: skip
_MISSING = {
    "structure": "no structure could be tested",
    "semantics": "no log-probs of the engine",
    "engine": "no token was scored by both engines under the same weights",
    "routing": "the experts of both engines are not recorded, or the model is dense",
    "staleness": "no log-probs of the engine",
    "sequence budget": "no token was scored by both engines under the same weights",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One axis, judged by its worst number."""

    axis: str
    level: Verdict
    text: str
    metric: str = ""
    """The number that decided; empty where there is none."""
    value: float | None = None
    interval: tuple[float, float] | None = None
    """95 %, by drawing whole sequences anew."""
    bounds: tuple[float, float] | None = None
    source: str = ""
    next_step: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that is known of one body of evidence."""

    evidence: Evidence
    examination: Examination
    causes: Sequence[Cause]
    findings: Sequence[Finding]
    """Worst first."""
    remarks: Sequence[str]

    @property
    def level(self) -> Verdict:
        """The worst of all; a failure that was found breaks a run, whatever the levels and however little there is."""
        if any(cause.is_failure for cause in self.causes):
            return "broken"
        worst: Verdict = min((finding.level for finding in self.findings), key=_severity)
        return worst if worst == "broken" or is_enough(self.examination) else "insufficient"


def _severity(verdict: Verdict) -> int:
    """The smaller the worse."""
    return WORST_FIRST.index(verdict)


def judge(evidence: Evidence) -> Diagnosis:
    """Examine the evidence and say what the numbers mean."""
    examined = examine(evidence)
    condition, remarks = _condition(evidence), _remarks(examined)
    enough = is_enough(examined)
    findings = [_finding(axis, examined, condition, enough) for axis in AXES]
    return Diagnosis(
        evidence=evidence,
        examination=examined,
        causes=diagnose(evidence, examined),
        findings=sorted(findings, key=lambda finding: _severity(finding.level)),
        remarks=remarks,
    )


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis for a terminal."""
    metrics = diagnosis.examination.metrics
    lines = [
        f"{diagnosis.evidence.name}: {diagnosis.level}",
        f"  {metrics['data/num_tokens']:,.0f} sampled tokens in {metrics['data/num_sequences']:,.0f} sequences, "
        f"{metrics.get('data/num_routed_sequences', 0):,.0f} of them with experts",
        *(f"  {remark}" for remark in diagnosis.remarks),
        "",
    ]
    for number, cause in enumerate(diagnosis.causes, start=1):
        word = "cause" if cause.is_failure else "explanation"
        lines += [
            *_wrapped(f"{word} {number}: {cause.text}", "  "),
            *_wrapped(f"-> {cause.next_step}", "     "),
        ]
    if not diagnosis.causes:
        lines.append("  no known failure shows its signs")
    lines.append("")
    for finding in diagnosis.findings:
        lines += _wrapped(f"{finding.level:12s} {finding.axis:16s} {finding.text}", "  ", hang=31)
        if finding.next_step and finding.level in ("warn", "broken"):
            lines += _wrapped(f"-> {finding.next_step}", " " * 31)
    return "\n".join(lines)


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything but the arrays of plots."""
    return {
        "name": diagnosis.evidence.name,
        "facts": asdict(diagnosis.evidence.facts),
        "level": diagnosis.level,
        "remarks": list(diagnosis.remarks),
        "causes": [asdict(cause) | {"is_failure": cause.is_failure} for cause in diagnosis.causes],
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "metrics": dict(diagnosis.examination.metrics),
        "tables": dict(diagnosis.examination.tables),
    }


def exit_status(verdict: Verdict, fail_on: Verdict | None) -> int:
    """0 healthy, 1 warn, 2 broken, 3 insufficient data, as far as `fail_on` (warn or broken) asks for it; else 0."""
    if fail_on is None or (fail_on == "broken" and verdict == "warn"):
        return 0
    return EXIT_STATUS[verdict]


def check_structure(evidence: Evidence) -> tuple[bool, str]:
    """Whether the record passes every structure test, and each test in a line, failures first."""
    if not evidence.experts:
        return (
            False,
            f"{evidence.name}: no experts are recorded, so there are no routes to test; record those of both engines",
        )
    rows = structure(Aligned(evidence))[1]["structure"]
    rows = sorted(rows, key=lambda row: bool(row["passed"]))
    lines = [
        f"{'passed' if row['passed'] else 'FAILED'}  {row['test']:24s} {row['source']:28s} {row['value']:<10.4g} {row['detail']}"
        for row in rows
    ]
    return all(row["passed"] for row in rows), "\n".join(lines)


_COMPARED = ("mismatch/", "floor/", "total/", "router/", "cause/")
_HINTS = {
    "staleness": "data are older, or each update moves further: compare max_staleness, learning rate and updates_per_batch",
    "decode": "the engine's decoding left its prefill: compare attention back-ends, batch sizes and cache settings",
    "engine": "arithmetic differs more: compare dtypes, kernels and LM heads of both engines, and the last weight push",
    "routing": "experts differ more: compare router dtypes, and whether replay is on",
    "rerun": "the trainer became less repeatable: compare its kernels and layouts",
    "unsplit": "record engine_logp to tell staleness from the engine",
}


def compare(before: Diagnosis, after: Diagnosis) -> str:
    """Which numbers moved from one body of evidence to the other by more than chance, and which part of the gap did."""
    earlier, later = (_intervals(d.examination) for d in (before, after))
    lines = [f"from {before.evidence.name}: {before.level}", f"to   {after.evidence.name}: {after.level}", ""]
    lines.append(f"  {'':34s} {'before':>12s} {'after':>12s}   95 % intervals (bootstrap over sequences)")
    names = [name for name in earlier if name in later and name.startswith(_COMPARED)]
    for name in names:
        (value, low, high), (value2, low2, high2) = earlier[name], later[name]
        moved = "moved" if low2 > high or high2 < low else ""
        lines.append(
            f"  {name:34s} {value:12.3g} {value2:12.3g}   {low:.3g} .. {high:.3g} | {low2:.3g} .. {high2:.3g}  {moved}"
        )
    if not any(line.endswith("moved") for line in lines):
        return "\n".join([*lines, "", "  no number moved by more than chance"])
    return "\n".join([*lines, "", *_moved_parts(before.examination, after.examination)])


def _moved_parts(before: Examination, after: Examination) -> list[str]:
    """Parts of the mean squared gap between trainer and sampling."""
    squares = [
        {
            row["part"]: row["square_share"] * examined.metrics.get("total/square_mean_nats2", 0.0)
            for row in examined.tables.get("causes", [])
            if row["gap"] == "policy"
        }
        for examined in (before, after)
    ]
    if not all(squares):
        return ["  the parts of the gap are not recorded on both sides (natural, replayed and engine passes)"]
    change = {part: squares[1].get(part, 0.0) - squares[0].get(part, 0.0) for part in squares[0] | squares[1]}
    lines = [
        f"  {part:12s} {squares[0].get(part, 0.0):10.3g} -> {squares[1].get(part, 0.0):10.3g} nats² per token"
        for part in change
        if squares[0].get(part) or squares[1].get(part)
    ]
    most = max(change, key=lambda part: abs(change[part]))
    if change[most]:
        lines += _wrapped(f"what moved most: {most}; {_HINTS.get(most, '')}", "  ")
    return ["  parts of the squared gap:", *lines]


def read(
    paths: Sequence[Path], columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Evidence:
    """Evidence of run directories, evidence files or dumps of other frameworks."""
    return read_evidence(paths[0] if len(paths) == 1 else list(paths), columns=columns, limit=limit)


def _condition(evidence: Evidence) -> Condition:
    facts = evidence.facts
    if facts.trainer_dtype == facts.engine_dtype == "float32":
        return "float32"
    if not (facts.num_experts or evidence.is_routed.any()):
        return "dense"
    return "replay" if facts.router_replay == "engine" else "moe"


def is_enough(examined: Examination) -> bool:
    """For verdicts on levels."""
    metrics = examined.metrics
    return metrics["data/num_sequences"] >= LEAST_SEQUENCES and metrics["data/num_tokens"] >= LEAST_TOKENS


def _remarks(examined: Examination) -> list[str]:
    tokens = examined.metrics["data/num_tokens"]
    if not is_enough(examined):
        return [
            f"insufficient data: verdicts need {LEAST_SEQUENCES} sequences and {LEAST_TOKENS:,} tokens; add evidence files"
        ]
    if tokens < WANTED_TOKENS:
        return [f"fewer than {WANTED_TOKENS:,} tokens: means are rough, see the intervals"]
    return []


def _finding(axis: str, examined: Examination, condition: Condition, enough: bool) -> Finding:
    intervals = _intervals(examined)
    judged = list[tuple[Verdict, str]]()
    for name in AXES[axis]:
        value = examined.metrics.get(name)
        if value is None:
            continue
        _, low, high = intervals.get(name, (value, value, value))
        # Only what the scatter of the sequences leaves no doubt of counts against a run.
        levels = [found for x in (value, low, high) if (found := level(name, x, condition)) is not None]
        if levels:
            best: Verdict = max(levels, key=_severity)
            judged.append((best, name))
    if not judged:
        return Finding(
            axis=axis,
            level="insufficient" if axis == "engine" else "unknown",
            text=f"not judged: {_MISSING[axis]}",
        )
    worst, name = min(judged, key=lambda item: _severity(item[0]))
    if not enough and axis != "structure" and worst != "healthy":
        worst = "insufficient"
    value, norm = examined.metrics[name], NORMS[name]
    interval = intervals.get(name)
    bounds = norm.bounds_for(condition)
    assert bounds is not None, "a level came of it"
    between = f" ({interval[1]:.2g} .. {interval[2]:.2g})" if interval else ""
    sign = ">=" if bounds[0] > bounds[1] else "<="
    text = f"{name} = {value:.3g}{' ' + norm.unit if norm.unit else ''}{between}, healthy {sign} {bounds[0]:g}; {norm.meaning}"
    return Finding(
        axis=axis, level=worst, text=text, metric=name, value=value, interval=interval[1:] if interval else None,
        bounds=bounds, source=norm.source, next_step=norm.next_step,
    )  # fmt: skip


def _intervals(examined: Examination) -> dict[str, tuple[float, float, float]]:
    """Value, low and high by metric."""
    rows = examined.tables.get("intervals", [])
    return {row["metric"]: (row["value"], row["low"], row["high"]) for row in rows}


def _wrapped(text: str, indent: str, hang: int | None = None) -> list[str]:
    following = " " * (len(indent) + 3 if hang is None else hang)
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=following) or [indent]
