"""What every page of this package shares: how plots are drawn, how tables are set, and the page around them.

A page is self-contained: one HTML file without scripts, with its plots inside.  Colours are the Okabe-Ito set, which
colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Generic, TypeVar

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#9AA0A6",
)  # fmt: skip
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#80868b",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "megatron_vespo",
}


class Missing(Exception):
    """There is no data for this panel; the message says what is missing."""


Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Panel(Generic[Subject]):
    """A question, how to read the answer, and the function that draws it; it raises `Missing` where it lacks its data."""

    title: str
    caption: str
    draw: Callable[[Figure, Subject], None]
    height: float = 3.3
    """Inches, at a width of 6.2."""


def render(panel: Panel[Subject], subject: Subject) -> bytes:
    """The panel as SVG.

    Raises:
        Missing: there is no data for it.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, panel.height), layout="constrained")
        panel.draw(figure, subject)
        for axes in figure.axes:
            if axes.get_xlabel() == "step":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, dpi=160)
    return out.getvalue()


def section(title: str, panels: Sequence[Panel[Subject]], subject: Subject) -> str:
    """A heading and its panels; one that lacks its data says so in its place."""
    figures = "".join(_figure(panel, subject) for panel in panels)
    return f"<section><h2>{escape(title)}</h2><div class='grid'>{figures}</div></section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Cells are HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>"


def verdict_list(verdicts: Iterable[tuple[str, str, str]]) -> str:
    """A list of (level, word, text): level "good", "watch" or "bad" chooses the colour."""
    items = "".join(f"<li class='{level}'><b>{word}</b>{text}</li>" for level, word, text in verdicts)
    return f"<ul class='verdicts'>{items}</ul>" if items else ""


def facts_list(facts: dict[str, str]) -> str:
    """Names and values side by side."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{items}</dl>"


def missing(reason: str) -> str:
    """What stands where data is lacking."""
    return f"<p class='missing'>Not available: {escape(reason)}.</p>"


def page(title: str, body: Iterable[str], footer: str) -> bytes:
    """The whole file."""
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    end = f"<footer>{escape(footer)}, written {written}.</footer>"
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"\n<body>{''.join(body)}{end}</body></html>\n"
    ).encode()


def _figure(panel: Panel[Any], subject: Any) -> str:
    try:
        image = base64.b64encode(render(panel, subject)).decode()
        content = f"<img alt='{escape(panel.title)}' src='data:image/svg+xml;base64,{image}'>"
    except Missing as reason:
        content = missing(str(reason))
    return f"<figure><figcaption><b>{escape(panel.title)}</b>{escape(panel.caption)}</figcaption>{content}</figure>"


_CSS = """
:root { --ink: #202124; --soft: #5f6368; --line: #e3e5e8; --good: #009e73; --watch: #b97d00; --bad: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 28px 32px; color: var(--ink); background: #f7f8f9;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 14px; display: flex; align-items: center; gap: 14px; flex-wrap: wrap; }
h2 { font-size: 18px; margin: 30px 0 10px; }
h3 { font-size: 14px; margin: 16px 0 6px; }
.card h2, .card > h3:first-child { margin-top: 0; }
header, .card, figure, .tile, .verdicts { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
header, .card { padding: 18px 22px; }
.card { margin-top: 16px; overflow-x: auto; }
.state { font-size: 13px; font-weight: 600; padding: 3px 12px; border-radius: 20px; color: #fff; }
.state.good { background: var(--good); } .state.watch { background: var(--watch); } .state.bad { background: var(--bad); }
dl { margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 8px 28px; }
dl div:last-child { grid-column: 1 / -1; }
dt, .label, .remark, .hint, figcaption, footer { color: var(--soft); font-size: 12px; }
dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { padding: 12px 16px; }
.tile:first-child { grid-column: span 2; }
.value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdicts { list-style: none; margin: 0; padding: 8px 22px; }
.verdicts li { padding: 6px 0 6px 14px; border-left: 4px solid; margin: 6px 0; }
.verdicts b { display: inline-block; width: 60px; font-size: 12px; }
.verdicts .good { border-color: var(--good); } .verdicts .good b { color: var(--good); }
.verdicts .watch { border-color: var(--watch); } .verdicts .watch b { color: var(--watch); }
.verdicts .bad { border-color: var(--bad); } .verdicts .bad b { color: var(--bad); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px; }
figure img { width: 100%; display: block; margin-top: 6px; }
figcaption b { display: block; color: var(--ink); font-size: 14px; }
.missing { color: var(--soft); font-style: italic; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: 12px; color: var(--soft); font-weight: 600; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; vertical-align: middle; }
.numbers .wide { width: 40%; } .bar { height: 12px; border-radius: 3px; min-width: 1px; }
.samples td { font-variant-numeric: tabular-nums; }
pre { margin: 0; font: 12px/1.4 ui-monospace, "Liberation Mono", monospace; white-space: pre-wrap; word-break: break-word;
  max-height: 190px; overflow-y: auto; min-width: 60px; }
footer { margin-top: 28px; }
@media print { body { background: #fff; } figure, .card { break-inside: avoid; } }
"""
