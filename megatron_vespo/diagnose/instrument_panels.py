"""The plots of an examination: each panel is one question about two engines, answered from numbers that are there."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_vespo.diagnose.examination import Examination, Row
from megatron_vespo.diagnose.page import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Missing, Panel

_TAUS = (1.5, 2, 5, 10)
_SHIFTS = (-2, -1, 0, 1, 2)
_PARTS = {
    "staleness": ORANGE, "decode": SKY, "unsplit": GREY, "engine": BLUE, "routing": PURPLE, "rerun": GREEN,
}  # fmt: skip
_NO_ROUTES = "the experts of both engines are not recorded, or the model is dense"


# Structure


def _shifts(figure: Figure, examined: Examination) -> None:
    axes = figure.subplots()
    given = {
        "log-probs (correlation)": ("structure/logp_shift", BLUE),
        "expert rows (overlap)": ("structure/token_shift", ORANGE),
    }
    found = {
        label: (examined.arrays[key], color)
        for label, (key, color) in given.items()
        if key in examined.arrays
    }
    if not found:
        raise Missing("there are too few tokens to shift")
    width = 0.8 / len(found)
    for place, (label, (fit, color)) in enumerate(found.items()):
        axes.bar(
            np.array(_SHIFTS) + (place - (len(found) - 1) / 2) * width, fit, width, color=color, label=label
        )
    axes.set(
        xlabel="the engine's record shifted by so many tokens",
        ylabel="agreement",
        ylim=(min(0, axes.get_ylim()[0]), 1.25),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", ncols=2)


def _layer_map(figure: Figure, examined: Examination) -> None:
    fit = _array(examined, "structure/layer_shift")
    axes = figure.subplots()
    image = axes.imshow(fit, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    axes.grid(False)
    axes.set(xlabel="layer of the trainer", ylabel="layer of the engine")
    _whole_numbers(axes)
    figure.colorbar(image, label="overlap")


# Log-probs


def _probabilities(figure: Figure, examined: Examination) -> None:
    points = np.exp(
        _array(
            examined, "mismatch/scatter", "no token has been scored by both engines under the same weights"
        )
    )
    axes = figure.subplots()
    bins = axes.hexbin(
        points[:, 0], points[:, 1], gridsize=40, bins="log", mincnt=1, cmap="Blues", extent=(0, 1, 0, 1)
    )
    axes.plot([0, 1], [0, 1], color=RED, linewidth=0.8)
    axes.set(xlabel="probability, engine", ylabel="probability, trainer")
    figure.colorbar(bins, label="tokens")


def _gaps(figure: Figure, examined: Examination) -> None:
    """By decades of |d|: the histogram's own bins are far finer."""
    counts, edges = _histogram(examined)
    decades = np.arange(np.floor(np.log10(edges[0])), np.ceil(np.log10(edges[-1])) + 0.25, 0.25)
    middle = (np.log10(edges[1:]) + np.log10(edges[:-1])) / 2
    axes = figure.subplots()
    for side, label, color in ((0, "trainer below engine", BLUE), (1, "trainer above engine", ORANGE)):
        heights, _ = np.histogram(middle, decades, weights=counts[side])
        axes.stairs(heights, 10**decades, color=color, label=label, linewidth=1.6)
    axes.set(xscale="log", xlabel="|d|, nats", ylabel="tokens")
    used = np.flatnonzero(counts.sum(0))
    axes.set_xlim(float(edges[used[0]]) / 2, float(edges[used[-1] + 1]) * 2)
    axes.legend()


def _exceedance(figure: Figure, examined: Examination) -> None:
    counts, edges = _histogram(examined)
    num = examined.metrics["mismatch/num_tokens"]
    beyond = np.cumsum(counts.sum(0)[::-1])[::-1] / num
    axes = figure.subplots()
    axes.plot(edges[:-1], np.where(beyond > 0, beyond, np.nan), color=BLUE)
    for tau in _TAUS:
        axes.axvline(np.log(tau), color=GREY, linewidth=0.8)
        axes.text(np.log(tau), 1.05, f"{tau:g}", fontsize=7, color=GREY, ha="center", va="bottom")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="x, nats (grey: log of the ratio that corrections cut at)",
        ylabel="share of tokens with |d| > x",
    )
    used = np.flatnonzero(counts.sum(0))
    axes.set_xlim(min(float(edges[used[0]]), 0.1), max(float(edges[used[-1] + 1]), 3))
    axes.set_ylim(0.5 / num, 1.0)


