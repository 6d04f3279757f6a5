"""What the instruments cost: the cheap counters of every step, and the rich ones of an examined one, on the driver.

    python benchmarks/instruments.py [--sequences 512] [--tokens 2048] [--run RUN]

A synthetic step of the size that a run of Qwen3-30B-A3B has: 48 layers with 8 of 128 experts, a tenth of whose choices the
engines make differently.  CPU seconds of one core, medians of repetitions that take turns, so that a busy machine spoils
little.  They are shares of two parts of a step: the training pass alone on --gpus H100 at 40 % of their peak, which no step
can be shorter than, and the sampling of one response of full length, which none is shorter than at max_staleness = 0.  The driver's seconds pass beside
the push of the weights; what they take beyond it is time/measure_s of a run.

With --run: shares of a real run's own steps, from its metrics.jsonl; "measure" is all counters and files of a step, "examine"
the trainer's three passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.control.examination import Case, case_metrics, write_cases
from megatron_vespo.control.measurements import step_metrics
from megatron_vespo.control.selection import Selection
from megatron_vespo.evidence import Facts
from megatron_vespo.rundir import read_metrics, rollout_rows
from megatron_vespo.trainer.hf_config import read_model_shape
from megatron_vespo.trainer.step_time import training_flops
from megatron_vespo.types import (
    Examined,
    Experts,
    Group,
    Prompt,
    Response,
    Rollout,
    Scored,
    StepOutput,
    TrainSequence,
    Update,
    VersionSpan,
)

CONFIGS = Path(__file__).parent.parent / "configs"
LAYERS, EXPERTS, TOP_K = 48, 128, 8
FLIPS, NOISE, GROUP, PROMPT_TOKENS = 0.1, 0.02, 8, 128
PEAK_FLOPS_S, UTILISATION, DECODE_TOKENS_S = 989e12, 0.4, 50
VERSION, REPETITIONS = 40, 3


class Step:
    """All that the driver is handed in one step."""

    def __init__(self, cfg: TrainConfig, num: int, num_tokens: int) -> None:
        self._rng = np.random.default_rng(0)
        self._num_tokens = num_tokens
        self.cfg = cfg
        prompt = Prompt(uid="p", token_ids=np.ones(PROMPT_TOKENS, np.int32), text="?", answer="")
        sequence = TrainSequence(
            uid="p", token_ids=np.ones(num_tokens, np.int32), num_prompt_tokens=PROMPT_TOKENS
        )
        self.chosen = Selection.of(cfg, VERSION, [sequence] * num)
        routes = {i: self._routes() for i in self.chosen.routed}
        rollouts = [self._rollout(prompt, routes[i][0] if i in routes else None) for i in range(num)]
        self.groups = [
            Group(rollouts=tuple(rollouts[i : i + GROUP]), ordinal=i) for i in range(0, num, GROUP)
        ]
        self.rescored = [
            self._scored(r, routes[i][1] if i in routes else None) for i, r in enumerate(rollouts)
        ]
        scored = [self._scored(r, routes[i][2] if i in routes else None) for i, r in enumerate(rollouts)]
        update = Update(
            loss=0.1, grad_norm=1.0, learning_rate=1e-6, entropy=0.5, kl=None, num_tokens=num * num_tokens,
            num_microbatches=8, num_inputs=num * num_tokens, num_packed=num * num_tokens,
        )  # fmt: skip
        log_w = self._rng.normal(0, 1, num)
        self.output = StepOutput(
            scored=tuple(scored), log_w=log_w, coefficient=np.exp(-np.abs(log_w)), updates=(update,)
        )
        self.cases = [self._case(i, rollouts[i]) for i in self.chosen.examined]

    def _routes(self) -> list[Experts]:
        """When sampled, re-scored, and of the trainer."""
        rows = self._num_tokens - 1
        first = self._rng.integers(0, EXPERTS, (rows, LAYERS, 1))
        base = (first + 3 * np.arange(TOP_K)) % EXPERTS
        routes = []
        for _ in range(3):
            flips = self._rng.random((rows, LAYERS)) < FLIPS / 2
            one = base.copy()
            one[..., -1] = np.where(flips, (base[..., -1] + 1) % EXPERTS, base[..., -1])
            routes.append(one.astype(np.uint8))
        return routes

    def _logp(self, num: int) -> np.ndarray:
        return -self._rng.exponential(0.5, num).astype(np.float32)

    def _rollout(self, prompt: Prompt, experts: Experts | None) -> Rollout:
        num = self._num_tokens - PROMPT_TOKENS
        response = Response(
            token_ids=np.ones(num, np.int32), text="x" * num, behavior_logp=self._logp(num),
            spans=(VersionSpan(version=VERSION - 1, start=0, end=num),), experts=experts, finish_reason="stop",
        )  # fmt: skip
        return Rollout(
            prompt=prompt, response=response, reward=1.0, advantage=float(self._rng.choice([-1, 1]))
        )

    def _scored(self, rollout: Rollout, experts: Experts | None) -> Scored:
        behavior = rollout.response.behavior_logp
        noise = self._rng.normal(0, NOISE, len(behavior)).astype(np.float32)
        return Scored(logp=behavior + noise, experts=experts, entropy=np.abs(behavior))

    def _case(self, i: int, rollout: Rollout) -> Case:
        policy = self.output.scored[i]
        return Case(
            rollout=rollout,
            examined=Examined(
                natural=policy,
                repeat=self._scored(rollout, None).logp,
                replayed=self._scored(rollout, policy.experts),
                margin=self._rng.exponential(1, (self._num_tokens - 1, LAYERS)).astype(np.float32),
            ),
            policy=policy,
            engine=self.rescored[i],
            train_version=VERSION - 1,
        )


def cpu_s(*works: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each."""
    seconds = [[] for _ in works]
    for _ in range(REPETITIONS):
        for work, mine in zip(works, seconds, strict=True):
            began = time.process_time()
            work()
            mine.append(time.process_time() - began)
    return [statistics.median(mine) for mine in seconds]


