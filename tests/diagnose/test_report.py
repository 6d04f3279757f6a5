"""The report says what the run directory says, in every state of a run."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.diagnose.history import read_history
from megatron_vespo.diagnose.panels import RL_SECTIONS, SFT_SECTIONS
from megatron_vespo.diagnose.report import key_figures, write_report
from megatron_vespo.diagnose.verdicts import judge
from megatron_vespo.metrics import RunLog
from megatron_vespo.rundir import RunDirectory, rollout_files


def titles(sections) -> list[str]:
    return [panel.title for panels in sections.values() for panel in panels]


def levels(history) -> dict[str, str]:
    return {verdict.text: verdict.level for verdict in judge(history)}


def verdict(history, words: str) -> str:
    """The level of the one verdict whose text has `words`."""
    (level,) = [level for text, level in levels(history).items() if words in text]
    return level


@pytest.fixture(scope="module")
def page(rl_run, tmp_path_factory) -> str:
    """The report of a complete run."""
    return write_report(rl_run(tmp_path_factory.mktemp("page") / "demo")).read_text()


def test_a_complete_run_fills_every_panel(page):
    for title in titles(RL_SECTIONS):
        assert title.replace("'", "&#x27;") in page
    assert page.count("<img") == len(titles(RL_SECTIONS))
    assert "Not available" not in page
    assert "complete, step 4 of 4" in page
    assert "tensor 2 x pipeline 2 x expert 2 on 4 ranks" in page
    assert "&lt;|im_start|&gt;user" in page  # the samples, escaped


def test_the_page_needs_nothing_from_outside(page):
    assert set(re.findall(r"src='([^:]*:[^;]*)", page)) == {"data:image/svg+xml"}
    assert "<script" not in page
    assert "<link" not in page
    assert "http" not in re.sub(r"src='[^']*'", "", page)


def test_key_figures_are_those_of_the_metrics(rl_run, tmp_path):
    history = read_history(rl_run(tmp_path / "demo"))
    figures = {label: (value, remark) for label, value, remark in key_figures(history)}
    last = history.records[-1]
    assert figures["held-out reward"][0] == f"0.220 → {last['reward/heldout_mean']:.3f}"
    assert figures["steps"] == ("4", "of 4")
    assert figures["staleness"][1] == "steps, mean; oldest 1, bound 1"
    tokens = sum(sum(record.get("staleness/histogram", [])) for record in history.records)
    assert figures["trained on"][0] == str(tokens)


def test_log_w_splits_into_engine_and_staleness(rl_run, tmp_path):
    table = read_history(rl_run(tmp_path / "demo")).sequences
    np.testing.assert_allclose(table.engine_nats + table.stale_nats, table.log_w, atol=1e-6)
    assert np.abs(table.stale_nats).max() > 10 * np.abs(table.engine_nats).max()


def test_staleness_of_a_sequence_is_the_mean_over_its_tokens(rl_run, tmp_path):
    path = rl_run(tmp_path / "demo")
    rows = [row for file in rollout_files(path) for row in pq.read_table(file).to_pylist()]
    expected = [row["train_version"] - sum(row["versions"]) / len(row["versions"]) for row in rows]
    np.testing.assert_allclose(read_history(path).sequences.staleness, expected)
    assert 0 < max(expected) <= 1


def test_verdicts_of_a_healthy_run(rl_run, tmp_path):
    history = read_history(rl_run(tmp_path / "demo"))
    assert verdict(history, "held-out reward 0.220") == "good"
    assert verdict(history, "staleness bound respected: at most 1, bound 1") == "good"
    assert verdict(history, "mismatch normal for float32") == "good"
    assert "bad" not in levels(history).values()


def test_engines_that_disagree_are_called_out_first(rl_run, tmp_path):
    history = read_history(rl_run(tmp_path / "demo", noise=0.1))
    assert judge(history)[0].level == "bad"
    assert verdict(history, "the engines disagree: k3") == "bad"
    assert verdict(history, "the engine alone moves log W") == "watch"


def test_a_broken_staleness_bound_is_bad(rl_run, tmp_path):
    path = rl_run(tmp_path / "demo")
    config = path / "config.toml"
    config.write_text(config.read_text().replace("max_staleness = 1", "max_staleness = 0"))
    assert verdict(read_history(path), "staleness bound broken: at most 1, bound 0") == "bad"


def test_a_crashed_run_has_a_report_that_says_so(rl_run, tmp_path):
    path = rl_run(tmp_path / "demo", num_steps=40, done=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # torn by the crash
    assert "stopped early, step 2 of 40" in write_report(path).read_text()
    assert verdict(read_history(path), "stopped at step 2 of 40") == "bad"


def test_a_run_that_is_still_going_is_called_running(rl_run, tmp_path):
    path = rl_run(tmp_path / "demo", num_steps=40, done=1)
    with RunDirectory(path, (path / "config.toml").read_text(), resume=True):
        assert read_history(path).state == "running"
    assert read_history(path).state == "stopped early"


def test_an_old_final_model_does_not_make_an_extended_run_complete(rl_run, tmp_path):
    path = rl_run(tmp_path / "demo", num_steps=2)
    assert read_history(path).state == "complete"
    with RunDirectory(path, (path / "config.toml").read_text(), resume=True) as run, RunLog(run) as log:
        log.log(3, {"optim/loss": 0.1})
    assert read_history(path).state == "stopped early"


def test_a_panel_without_data_says_what_is_missing(rl_run, tmp_path):
    path = rl_run(tmp_path / "dense")
    metrics = path / "metrics.jsonl"
    metrics.write_text(re.sub(r'"experts/\w*": (\[[^\]]*\]|[^,]*), ', "", metrics.read_text()))
    shutil.rmtree(path / "rollouts")
    page = write_report(path).read_text()
    assert page.count("<img") == len(titles(RL_SECTIONS)) - 6
    assert page.count("experts/overlap_layer has not been logged") == 2
    assert page.count("there are no rollout files") == 5  # four panels and the samples


def test_a_run_that_has_only_been_evaluated_has_a_report(rl_run, tmp_path):
    page = write_report(rl_run(tmp_path / "demo", num_steps=4, done=0)).read_text()
    assert "at step 0, the only evaluation so far" in page


def test_supervised_fine_tuning_has_its_own_panels(sft_run, tmp_path):
    page = write_report(sft_run(tmp_path / "sft")).read_text()
    assert page.count("<img") == len(titles(SFT_SECTIONS)) == 4
    assert "loss fell: 1.82 → 0.406" in page  # 3 exp(-10/20) and 3 exp(-40/20)
    assert "Samples" not in page


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no config.toml in it, so it holds no run"):
        write_report(tmp_path / "nowhere")


def test_a_run_without_a_step_is_an_error(tmp_path):
    with (
        RunDirectory(tmp_path, "seed = 1\n"),
        pytest.raises(ConfigError, match="no step has been logged yet"),
    ):
        write_report(tmp_path)
