"""How long a run needs to recover from each kind of failure of an engine.

    python benchmarks/chaos.py

Real loop, fleet, publisher and weight push over gloo; three simulated engines and a simulated trainer with steps of 0.2 s
(tests/control/chaos.py, which says what each fault is; the same runs are tests).  A step takes as long as a restart where
the whole fleet is lost.  The timeouts that decide how soon a hang is noticed are printed with the table.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megatron_vespo.data.demo import write_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.control.chaos import FAULTS, PROMPTS, STALENESS, config, suffer_in_the_middle


def main() -> None:
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_tiny_model(root / "model", seed=0)
        limits = config(root).rollout
        _say(
            f"stall_timeout_s = {limits.stall_timeout_s:g}, sync_timeout_s = {limits.sync_timeout_s:g}; a simulated engine "
            "restarts in 1 s after a pause of 1 s"
        )
        _say(
            f"{'fault':36s} {'recovery s':>10s} {'longest step s':>14s} {'usual s':>8s} {'lost':>5s} {'twice':>6s} {'stale':>6s}"
        )
        for number, fault in enumerate(FAULTS):
            directory = root / str(number)
            directory.mkdir()
            (directory / "model").symlink_to(root / "model")
            seen = asyncio.run(suffer_in_the_middle(fault, directory))
            wanted = set(range(PROMPTS * len(seen.steps)))
            lost, twice = len(wanted - set(seen.ordinals)), len(seen.ordinals) - len(set(seen.ordinals))
            recovery = f"{seen.recovery_s:.1f}" if fault.loses else "-"
            _say(
                f"{fault.name:36s} {recovery:>10s} {seen.longest_step_s:14.1f} {seen.usual_step_s:8.2f} {lost:5d} {twice:6d} "
                f"{seen.staleness_max:3d}<={STALENESS}",
            )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
