"""The run log and the live view."""

from __future__ import annotations

import io
import json
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.config import ConfigError
from megatron_vespo.metrics import LiveView, RunLog, phase_times, si, sparkline, step_line
from megatron_vespo.rollout.server import free_port
from megatron_vespo.rundir import RunDirectory, read_metrics
from megatron_vespo.types import RunError

STEP_42 = {
    "step": 42,
    "reward/train_mean": 0.413,
    "staleness/mean_steps": 1.0,
    "staleness/max_steps": 2,
    "algo/log_w_mean": -0.31,
    "algo/log_w_std": 1.1,
    "algo/phi_mean": 0.72,
    "mismatch/k3_nats": 2.1e-3,
    "mismatch/abs_max_nats": 0.3,
    "experts/overlap_mean": 0.998,
    "optim/loss": 0.01,
    "optim/grad_norm": 0.84,
    "time/step_s": 3.2,
    "time/wait_s": 0.4,
    "time/train_s": 2.0,
    "time/sync_s": 0.6,
    "time/eval_s": 0.0,
    "throughput/tokens_per_s": 1400.0,
}


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run", "seed = 1\n") as run:
        yield run


def scalars(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run.events))
    board.Reload()
    return {tag: [(e.step, board_value(e)) for e in board.Tensors(tag)] for tag in board.Tags()["tensors"]}


def board_value(event) -> float:
    return float(
        np.frombuffer(event.tensor_proto.tensor_content, np.float32)[0]
        if event.tensor_proto.tensor_content
        else event.tensor_proto.float_val[0]
    )


def test_a_record_comes_back_as_it_was_logged(run):
    with RunLog(run) as log:
        log.log(1, {"a/loss": np.float32(0.5), "a/count": np.int64(3), "a/layer": np.array([1.0, 0.25])})
        log.log(2, {"a/loss": 0.1 + 0.2})
    first, second = read_metrics(run.metrics)
    assert {key: first[key] for key in first if key != "time"} == {
        "step": 1,
        "a/loss": 0.5,
        "a/count": 3,
        "a/layer": [1.0, 0.25],
    }
    assert second["a/loss"] == 0.1 + 0.2
    assert second["time"] >= first["time"]


def test_a_step_is_on_disk_before_the_next_one_begins(run):
    with RunLog(run) as log:
        record = log.log(1, {"a/loss": 0.5})
        assert json.loads(run.metrics.read_text()) == record


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), [0.0, float("nan")], "0.5", None, True])
def test_what_is_no_finite_number_is_refused_by_name(run, value):
    with RunLog(run) as log:
        with pytest.raises(
            RunError, match=r"metric 'algo/phi_mean(\[1\])?' = .* at step 7: expected a finite number"
        ):
            log.log(7, {"optim/loss": 0.1, "algo/phi_mean": value})
        assert run.metrics.read_bytes() == b""


def test_tensorboard_shows_the_scalars(run):
    with RunLog(run) as log:
        log.log(1, {"a/loss": 0.5, "a/layer": [1.0, 2.0]})
        log.log(2, {"a/loss": 0.25})
    assert scalars(run) == {"a/loss": [(1, 0.5), (2, 0.25)]}


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(run):
    with RunLog(run) as log:
        for step in (1, 2, 3):
            log.log(step, {"a/loss": float(step)})
    run.rewind(1)
    with RunLog(run) as log:
        log.log(2, {"a/loss": 20.0})
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2]
    assert scalars(run) == {"a/loss": [(1, 1.0), (2, 20.0)]}


def test_a_step_is_one_aligned_line():
    assert step_line(STEP_42) == (
        "step   42 | reward  0.413 | held-out    ... | stale 1.0 max 2 | log W  -0.31 +- 1.10 | phi 0.72 | k3 2.1e-03"
        " | max|d| 3.0e-01 | experts 0.998 | grad  0.84 |   3.2 s = wait 0.4 + train 2.0 + sync 0.6 | 1.4k tok/s"
    )
    evaluated = step_line(STEP_42 | {"reward/heldout_mean": 0.4})
    assert "held-out  0.400" in evaluated
    assert len(evaluated) == len(step_line(STEP_42))


