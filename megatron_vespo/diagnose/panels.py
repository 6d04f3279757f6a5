"""The plots of a report: each panel is one question, answered from a run's history.

A panel that lacks its data raises `Missing`; the report prints the reason in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import ValidationError

from megatron_vespo.config import AlgorithmConfig
from megatron_vespo.diagnose.history import History, SequenceTable
from megatron_vespo.diagnose.page import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW, Missing, Panel
from megatron_vespo.metrics import PHASES
from megatron_vespo.types import Doubles

PHASE_COLORS: dict[str, str] = dict(
    zip(PHASES, (GREY, RED, BLUE, ORANGE, GREEN, YELLOW, PURPLE, SKY), strict=True)
)
_POINTS = 4000
"""Of a scatter plot; more only make it black."""


# Reward


def _reward_by_step(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _draw_reward(axes, history, lambda key: history.series(key)[0])
    axes.set_xlabel("step")


def _reward_by_minutes(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _draw_reward(axes, history, history.minutes)
    axes.set_xlabel("minutes since the start")


def _draw_reward(axes: Axes, history: History, x_of: Callable[[str], np.ndarray]) -> None:
    _, train = history.series("reward/train_mean")
    _, heldout = history.series("reward/heldout_mean")
    if not len(train) and not len(heldout):
        raise Missing("no reward has been logged")
    if len(train):
        window = max(1, len(train) // 20)
        x = x_of("reward/train_mean")
        axes.plot(x, train, ".", color=BLUE, alpha=0.35, markersize=5, label="train, one step")
        if window > 1:
            axes.plot(x, _trailing_mean(train, window), color=BLUE, label=f"train, mean of {window} steps")
    if len(heldout):
        axes.plot(x_of("reward/heldout_mean"), heldout, "o-", color=RED, markersize=4, label="held-out")
    axes.set_ylabel("mean reward")
    axes.set_ylim(min(0, axes.get_ylim()[0]), max(1.02, axes.get_ylim()[1]))
    axes.legend(loc="best")


# Off-policyness


def _staleness_histogram(figure: Figure, history: History) -> None:
    lists = [record["staleness/histogram"] for record in history.records if "staleness/histogram" in record]
    if not lists:
        raise Missing("staleness/histogram has not been logged")
    tokens = np.zeros(max(map(len, lists)))
    for counts in lists:
        tokens[: len(counts)] += counts
    axes = figure.subplots()
    bars = axes.bar(range(len(tokens)), 100 * tokens / max(1, tokens.sum()), color=BLUE, width=0.5)
    axes.bar_label(bars, [f"{share:.1f}%" for share in 100 * tokens / max(1, tokens.sum())], padding=2)
    axes.set(xlabel="staleness: optimizer steps between sampling and training", ylabel="% of response tokens")
    axes.set_xticks(range(len(tokens)))
    axes.set_xlim(-0.7, len(tokens) - 0.3)
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)


def _staleness_over_time(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "staleness/mean_steps", color=BLUE, label="mean over tokens")
    _line(axes, history, "staleness/max_steps", color=ORANGE, label="oldest token", drawstyle="steps-mid")
    bound = history.config["loop"]["max_staleness"]
    axes.axhline(bound, color=RED, linestyle="--", linewidth=1, zorder=3, label=f"bound {bound}")
    axes.set(xlabel="step", ylabel="staleness, steps", ylim=(-0.05 * max(1, bound), 1.35 * max(1, bound)))
    axes.legend(loc="upper right", ncols=3)


def _log_w_over_time(figure: Figure, history: History) -> None:
    table = _sequences(history)
    steps, parts = _by_step(table.step, table.log_w)
    bands = np.array([np.quantile(part, (0.05, 0.25, 0.5, 0.75, 0.95)) for part in parts]).T
    axes = figure.subplots()
    axes.fill_between(
        steps, bands[0], bands[4], color=BLUE, alpha=0.15, linewidth=0, label="5% to 95% of sequences"
    )
    axes.fill_between(steps, bands[1], bands[3], color=BLUE, alpha=0.3, linewidth=0, label="25% to 75%")
    axes.plot(steps, bands[2], color=BLUE, label="median", marker="." if len(steps) < 3 else None)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlabel="step", ylabel="log W, nats a sequence")
    axes.margins(y=0.2)
    axes.legend(loc="upper right", ncols=3)


def _log_w_histogram(figure: Figure, history: History) -> None:
    table = _sequences(history)
    axes = figure.subplots()
    edges = np.histogram_bin_edges(table.log_w, 60).tolist()
    for signs, color, label in _by_sign(table):
        axes.hist(
            table.log_w[signs], edges, color=color, alpha=0.6, label=f"{label}: {signs.sum()} sequences"
        )
    axes.set(xlabel="log W, nats a sequence", ylabel="sequences", yscale="log")
    axes.legend(loc="upper right")


def _phi_over_time(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "algo/phi_pos_mean", color=GREEN, label="A ≥ 0")
    _line(axes, history, "algo/phi_neg_mean", color=RED, label="A < 0")
    if len(history.series("algo/ess_fraction")[0]):
        _line(axes, history, "algo/ess_fraction", color=GREY, linewidth=1, label="ESS fraction of raw W")
    axes.set(xlabel="step", ylabel="mean phi(W)")
    axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
    axes.legend(loc="lower left", ncols=3)


def _kernel(figure: Figure, history: History) -> None:
    table = _sequences(history)
    low, high = min(-2.5, np.quantile(table.log_w, 0.002)), max(1.3, np.quantile(table.log_w, 0.998))
    x = np.linspace(low, high, 300)
    axes = figure.subplots()
    shown = np.linspace(0, len(table.log_w) - 1, min(_POINTS, len(table.log_w))).astype(int)
    positive = table.advantage[shown] >= 0
    density = axes.twinx()
    for advantage, signs, color, label in ((1.0, positive, GREEN, "A ≥ 0"), (-1.0, ~positive, RED, "A < 0")):
        density.hist(table.log_w[shown][signs], 80, range=(low, high), color=color, alpha=0.25)
        if (curve := _coefficient(history, x, advantage)) is not None:
            axes.plot(x, curve, color=color, linewidth=1, label=f"c(W), {label}")
        axes.plot(
            table.log_w[shown][signs], table.coefficient[shown][signs], "o", color=color, alpha=0.25,
            markersize=6, markeredgewidth=0, label=f"trained, {label}", rasterized=True,
        )  # fmt: skip
    density.margins(y=1.5)  # the dots' own density, at the foot of the plot
    density.set_axis_off()
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set(xlabel="log W, nats a sequence", ylabel="coefficient", xlim=(low, high))
    axes.set_ylim(0, 1.2 * max(1.2, np.quantile(table.coefficient, 0.998)))
    for handle in axes.legend(loc="upper left", ncols=2).get_lines():
        handle.set_alpha(1)


_OF_W_ALONE = {"vespo", "reinforce", "importance_sampling", "seq_tis", "seq_mis", "topr"}
"""Methods whose coefficient is a function of a sequence's W."""


