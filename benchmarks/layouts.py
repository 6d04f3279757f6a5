"""Agreement of every layout with one rank, in numbers, as one table; the tests only demand a bound.

    python benchmarks/layouts.py [--model moe|dense|llama] [--recompute none selective full]

Real gloo ranks train tests/trainer's tiny model in float32 on six sequences of uneven length, four of them with tokens
of an environment, in every layout of tests/trainer/test_layouts.py. Columns: the largest difference from one rank of
gradients (gathered to Hugging Face names; their largest entry is printed above), of log-probs (nats), of log W (nats) and
of the weights after a step, whether all expert choices are equal, and the median seconds of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.trainer.ranks import Pool
from tests.trainer.test_layouts import LAYOUTS, named
from tests.trainer.tiny import VESPO, largest_gap, make_moderate_batch, trainer_config, write_model

HEAD = f"{'layout':52s} recompute    gradients  log-probs    log W   weights  experts  s/step"


def row(
    pool: Pool, model: Path, batch: list[Any], one: tuple[Any, ...], axes: dict[str, int], recompute: str
) -> str:
    gradients, step, weights = one
    cfg = trainer_config(**axes).model_copy(update={"recompute": recompute})
    grid = pool.grid(cfg, model, algorithm=VESPO)
    grad_gap = largest_gap(grid.gradients(batch), gradients)
    got = grid.step(batch)
    weight_gap = largest_gap(grid.weights(), weights)
    seconds = []
    for i in range(3):
        began = time.perf_counter()
        grid.step(batch, 1 + i)
        seconds.append(time.perf_counter() - began)
    pairs = list(zip(got.scored, step.scored, strict=True))
    logp_gap = max(float(np.abs(a.logp - b.logp).max()) for a, b in pairs)
    experts = "-"
    if pairs[0][0].experts is not None:
        experts = (
            "equal" if all((np.sort(a.experts) == np.sort(b.experts)).all() for a, b in pairs) else "DIFFER"
        )
    log_w_gap = float(np.abs(got.log_w - step.log_w).max())
    return (
        f"{named(axes):52s} {recompute:9s} {grad_gap:12.1e} {logp_gap:10.1e} {log_w_gap:8.1e} {weight_gap:9.1e} "
        f"{experts:>8s} {statistics.median(seconds):7.3f}"
    )


def fits(kind: str, axes: dict[str, int]) -> bool:
    return kind == "moe" or not axes.keys() & {"expert", "expert_tensor"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["moe", "dense", "llama"], default="moe")
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tied = args.model != "moe"
        model = write_model(Path(place), moe=not tied, tie_word_embeddings=tied, llama=args.model == "llama")
        pool = Pool(4)
        batch = make_moderate_batch(pool, model)
        grid = pool.grid(trainer_config(), model, algorithm=VESPO)
        one = grid.gradients(batch), grid.step(batch), grid.weights()
        largest = max(float(np.abs(g).max()) for g in one[0].values())
        sys.stdout.write(f"largest entry of a gradient on one rank: {largest:.3f}\n{HEAD}\n")
        for axes in LAYOUTS:
            for recompute in args.recompute if fits(args.model, axes) else ():
                sys.stdout.write(row(pool, model, batch, one, axes, recompute) + "\n")
                sys.stdout.flush()
        pool.close()


if __name__ == "__main__":
    main()
