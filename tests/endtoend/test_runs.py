"""Whole runs through the command line, on real parts: Megatron-Core ranks under Ray, an SGLang server, math-verify.

Each run takes most of a minute, nearly all of it imports, so one run serves several tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.data.demo import write_demo_inputs
from megatron_vespo.evidence import read_evidence
from megatron_vespo.rundir import read_metrics

REPOSITORY = Path(__file__).parent.parent.parent
PATIENCE_S = 240


class Run:
    """One `megatron-vespo` command in its own session; every process it starts inherits a mark by which it is found."""

    def __init__(self, log: Path, *argv: str) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_vespo.cli", *argv],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_MARK": self.mark},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def wait_for(self, line: str) -> None:
        self._until(lambda: line in self.text or self.process.poll() is not None, f"'{line}'")
        assert line in self.text, self.text

    def living(self) -> list[psutil.Process]:
        """Every process of this run, however it detached itself."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and process.environ().get("TEST_MARK") == self.mark
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def expect_no_process_left(self) -> None:
        self._until(lambda: not self.living(), "the end of every process", patience_s=30)

    def kill_everything(self) -> None:
        for process in self.living():
            process.kill()

    def _until(self, happened: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not happened():
            assert time.monotonic() < deadline, (
                f"waited {patience_s} s for {what}\n{self.living()}\n{self.text}"
            )
            time.sleep(0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endtoend")
    write_demo_inputs(directory / "inputs", seed=0)
    return directory


@pytest.fixture
def start(place: Path, request: pytest.FixtureRequest):
    """Start a command; whatever a failing test leaves running is ended."""
    runs: list[Run] = []

    def _start(*argv: str) -> Run:
        runs.append(Run(place / f"{request.node.name}-{len(runs)}.log", *argv))
        return runs[-1]

    yield _start
    for run in runs:
        run.kill_everything()


def sft(place: Path, name: str, model: str, *overrides: str) -> list[str]:
    inputs = place / "inputs"
    data = f"data.train={inputs / 'demonstrations.parquet'}"
    return [
        "sft",
        "configs/demo_sft.toml",
        f"run_dir={place / name}",
        f"model={inputs / model}",
        data,
        *overrides,
    ]


def rl(place: Path, name: str, *overrides: str) -> list[str]:
    inputs = place / "inputs"
    return [
        "train", "configs/demo.toml", f"run_dir={place / name}", f"model={place / 'sft' / 'final'}",
        f"prompts.train={inputs / 'train.parquet'}", f"evaluation.sets.heldout={inputs / 'heldout.parquet'}",
        "loop.prompts_per_step=4", "loop.group_size=4", "evaluation.samples=1", "instruments.every=2", *overrides,
    ]  # fmt: skip


def test_fine_tuning_lowers_the_loss_and_exports_a_model_that_transformers_loads(place, start):
    run = start(*sft(place, "sft", "model", "num_steps=12", "save_every=5"))
    assert run.wait() == 0, run.text
    run.expect_no_process_left()
    assert names(place / "sft" / "checkpoints") == ["step_000010", "step_000012"]  # the newest two
    losses = [record["optim/loss"] for record in read_metrics(place / "sft" / "metrics.jsonl")]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]
    model = AutoModelForCausalLM.from_pretrained(place / "sft" / "final")
    text = AutoTokenizer.from_pretrained(place / "sft" / "final")("3+4")["input_ids"]
    assert torch.isfinite(model(torch.tensor([text])).logits).all()


def rows_of(run_dir: Path) -> list[dict]:
    return [
        row
        for file in sorted((run_dir / "rollouts").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_run_goes_back_to_a_step_and_does_the_same_again(place, start):
    before = read_metrics(place / "sft" / "metrics.jsonl")
    run = start(*sft(place, "sft", "model", "num_steps=12", "save_every=5"), "--resume", "11")
    assert run.wait() == 2 and "no checkpoint of that step" in run.text and "(there are: 12, 10)" in run.text
    run = start(*sft(place, "sft", "model", "num_steps=12", "save_every=5"), "--resume", "10")
    assert run.wait() == 0, run.text
    after = read_metrics(place / "sft" / "metrics.jsonl")
    assert [r["optim/loss"] for r in after] == [r["optim/loss"] for r in before]
    assert names(place / "sft" / "checkpoints") == ["step_000010", "step_000012", "superseded"]
    assert names(place / "sft" / "checkpoints" / "superseded") == ["step_000012"]


def test_a_run_directory_is_never_overwritten(place, start):
    before = (place / "sft" / "metrics.jsonl").read_bytes()
    run = start(*sft(place, "sft", "model", "num_steps=12"))
    assert run.wait() == 2
    assert "already holds a run" in run.text and "resume it, or choose another directory" in run.text
    assert (place / "sft" / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_ends_after_the_step_and_keeps_what_was_done(place, start):
    run = start(*rl(place, "rl", "loop.num_steps=500"))
    run.wait_for("step    2 |")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    assert run.wait() == 130, run.text
    run.expect_no_process_left()
    steps = [record["step"] for record in read_metrics(place / "rl" / "metrics.jsonl")]
    assert f"stopped after step {steps[-1]} of 500: the checkpoint of step {steps[-1]} is saved" in run.text
    assert (place / "rl" / "checkpoints" / f"step_{steps[-1]:06d}" / "manifest.json").exists()
    assert "stopped early" in (place / "rl" / "report.html").read_text()


def test_resuming_goes_on_to_the_end(place, start):
    done = read_metrics(place / "rl" / "metrics.jsonl")[-1]["step"]
    run = start(*rl(place, "rl", f"loop.num_steps={done + 2}"), "--resume", "auto")
    assert run.wait() == 0, run.text
    run.expect_no_process_left()
    assert f"1 engine(s) serve version {done}, confirmed" in run.text
    records = read_metrics(place / "rl" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(done + 3))
    AutoModelForCausalLM.from_pretrained(place / "rl" / "final")
    assert "complete, step" in (place / "rl" / "report.html").read_text()


def test_both_engines_agree_on_every_token_and_expert_of_the_run(place):
    """fp32 on both sides: whatever exceeds rounding is a wrong weight, a wrong token or a wrong temperature."""
    records = [r for r in read_metrics(place / "rl" / "metrics.jsonl") if r["step"] > 0]
    for record in records:
        assert record["mismatch/abs_max_nats"] < 1e-4
        assert record["experts/overlap_mean"] > 0.999
        assert record["sync/canary_abs_max_nats"] < 1e-4
        assert record["staleness/max_steps"] <= 1
    assert max(record["staleness/max_steps"] for record in records) == 1, "sampling never ran ahead"
    assert min(record["experts/stale_overlap_mean"] for record in records) > 0.5


def test_evidence_of_the_run_holds_every_pass_and_they_agree(place):
    """fp32 on both sides, under the same weights: natural, repeated and engine's pass differ by rounding alone."""
    last = read_metrics(place / "rl" / "metrics.jsonl")[-1]["step"]
    due = [1, *range(2, last + 1, 2)]
    assert names(place / "rl" / "evidence") == [f"step_{step:06d}.parquet" for step in due]
    evidence = read_evidence(place / "rl", kind="evidence")
    assert len(evidence.num_response) == 16 * len(due) and evidence.is_routed.all()
    sampled, fresh = evidence.is_sampled, evidence.version_gap == 0
    for ours, theirs, chosen in (
        (evidence.natural_logp, evidence.engine_logp, sampled),
        (evidence.natural_logp, evidence.repeat_logp, sampled),
        (evidence.natural_logp, evidence.policy_logp, sampled),
        (evidence.replayed_logp, evidence.behavior_logp, sampled & fresh),
    ):
        assert chosen.any() and np.abs(ours - theirs)[chosen].max() < 1e-4
    assert evidence.margin.shape == evidence.experts["natural"].shape[:2] and (evidence.margin >= 0).all()
    agree = np.sort(evidence.experts["natural"]) == np.sort(evidence.experts["engine"])
    assert agree.mean() > 0.999


def test_the_log_names_the_causes_of_log_w_and_neither_engine_nor_router_is_one(place):
    records = [r for r in read_metrics(place / "rl" / "metrics.jsonl") if "cause/engine_nats" in r]
    assert {"time/examine_s", "floor/k3_nats", "router/mismatch", "router/margin_p50"} <= records[0].keys()
    assert all(record["sync/canary_expert_mismatch"] < 0.01 for record in records)
    assert all(abs(record["cause/engine_nats"] + record["cause/routing_nats"]) < 1e-5 for record in records)
    assert not (place / "rl" / "alerts.jsonl").read_text(), "a healthy run raised an alert"


def test_rollout_files_explain_log_w_token_by_token(place):
    rows = rows_of(place / "rl")
    assert len(rows) == 16 * len(list((place / "rl" / "rollouts").glob("*.parquet")))
    uids = [row["uid"] for row in rows[::4]]
    assert len(uids) == len(set(uids)), "a prompt was trained on twice, across an interruption"
    for row in rows:
        policy, behavior = (
            np.array(row["policy_logp"], np.float64),
            np.array(row["behavior_logp"], np.float64),
        )
        assert len(policy) == len(behavior) == len(row["response_ids"]) == len(row["versions"])
        assert row["log_w"] == pytest.approx((policy - behavior).sum(), abs=1e-5)
        fresh = np.array(row["versions"]) == row["train_version"]
        assert np.abs(policy - behavior)[fresh].max(initial=0) < 1e-4


def test_the_weights_that_trained_are_the_weights_that_sampled(place):
    """Step 1 trains on version 0: its behavior log-probs are those of the exported model, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(place / "sft" / "final", dtype=torch.float32).eval()
    for row in pq.read_table(place / "rl" / "rollouts" / "step_000001.parquet").to_pylist()[:6]:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logp = (
                model(ids)
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
            )
        np.testing.assert_allclose(row["behavior_logp"], logp, atol=1e-4)


def test_a_killed_engine_is_replaced_and_the_run_loses_nothing(place, start):
    run = start(*rl(place, "killed", "loop.num_steps=6", "rollout.engines=2"))
    run.wait_for("step    2 |")
    server, _ = [p for p in run.living() if p.cmdline()[1:3] == ["-m", "sglang.launch_server"]]
    server.kill()
    assert run.wait() == 0, run.text
    run.expect_no_process_left()
    assert "is lost, its work goes elsewhere" in run.text and "was killed by SIGKILL" in run.text
    records = read_metrics(place / "killed" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(7))
    rows = rows_of(place / "killed")
    assert sorted({row["ordinal"] for row in rows}) == list(range(24)), (
        "every prompt is trained on, in the order of the stream"
    )
    assert len(rows) == 16 * 6
    for record in records[1:]:
        assert record["staleness/max_steps"] <= 1
        assert record["mismatch/abs_max_nats"] < 1e-4, "the new engine serves other weights"


def test_with_no_engine_left_the_run_ends_with_its_log_and_saves_the_steps(place, start):
    run = start(*rl(place, "hopeless", "loop.num_steps=500", "rollout.max_restarts=0"))
    run.wait_for("step    1 |")
    (server,) = [p for p in run.living() if p.cmdline()[1:3] == ["-m", "sglang.launch_server"]]
    server.kill()
    assert run.wait() == 1
    run.expect_no_process_left()
    assert "RunError: engines = none left" in run.text and "killed by SIGKILL" in run.text
    last = read_metrics(place / "hopeless" / "metrics.jsonl")[-1]["step"]
    manifests = sorted((place / "hopeless" / "checkpoints").glob("*/manifest.json"))
    manifest = json.loads(manifests[-1].read_text())
    # The ranks may have ended the step in which the server died; then the checkpoint has it, the log has not.
    assert manifest["state"]["version"] == manifest["step"] and manifest["step"] - last in (0, 1)
    assert manifest["state"]["ledger"]["trained"] == [4 * manifest["step"]]


def dense(place: Path, *overrides: str) -> list[str]:
    inputs = place / "inputs"
    return [
        "train", "configs/dense_sync.toml", f"run_dir={place / 'dense'}", f"model={inputs / 'dense_model'}",
        f"prompts.train={inputs / 'train.jsonl'}", f"evaluation.sets.heldout={inputs / 'heldout.parquet'}",
        "loop.prompts_per_step=2", "loop.group_size=2", "evaluation.samples=1", "loop.save_every=2", *overrides,
    ]  # fmt: skip


def test_a_dense_model_trains_synchronously_from_jsonl_and_nothing_outlives_a_killed_driver(place, start):
    run = start(*dense(place, "loop.num_steps=500"))
    run.wait_for("step    3 |")
    assert len(run.living()) > 5
    run.process.kill()
    run.process.wait()
    run.expect_no_process_left()
    records = [json.loads(line) for line in (place / "dense" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["staleness/max_steps"] == 0 for r in records[1:])
    assert all(r["mismatch/abs_max_nats"] < 1e-4 for r in records[1:])
    assert "experts/overlap_mean" not in records[1]


def test_a_run_whose_driver_was_killed_goes_on_with_the_prompts_that_are_left(place, start):
    """It has conversations of two turns from here on, judged by a function of the user's."""
    strangers = Path(__file__).with_name("strangers.py")
    run = start(
        *dense(
            place, "loop.num_steps=6", f"environment.name={strangers}:Insists", "environment.max_turns=2",
            "reward.verifier=function", f"reward.function={strangers}:parity", "loop.filter_groups=true",
            f"evaluation.sets.again={place / 'inputs' / 'heldout.parquet'}",
            "sampling.max_response_tokens=90",  # long enough for an untrained model to end a turn by chance
        ),
        "--resume", "auto",
    )  # fmt: skip
    assert run.wait() == 0, run.text
    records = read_metrics(place / "dense" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(7))
    rows = rows_of(place / "dense")
    ordinals = sorted({row["ordinal"] for row in rows})
    assert len(rows) == 2 * len(ordinals) == 24, "two responses of each prompt, each prompt in one step"
    filtered = records[-1]["prompts/filtered"]
    assert len(set(range(ordinals[-1] + 1)) - set(ordinals)) == filtered, "a prompt was skipped"
    talks = [row for row in rows if row["num_turns"] == 2]
    assert talks, "no conversation came to a second turn"
    for row in talks:
        policy, behavior = (np.array(row[key], np.float64) for key in ("policy_logp", "behavior_logp"))
        sampled = np.array(row["sampled"])
        assert (behavior[~sampled] == 0).all() and "Sure?" not in row["response_text"]
        assert np.abs(policy - behavior)[sampled].max() < 1e-4
        assert row["log_w"] == pytest.approx((policy - behavior)[sampled].sum(), abs=1e-5)
    assert {"eval/heldout/avg", "eval/again/avg"} <= records[-1].keys()
    assert "no group was trained on twice" in (place / "dense" / "report.html").read_text()