def _by(table: str) -> Any:
    """A panel's drawing: mean |d| of the rows of a conditioned table, and their share of the squared gap."""

    def draw(figure: Figure, examined: Examination) -> None:
        rows = _rows(examined, table, f"no tokens are grouped by {table.replace('_', ' ')}")
        labels = [_label(row) for row in rows]
        left, right = figure.subplots(1, 2)
        place = np.arange(len(rows))
        left.barh(place, [row["abs_mean_nats"] for row in rows], color=BLUE)
        left.set(yticks=place, yticklabels=labels, xlabel="mean |d|, nats")
        right.barh(place - 0.2, [row["token_share"] for row in rows], 0.4, color=GREY, label="of tokens")
        right.barh(place + 0.2, [row["k2_share"] for row in rows], 0.4, color=ORANGE, label="of sum d²")
        right.set(yticks=[], xlabel="share")
        right.legend()
        for axes in (left, right):
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)

    return draw


# Sequences


def _sequence_gaps(figure: Figure, examined: Examination) -> None:
    nats, tokens = _array(examined, "mismatch/seq_nats", _NO_PAIR), examined.arrays["mismatch/seq_tokens"]
    axes = figure.subplots()
    axes.scatter(tokens, nats, s=10, color=BLUE, alpha=0.6, linewidths=0)
    reach = np.array([0, tokens.max()])
    axes.plot(reach, -examined.metrics["mismatch/k3_nats"] * reach, color=RED, linewidth=1, label="-k3 T")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="T, sampled tokens", ylabel="D = sum of d, nats")
    axes.legend()


def _budget(figure: Figure, examined: Examination) -> None:
    axes = figure.subplots()
    names = ["mean", "median", "5 %"]
    for offset, sign, color in ((-0.2, "pos", GREEN), (0.2, "neg", RED)):
        keys = [f"mismatch/phi_{sign}_{key}" for key in ("mean", "p50", "p05")]
        if keys[0] not in examined.metrics:
            raise Missing(_NO_PAIR)
        axes.bar(
            np.arange(3) + offset,
            [examined.metrics[key] for key in keys],
            0.4,
            color=color,
            label="A ≥ 0" if sign == "pos" else "A < 0",
        )
    axes.set(xticks=np.arange(3), xticklabels=names, ylabel="phi of the engine's part alone", ylim=(0, 1.3))
    axes.legend(ncols=2, loc="upper right")


# Router