def _coefficient(history: History, log_w: Doubles, advantage: float) -> Doubles | None:
    """The function that trains, by the very code, so that the curve cannot disagree; None where W alone does not decide."""
    import torch  # seconds to import, and only this panel needs it

    from megatron_vespo.algo.coefficients import Ratios, coefficient

    try:
        algorithm = AlgorithmConfig.model_validate(history.setting("algorithm", {}))
    except ValidationError:  # written by another version
        return None
    options = (
        algorithm.vespo.length_exponent or algorithm.vespo.noise_aware or algorithm.correction.kind != "none"
    )
    if algorithm.name not in _OF_W_ALONE or algorithm.needs_whole_update or options:
        return None
    x = torch.from_numpy(log_w)
    ratios = Ratios(log_ratio_S=x, log_w_N=x, num_tokens_N=torch.ones_like(x), seq_S=torch.arange(len(x)))
    return coefficient(algorithm, ratios, torch.full_like(x, advantage)).numpy()


def _who_counts(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "algo/dead_fraction", color=RED, label="dead: coefficient < 0.01")
    _line(axes, history, "algo/top1pct_share", color=BLUE, label="held by the largest 1 %")
    _line(axes, history, "algo/net_advantage", color=GREEN, label="net: + reinforces, - suppresses")
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlabel="step", ylabel="share of the update")
    axes.margins(y=0.3)
    axes.legend(loc="upper left")


