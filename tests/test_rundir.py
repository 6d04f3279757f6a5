"""The run directory: who may use it, what a resume keeps, what a rollout file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.rundir import (
    RunDirectory,
    is_running,
    read_metrics,
    rollout_files,
    rollout_rows,
    write_rollouts,
)
from megatron_vespo.types import Group, Prompt, Response, Rollout, RunError, Scored, StepOutput, VersionSpan


def start_a_run(path, config=""):
    """A run that did one step."""
    with RunDirectory(path, config) as run:
        run.metrics.write_text('{"step": 1}\n')


def test_a_fresh_directory_gets_its_layout(tmp_path):
    with RunDirectory(tmp_path / "a" / "b", "seed = 1\n") as run:
        assert run.config.read_text() == "seed = 1\n"
        assert not run.resumed
        assert {p.name for p in run.path.iterdir()} >= {"rollouts", "checkpoints", "logs", "events", "lock"}
        assert "python" in json.loads(run.environment.read_text())["versions"]


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    start_a_run(tmp_path, "seed = 1\n")
    with pytest.raises(ConfigError, match=r"already holds a run \(metrics.jsonl.*never overwritten"):
        RunDirectory(tmp_path, "seed = 2\n")
    assert (tmp_path / "config.toml").read_text() == "seed = 1\n"
    with RunDirectory(tmp_path, "seed = 1\n", resume=True):  # the refusal did not keep the lock
        pass


def test_resuming_where_there_is_no_run_starts_one(tmp_path):
    with RunDirectory(tmp_path, "seed = 1\n", resume=True) as run:
        assert not run.resumed


def test_a_directory_in_which_a_run_only_failed_to_start_can_be_used(tmp_path):
    RunDirectory(tmp_path, "seed = 1\n").close()
    with RunDirectory(tmp_path, "seed = 2\n") as run:
        assert not run.resumed
    assert (tmp_path / "config.toml").read_text() == "seed = 2\n"


def test_resuming_keeps_the_configuration_it_replaces(tmp_path):
    start_a_run(tmp_path, "seed = 1\n")
    with RunDirectory(tmp_path, "seed = 2\n", resume=True) as run:
        assert run.resumed
        assert run.config.read_text() == "seed = 2\n"
    assert (tmp_path / "superseded" / "001" / "config.toml").read_text() == "seed = 1\n"


def test_a_second_process_is_refused_and_told_the_first_ones_pid(tmp_path):
    code = f"from megatron_vespo.rundir import RunDirectory; from pathlib import Path; RunDirectory(Path({str(tmp_path)!r}), '', resume=True)"
    with RunDirectory(tmp_path, ""):
        assert is_running(tmp_path)
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert f"pid {os.getpid()} on " in second.stderr
    assert "is running in it" in second.stderr
    assert not is_running(tmp_path)


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    code = f"import os; from megatron_vespo.rundir import RunDirectory; from pathlib import Path; RunDirectory(Path({str(tmp_path)!r}), '').metrics.write_text('x'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    with RunDirectory(tmp_path, "", resume=True) as run:
        assert run.resumed


def test_holding_the_lock_twice_in_one_process_is_refused(tmp_path):
    with RunDirectory(tmp_path, ""), pytest.raises(RunError, match="is running in it"):
        RunDirectory(tmp_path, "", resume=True)


def test_rewinding_moves_later_steps_aside(tmp_path):
    with RunDirectory(tmp_path, "") as run:
        run.metrics.write_bytes(
            b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4'
        )  # the last line was torn
        run.alerts.write_bytes(b'{"step": 2, "rule": "a"}\n{"step": 3, "rule": "b"}\n')
        for step in (1, 2, 3):
            (run.rollouts / f"step_{step:06d}.parquet").write_text(str(step))
            (run.evidence / f"step_{step:06d}.parquet").write_text(str(step))
        run.rewind(2)
        assert read_metrics(run.metrics) == [{"step": 1}, {"step": 2}]
        assert [file.name for file in rollout_files(tmp_path)] == [
            "step_000001.parquet",
            "step_000002.parquet",
        ]
        aside = tmp_path / "superseded" / "001"
        assert (aside / "metrics.jsonl").read_bytes().endswith(b'{"step": 3}\n{"step": 4')
        assert (aside / "rollouts" / "step_000003.parquet").read_text() == "3"
        assert (aside / "evidence" / "step_000003.parquet").read_text() == "3"
        assert sorted(file.name for file in run.evidence.iterdir()) == [
            "step_000001.parquet",
            "step_000002.parquet",
        ]
        assert run.alerts.read_bytes() == b'{"step": 2, "rule": "a"}\n'
        assert (aside / "alerts.jsonl").read_bytes().endswith(b'{"step": 3, "rule": "b"}\n')


def test_rewinding_to_the_last_step_changes_nothing(tmp_path):
    with RunDirectory(tmp_path, "") as run:
        run.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n')
        run.rewind(2)
        assert read_metrics(run.metrics) == [{"step": 1}, {"step": 2}]
    assert not (tmp_path / "superseded").exists()


def test_rewinding_to_minus_one_forgets_everything(tmp_path):
    with RunDirectory(tmp_path, "") as run:
        run.metrics.write_bytes(b'{"step": 0}\n{"step": 1}\n')
        run.rewind(-1)
        assert read_metrics(run.metrics) == []


def test_a_torn_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": ')
    assert read_metrics(file) == [{"step": 1}]
    file.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2: expected one JSON object"):
        read_metrics(file)


def a_batch() -> tuple[list[Group], StepOutput, list[Scored]]:
    """Two responses of 3 and 1 tokens to one prompt; the first spans versions 4 and 5."""
    prompt = Prompt(uid="q7", token_ids=np.array([1, 2], np.int32), text="2+2=", answer="4")
    long = Response(
        token_ids=np.array([5, 6, 7], np.int32),
        text="4 ok",
        behavior_logp=np.array([-0.5, -0.25, -1.0], np.float32),
        spans=(VersionSpan(version=4, start=0, end=2), VersionSpan(version=5, start=2, end=3)),
        experts=None,
        finish_reason="stop",
        num_resumed=1,
        engine="engine 3",
    )
    short = Response(
        token_ids=np.array([9], np.int32),
        text="3",
        behavior_logp=np.array([-2.0], np.float32),
        spans=(VersionSpan(version=5, start=0, end=1),),
        experts=None,
        finish_reason="length",
    )
    rollouts = [
        Rollout(prompt=prompt, response=long, reward=1.0, advantage=0.5),
        Rollout(prompt=prompt, response=short, reward=0.0, advantage=-0.5),
    ]
    output = StepOutput(
        scored=(
            Scored(logp=np.array([-0.5, -0.5, -1.0], np.float32), experts=None),
            Scored(logp=np.array([-1.5], np.float32), experts=None),
        ),
        log_w=np.array([-0.25, 0.5]),
        coefficient=np.array([1.15, 0.75]),
        updates=(),
    )
    engine = [Scored(logp=np.array([-0.5, -0.5, -1.125], np.float32), experts=None)] * 2
    return [Group(rollouts=tuple(rollouts), ordinal=11)], output, engine


def test_a_rollout_file_holds_every_number_exactly(tmp_path):
    groups, output, engine = a_batch()
    file = write_rollouts(tmp_path, rollout_rows(groups, output, engine, step=6))
    assert file.name == "step_000006.parquet"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]  # no partial file is left
    first, second = pq.read_table(file).to_pylist()
    assert first == {
        "step": 6,
        "train_version": 5,
        "uid": "q7",
        "ordinal": 11,
        "sample": 0,
        "prompt_text": "2+2=",
        "response_text": "4 ok",
        "answer": "4",
        "reward": 1.0,
        "advantage": 0.5,
        "finish_reason": "stop",
        "prompt_ids": [1, 2],
        "response_ids": [5, 6, 7],
        "versions": [4, 4, 5],
        "sampled": None,
        "engine": "engine 3",
        "num_turns": 1,
        "num_resumed": 1,
        "behavior_logp": [-0.5, -0.25, -1.0],
        "policy_logp": [-0.5, -0.5, -1.0],
        "engine_logp": [-0.5, -0.5, -1.125],
        "log_w": -0.25,
        "coefficient": 1.15,
    }
    assert (second["sample"], second["versions"], second["log_w"]) == (1, [5], 0.5)


def test_an_engine_that_was_not_asked_leaves_a_null(tmp_path):
    groups, output, _ = a_batch()
    table = pq.read_table(write_rollouts(tmp_path, rollout_rows(groups, output, [None, None], step=6)))
    assert table["engine_logp"].to_pylist() == [None, None]
    assert table.schema.field("engine_logp").type == table.schema.field("policy_logp").type
