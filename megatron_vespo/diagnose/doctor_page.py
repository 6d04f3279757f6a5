"""The doctor's page: a diagnosis in, one self-contained HTML file out; what was not recorded is said in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from megatron_vespo.diagnose.causes import Cause
from megatron_vespo.diagnose.doctor import Diagnosis, Finding
from megatron_vespo.diagnose.examination import Examination, Row
from megatron_vespo.diagnose.instrument_panels import SECTIONS
from megatron_vespo.diagnose.page import facts_list, missing, page, section, table, verdict_list
from megatron_vespo.evidence import Evidence
from megatron_vespo.rundir import write_atomically

LEVELS = {"healthy": "good", "warn": "watch", "broken": "bad", "insufficient": "watch", "unknown": "watch"}
"""The page's colour of each level."""
_SHOWN_TOKENS = 24
"""Of the extreme tokens."""

Decode = Callable[[Sequence[int]], str]


def write_page(diagnosis: Diagnosis, file: Path) -> None:
    """Write everything that is known as one HTML file."""
    examined = diagnosis.examination
    body = [
        _header(diagnosis),
        verdict_section(diagnosis),
        *(section(title, panels, examined) for title, panels in SECTIONS.items()),
        _tests(examined),
        _quantiles(examined),
        _tokens(examined, _decoder(diagnosis.evidence)),
    ]
    write_atomically(
        file,
        page(f"doctor: {diagnosis.evidence.name}", body, f"doctor's report of {diagnosis.evidence.name}"),
    )


def verdict_section(diagnosis: Diagnosis) -> str:
    """The causes, then one line for each axis, worst first."""
    causes = [_cause(cause) for cause in diagnosis.causes]
    findings = [_finding(finding) for finding in diagnosis.findings]
    return f"<section><h2>Trainer and engine: verdicts</h2>{verdict_list([*causes, *findings])}</section>"


def _cause(cause: Cause) -> tuple[str, str, str]:
    level = "bad" if cause.is_failure else "watch"
    return level, "cause", f"{escape(cause.text)}<br><i>{escape(cause.next_step)}</i>"


def _finding(finding: Finding) -> tuple[str, str, str]:
    advice = (
        f"<br><i>{escape(finding.next_step)}</i>" if finding.next_step and finding.level != "healthy" else ""
    )
    return (
        LEVELS[finding.level],
        escape(finding.level),
        f"<b>{escape(finding.axis)}</b> {escape(finding.text)}{advice}",
    )


def _header(diagnosis: Diagnosis) -> str:
    evidence, metrics = diagnosis.evidence, diagnosis.examination.metrics
    facts = evidence.facts
    shown = {
        "tokens": f"{metrics.get('data/num_tokens', 0):,.0f} in {metrics.get('data/num_sequences', 0):,.0f} sequences",
        "with experts of both": f"{metrics.get('data/num_routed_sequences', 0):,.0f} sequences",
        "model": facts.model or "not recorded",
        "trainer, engine": " and ".join(filter(None, (facts.trainer_dtype, facts.engine_dtype)))
        or "not recorded",
        "sampling": f"temperature {facts.temperature:g}, top_p {facts.top_p:g}",
        "router replay": facts.router_replay,
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        or "not recorded",
    }
    level = diagnosis.level
    return (
        f"<header><h1>{escape(Path(evidence.name).name)}<span class='state {LEVELS[level]}'>{level}</span></h1>"
        f"{facts_list(shown)}</header>"
    )


def _tests(examined: Examination) -> str:
    rows = examined.tables.get("structure", [])
    content = missing("there is nothing to test")
    if rows:
        failed_first = sorted(rows, key=lambda row: bool(row["passed"]))
        content = table(
            ("test", "of", "", "value", "detail"),
            (
                (escape(row["test"]), escape(row["source"]), "passed" if row["passed"] else "<b>FAILED</b>",
                 f"{row['value']:.4g}", escape(str(row["detail"])))
                for row in failed_first
            ),
        )  # fmt: skip
    return f"<section class='card'><h2>Tests of the record</h2>{content}</section>"


def _quantiles(examined: Examination) -> str:
    rows = examined.tables.get("quantiles", [])
    if not rows:
        return ""
    keys = (
        "abs_mean_nats",
        "abs_p50_nats",
        "abs_p90_nats",
        "abs_p99_nats",
        "abs_p999_nats",
        "abs_max_nats",
        "k3_nats",
    )
    head = ("pair", "tokens", "mean |d|", "50 %", "90 %", "99 %", "99.9 %", "largest", "k3")
    body = (
        (escape(row["pair"]), f"{row['num_tokens']:,.0f}", *(_number(row, key) for key in keys))
        for row in rows
    )
    hint = (
        "mismatch: trainer against engine, same weights; total: against the log-probs of sampling; floor: trainer against "
        "itself; decode: the engine's decoding against its prefill; replayed: with the engine's experts. Nats."
    )
    return f"<section class='card'><h2>Gaps of log-probs</h2><p class='hint'>{hint}</p>{table(head, body)}</section>"


def _tokens(examined: Examination, decode: Decode) -> str:
    rows = examined.tables.get("extreme", [])[:_SHOWN_TOKENS]
    if not rows:
        return ""
    head = (
        "sequence",
        "at",
        "context, <b>token</b>",
        "d",
        "engine",
        "sampled",
        "trainer",
        "replayed",
        "entropy",
        "flipped layers",
    )
    body = (
        (
            escape(str(row["uid"] if row.get("uid") else row["sequence"])), str(row["position"]), _context(row, decode), f"{row['gap_nats']:+.3f}",
            *(_number(row, key) for key in ("engine", "behavior", "policy", "replayed", "entropy")),
            escape(", ".join(map(str, row.get("flipped_layers") or ()))),
        )
        for row in rows
    )  # fmt: skip
    return (
        f"<section class='card'><h2>The tokens that differ most</h2>{table(head, body, 'samples')}</section>"
    )


def _context(row: Row, decode: Decode) -> str:
    before, token, after = (escape(decode(ids)) for ids in (row["before"], [row["token"]], row["after"]))
    return f"<pre>{before}<b>[{token}]</b>{after}</pre>"


def _number(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.3g}"


def _decoder(evidence: Evidence) -> Decode:
    """Of the model that the evidence names, where it lies on this machine; else token ids."""
    model = Path(evidence.facts.model) if evidence.facts.model else None
    if model is not None and (model / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer  # slow to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as err:
            logging.getLogger(__name__).warning("tokens are shown as ids: tokenizer of %s: %s", model, err)
        else:
            return lambda ids: str(tokenizer.decode(ids))
    return lambda ids: " ".join(map(str, ids)) + " "
