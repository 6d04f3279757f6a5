"""Level "stack" of the staleness study: what it asks of `megatron-vespo train`, and what it reads from a run."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.types import RunError
from tools.staleness import stack, task

ROOT = Path(__file__).parent.parent.parent
CELL: dict[str, Any] = {
    "level": "stack",
    "algorithm": "GSPO",
    "overrides": {"name": "gspo", "gspo.clip": [0.03, 0.04]},
    "seed": 3,
    "learning_rate": 2e-4,
    "num_updates": 384,
    "N": 16,
}


def config(**changed: Any) -> TrainConfig:
    settings = stack.Settings.model_validate(CELL | changed)
    return load_config(TrainConfig, stack.TRAIN, stack.overrides(settings, Path("there"), "http://h:1"))


def test_a_cell_is_a_configuration_of_the_product():
    cfg = config()
    assert (cfg.algorithm.name, cfg.algorithm.gspo.clip) == ("gspo", (0.03, 0.04))
    assert (cfg.seed, cfg.trainer.optimizer.learning_rate) == (3, 2e-4)
    assert (cfg.rollout.engines, cfg.rollout.external) == (0, ("http://h:1",))
    assert cfg.model != config(seed=4).model


@pytest.mark.parametrize("n, steps, every", [(1, 384, 64), (4, 96, 16), (64, 6, 1)])
def test_every_n_makes_the_same_updates_of_the_same_size_and_is_evaluated_after_the_same(n, steps, every):
    cfg = config(N=n)
    assert cfg.loop.num_steps * cfg.loop.updates_per_batch == 384
    assert cfg.loop.prompts_per_step == n * stack.PROMPTS_PER_UPDATE
    assert (cfg.loop.num_steps, cfg.evaluation.every) == (steps, every)
    assert cfg.loop.max_staleness == 0


def test_the_command_line_gives_the_same_configuration_again_and_names_no_place_outside_the_repository(
    monkeypatch,
):
    arguments = stack.overrides(stack.Settings.model_validate(CELL), stack.RUNS / "a place", "http://h:1")
    line = stack.command(arguments)
    assert str(ROOT) not in line
    program, verb, path, *words = shlex.split(line)
    assert (program, verb) == ("megatron-vespo", "train")
    monkeypatch.chdir(ROOT)
    by_hand, ours = (
        load_config(TrainConfig, Path(path), words),
        load_config(TrainConfig, stack.TRAIN, arguments),
    )
    assert by_hand.model.resolve() == ours.model and by_hand.run_dir.resolve() == ours.run_dir
    assert (by_hand.algorithm, by_hand.loop, by_hand.trainer) == (ours.algorithm, ours.loop, ours.trainer)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"N": 5}, "N = 5"),
        ({"num_updates": 100}, "num_updates = 100"),
        ({"overrides": {"name": "gspo", "gspo.clap": [1, 2]}}, "algorithm.gspo.clap"),
        ({"router_replay": "trainer", "N": 1}, "router_replay"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_before_anything_starts(changed, named):
    stack.check(CELL)
    with pytest.raises(ConfigError, match=named):
        stack.check(CELL | changed)


def test_a_run_becomes_one_entry_an_evaluation_with_means_over_its_steps():
    def step(number: int, std: float, **more: float) -> dict[str, Any]:
        return {"step": number, "algo/log_w_std": std, "time/train_s": 1.5, "time/wait_s": 0.25, **more}

    records = [
        {"step": 0, "eval/prompts/avg": 0.25},
        step(1, 1.0),
        step(2, 3.0, **{"eval/prompts/avg": 0.75}),
        step(3, 5.0),
        step(4, 7.0, **{"eval/prompts/avg": 0.5}),
    ]
    assert stack.outcome(records, updates_per_step=4) == {
        "start": 0.25,
        "best": 0.75,
        "final": 0.5,
        "history": [
            {"update": 0, "success": 0.25},
            {"update": 8, "success": 0.75, "log_w_std": 2.0},
            {"update": 16, "success": 0.5, "log_w_std": 6.0},
        ],
        "phases_s": {"wait": 1.0, "train": 6.0, "score": 0.0, "sync": 0.0, "eval": 0.0},
    }


def test_a_child_that_fails_says_so_with_the_end_of_its_output(tmp_path):
    def fail() -> None:
        os.write(1, b"what went wrong\n")
        raise SystemExit(3)

    with pytest.raises(RunError, match=r"status 3.*\n.*what went wrong"):
        stack._in_child(fail, tmp_path / "log")


def test_what_a_child_does_stays_in_the_child(tmp_path):
    seen: list[int] = []
    stack._in_child(lambda: seen.append(1), tmp_path / "log")
    assert not seen


def test_demonstrations_are_right_as_often_as_they_should_be(tmp_path):
    task.write_inputs(tmp_path, seed=0)
    prompts = pq.read_table(tmp_path / "prompts.parquet").to_pylist()
    answers = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in prompts}
    assert len(answers) == task.NUM_PROMPTS == len(set(answers.values()))
    rows = pq.read_table(tmp_path / "demonstrations.parquet").column("messages").to_pylist()
    right = sum(said["content"] == answers[asked["content"]] for asked, said in rows) / len(rows)
    assert right == pytest.approx(0.8**6 * (1 - 0.002 * 25 / 26) ** 16, abs=0.03)  # 4096 rows: sd 0.007


def test_inputs_are_decided_by_the_seed(tmp_path):
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        task.write_inputs(tmp_path / place, seed)
    files = [
        [(tmp_path / place / name).read_bytes() for name in ("prompts.parquet", "model/model.safetensors")]
        for place in "abc"
    ]
    assert files[0] == files[1]
    assert files[0][0] != files[2][0] and files[0][1] != files[2][1]
