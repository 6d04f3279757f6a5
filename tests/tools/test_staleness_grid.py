"""Grids: what they expand to, what they refuse, and that nothing finished is ever run again or lost."""

import json
import multiprocessing
import os
import re

import pytest

from megatron_vespo.config import ConfigError
from tools.staleness import grid as grids

GRID = """
level = "toy"
title = "A title"
[base]
num_updates = 2
warm_updates = 1
[methods]
VESPO = { name = "vespo" }
GSPO = { name = "gspo", gspo.clip = [0.03, 0.04] }
[[block]]
name = "first"
title = "First"
base = { learning_rate = 1e-3 }
axes = { N = [4, 1], seed = [0, 1] }
tuning_seeds = [7]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_a_block_is_the_product_of_methods_and_axes(path):
    grid = grids.load_grid(path)
    cells = grids.expand(grid, grid.block[0])
    table = [cell for cell in cells if cell["seed"] != 7]
    assert len(table) == 2 * 2 * 2 == len(set(map(grids.identity, table)))
    assert table[-1] == {
        "level": "toy",
        "algorithm": "GSPO",
        "overrides": {"name": "gspo", "gspo.clip": [0.03, 0.04]},
        "num_updates": 2,
        "warm_updates": 1,
        "learning_rate": 1e-3,
        "N": 1,
        "seed": 1,
    }


def test_tuning_seeds_run_in_the_first_column_only(path):
    grid = grids.load_grid(path)
    tuning = [cell for cell in grids.expand(grid, grid.block[0]) if cell["seed"] == 7]
    assert [(cell["algorithm"], cell["N"]) for cell in tuning] == [("VESPO", 1), ("GSPO", 1)]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('title = "A title"', 'titel = "A title"', "titel: Extra inputs are not permitted"),
        ("tuning_seeds = [7]", "tuning_seeds = [1]", "seeds [1]: are of the table and for tuning"),
        ("tuning_seeds = [7]", 'methods = ["PPO"]', "methods = ['PPO']: not in [methods]"),
        ("base = { learning_rate = 1e-3 }", "base = { N = 1 }", "['N']: stand in its base and its axes"),
        ("N = [4, 1]", "M = [4, 1]", "axes has no 'N'"),
        ("[[block]]", "[[block]", "mend that line"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(path, old, new, complaint):
    path.write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        grids.load_grid(path)


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="level = 'toi'"):
        grids.load_level("toi")


def test_results_survive_a_torn_last_line_and_a_later_success_replaces_a_failure(tmp_path):
    path = tmp_path / "results.jsonl"
    results = grids.Results(path)
    results.add({"seed": 0}, {"result": {"final": 1.0}})
    results.add({"seed": 1}, {"error": "out of memory"})
    assert grids.read_results(path).failed == {grids.identity({"seed": 1}): "out of memory"}
    results.add({"seed": 1}, {"result": {"final": 0.5}})
    with path.open("a") as file:
        file.write('{"cell": {"seed": 2}, "resu')
    again = grids.read_results(path)
    assert again.done == {
        grids.identity({"seed": 0}): {"final": 1.0},
        grids.identity({"seed": 1}): {"final": 0.5},
    }
    assert not again.failed
    again.add({"seed": 2}, {"result": {"final": 0.25}})
    assert [json.loads(line)["cell"]["seed"] for line in path.read_text().splitlines()] == [0, 1, 1, 2]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"cell": {}}\n{"cell": {}, "result": {}}\n')
    with pytest.raises(ConfigError, match="line 1: is not a result"):
        grids.read_results(path)


def test_two_calls_cannot_write_the_same_results(tmp_path):
    path = tmp_path / "docs" / "results.jsonl"
    with (
        grids.only_writer(path),
        pytest.raises(ConfigError, match="another process"),
        grids.only_writer(path),
    ):
        pass
    with grids.only_writer(path):
        pass


def test_a_worker_runs_what_is_missing_and_a_failed_cell_stops_nobody(path, capsys):
    grid = grids.load_grid(path)
    broken, done, missing = grids.expand(grid, grid.block[0])[:3]
    broken = broken | {"N": 0}
    results = grids.Results(path.with_suffix(".jsonl"))
    results.add(done, {"result": {"final": 0.5}})
    grids.run_missing("toy", [broken, done, missing], results, num_workers=1)
    assert results.done[grids.identity(done)] == {"final": 0.5}
    assert 0 <= results.done[grids.identity(missing)]["final"] <= 1
    assert "greater than or equal to 1" in results.failed[grids.identity(broken)]
    assert (
        "[1/2," in (lines := capsys.readouterr().out) and "FAILED" in lines and "[2/2, 0.0 min left]" in lines
    )
    again = grids.read_results(results.path)
    assert (again.done, again.failed) == (results.done, results.failed)


def test_a_worker_that_dies_leaves_its_exit_code():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=os._exit, args=(3,))
    process.start()
    theirs.close()
    assert grids._receive(ours, process) == {"error": "the worker process died with exit code 3"}
