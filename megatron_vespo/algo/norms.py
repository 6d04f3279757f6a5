"""What is healthy: definition, bounds, source and next step of every number that a verdict is made of.

Bounds are those of published runs and of other frameworks' gates where there are any; where there are none the source says so.
They hold for temperature 1 without truncation.  A number between its two bounds is to be watched.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["healthy", "warn", "broken"]
Condition = Literal["float32", "dense", "moe", "replay"]
"""Of trainer and engine: both float32; else a dense model, a MoE, a MoE whose trainer repeats the engine's experts."""
Bounds = tuple[float, float]
"""Healthy up to the first, broken from the second (or downwards, where the first is the larger)."""

_R3 = "R3 (arXiv 2510.11370): SGLang against Megatron, Qwen3-30B-A3B 1.5e-3, with replay 7.5e-4, dense 8B 6.4e-4"
_DEFINITION = "definition"
_OWN = "provisional: this project's measurements on tiny models"


@dataclass(frozen=True, kw_only=True)
class Norm:
    """One metric."""

    meaning: str
    formula: str
    unit: str = ""
    bounds: Bounds | None = None
    """None: informational."""
    variants: Mapping[Condition, Bounds] = field(default_factory=dict[Condition, Bounds])
    source: str = _DEFINITION
    next_step: str = ""

    def bounds_for(self, condition: Condition) -> Bounds | None:
        return self.variants.get(condition, self.bounds)

    def limits(self, condition: Condition) -> Bounds:
        """The bounds of a metric that is known to have some."""
        bounds = self.bounds_for(condition)
        assert bounds is not None, "an informational metric"
        return bounds


_ENGINE_STEP = (
    "see the causes: routing asks for router replay, decode for another attention back-end or batch-invariant kernels, engine for a "
    "float32 LM head and router"
)
_RECORD_STEP = "nothing else on this page means anything before the record is right; see the test's detail"

