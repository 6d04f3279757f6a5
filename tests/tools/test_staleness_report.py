"""The numbers of the tables, worked out by hand, and that the words under them say what the numbers do."""

from pathlib import Path

import pytest

from tools.staleness import grid as grids
from tools.staleness import outcomes, report
from tools.staleness.grid import Block, Grid, Results, identity

HIGH, LOW = 2e-3, 1e-3
BLOCK = Block(
    name="main",
    title="Main",
    axes={"N": [4, 64], "learning_rate": [LOW, HIGH], "seed": [0, 1]},
    tuning_seeds=[9],
    weights=True,
)
GRID = Grid(
    level="toy",
    title="A study",
    methods={"VESPO": {"name": "vespo"}, "SAPO": {"name": "sapo"}},
    block=[BLOCK],
)
FINALS = {
    ("VESPO", 4, LOW): (0.98, 1.00),
    ("VESPO", 64, LOW): (0.90, 0.94),
    ("VESPO", 4, HIGH): (0.99, 0.99),
    ("VESPO", 64, HIGH): (0.70, 0.74),
    ("SAPO", 4, LOW): (0.96, 1.00),
    ("SAPO", 64, LOW): (0.20, 0.60),
    ("SAPO", 4, HIGH): (0.90, 0.90),
    ("SAPO", 64, HIGH): (0.93, 0.97),
}
"""Final success of the seeds 0 and 1."""


def result(final: float, *, best: float = 0.98, curve: float = 0.5) -> dict:
    history = [
        {"update": 0, "success": 0.2},
        {"update": 32, "success": curve, "log_w_std": 1.0, "phi_mean": 0.5},
        {"update": 64, "success": final, "log_w_std": 2.0},  # nobody has an advantage left: no living weight
    ]
    return {"start": 0.2, "best": best, "final": final, "history": history, "wall_s": 30.0, "cpu_s": 15.0}


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "study.jsonl")
    for cell in grids.expand(GRID, BLOCK):
        rate = cell["learning_rate"]
        if cell["seed"] == 9:  # LOW ends a little higher, but within the tie, and HIGH learns faster
            outcome = result(0.985, curve=0.3) if rate == LOW else result(0.980, curve=0.9)
            if cell["algorithm"] == "SAPO":
                outcome = result(0.985) if rate == LOW else result(0.90)
        else:
            outcome = result(FINALS[cell["algorithm"], cell["N"], rate][cell["seed"]])
        results.done[identity(cell)] = outcome
    return results


def test_collapse_is_what_was_agreed():
    assert not outcomes.has_collapsed(result(0.74, best=0.98))  # 0.735 is the bound
    assert outcomes.has_collapsed(result(0.73, best=0.98))
    assert outcomes.has_collapsed({"start": 0.5, "best": 0.55, "final": 0.45})
    assert not outcomes.has_collapsed({"start": 0.5, "best": 0.55, "final": 0.5})


def test_mean_and_spread_over_seeds():
    runs = [result(0.2), result(0.6)]
    assert outcomes.mean_final(runs) == pytest.approx(0.4)
    assert outcomes.spread_final(runs) == pytest.approx(0.08**0.5)  # (0.2^2 + 0.2^2) / (2 - 1)
    assert outcomes.spread_final(runs[:1]) == 0


def test_the_rate_is_chosen_on_the_tuning_seeds_and_a_tie_goes_to_the_faster(results):
    rows = {row.label: row for row in outcomes.collect(GRID, BLOCK, results)}
    assert rows["VESPO"].chosen_rate(4) == HIGH
    assert rows["SAPO"].chosen_rate(4) == LOW
    assert rows["SAPO"].best_rate(64) == HIGH and rows["SAPO"].best_rate(4) == LOW
    assert [len(runs) for runs in rows["VESPO"].runs[LOW].values()] == [
        2,
        2,
    ]  # the tuning seed is not in the table