def test_a_step_of_supervised_fine_tuning_shows_its_loss():
    record = {
        "step": 10,
        "optim/loss": 1.5,
        "optim/grad_norm": 2.0,
        "optim/learning_rate": 1e-3,
        "time/step_s": 0.4,
    }
    assert step_line(record) == "step   10 | loss  1.5000 | grad  2.00 | lr 1.0e-03 |   0.4 s"


def test_an_evaluation_before_the_first_step_is_a_line_too():
    assert step_line({"step": 0, "reward/heldout_mean": 0.2}) == "step    0 | held-out  0.200"


def test_phases_that_took_no_time_are_left_out():
    assert phase_times(STEP_42) == {"wait": 0.4, "train": 2.0, "sync": 0.6}


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (999.6, "1k"), (1420, "1.42k"), (11400, "11.4k"), (2.08e6, "2.08M"), (0.5, "0.5")],
)
def test_large_numbers_get_a_prefix(value, text):
    assert si(value) == text


def test_a_sparkline_spans_the_whole_history():
    assert sparkline([0.0, 0.5, 1.0], 20) == "▁▅█"  # 7 * 0.5 rounds to 4, the fifth block
    assert sparkline([0.0] * 50 + [1.0] * 50, 2) == "▁█"
    assert sparkline([-1.0, 1.0], 20) == "▁█"


def test_without_a_terminal_each_step_and_event_is_a_line():
    out = io.StringIO()
    with LiveView("demo", 100, console=Console(file=out, force_terminal=False, width=80)) as view:
        view.event("engine is ready [port 31000]")
        view.step(STEP_42)
    event, step = out.getvalue().splitlines()  # nothing wraps, brackets are no markup
    assert event.endswith("engine is ready [port 31000]")
    assert step == step_line(STEP_42)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_shows_a_panel_that_fits(width):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=width, height=40, color_system=None, legacy_windows=False
    )
    with LiveView("demo", 100, max_staleness=2, console=console) as view:
        view.step({"step": 0, "reward/heldout_mean": 0.25})
        view.event("checkpoint saved")
        view.step(STEP_42)
    frame = out.getvalue()[out.getvalue().rindex("╭") :]
    assert max(map(len, frame.splitlines())) <= min(width, 100)
    for part in (
        "step 42/100",
        "train 0.413",
        "held-out 0.250",
        "2 max, bound 2",
        "k3 2.1e-03",
        "checkpoint saved",
        "train 2.0",
    ):
        assert part in frame


def test_an_exception_leaves_the_view_and_is_not_swallowed():
    with (
        pytest.raises(RunError, match="engine died"),
        LiveView("demo", 2, console=Console(file=io.StringIO())),
    ):
        raise RunError("engine died")


def test_wandb_that_is_missing_is_an_error_with_a_remedy(run):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"wandb_project = 'vespo': .* not installed; pip install wandb"):
            RunLog(run, wandb_project="vespo")
    else:
        pytest.skip("wandb is installed here")


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_is_told_the_scalars_of_the_newest_step(run):
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with RunLog(run, prometheus=address) as log:
        log.log(1, {"mismatch/k3_nats": 1e-3, "sync/bytes": 5})
        log.log(
            2, {"mismatch/k3_nats": 2e-3, "eval/a-b/avg": 0.5, "eval/a_b/avg": 0.25, "experts/layers": [1.0]}
        )
        lines = [line for line in scrape(address).splitlines() if not line.startswith("#")]
    assert 'megatron_vespo_mismatch_k3_nats{metric="mismatch/k3_nats",run="run"} 0.002' in lines
    assert 'megatron_vespo_eval_a_b_avg{metric="eval/a-b/avg",run="run"} 0.5' in lines
    assert 'megatron_vespo_eval_a_b_avg{metric="eval/a_b/avg",run="run"} 0.25' in lines
    assert 'megatron_vespo_step{metric="step",run="run"} 2.0' in lines
    assert len(lines) == 5, "with the time"
    with pytest.raises(urllib.error.URLError):
        scrape(address)  # the port is free again


def test_a_port_that_is_taken_is_told_as_such(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"prometheus = '{address}': cannot listen there"):
            RunLog(run, prometheus=address)