def _by_update(figure: Figure, history: History) -> None:
    records = [record for record in history.records if "algo/phi_mean_updates" in record]
    if not records:
        raise Missing("a batch has one update (loop.updates_per_batch = 1)")
    late = records[-max(1, len(records) // 4) :]
    num = min(len(record["algo/phi_mean_updates"]) for record in late)  # a guard may leave some out
    axes = figure.subplots()
    place = np.arange(1, num + 1)
    for key, color, label in (
        ("phi_mean", BLUE, "mean coefficient"),
        ("ess_phi_fraction", ORANGE, "its effective sample size"),
        ("ess_fraction", GREY, "that of raw W"),
    ):
        rows = [record[f"algo/{key}_updates"][:num] for record in late if f"algo/{key}_updates" in record]
        if rows:
            axes.plot(place, np.mean(rows, 0), color=color, label=label, marker=".")
    axes.set(xlabel="update on the batch", ylabel="share of the weight", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.3)
    axes.legend(loc="lower left")


def _by_lag(figure: Figure, history: History) -> None:
    records = [record for record in history.records if "algo/log_w_lag_count" in record]
    size = max((len(record["algo/log_w_lag_count"]) for record in records), default=0)
    if size < 2:
        raise Missing(
            "W is not against the behavior, or no sequence was older than the weights that it trained"
        )
    count, sums, squares = np.zeros((3, size))
    for record in records:
        n, mean, std = (np.array(record[f"algo/log_w_lag_{key}"]) for key in ("count", "mean", "std"))
        count[: len(n)] += n
        sums[: len(n)] += n * mean
        squares[: len(n)] += n * (std**2 + mean**2)
    lag = np.flatnonzero(count)
    mean = sums[lag] / count[lag]
    std = np.sqrt(np.maximum(squares[lag] / count[lag] - mean**2, 0))
    axes = figure.subplots()
    axes.errorbar(lag, mean, std, color=BLUE, marker="o", linestyle="none", capsize=4)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(xlabel="mean staleness of the sequence, steps", ylabel="log W, nats: mean ± deviation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(0.15)


# The two engines


def _token_gap(figure: Figure, history: History) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for key, color, label in (
        ("max", ORANGE, "largest"),
        ("p99", SKY, "99th percentile"),
        ("mean", BLUE, "mean"),
    ):
        _line(top, history, f"mismatch/abs_{key}_nats", color=color, label=label)
    _line(bottom, history, "mismatch/k3_nats", color=PURPLE, label="k3")
    for axes in (top, bottom):
        _log_scale(axes)
    top.set_ylabel("|Δlogp|, nats")
    bottom.set(xlabel="step", ylabel="k3, nats")
    top.legend(loc="upper right", ncols=3)
    figure.align_ylabels()


def _sequence_nats(figure: Figure, history: History) -> None:
    table = _sequences(history)
    known = ~np.isnan(table.engine_nats)
    if not known.any():
        raise Missing("no sequence was re-scored by the engine (engine_logp is null in the rollout files)")
    axes = figure.subplots()
    for nats, color, label in (
        (table.stale_nats, ORANGE, "staleness"),
        (table.engine_nats, BLUE, "engine mismatch"),
    ):
        steps, size = _by_step(table.step[known], np.abs(nats[known]))
        axes.plot(
            steps, [np.quantile(s, 0.95) for s in size], color=color, label=f"{label}, 95% of sequences below"
        )
        axes.plot(
            steps, [np.mean(s) for s in size], color=color, linewidth=1, linestyle=":", label=f"{label}, mean"
        )
    _log_scale(axes)
    axes.set(xlabel="step", ylabel="|nats| a sequence")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)


def _expert_heat_map(figure: Figure, history: History) -> None:
    steps, overlap = _layers(history, "experts/overlap_layer")
    axes = figure.subplots()
    low = min(0.99, float(overlap.min()))
    image = axes.pcolormesh(
        _edges(steps),
        np.arange(overlap.shape[1] + 1) - 0.5,
        overlap.T,
        cmap="cividis",
        vmin=low,
        vmax=1,
        rasterized=True,
    )
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="step", ylabel="MoE layer")
    figure.colorbar(image, ax=axes, label="share of experts both engines chose")


def _expert_by_layer(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    for key, color, label in (
        ("experts/overlap_layer", BLUE, "same weights: trainer and engine"),
        ("experts/stale_overlap_layer", ORANGE, "trainer now and engine when sampling"),
    ):
        if not any(key in record for record in history.records) and color == ORANGE:
            continue
        _, overlap = _layers(history, key)
        layers = np.arange(overlap.shape[1])
        axes.plot(layers, overlap.mean(0), "o-", color=color, markersize=4, label=f"{label}, mean")
        axes.fill_between(layers, overlap.min(0), overlap.max(0), color=color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="MoE layer", ylabel="share of experts in common")
    axes.margins(y=0.15)
    axes.legend(loc="lower left")


# Responses and optimizer


def _responses(figure: Figure, history: History) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    _line(top, history, "algo/entropy_nats", color=PURPLE)
    _line(bottom, history, "response/length_mean", color=BLUE)
    top.set_ylabel("entropy, nats")
    bottom.set(xlabel="step", ylabel="length, tokens")
    figure.align_ylabels()


def _data_quality(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "reward/signal_fraction", color=BLUE, label="groups with unequal rewards")
    _line(
        axes, history, "response/truncated_fraction", color=ORANGE, label="responses cut at the length limit"
    )
    axes.set(xlabel="step", ylabel="fraction", ylim=(-0.03, 1.18))
    axes.legend(loc="upper right", ncols=2)


def _loss(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "optim/loss", color=BLUE)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    if history.series("optim/loss")[1].min() > 0:
        _log_scale(axes)


def _optimizer(figure: Figure, history: History) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    _line(top, history, "optim/grad_norm", color=BLUE, label="before clipping")
    clip = history.setting("trainer.optimizer.clip_grad_norm", None)
    if clip is not None:
        top.axhline(clip, color=RED, linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
    _line(bottom, history, "optim/learning_rate", color=GREEN)
    top.set_ylabel("gradient norm")
    top.legend(loc="upper right", ncols=2)
    bottom.set(xlabel="step", ylabel="learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", scilimits=(-3, 3))
    figure.align_ylabels()


def _step_time(figure: Figure, history: History) -> None:
    steps, total = history.series("time/step_s")
    if not len(steps):
        raise Missing("time/step_s has not been logged")
    axes = figure.subplots()
    parts = {
        name: np.array([r.get(f"time/{name}_s", 0.0) for r in history.records if "time/step_s" in r])
        for name in PHASES
    }
    parts = {name: seconds for name, seconds in parts.items() if seconds.any()}
    if parts:
        axes.stackplot(
            steps,
            *parts.values(),
            labels=list(parts),
            colors=[PHASE_COLORS[p] for p in parts],
            step="mid",
            linewidth=0,
        )
    axes.plot(steps, total, color="#202124", linewidth=0.8, label="whole step", drawstyle="steps-mid")
    axes.set(xlabel="step", ylabel="seconds a step")
    axes.set_ylim(
        0, 1.25 * float(np.quantile(np.maximum(total, sum(parts.values(), np.zeros(len(steps)))), 0.99))
    )
    axes.legend(loc="upper center", ncols=len(parts) + 1, columnspacing=1, handlelength=1)


def _throughput(figure: Figure, history: History) -> None:
    axes = figure.subplots()
    _line(axes, history, "throughput/tokens_per_s", color=BLUE)
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)


# What panels share


def _line(axes: Axes, history: History, key: str, **style: object) -> None:
    steps, values = history.series(key)
    if not len(steps):
        raise Missing(f"{key} has not been logged")
    marker = "." if len(steps) < 3 else None  # one point makes no line
    axes.plot(steps, values, marker=marker, **style)  # pyright: ignore[reportArgumentType]


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis, unless the engines agree so well that there is nothing above zero to show."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend


def _sequences(history: History) -> SequenceTable:
    if history.sequences is None:
        raise Missing("there are no rollout files")
    return history.sequences.trained


def _layers(history: History, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and [steps, layers] of a metric that is a list."""
    having = [record for record in history.records if key in record]
    if not having:
        raise Missing(f"{key} has not been logged (a dense model, or experts are not recorded)")
    return np.array([record["step"] for record in having]), np.array([record[key] for record in having])


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders around steps that may have gaps."""
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - 0.5], middle, [steps[-1] + 0.5]])


