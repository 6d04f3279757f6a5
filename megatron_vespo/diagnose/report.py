"""The report: a run directory in, one self-contained HTML page out.

It reads files only (config.toml, environment.json, metrics.jsonl, rollouts/), so that it works while the run
is going, after a crash, and on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vespo.config import LayoutConfig
from megatron_vespo.diagnose.doctor import judge as judge_evidence
from megatron_vespo.diagnose.doctor_page import verdict_section
from megatron_vespo.diagnose.history import History, read_history
from megatron_vespo.diagnose.instrument_panels import ESSENTIAL
from megatron_vespo.diagnose.page import facts_list, missing, page, section, table, verdict_list
from megatron_vespo.diagnose.panels import PHASE_COLORS, RL_SECTIONS, SFT_SECTIONS
from megatron_vespo.diagnose.verdicts import judge
from megatron_vespo.evidence import read_evidence
from megatron_vespo.metrics import PHASES, si
from megatron_vespo.rundir import step_of, write_atomically
from megatron_vespo.types import RunError

_EXAMINED_TOKENS = 200_000
"""Of all evidence files; more change no verdict."""
_SHOWN_CHARACTERS = 1500
"""Of a prompt or response in the samples table."""


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from what the run has logged so far; its path.

    Raises:
        ConfigError: the directory is missing, holds no run, or no step has been logged yet.
    """
    history = read_history(run_dir)
    sections = RL_SECTIONS if history.is_rl else SFT_SECTIONS
    body = [
        _header(history),
        _tiles(key_figures(history)),
        _verdicts(history),
        *(section(title, panels, history) for title, panels in sections.items()),
        _instruments(run_dir),
        _time_table(history),
        _samples(history),
    ]
    file = run_dir / "report.html"
    write_atomically(file, page(_name(history), body, _footer(history)))
    return file


def _instruments(run_dir: Path) -> str:
    """What the doctor says of the examined batches of the run, all together; nothing where none was examined."""
    if not any((run_dir / "evidence").glob("*.parquet")):
        return ""
    try:
        diagnosis = judge_evidence(read_evidence(run_dir, kind="evidence", limit=_EXAMINED_TOKENS))
    except RunError as err:  # the rest of the report is worth having
        return f"<section><h2>Instruments</h2>{missing(str(err))}</section>"
    panels = section(
        "Instruments: trainer against engine on examined batches", ESSENTIAL, diagnosis.examination
    )
    return verdict_section(diagnosis) + panels


def key_figures(history: History) -> list[tuple[str, str, str]]:
    """(label, value, remark) of every figure the run has the numbers for, most wanted first."""
    rows = [
        _heldout_figure(history),
        ("steps", f"{history.last_step}", f"of {history.num_steps}"),
        _figure(history, "time/step_s", "step time", "{:.2f} s", "mean"),
        _figure(history, "throughput/tokens_per_s", "throughput", "{}", "tokens/s, mean"),
        _token_figure(history),
        _staleness_figure(history),
        _figure(history, "algo/phi_mean", "phi(W)", "{:.2f}", "mean over steps; 1 = data counts fully"),
        _figure(history, "algo/ess_fraction", "ESS", "{:.0%}", "of the batch, by raw W"),
        _figure(history, "mismatch/k3_nats", "k3", "{:.1e}", "nats, mean over steps"),
        _figure(history, "mismatch/abs_max_nats", "|Δlogp|", "{:.1e}", "nats, largest of all tokens", np.max),
        _figure(
            history, "experts/overlap_mean", "experts agree", "{:.2%}", "trainer and engine, same weights"
        ),
        None if history.is_rl else _figure(history, "optim/loss", "loss", "{:.4f}", "last", lambda v: v[-1]),
    ]
    return [row for row in rows if row is not None]


def _figure(
    history: History, key: str, label: str, form: str, remark: str, reduce: Any = np.mean
) -> tuple[str, str, str] | None:
    _, values = history.series(key)
    if not len(values):
        return None
    value = float(reduce(values))
    return label, form.format(si(value) if form == "{}" else value), remark


def _heldout_figure(history: History) -> tuple[str, str, str] | None:
    steps, reward = history.series("reward/heldout_mean")
    if not len(reward):
        return None
    if len(reward) == 1:
        return "held-out reward", f"{reward[0]:.3f}", f"at step {steps[0]}, the only evaluation so far"
    return (
        "held-out reward",
        f"{reward[0]:.3f} → {reward[-1]:.3f}",
        f"best {reward.max():.3f} at step {steps[reward.argmax()]}",
    )


def _token_figure(history: History) -> tuple[str, str, str] | None:
    counts = [
        sum(record["staleness/histogram"]) for record in history.records if "staleness/histogram" in record
    ]
    return ("trained on", si(sum(counts)), "response tokens") if counts else None


def _staleness_figure(history: History) -> tuple[str, str, str] | None:
    _, mean = history.series("staleness/mean_steps")
    _, oldest = history.series("staleness/max_steps")
    if not len(mean) or not len(oldest):
        return None
    bound = history.config["loop"]["max_staleness"]
    return "staleness", f"{mean.mean():.2f}", f"steps, mean; oldest {oldest.max():.0f}, bound {bound}"


def _name(history: History) -> str:
    return history.path.resolve().name