def test_without_tuning_seeds_the_rate_is_chosen_on_the_first_column_of_the_table(results):
    row = outcomes.collect(GRID, BLOCK, results)[0]
    row.tuning.clear()
    row.runs[HIGH][4] = [result(0.5)]
    assert row.chosen_rate(4) == LOW
    assert row.chosen_rate(1) is None  # nothing has run there


def test_the_tables_are_those_worked_out_by_hand(results):
    one, best = outcomes.tables(BLOCK, outcomes.collect(GRID, BLOCK, results))
    # VESPO is at HIGH and SAPO at LOW: .72 against .40 +- .283, which is 1.6 pooled deviations away
    lines = report.markdown(one, BLOCK)
    assert lines[0].startswith("One learning rate per row, chosen at N = 4 on the tuning seeds")
    assert lines[4] == "| VESPO | **0.990 +- 0.000** (0.002) | **0.720 +- 0.028** `x 1` (0.002) | 73% |"
    assert lines[5] == "| SAPO | **0.980 +- 0.028** (0.001) | 0.400 +- 0.283 `x 2` (0.001) | 41% |"
    assert lines[7:] == [
        "Collapsed at N = 64: VESPO (1 of 2), SAPO (2 of 2).",
        "",
        "VESPO is among the best in every column.",
    ]
    # with a rate for each N, SAPO's .95 +- .028 against .92 +- .028 is more than one pooled deviation ahead
    lines = report.markdown(best, BLOCK)
    assert "| VESPO | **0.990 +- 0.014** (0.001) | 0.920 +- 0.028 (0.001) | 93% |" in lines
    assert lines[-1] == "VESPO is not among the best at N = 64 (a higher mean: SAPO)."


def test_what_has_no_result_is_left_out_and_counted(results, tmp_path):
    for cell in grids.expand(GRID, BLOCK):
        if cell["algorithm"] == "SAPO" or cell["N"] == 64:
            results.done.pop(identity(cell), None)
    report.write(GRID, results, tmp_path / "study")
    text = (tmp_path / "study.md").read_text()
    assert "SAPO" not in text and "| VESPO | **0.990 +- 0.000** |  |  |" in text.replace(" (0.002)", "")
    assert "14 cells have no result" in text


def test_half_a_grid_has_a_report(results, tmp_path):
    """Nothing in the first column yet, and so no learning rate that could be chosen there."""
    for cell in grids.expand(GRID, BLOCK):
        if cell["N"] == 4:
            results.done.pop(identity(cell))
    report.write(GRID, results, tmp_path / "study")
    text = (tmp_path / "study.md").read_text()
    assert "One learning rate" not in text and "| VESPO |  | 0.920 +- 0.028 (0.001) |  |" in text


def test_a_report_has_tables_plots_and_its_cost(results, tmp_path):
    report.write(GRID, results, tmp_path / "study")
    text = (tmp_path / "study.md").read_text()
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"study_main{kind}.png" for kind in ("", "_curves", "_log_w_std", "_phi_mean")}
    assert all(f"]({name})" in text for name in plots)
    assert "20 runs, together 10.0 minutes, of which 5.0 of computing." in text


def test_other_axes_become_rows_and_the_rate_can_be_the_columns():
    axes = {"learning_rate": [LOW, HIGH], "policy": ["dense", "moe"], "seed": [0]}
    block = Block(name="rates", title="Rates", columns="learning_rate", axes=axes)
    grid = GRID.model_copy(update={"block": [block]})
    results = Results(Path("nowhere"))
    for cell in grids.expand(grid, block):
        results.done[identity(cell)] = result(0.9 if cell["policy"] == "moe" else 0.8)
    (table,) = outcomes.tables(block, outcomes.collect(grid, block, results))
    assert list(table.entries) == [
        "VESPO, policy dense",
        "VESPO, policy moe",
        "SAPO, policy dense",
        "SAPO, policy moe",
    ]
    assert [outcomes.mean_final(runs) for _, runs in table.entries["SAPO, policy moe"].values()] == [0.9, 0.9]