def _by_step(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct steps, and the values of each; `step` ascends."""
    steps, first = np.unique(step, return_index=True)
    return steps, np.split(values, first[1:])


def _by_sign(table: SequenceTable) -> Sequence[tuple[np.ndarray, str, str]]:
    positive = table.advantage >= 0
    return (positive, GREEN, "A ≥ 0"), (~positive, RED, "A < 0")


def _trailing_mean(values: Doubles, window: int) -> Doubles:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    last = np.arange(len(values)) + 1
    return (sums[last] - sums[first]) / (last - first)


RL_SECTIONS: dict[str, tuple[Panel[History], ...]] = {
    "Reward": (
        Panel("Reward by step", "Train: the step's own rollouts. Held-out: prompts never trained on.", _reward_by_step),
        Panel("Reward by time", "The same against the wall clock; a resumed run includes its pause.", _reward_by_minutes),
    ),
    "Off-policyness": (
        Panel("How stale were the tokens?", "Counted when trained: trainer version minus the version that sampled the token.", _staleness_histogram),
        Panel("Staleness over time", "The buffer guarantees the bound; nothing is dropped to keep it.", _staleness_over_time),
        Panel("Importance weight over time", "log W = sum over the response of policy minus reference log-prob.", _log_w_over_time),
        Panel("Distribution of log W", "All sequences, by the sign of their advantage.", _log_w_histogram),
        Panel("What the kernel leaves", "Mean coefficient per step. Near 1: data counts fully. Near 0: data is thrown away.", _phi_over_time),
        Panel("Who decides the update?", "Contributions are coefficient * advantage; on policy the net is 0.", _who_counts),
        Panel("What is left of a batch?", "Update by update, mean over the last quarter of the steps.", _by_update),
        Panel("How does log W grow with age?", "All steps together.", _by_lag),
        Panel("Where the data lies on the kernel", "Curve: the function that trained. Dots: trained sequences; bars: how many lie there.", _kernel),
    ),
    "Trainer against engine": (
        Panel("Log-prob gap, token by token", "Trainer minus engine under the same weights; k3 estimates KL(engine || trainer).", _token_gap),
        Panel("What moves log W", "Against the behavior log W splits exactly: engine mismatch (same weights) plus staleness (engine now minus then) plus updates.", _sequence_nats),
        Panel("Expert agreement by layer and step", "Same tokens, same weights, both engines. Dark: they route differently.", _expert_heat_map),
        Panel("Expert agreement by layer", "Line: mean over steps; band: lowest to highest step.", _expert_by_layer),
    ),
    "Responses": (
        Panel("Entropy and length", "Entropy of the next-token distribution, mean over response tokens.", _responses),
        Panel("Is the data any use?", "Groups whose rewards are all equal carry no signal.", _data_quality),
    ),
    "Optimizer and time": (
        Panel("Gradient norm and learning rate", "The norm is over all parameters, before clipping.", _optimizer),
        Panel("Where a step's time goes", "Phases are stacked; the line is the whole step as the loop measured it.", _step_time),
    ),
}  # fmt: skip

SFT_SECTIONS: dict[str, tuple[Panel[History], ...]] = {
    "Training": (
        Panel("Loss", "Mean negative log-prob of the demonstrations' assistant tokens.", _loss),
        Panel(
            "Gradient norm and learning rate", "The norm is over all parameters, before clipping.", _optimizer
        ),
        Panel(
            "Where a step's time goes",
            "Phases are stacked; the line is the whole step as the loop measured it.",
            _step_time,
        ),
        Panel("Throughput", "Tokens trained per second of the whole step.", _throughput),
    ),
}