def _header(history: History) -> str:
    model = Path(history.setting("model", "?")).name
    state = {"running": "watch", "complete": "good", "stopped early": "bad"}[history.state]
    facts = {
        "model": model,
        "algorithm": _algorithm(history) if history.is_rl else "supervised fine-tuning",
        "layout": _layout(history),
        "precision": f"{history.setting('trainer.dtype', '?')} on {history.setting('trainer.device', '?')}",
        "seed": str(history.setting("seed", 0)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(history.started)),
        "duration": _duration(history.seconds),
        "versions": ", ".join(f"{name} {version}" for name, version in history.versions.items())
        or "not recorded",
    }
    return (
        f"<header><h1>{escape(_name(history))}<span class='state {state}'>{history.state}, "
        f"step {history.last_step} of {history.num_steps}</span></h1>{facts_list(facts)}</header>"
    )


def _algorithm(history: History) -> str:
    name = history.config["algorithm"]["name"]
    loop = history.config["loop"]
    batch = f"{loop['prompts_per_step']} prompts x {loop['group_size']} responses a step"
    return f"{name}, staleness ≤ {loop['max_staleness']}, {batch}"


def _layout(history: History) -> str:
    layout = LayoutConfig.model_validate(history.setting("trainer.layout", {}))
    degrees = ("tensor", "context", "pipeline", "data", "expert")
    split = [f"{name} {getattr(layout, name)}" for name in degrees if getattr(layout, name) > 1]
    return " x ".join(split) + f" on {layout.world_size} ranks" if split else f"{layout.world_size} rank"


def _tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    tiles = "".join(
        f"<div class='tile'><div class='label'>{escape(label)}</div><div class='value'>{escape(value)}</div>"
        f"<div class='remark'>{escape(remark)}</div></div>"
        for label, value, remark in figures
    )
    return f"<section class='tiles'>{tiles}</section>"


def _verdicts(history: History) -> str:
    found = verdict_list((verdict.level, verdict.level, escape(verdict.text)) for verdict in judge(history))
    return f"<section><h2>Verdicts</h2>{found}</section>" if found else ""


def _time_table(history: History) -> str:
    _, total = history.series("time/step_s")
    rows = []
    for phase in PHASES:
        _, seconds = history.series(f"time/{phase}_s")
        if seconds.any():
            share = seconds.sum() / total.sum() if total.sum() else 0.0
            bar = f"<div class='bar' style='width:{min(100, 100 * share):.1f}%;background:{PHASE_COLORS[phase]}'></div>"
            rows.append((
                phase, str(len(seconds)), f"{seconds.mean():.2f} s", f"{seconds.max():.2f} s", _duration(seconds.sum()),
                f"{share:.1%}", bar,
            ))  # fmt: skip
    if not rows:
        return ""
    head = ("phase", "times", "mean", "longest", "sum", "of step time", "")
    return f"<section class='card'><h3>Time by phase</h3>{table(head, rows)}</section>"


def _samples(history: History) -> str:
    if not history.rollout_files:
        return (
            f"<section><h2>Samples</h2>{missing('there are no rollout files')}</section>"
            if history.is_rl
            else ""
        )
    chosen = dict.fromkeys((history.rollout_files[0], history.rollout_files[-1]))
    tables = "".join(f"<h3>Step {step_of(file)}</h3>{_sample_table(file)}" for file in chosen)
    return f"<section class='card'><h2>Samples</h2><p class='hint'>The best and the worst response to the first prompts of the first and the last step.</p>{tables}</section>"


def _weight(coefficient: float | None) -> str:
    return "left out" if coefficient is None else f"{coefficient:.2f}"


def _sample_table(file: Path) -> str:
    columns = [
        "uid",
        "sample",
        "prompt_text",
        "response_text",
        "answer",
        "reward",
        "advantage",
        "coefficient",
        "train_version",
        "versions",
        "finish_reason",
    ]
    rows = _best_and_worst(pq.read_table(file, columns=columns), num_prompts=3)
    cells = (
        (
            _text(row["prompt_text"]), _text(row["answer"]), _text(row["response_text"]), escape(row["finish_reason"]),
            f"{row['reward']:.2f}", f"{row['advantage']:+.2f}", f"{row['train_version'] - np.mean(row['versions']):.1f}",
            _weight(row["coefficient"]),
        )
        for row in rows
    )  # fmt: skip
    head = ("prompt", "answer", "response", "end", "reward", "advantage", "staleness", "phi")
    return table(head, cells, "samples")


def _best_and_worst(table: pa.Table, num_prompts: int) -> list[dict[str, Any]]:
    """The rows of highest and lowest advantage among each of the first prompts."""
    advantage, uids = table["advantage"].to_numpy(), np.array(table["uid"].to_pylist())
    chosen: list[int] = []
    for uid in list(dict.fromkeys(uids.tolist()))[:num_prompts]:
        rows = np.flatnonzero(uids == uid)
        chosen += dict.fromkeys((int(rows[advantage[rows].argmax()]), int(rows[advantage[rows].argmin()])))
    return table.take(chosen).to_pylist()


def _text(text: str) -> str:
    cut = (
        text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + f" … ({len(text)} characters)"
    )
    return f"<pre>{escape(cut)}</pre>"


def _footer(history: History) -> str:
    partly = ""
    if history.files_read < len(history.rollout_files):
        partly = f" (sequence panels: {history.files_read} of {len(history.rollout_files)} rollout files)"
    return f"megatron_vespo report of {history.path}{partly}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{seconds:.1f} s"
    )
