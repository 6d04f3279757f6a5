"""The demo over several seeds and staleness bounds, on this machine, as one table.

    python benchmarks/demo.py [--seeds 0 1 2] [--staleness 1] [--root runs/benchmark]

Runs what `make demo` runs (inputs, fine-tuning, RL), one after the other and nothing beside it, and prints for each
run: held-out reward at the start, the best and at the end, wall-clock minutes of the whole and of RL alone, seconds per
RL step. With several bounds (--staleness 0 1) the ratio of their median step times follows, measured side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

VESPO = [sys.executable, "-m", "megatron_vespo.cli"]


def run(*argv: str) -> None:
    subprocess.run([*VESPO, *argv], check=True, stdout=subprocess.DEVNULL)


def warm_start(place: Path, seed: int) -> float:
    """Inputs and fine-tuning of one seed; seconds."""
    began = time.monotonic()
    inputs = place / "inputs"
    run("demo-inputs", str(inputs), "--seed", str(seed))
    run(
        "sft", "configs/demo_sft.toml", f"seed={seed}", f"run_dir={place / 'sft'}", f"model={inputs / 'model'}",
        f"data.train={inputs / 'demonstrations.parquet'}",
    )  # fmt: skip
    return time.monotonic() - began


def train(place: Path, seed: int, staleness: int) -> tuple[float, list[dict]]:
    """RL of one seed under one bound; seconds with start-up and end, and the metrics."""
    began, run_dir, inputs = time.monotonic(), place / f"rl-staleness{staleness}", place / "inputs"
    run(
        "train", "configs/demo.toml", f"seed={seed}", f"run_dir={run_dir}", f"model={place / 'sft' / 'final'}",
        f"prompts.train={inputs / 'train.parquet'}", f"evaluation.sets.heldout={inputs / 'heldout.parquet'}",
        f"loop.max_staleness={staleness}",
    )  # fmt: skip
    return time.monotonic() - began, [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def row(seed: int, staleness: int, warm_s: float, rl_s: float, records: list[dict]) -> str:
    heldout = [record["reward/heldout_mean"] for record in records if "reward/heldout_mean" in record]
    steps = [record["time/step_s"] for record in records[2:]]
    stale = max(record["staleness/max_steps"] for record in records[1:])
    gap = max(record["mismatch/abs_max_nats"] for record in records[1:])
    return (
        f"{seed:4d} {staleness:5d} {stale:9d} {heldout[0]:8.3f} {max(heldout):6.3f} {heldout[-1]:6.3f} "
        f"{(warm_s + rl_s) / 60:11.1f} {rl_s / 60:8.1f} {statistics.median(steps):10.2f} {gap:9.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[1])
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    lines = ["seed bound max stale    start   best    end  all minutes  RL only  s per step max |d|"]
    step_s: dict[int, list[float]] = {bound: [] for bound in args.staleness}
    for seed in args.seeds:
        place = args.root / f"seed{seed}"
        warm_s = warm_start(place, seed)
        for bound in args.staleness:
            rl_s, records = train(place, seed, bound)
            step_s[bound] += [record["time/step_s"] for record in records[2:]]
            lines.append(row(seed, bound, warm_s, rl_s, records))
            sys.stderr.write(lines[-1] + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    first, *others = args.staleness
    for bound in others:
        ratio = statistics.median(step_s[first]) / statistics.median(step_s[bound])
        sys.stdout.write(f"median step time, bound {first} / bound {bound}: {ratio:.2f}\n")


if __name__ == "__main__":
    main()