NORMS: Mapping[str, Norm] = {
    # Two engines, the same weights
    "mismatch/k3_nats": Norm(
        meaning="Engine mismatch: estimates KL(engine || trainer) per token under the same weights.",
        formula="mean(exp(d) - 1 - d), d = trainer - engine", unit="nats",
        bounds=(2e-3, 1e-2), variants={"float32": (1e-6, 1e-4), "dense": (1e-3, 1e-2), "replay": (1e-3, 8e-3)},
        source=f"{_R3}; MiMo 2e-3 to 1e-2 in production; Fireworks 1.3e-2 before a collapse", next_step=_ENGINE_STEP),
    "mismatch/abs_mean_nats": Norm(
        meaning="Mean size of the gap of a token's log-prob.", formula="mean |d|", unit="nats",
        bounds=(0.03, 0.1), variants={"float32": (1e-4, 1e-2)},
        source="vime and TRL 0.010 to 0.018 healthy, MiMo up to 0.046, slime's CI gate 0.1; 0.2 after a missed weight push (TRL issue 5312)",
        next_step=_ENGINE_STEP),
    "mismatch/k1_nats": Norm(
        meaning="Drift: what a sequence's weight loses per token, with its sign.", formula="-mean d", unit="nats",
        bounds=(3e-3, 3e-2), variants={"float32": (1e-5, 1e-3)}, source="the scale of KL; miles' CI compares means within 0.03",
        next_step="a drift far from k3 is a bias, not noise: compare temperature, truncation and vocabulary of both sides"),
    "mismatch/mult_err": Norm(
        meaning="NeMo-RL's token_mult_prob_error.", formula="mean exp(|d|)",
        bounds=(1.05, 1.1), variants={"float32": (1.001, 1.01), "replay": (1.02, 1.1)},
        source="NeMo-RL: above 1.05 investigate; its CI gates 1.1, with replay 1.02", next_step=_ENGINE_STEP),
    "mismatch/prob_abs_mean": Norm(
        meaning="verl's rollout_probs_diff_mean: of probabilities, not of log-probs.", formula="mean |exp(logp) - exp(logp')|",
        bounds=(5e-3, 1e-2), variants={"float32": (1e-5, 1e-3)}, source="verl FAQ", next_step=_ENGINE_STEP),
    "mismatch/pearson": Norm(
        meaning="Correlation of the probabilities of both engines.", formula="Pearson(exp(logp), exp(logp'))",
        bounds=(0.995, 0.98), source="verl reports 0.9925 to 0.998; introduced by MiniMax-M1 (arXiv 2506.13585)", next_step=_ENGINE_STEP),
    "mismatch/f_2": Norm(
        meaning="Extreme tokens: what truncation at a ratio of 2 cuts.", formula="mean 1[|d| > log 2]",
        bounds=(5e-3, 5e-2), variants={"float32": (1e-5, 1e-3), "replay": (1e-3, 5e-2)},
        source="MiMo 6e-4 to 9e-3; above 0.1 R3 saw a precursor of collapse", next_step="look at the tokens that differ most, and at the dose of flipped experts"),
    "mismatch/ratio_mean": Norm(
        meaning="Mean probability ratio; 1 if both are normalised over the same tokens.", formula="mean exp(d)", source=_DEFINITION,
        next_step="away from 1 by more than its error: truncation, temperature or another vocabulary"),
    "mismatch/ess_token": Norm(
        meaning="Effective share of the tokens under token-level weights.", formula="(sum r)^2 / (n sum r^2)",
        bounds=(0.9, 0.3), source="verl's threshold 0.3", next_step=_ENGINE_STEP),
    "mismatch/seq_outlier_fraction": Norm(
        meaning="Sequences whose mean exp(|d|) exceeds 2.", formula="mean 1[mult_err > 2]",
        bounds=(0.0, 0.01), source="NeMo-RL masks at 2; its issue 2100 had 15 to 20 % that depended on the prompt",
        next_step="look at these sequences: one prompt's answers all wrong points to the engine, not to noise"),
    "mismatch/seq_growth": Norm(
        meaning="How the spread of a sequence's gap grows with its length.", formula="std(D | T) ~ T^H",
        source="0.5: independent tokens; 1: one error per sequence"),
    "mismatch/seq_budget_nats": Norm(
        meaning="What the engine alone takes from log W of a long sequence.", formula="k3 * 95th percentile of T", unit="nats",
        bounds=(0.7, 3.0), source="VESPO's kernel at k = 2, lambda = 3: median phi 0.69 at 0.7 nats, 0.02 at 3",
        next_step="repeat the engine's experts, or keep the engine out of W: algorithm.reference = \"proximal\""),
    "mismatch/slope": Norm(
        meaning="Slope of the trainer's log-probs on the engine's; another temperature makes it differ from 1.",
        formula="Huber fit of logp = a + b logp'", source=_DEFINITION, next_step="compare the temperatures of both sides"),
    # Semantics
    "semantics/surprise_nats": Norm(
        meaning="Whether tokens were drawn from the distribution that the trainer knows.", formula="mean(-M) - mean(entropy)", unit="nats",
        source="0 in expectation; top-p and a lower temperature make it negative"),
    "semantics/bf16_behavior_fraction": Norm(
        meaning="Log-probs that bfloat16 holds exactly.", formula="mean 1[low 16 bits are 0]",
        bounds=(0.01, 0.9), source="by chance 1 / 65536; miles issue 2722 saw steps of 0.125",
        next_step="compute the log-softmax in float32 (SGLang --enable-fp32-lm-head)"),
    # Routers
    "router/mismatch": Norm(
        meaning="Choices (token, layer) whose expert sets differ between the engines, same weights.", formula="mean 1[P != Q]",
        bounds=(0.15, 0.30), variants={"float32": (1e-3, 0.05)}, source="R3: about 10 % of the routers of Qwen3-30B-A3B",
        next_step="if routing's share of the gap is above a half: trainer.router_replay = \"engine\""),
    "router/overlap": Norm(
        meaning="Share of the experts that both chose.", formula="mean #(P and Q) / K",
        bounds=(0.97, 0.9), source="98.7 % at R3's magnitude; chance is K / E", next_step="below 0.9 suspect a mapping, not noise"),
    "router/local": Norm(
        meaning="The same when everything upstream is replayed: what one layer adds.", formula="mean 1[P_local != Q]",
        bounds=(0.05, 0.12), variants={"float32": (1e-3, 0.02)}, source=_OWN, next_step="compare the router's dtype on both sides"),
    "router/far_flip_fraction": Norm(
        meaning="Flips far from a tie, which noise cannot make.", formula="flips above 6 times the implied noise / flips",
        bounds=(0.05, 0.2), source=f"margin law; {_OWN}", next_step="test the structure of the record, and the router's weights"),
    "router/load_tv": Norm(
        meaning="How much load moves between experts, by layer.", formula="1/2 sum |share_P - share_Q|",
        bounds=(4e-3, 3e-2), source="random swaps make 1e-3 at 64k tokens; small samples make more", next_step="look at the map of load: one way is a bias"),
    "router/zero_overlap_fraction": Norm(
        meaning="Choices with no expert in common.", formula="mean 1[P and Q disjoint]",
        bounds=(1e-3, 1e-2), source="miles' CI fails at 1 %", next_step="garbage rows or a wrong mapping: see the structure tests"),
    "router/layers_per_token": Norm(meaning="Layers in which a token's experts differ.", formula="mean sum_l 1[P != Q]", source="R3: about 6 of 48"),
    "router/any_flip": Norm(meaning="Tokens with a difference in any layer.", formula="mean 1[any l: P != Q]", source="R3: 94 %"),
    "router/implied_noise": Norm(
        meaning="Noise of the router's scores that explains the flips.", formula="E|eps| = 2 flip rate / f(0), f the density of margins",
        source="margin law, within 20 % on a toy model"),
    "router/cascade_share": Norm(meaning="Flips that earlier layers caused.", formula="1 - sum local / sum free", source="73 % on a toy model of 24 layers"),
    # Causes
    "cause/routing_r": Norm(
        meaning="How much of the squared gap goes away with the engine's experts.", formula="1 - E[(B - M)^2] / E[(A - M)^2]",
        source="identity", next_step="above 0.5 turn on router replay; below 0.2 look elsewhere"),
    "cause/floor_z": Norm(
        meaning="Engine mismatch against the trainer's own noise.", formula="k3(A, engine) / k3(A, A2)",
        bounds=(2.5, 5.0), variants={"float32": (1e9, 1e12)}, source="R3: 1.5e-3 / 8.4e-4 = 1.8",
        next_step="near 1 ask for deterministic kernels in the trainer first"),
    "total/phi_pos_mean": Norm(
        meaning="VESPO's kernel on all of the gap: how much the data still counts where A >= 0.", formula="mean phi(exp(D))",
        bounds=(0.5, 0.1), source="phi = 1 on policy; below 0.1 data are thrown away", next_step="lower max_staleness or the learning rate"),
    "total/ess_seq": Norm(
        meaning="Effective share of the sequences under whole-sequence weights.", formula="(sum W)^2 / (B sum W^2)",
        bounds=(0.5, 0.1), source=_OWN, next_step="see the causes for what moves W"),
    # Structure
    "structure/logp_shift": Norm(
        meaning="By how many tokens the engine's log-probs are shifted.", formula="argmax over shifts of the correlation",
        bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    "structure/token_shift": Norm(
        meaning="By how many rows the engine's experts are shifted.", formula="argmax over shifts of the overlap", bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    "structure/layer_offset": Norm(
        meaning="By how many layers the engine's experts are shifted.", formula="argmax over layers of the overlap", bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    "structure/permuted_experts": Norm(
        meaning="Experts that bear another number in the engine.", formula="assignment that maximises co-occurrence", bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    "structure/mispaired_sequences": Norm(
        meaning="Sequences whose experts fit another sequence better.", formula="overlap with the rows of others", bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    "structure/garbage_row_fraction": Norm(
        meaning="Rows in runs that agree by chance alone.", formula="share of rows with overlap near K / E",
        bounds=(0.0, 1e-3), source="NeMo-RL: absent or rare; miles' assert at 1 %", next_step=_RECORD_STEP),
    "structure/zero_row_fraction": Norm(
        meaning="Rows that nobody wrote.", formula="share of rows of zeros", bounds=(0.0, 1e-3), next_step=_RECORD_STEP),
    "structure/duplicate_fraction": Norm(
        meaning="Choices that name one expert twice.", formula="share of rows", bounds=(0.0, 1e-3), next_step=_RECORD_STEP),
    "structure/row_count_errors": Norm(
        meaning="Sequences with another number of rows than tokens - 1.", formula="count", bounds=(0.0, 1.0), next_step=_RECORD_STEP),
    # Live only
    "sync/canary_abs_mean_nats": Norm(
        meaning="Fixed tokens scored by both engines right after a weight push.", formula="mean |d|", unit="nats",
        source="judged by its jump: three times the median of earlier pushes (TRL issue 5312: 13 times after a missed one)",
        next_step="a jump means that weights did not arrive"),
    "stale/seq_nats_std": Norm(
        meaning="Spread of what staleness adds to log W.", formula="std of sum(engine now - engine when sampled)", unit="nats", source=_DEFINITION),
    "experts/overlap_mean": Norm(
        meaning="The live form of router/overlap.", formula="mean #(P and Q) / K", bounds=(0.97, 0.9), source="98.7 % at R3's magnitude"),
}  # fmt: skip
"""By name, as in metrics.jsonl and in an examination."""


def level(name: str, value: float, condition: Condition) -> Level | None:
    """What the value means; None where the metric has no bounds."""
    norm = NORMS.get(name)
    bounds = norm.bounds_for(condition) if norm else None
    if bounds is None:
        return None
    healthy, broken = bounds
    size = abs(value)
    if healthy > broken:  # less is worse
        return "healthy" if size >= healthy else "broken" if size < broken else "warn"
    return "healthy" if size <= healthy else "broken" if size >= broken else "warn"


def explain(name: str) -> str:
    """A metric's definition, bounds and source, as lines of text.

    Raises:
        KeyError: the name is not in the catalogue; the message names the nearest.
    """
    if name not in NORMS:
        near = difflib.get_close_matches(name, NORMS, n=3, cutoff=0.4)
        raise KeyError(
            f"metric = '{name}': not in the catalogue; {'did you mean ' + ', '.join(near) if near else 'list it without an argument'}?"
        )
    norm = NORMS[name]
    lines = [
        name,
        f"  {norm.meaning}",
        f"  formula    {norm.formula}" + (f"   [{norm.unit}]" if norm.unit else ""),
    ]
    for condition, bounds in {"": norm.bounds, **norm.variants}.items():
        if bounds is not None:
            healthy, broken = bounds
            signs = (">=", "<") if healthy > broken else ("<=", ">=")
            lines.append(
                f"  {condition or 'bounds':10s} healthy {signs[0]} {healthy:g}, broken {signs[1]} {broken:g}"
            )
    lines.append(f"  source     {norm.source}")
    if norm.next_step:
        lines.append(f"  next       {norm.next_step}")
    return "\n".join(lines)
