"""Inject every known failure, ask the doctor, and write the confusion matrix.

    python tools/bug_zoo.py                                  all cases, fresh seeds: docs/bug_zoo.md, about 10 minutes
    python tools/bug_zoo.py --seeds 0 --cases "old weights"  one patient, printed alone

Exit status 1 where less than 90 % are right, or a healthy one is called ill.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own path is tools/

import torch  # noqa: E402

from megatron_vespo.rundir import write_atomically  # noqa: E402
from tools.zoo import matrix, page  # noqa: E402
from tools.zoo.failures import BACKGROUNDS, CASES  # noqa: E402

FRESH_SEEDS = (30, 31, 32)
"""Those on which no rule was tuned."""
LEAST_RIGHT = 0.9


def examine_all(cases: Sequence[str], seeds: Sequence[int], workers: int) -> list[matrix.Outcome]:
    """Every patient, with a line for each as it comes."""
    found, began = list[matrix.Outcome](), time.perf_counter()
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        patients = [pool.submit(_outcomes, case, seed) for case in cases for seed in seeds]
        for patient in patients:
            for outcome in patient.result():
                found.append(outcome)
                mark = "" if outcome.is_right else f"  <- {outcome.injected}"
                sys.stdout.write(
                    f"{time.perf_counter() - began:5.0f} s  {outcome.case}, seed {outcome.seed}, {outcome.background}, "
                    f"{outcome.known}: {outcome.diagnosed}{mark}\n"
                )
                sys.stdout.flush()
    return found


def _outcomes(case: str, seed: int) -> list[matrix.Outcome]:
    return list(matrix.outcomes(case, [seed], list(BACKGROUNDS), list(matrix.KNOWN)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH_SEEDS)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE", help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--output", type=Path, help="default: docs/bug_zoo.md where all cases are run")
    args = parser.parse_args()
    found = examine_all(args.cases or list(CASES), args.seeds, args.workers)
    whole = [outcome for outcome in found if outcome.known == "everything"]
    output = args.output or (None if args.cases else ROOT / "docs" / "bug_zoo.md")
    if output:
        write_atomically(output, page.markdown(found).encode())
    right, alarms = matrix.share_right(whole), matrix.num_false_alarms(found)
    sys.stdout.write(
        f"{matrix.confusion(whole)}\n\n{right:.1%} of {len(whole)} right, {alarms} false alarm(s)\n"
    )
    return int(right < LEAST_RIGHT or alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
