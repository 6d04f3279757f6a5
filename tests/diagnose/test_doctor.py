from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from megatron_vespo.cli import app
from megatron_vespo.config import ConfigError
from megatron_vespo.diagnose.doctor import check_structure, compare, describe, exit_status, judge, to_json
from megatron_vespo.diagnose.doctor_page import write_page
from tests.diagnose.toy import World


@pytest.fixture(scope="module")
def healthy():
    return judge(World(1).evidence())


@pytest.fixture(scope="module")
def shifted():
    evidence = World(1).evidence()
    rows = {
        who: np.roll(rows, 1, axis=0) if who in ("behavior", "engine") else rows
        for who, rows in evidence.experts.items()
    }
    return judge(replace(evidence, experts=rows))


@pytest.fixture
def slime_dump(tmp_path):
    """What another framework writes, of a trainer whose log-probs are of older weights."""
    evidence = World(2).evidence()
    ends = np.cumsum(evidence.num_response)[:-1]
    noise = np.random.default_rng(0).normal(0, 0.3, len(evidence.policy_logp)).astype(np.float32)
    policy = np.minimum(evidence.policy_logp + noise, 0)
    file = tmp_path / "rollout.parquet"
    pq.write_table(pa.table({
        "tokens": np.split(evidence.tokens, np.cumsum(evidence.num_prompt + evidence.num_response)[:-1]),
        "response_length": evidence.num_response,
        "rollout_log_probs": np.split(evidence.behavior_logp, ends),
        "log_probs": np.split(policy, ends),
    }), file)  # fmt: skip
    return file


def test_a_healthy_pair_shows_no_failure(healthy):
    assert not [cause for cause in healthy.causes if cause.is_failure]
    assert healthy.level != "broken"
    assert {finding.axis for finding in healthy.findings} == {
        "structure", "semantics", "engine", "routing", "staleness", "sequence budget",
    }  # fmt: skip


def test_a_shifted_record_breaks_the_run_and_is_said_first(shifted):
    assert shifted.level == "broken" and shifted.findings[0].axis == "structure"
    assert shifted.causes[0].name == "row_shift"
    text = describe(shifted)
    assert text.index("cause 1") < text.index("structure/token_shift") and "->" in text
    assert max(map(len, text.splitlines())) <= 100


def test_too_little_data_gives_no_verdict_on_levels():
    evidence = World(1).evidence()
    first = int(evidence.num_response[0])
    keep = {name: getattr(evidence, name)[:first] for name in (
        "is_sampled", "behavior_logp", "policy_logp", "natural_logp", "engine_logp", "repeat_logp", "replayed_logp", "entropy", "version_gap",
    )}  # fmt: skip
    small = replace(
        evidence, **keep, num_prompt=evidence.num_prompt[:1], num_response=evidence.num_response[:1], step=None,
        tokens=evidence.tokens[: int(evidence.num_prompt[0]) + first], is_routed=np.zeros(1, bool), experts={}, margin=None,
    )  # fmt: skip
    diagnosis = judge(small)
    assert "insufficient data" in diagnosis.remarks[0]
    assert all(finding.level in ("insufficient", "healthy", "unknown") for finding in diagnosis.findings)


@pytest.mark.parametrize(
    ("verdict", "fail_on", "status"),
    [
        ("broken", None, 0), ("healthy", "warn", 0), ("warn", "warn", 1), ("warn", "broken", 0), ("broken", "broken", 2),
        ("insufficient", "broken", 3), ("insufficient", "warn", 3),
    ],
)  # fmt: skip
def test_the_exit_status_says_what_was_asked_for(verdict, fail_on, status):
    assert exit_status(verdict, fail_on) == status


def test_json_holds_everything_but_plots(healthy):
    again = json.loads(json.dumps(to_json(healthy)))
    assert again["level"] == healthy.level and again["metrics"] == dict(healthy.examination.metrics)
    assert set(again["tables"]) == set(healthy.examination.tables)


def test_structure_tests_alone(healthy, shifted):
    assert check_structure(healthy.evidence)[0]
    is_sound, text = check_structure(shifted.evidence)
    assert not is_sound and text.startswith("FAILED") and "token_shift" in text


def test_a_comparison_names_the_part_that_moved(healthy):
    noisier = judge(World(1, noise=5e-3).evidence())
    text = compare(healthy, noisier)
    assert re.search(r"mismatch/k3_nats .* moved", text) and "what moved most" in text
    assert "no number moved" in compare(healthy, healthy)


@pytest.mark.parametrize("seed", range(2, 8))
def test_no_healthy_pair_is_called_broken(seed):
    assert judge(World(seed).evidence()).level != "broken"


def test_what_is_not_recorded_is_unknown_and_routes_that_are_not_there_fail(healthy):
    none = np.zeros_like(healthy.evidence.is_routed)
    bare = replace(healthy.evidence, experts={}, is_routed=none, margin=None, replayed_logp=None)
    found = {finding.axis: finding.level for finding in judge(bare).findings}
    assert found["routing"] == "unknown" and found["engine"] != "unknown"
    assert not check_structure(bare)[0]


def test_a_page_is_whole_in_itself_and_says_what_is_missing(healthy, shifted, tmp_path):
    for diagnosis in (healthy, shifted):
        write_page(diagnosis, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert page.count("data:image/svg+xml") >= 15 and not re.search(r"(src|href)=['\"]https?:", page)
        assert diagnosis.level in page
    bare = replace(
        healthy.evidence, experts={}, is_routed=np.zeros_like(healthy.evidence.is_routed), margin=None, entropy=None,
        engine_logp=None, replayed_logp=None, repeat_logp=None, version_gap=None, name="<script>",
    )  # fmt: skip
    write_page(judge(bare), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Not available" in page and "<script>" not in page


def test_a_dump_of_another_framework_gets_a_report_from_one_command(slime_dump, tmp_path):
    page = tmp_path / "report.html"
    result = CliRunner().invoke(
        app, ["doctor", "report", str(slime_dump), "-o", str(page), "--fail-on", "broken"]
    )
    assert result.exit_code == 2, result.output
    assert "log-probs carry noise that no model makes" in result.output.replace("\n", " ") and page.exists()


def test_the_command_speaks_json(slime_dump):
    result = CliRunner().invoke(app, ["doctor", "report", str(slime_dump), "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["level"] == "broken"


def test_a_metric_is_explained_and_an_unknown_one_refused():
    assert "E[(B - M)^2]" in CliRunner().invoke(app, ["doctor", "explain", "cause/routing_r"]).output
    assert "mismatch/k3_nats" in CliRunner().invoke(app, ["doctor", "explain"]).output
    result = CliRunner().invoke(app, ["doctor", "explain", "mismatch/k33"])
    assert isinstance(result.exception, ConfigError) and "did you mean" in str(result.exception)


@pytest.mark.parametrize("arguments", [["--fail-on", "never"], ["--columns", "behavior_logp"]])
def test_options_that_mean_nothing_are_refused(slime_dump, arguments):
    result = CliRunner().invoke(app, ["doctor", "report", str(slime_dump), *arguments])
    assert isinstance(result.exception, ConfigError) and "expected" in str(result.exception)