def synthetic(num: int, num_tokens: int, gpus: int) -> None:
    cfg = load_config(TrainConfig, CONFIGS / "qwen3_30b_a3b.toml", ["instruments.every=20"])
    step, facts = Step(cfg, num, num_tokens), Facts(num_experts=EXPERTS)

    def counters() -> None:
        step_metrics(VERSION, step.groups, step.output, step.rescored, cfg.algorithm)

    def write() -> None:
        rows = rollout_rows(step.groups, step.output, step.rescored, step=VERSION)
        write_cases(folder, [rows[i] for i in step.chosen.examined], step.cases, facts)

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        cheap, causes, files = cpu_s(counters, lambda: case_metrics(step.cases, facts), write)
        size = next(folder.iterdir()).stat().st_size
    shape = read_model_shape(CONFIGS / "shapes" / "qwen3_30b_a3b")
    responses = num * (num_tokens - PROMPT_TOKENS)
    flops = training_flops(shape, num * num_tokens, num * num_tokens**2, responses)
    steps = {
        f"training pass on {gpus} H100": flops / (gpus * PEAK_FLOPS_S * UTILISATION),
        f"sampling at {DECODE_TOKENS_S} tokens/s": (num_tokens - PROMPT_TOKENS) / DECODE_TOKENS_S,
    }
    every, compared = cfg.instruments.every, sum(one.experts is not None for one in step.output.scored)
    passes = len(step.cases) / num * min(steps.values())
    rows = (
        ("cheap, each step", cheap, 1, f"experts of {compared * (num_tokens - 1):,} tokens"),
        (
            "rich, driver",
            causes + files,
            every,
            f"{causes:.2f} s causes, {files:.2f} s file of {size / 1e6:.0f} MB",
        ),
        (
            "rich, ranks",
            passes,
            every,
            f"three forward passes over {len(step.cases)} sequences, by operations",
        ),
    )
    say(f"{num} sequences x {num_tokens} tokens, {LAYERS} layers, {TOP_K} of {EXPERTS} experts")
    say(f"{'':18}{'seconds':>8}{'every':>7}" + "".join(f"{name:>28}" for name in steps))
    say(f"{'':33}" + "".join(f"{f'{s:.1f} s':>28}" for s in steps.values()))
    for name, seconds, period, remark in rows:
        shares = "".join(f"{seconds / period / step_s:>28.2%}" for step_s in steps.values())
        say(f"{name:18}{seconds:8.2f}{period:7d}{shares}   {remark}")


def of_run(run: Path) -> None:
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["step"]]
    whole = sum(record["time/step_s"] for record in records)
    for phase in ("measure", "examine"):
        took = [record[f"time/{phase}_s"] for record in records if record.get(f"time/{phase}_s")]
        say(
            f"{phase:8}{sum(took):8.2f} s in {len(took)} of {len(records)} steps, {whole:.1f} s: {sum(took) / whole:.2%}"
        )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        of_run(arguments.run)
    else:
        synthetic(arguments.sequences, arguments.tokens, arguments.gpus)


if __name__ == "__main__":
    main()
