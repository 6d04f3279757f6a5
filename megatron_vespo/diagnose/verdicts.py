"""A run judged in sentences: what is normal, what to watch, what is wrong, and the number that says so.

Levels are judged against what healthy runs show, and trends against the run's own first quarter, because a
mismatch that grows warns earlier than one that is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_vespo.algo.norms import NORMS
from megatron_vespo.diagnose.history import History

Level = Literal["good", "watch", "bad"]


@dataclass(frozen=True)
class Verdict:
    level: Level
    text: str


def judge(history: History) -> list[Verdict]:
    """One verdict per question that the run has the numbers for, the grave ones first."""
    questions = _RL_QUESTIONS if history.is_rl else _SFT_QUESTIONS
    found = [verdict for ask in questions if (verdict := ask(history)) is not None]
    return sorted(found, key=lambda verdict: ("bad", "watch", "good").index(verdict.level))


def _end(history: History) -> Verdict | None:
    if history.state != "stopped early":
        return None
    return Verdict(
        "bad",
        f"stopped at step {history.last_step} of {history.num_steps}, without a final model: no process holds the run; see logs/, or resume it",
    )


def _learning(history: History) -> Verdict | None:
    steps, reward = history.series("reward/heldout_mean")
    if len(reward) < 2:
        return None
    gain, fall = reward[-1] - reward[0], reward.max() - reward[-1]
    text = f"held-out reward {reward[0]:.3f} → {reward[-1]:.3f}, best {reward.max():.3f} at step {steps[reward.argmax()]}"
    if fall > 0.1:
        return Verdict("bad", f"the policy got worse again: {text}")
    return Verdict("good" if gain > 0.02 else "watch", text if gain > 0.02 else f"no clear learning: {text}")


def _staleness(history: History) -> Verdict | None:
    _, oldest = history.series("staleness/max_steps")
    if not len(oldest):
        return None
    bound = history.config["loop"]["max_staleness"]
    broken = oldest.max() > bound
    return Verdict(
        "bad" if broken else "good",
        f"staleness bound {'broken' if broken else 'respected'}: at most {oldest.max():.0f}, bound {bound} (steps)",
    )


def _ledger(history: History) -> Verdict | None:
    table = history.sequences
    if table is None:
        return None
    visits = np.unique(np.stack([table.ordinal, table.sample]), axis=1).shape[1]
    twice = len(table.ordinal) - visits
    if twice:
        return Verdict(
            "bad",
            f"{twice} responses were trained on twice: the same visit to a prompt stands in two rollout rows",
        )
    groups = len(np.unique(table.ordinal))
    return Verdict("good", f"no group was trained on twice: {groups} visits to prompts, each in one step")


def _phi(history: History) -> Verdict | None:
    _, phi = history.series("algo/phi_mean")
    if not len(phi):
        return None
    now = _late(phi)
    level: Level = "good" if now > 0.5 else "watch" if now > 0.1 else "bad"
    words = {
        "good": "phi alive",
        "watch": "phi low: much of the data hardly counts",
        "bad": "phi dead: the data is thrown away",
    }
    advice = (
        "" if level == "good" else "; lower max_staleness or the learning rate, and compare what moves log W"
    )
    return Verdict(level, f"{words[level]}: mean {now:.2f} over the last quarter of the run{advice}")


def _sign_balance(history: History) -> Verdict | None:
    _, positive = history.series("algo/phi_pos_mean")
    _, negative = history.series("algo/phi_neg_mean")
    if not len(positive) or not len(negative) or _late(negative) <= 0:
        return None
    ratio = _late(positive) / _late(negative)
    if 0.5 < ratio < 2:
        return None
    favoured = "reinforcement" if ratio > 1 else "suppression"
    return Verdict(
        "watch",
        f"{favoured} outweighs: phi is {_late(positive):.2f} where A ≥ 0 and {_late(negative):.2f} where A < 0",
    )


def _mismatch(history: History) -> Verdict | None:
    _, k3 = history.series("mismatch/k3_nats")
    if not len(k3):
        return None
    dtypes = {history.setting("trainer.dtype", "bfloat16"), history.setting("rollout.dtype", "bfloat16")}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    normal, wrong = NORMS["mismatch/k3_nats"].limits("float32" if dtype == "float32" else "moe")
    now = _late(k3)
    if now > wrong:
        return Verdict(
            "bad",
            f"the engines disagree: k3 {now:.1e} nats, normal for {dtype} is below {normal:.0e}; suspect the weight push, the temperature or the tokens",
        )
    if now > normal:
        return Verdict(
            "watch", f"mismatch raised: k3 {now:.1e} nats, normal for {dtype} is below {normal:.0e}"
        )
    return Verdict("good", f"mismatch normal for {dtype}: k3 {now:.1e} nats")


def _mismatch_trend(history: History) -> Verdict | None:
    _, k3 = history.series("mismatch/k3_nats")
    if len(k3) < 8 or _early(k3) <= 0 or _late(k3) < 5 * _early(k3):
        return None
    return Verdict(
        "watch",
        f"mismatch grows: k3 {_early(k3):.1e} → {_late(k3):.1e} nats; the trend warns earlier than the level",
    )


def _nats_budget(history: History) -> Verdict | None:
    table = history.sequences
    if table is None or np.isnan(table.engine_nats).all():
        return None
    if history.setting("algorithm.reference", "behavior") == "proximal":  # neither is in W
        return None
    engine = float(np.nanquantile(np.abs(table.engine_nats), 0.95))
    stale = float(np.nanquantile(np.abs(table.stale_nats), 0.95))
    shares = f"95% of sequences: below {engine:.1e} nats from the engine, below {stale:.1e} from staleness"
    if engine < 0.1:
        return Verdict("good", f"log W measures staleness, not the engine: {shares}")
    return Verdict("watch", f"the engine alone moves log W: {shares}; phi falls without any policy update")


def _experts(history: History) -> Verdict | None:
    having = [
        record["experts/overlap_layer"] for record in history.records if "experts/overlap_layer" in record
    ]
    if not having:
        return None
    by_layer = np.array(having).mean(0)
    worst = int(by_layer.argmin())
    text = f"both engines chose the same experts for {by_layer.mean():.2%}, least in layer {worst}: {by_layer[worst]:.2%}"
    if by_layer[worst] < 0.8:
        return Verdict(
            "bad",
            f"{text}; so little is rather a bug (shifted tokens or layers, wrong weights) than rounding",
        )
    return Verdict("good" if by_layer[worst] > 0.97 else "watch", text)


def _signal(history: History) -> Verdict | None:
    _, signal = history.series("reward/signal_fraction")
    if not len(signal) or _late(signal) > 0.3:
        return None
    return Verdict(
        "watch",
        f"little signal: in only {_late(signal):.0%} of the groups do rewards differ; prompts are too easy or too hard",
    )


def _truncation(history: History) -> Verdict | None:
    _, cut = history.series("response/truncated_fraction")
    if not len(cut) or _late(cut) < 0.2:
        return None
    return Verdict(
        "watch",
        f"{_late(cut):.0%} of the responses are cut at the length limit; raise sampling.max_response_tokens",
    )


def _gradient(history: History) -> Verdict | None:
    steps, norm = history.series("optim/grad_norm")
    if not len(norm):
        return None
    peak, typical = int(norm.argmax()), float(np.median(norm))
    if norm[peak] > 10 * typical:
        return Verdict(
            "watch", f"gradient spike at step {steps[peak]}: {norm[peak]:.3g}, median {typical:.3g}"
        )
    return Verdict("good", f"gradient norm steady: median {typical:.3g}, largest {norm[peak]:.3g}")


def _waiting(history: History) -> Verdict | None:
    _, wait = history.series("time/wait_s")
    _, total = history.series("time/step_s")
    if not len(wait) or wait.sum() < 0.3 * total.sum():
        return None
    return Verdict(
        "watch",
        f"the trainer waits {wait.sum() / total.sum():.0%} of the time for responses; add engines or staleness, or shorten responses",
    )


def _unjudged(history: History) -> Verdict | None:
    kinds = ("timeouts", "deaths", "errors", "outages")
    counts = {kind: int(history.series(f"verifier/{kind}")[1].sum()) for kind in kinds}
    num, table = sum(counts.values()), history.sequences
    if not num:
        return None
    what = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    reward = history.config.get("reward", {}).get("failure_reward", 0.0)
    text = f"{num} responses could not be judged ({what}) and got reward {reward:g}; see logs/driver.log"
    many = table is not None and num > 0.1 * len(table.reward)
    return Verdict("bad" if many else "watch", text)


def _loss(history: History) -> Verdict | None:
    _, loss = history.series("optim/loss")
    if len(loss) < 2:
        return None
    fell = loss[-1] < loss[0]
    return Verdict(
        "good" if fell else "watch",
        f"loss {'fell' if fell else 'did not fall'}: {loss[0]:.4g} → {loss[-1]:.4g}",
    )


def _early(values: np.ndarray) -> float:
    return float(values[: max(1, len(values) // 4)].mean())


def _late(values: np.ndarray) -> float:
    return float(values[-max(1, len(values) // 4) :].mean())


_Question = Callable[[History], Verdict | None]
_SFT_QUESTIONS: tuple[_Question, ...] = (_end, _loss, _gradient)
_RL_QUESTIONS: tuple[_Question, ...] = (
    _end, _learning, _staleness, _ledger, _phi, _sign_balance, _mismatch, _mismatch_trend, _nats_budget, _experts,
    _signal, _truncation, _gradient, _waiting, _unjudged,
)  # fmt: skip