def _by_layer(figure: Figure, examined: Examination) -> None:
    rows = _rows(examined, "layers", _NO_ROUTES)
    layer = [row["layer"] for row in rows]
    axes = figure.subplots()
    for key, label, color in (
        ("mismatch", "trainer, free, against engine", BLUE),
        ("local", "local: upstream replayed", GREEN),
        ("slot_disagreement", "slots that differ", GREY),
    ):
        if any(key in row for row in rows):
            axes.plot(
                layer, [row.get(key, np.nan) for row in rows], "o-", markersize=3, color=color, label=label
            )
    axes.set(xlabel="layer", ylabel="share of choices")
    axes.set_ylim(0, max(1e-3, 1.3 * axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2, fontsize=7)


def _by_position(figure: Figure, examined: Examination) -> None:
    overlap = _array(examined, "router/overlap_layer_position", _NO_ROUTES)
    edges = examined.arrays["router/position_edges"]
    axes = figure.subplots()
    lowest = min(0.98, float(np.nanmin(overlap)))
    image = axes.pcolormesh(
        np.arange(len(edges)), np.arange(len(overlap) + 1) - 0.5, overlap, cmap="viridis", vmin=lowest, vmax=1
    )
    axes.grid(False)
    axes.set(
        xlabel="position in the sequence",
        ylabel="layer",
        xticks=np.arange(len(edges)),
        xticklabels=[f"{edge:g}" for edge in edges],
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="overlap")


def _margins(figure: Figure, examined: Examination) -> None:
    rows = _rows(examined, "margins", "margins of the trainer's router are not recorded")
    axes = figure.subplots()
    middle = np.arange(len(rows))
    axes.bar(middle, [row["flip_rate"] for row in rows], color=PURPLE)
    axes.set(
        xticks=middle, xticklabels=[f"{row['low']:g}" for row in rows], ylabel="share that differs",
        xlabel="margin from here on, in units of the noise that explains the flips",
    )  # fmt: skip


def _flips_per_token(figure: Figure, examined: Examination) -> None:
    counts = _array(examined, "router/layers_per_token", _NO_ROUTES)
    axes = figure.subplots()
    axes.bar(np.arange(len(counts)), counts / max(1, counts.sum()), color=PURPLE)
    axes.set(xlabel="layers in which a token's experts differ", ylabel="share of rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dose(figure: Figure, examined: Examination) -> None:
    rows = _rows(examined, "dose", _NO_ROUTES)
    axes = figure.subplots()
    place = np.arange(len(rows))
    axes.bar(place, [row["abs_mean_nats"] for row in rows], color=PURPLE)
    axes.set(
        xticks=place,
        xticklabels=[_range(row) for row in rows],
        xlabel="layers whose experts differ",
        ylabel="mean |d|, nats",
    )
    for x, row in enumerate(rows):
        axes.text(
            x, row["abs_mean_nats"], f"{row['k2_share']:.0%} of sum d²", fontsize=7, ha="center", va="bottom"
        )
    axes.set_ylim(0, 1.2 * max(row["abs_mean_nats"] for row in rows) or 1)


def _load(figure: Figure, examined: Examination) -> None:
    ours, theirs = _array(examined, "router/load", _NO_ROUTES), examined.arrays["router/reference_load"]
    shift = (ours - theirs) / np.maximum(theirs.sum(1, keepdims=True), 1)
    reach = max(1e-6, float(np.abs(shift).max()))
    axes = figure.subplots()
    image = axes.imshow(shift, cmap="RdBu_r", vmin=-reach, vmax=reach, origin="lower", aspect="auto")
    axes.grid(False)
    axes.set(xlabel="expert", ylabel="layer")
    _whole_numbers(axes)
    figure.colorbar(image, label="load, trainer - engine")


def _blame(figure: Figure, examined: Examination) -> None:
    ratio = _array(examined, "router/blame_ratio", _NO_ROUTES)
    axes = figure.subplots()
    shown = np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.nan)
    if np.isnan(shown).all():
        raise Missing("the engines agree on every token")
    reach = max(2.0, float(np.nanmax(shown)), 1 / float(np.nanmin(shown)))
    image = axes.imshow(shown, cmap="RdBu_r", norm=LogNorm(1 / reach, reach), origin="lower", aspect="auto")
    axes.grid(False)
    axes.set(xlabel="expert", ylabel="layer")
    _whole_numbers(axes)
    figure.colorbar(image, label="d² of its tokens / of others")


# Causes


def _parts(figure: Figure, examined: Examination) -> None:
    rows = [
        row
        for row in _rows(examined, "causes", "the passes that tell causes apart are not recorded")
        if row["gap"] == "policy"
    ]
    rows = [row for row in rows if row["square_share"] or row["nats"]]
    if not rows:
        raise Missing("the engines agree exactly")
    axes = figure.subplots()
    place, colors = np.arange(len(rows)), [_PARTS.get(row["part"], GREY) for row in rows]
    axes.barh(place, [row["square_share"] for row in rows], color=colors)
    for y, row in enumerate(rows):
        x = row["square_share"]
        text = f" {x:.0%}, mean {row['nats']:+.1e} nats a token "
        axes.text(max(x, 0), y, text, va="center", fontsize=8)
    axes.set(
        yticks=place,
        yticklabels=[row["part"] for row in rows],
        xlabel="share of the squared gap between trainer and sampling",
    )
    axes.set_xlim(min(0, *(row["square_share"] for row in rows)) - 0.02, 1.6)
    axes.invert_yaxis()


def _ages(figure: Figure, examined: Examination) -> None:
    rows = _rows(examined, "version_gaps", "the weight versions of the tokens are not recorded")
    if len(rows) < 2:
        raise Missing("all tokens are of one age")
    axes = figure.subplots()
    gap = [row["gap"] for row in rows]
    axes.plot(gap, [row["k3_nats"] for row in rows], "o-", color=ORANGE)
    axes.set(xlabel="versions between sampling and training", ylabel="k3 against the behavior, nats")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# What panels share

_NO_PAIR = "no token has been scored by both engines under the same weights"


def _array(examined: Examination, key: str, reason: str = "the data are not recorded") -> np.ndarray:
    if key not in examined.arrays or not examined.arrays[key].size:
        raise Missing(reason)
    return examined.arrays[key]


def _rows(examined: Examination, table: str, reason: str) -> list[Row]:
    if not examined.tables.get(table):
        raise Missing(reason)
    return examined.tables[table]


def _histogram(examined: Examination) -> tuple[np.ndarray, np.ndarray]:
    counts = _array(examined, "mismatch/gap_histogram", _NO_PAIR)
    if not counts.any():
        raise Missing("the engines agree exactly on every token")
    return counts, examined.arrays["mismatch/gap_edges"]


def _label(row: Row) -> str:
    return str(row["label"]) if "label" in row else _range(row)


def _range(row: Row) -> str:
    """The last one of a table may be open."""
    low, high = row["low"], row.get("high")
    return f"{low:g} .." if high is None else f"{low:g}" if low == high else f"{low:g} .. {high:g}"


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


CAUSE = Panel(
    "What the gap is made of",
    "The parts add up, token by token; a negative share works against the others.",
    _parts,
)
SHIFTS = Panel(
    "Do the records fit each other?",
    "Both must peak at 0; a peak elsewhere is an off-by-one in a record, not noise.",
    _shifts,
)
BY_LAYER = Panel(
    "Where do experts differ?",
    "Same tokens, same weights. Free minus local is the cascade from earlier layers.",
    _by_layer,
)
SECTIONS: dict[str, tuple[Panel[Examination], ...]] = {
    "Causes": (
        CAUSE,
        Panel("How does the gap grow with age?", "At 0 it is the engine's, its growth is staleness.", _ages),
        Panel("Do flipped experts explain it?", "Tokens by how many layers chose other experts than the engine.", _dose),
        Panel("Is one expert to blame?", "Red: tokens that used it have larger gaps than those that did not.", _blame),
    ),
    "Structure": (
        SHIFTS,
        Panel("Are the layers the same?", "Bright diagonal: yes. Bright off the diagonal: layers are counted differently.", _layer_map),
    ),
    "Log-probs, token by token": (
        Panel("Probabilities", "Tokens under the same weights; all should lie on the line.", _probabilities),
        Panel("How large are the gaps?", "d = trainer minus engine, by its size.", _gaps),
        Panel("How heavy is the tail?", "Grey lines: probability ratios of 1.5, 2, 5 and 10.", _exceedance),
        Panel("By probability", "Of the token under the engine.", _by("probability")),
        Panel("By entropy", "Of the trainer's next-token distribution, nats.", _by("entropy")),
        Panel("By position", "In the response.", _by("position")),
        Panel("By length", "Of the response.", _by("length")),
        Panel("By kind of token", "First, last and other tokens of a response.", _by("token_class")),
    ),
    "Sequences": (
        Panel("What a sequence's weight sees", "Every dot is a sequence; log W moves by D without any update.", _sequence_gaps),
        Panel("What the engine alone leaves of phi", "VESPO's kernel at W = exp(D): 1 means that the engine costs nothing.", _budget),
    ),
    "Router": (
        BY_LAYER,
        Panel("Where in the sequence?", "Overlap of the expert sets.", _by_position),
        Panel("Are flips near ties?", "Noise flips near ties only; a flat curve is a bug.", _margins),
        Panel("How many layers flip at once?", "Flips that come in bunches are cascades.", _flips_per_token),
        Panel("Does load move?", "A pattern means that flips go one way: a bias, not noise.", _load),
    ),
}  # fmt: skip
"""Of the doctor's page, in order."""
ESSENTIAL: tuple[Panel[Examination], ...] = (
    CAUSE, *SECTIONS["Causes"][2:], *SECTIONS["Log-probs, token by token"][:3], *SECTIONS["Router"][:3], *SECTIONS["Sequences"],
)  # fmt: skip
"""Of a run's report."""
