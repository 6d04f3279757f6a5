"""The loop against fakes: order of events, staleness, what is logged, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from megatron_vespo.config import AlgorithmConfig, TrainConfig, parse_config, to_toml
from megatron_vespo.control import loop
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.evaluation import evaluate
from megatron_vespo.control.observer import Observer, Sources
from megatron_vespo.control.progress import Progress, ledger_of
from megatron_vespo.control.sampler import Sampler
from megatron_vespo.data.stream import EpochStream
from megatron_vespo.diagnose.report import write_report
from megatron_vespo.evidence import Facts, read_evidence
from megatron_vespo.metrics import LiveView, RunLog
from megatron_vespo.rundir import RunDirectory
from megatron_vespo.types import RunError
from tests.control.fakes import NUM_EXPERTS, FakeEngine, FakeTrainer, FakeVerifier, prompt


def config(run_dir: Path, evaluation: dict, instruments: dict, **loop_options) -> TrainConfig:
    return parse_config(TrainConfig, {
        "run_dir": str(run_dir),
        "model": "none",
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 8},
        "sampling": {"max_response_tokens": 8},
        "evaluation": {"sets": {"heldout": "none.parquet"}, **evaluation},
        "instruments": instruments,
        "trainer": {"device": "cpu", "optimizer": {"learning_rate": 1e-3}},
        "loop": {"num_steps": 6, "prompts_per_step": 2, "group_size": 4, "step_timeout_s": 20, **loop_options},
    })  # fmt: skip


class Scenario:
    """A run of the real loop, observer and files on fake collaborators."""

    def __init__(
        self,
        run_dir: Path,
        start: Progress | None = None,
        evaluation: dict | None = None,
        instruments: dict | None = None,
        **loop_options,
    ) -> None:
        start = start or Progress(stream="test")
        self.cfg = config(run_dir, evaluation or {}, instruments or {"every": 0}, **loop_options)
        self.engine = FakeEngine(delay_s=0.002)
        self.trainer = FakeTrainer(self.engine, version=start.version)
        self.verifier = FakeVerifier()
        self.start = start
        self.path = run_dir
        self.text = io.StringIO()

    def run(self, meanwhile=None) -> list[dict]:
        cfg, start = self.cfg, self.start
        view = LiveView("test", cfg.loop.num_steps, console=Console(file=self.text, width=250))
        self.prompts = EpochStream([prompt(i) for i in range(50)], 0, False, ledger_of(start, 50))
        self.sampler = Sampler(cfg, self.engine, self.verifier)
        sources = Sources(
            prompts=self.prompts,
            failures=lambda: {f"verifier/{kind}": num for kind, num in self.verifier.failures.items()},
            engine_metrics=dict,
            evaluate=lambda: evaluate(cfg, {"heldout": [prompt(99)]}, self.sampler),
            facts=Facts(num_experts=NUM_EXPERTS),
        )
        with RunDirectory(self.path, to_toml(cfg), resume=start.version > 0) as run, RunLog(run) as log, view:
            self.observer = Observer(cfg, run, log, view, sources, start)
            try:
                asyncio.run(self._run(meanwhile))
            finally:
                self.observer.flush()
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    async def _run(self, meanwhile) -> None:
        self.buffer = GroupBuffer.of(self.cfg.loop)
        if meanwhile:
            background = asyncio.ensure_future(meanwhile(self))
        await loop.train(
            self.cfg, self.prompts, self.sampler, self.trainer, self.trainer, self.buffer, self.observer
        )
        if meanwhile:
            await background


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_staleness_reaches_its_bound_and_never_exceeds_it(tmp_path, bound):
    records = Scenario(tmp_path / "run", max_staleness=bound, num_steps=8).run()
    measured = [r["staleness/max_steps"] for r in records if r["step"] > 0]
    assert max(measured) == bound
    if bound == 0:
        assert measured == [0] * 8


def test_every_step_publishes_its_weights_before_the_next_one(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=3)
    scenario.run()
    assert scenario.trainer.events[:-1] == [
        "publish 0", "step on 0", "publish 1", "step on 1", "publish 2", "step on 2", "publish 3",
    ]  # fmt: skip
    assert scenario.trainer.events[-1].startswith("save 3 {'stream': 'test', 'version': 3, 'ledger': {")


def test_the_batch_is_rescored_under_the_weights_that_are_trained(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=4)
    records = scenario.run()
    assert scenario.engine.scored_under == [0, 1, 2, 3]
    for record in records[1:]:
        # log W = mismatch + staleness, and these engines agree on equal weights
        assert record["mismatch/abs_max_nats"] < 1e-6
        assert record["stale/seq_nats_mean"] == pytest.approx(record["algo/log_w_mean"], abs=1e-6)
        # each version lowers each of the 2 tokens' log-prob by 0.1
        assert record["algo/log_w_mean"] == pytest.approx(-0.2 * record["staleness/mean_steps"], abs=1e-6)


def test_the_engines_noise_is_the_canarys_until_a_batch_was_scored_by_both(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=3)
    scenario.run()
    assert scenario.trainer.noise_variances == [0.1, 0.0, 0.0]  # these engines agree


def test_what_a_guard_leaves_out_is_told_and_is_no_number(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=2)
    scenario.trainer.left_out = 4
    records = scenario.run()
    assert [r["optim/left_out_fraction"] for r in records[1:]] == [0.5, 0.5]
    (first, _) = sorted((tmp_path / "run" / "rollouts").iterdir())
    table = pq.read_table(first)
    for column in ("log_w", "coefficient"):
        assert table[column].is_null().to_pylist() == [False] * 4 + [True] * 4
    write_report(tmp_path / "run")
    assert "left out" in (tmp_path / "run" / "report.html").read_text()


def test_advantages_are_divided_by_the_deviation_of_the_batch(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=1)
    scale = {"advantage_scale": "batch_std"}
    scenario.cfg = scenario.cfg.model_copy(update={"algorithm": AlgorithmConfig.model_validate(scale)})
    scenario.run()
    advantages = np.array([s.advantage for s in scenario.trainer.batches[0]])
    assert np.square(advantages).mean() == pytest.approx(1, rel=1e-5)
    rows = pq.read_table(next((tmp_path / "run" / "rollouts").iterdir()))
    np.testing.assert_allclose(rows["advantage"].to_numpy(), advantages)
    reward = rows["reward"].to_numpy().reshape(2, 4)
    centered = (reward - reward.mean(1, keepdims=True)).ravel()
    np.testing.assert_allclose(advantages, centered / np.sqrt(np.square(centered).mean()), rtol=1e-5)
    assert [s.group for s in scenario.trainer.batches[0]] == [0] * 4 + [1] * 4


def test_prompts_are_trained_in_stream_order_each_once(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=6, max_staleness=2)
    scenario.run()
    uids = [s.uid for batch in scenario.trainer.batches for s in batch]
    assert uids == [f"p{i}" for i in range(12) for _ in range(4)]


def test_a_resumed_run_continues_where_the_first_stopped(tmp_path):
    first = Scenario(tmp_path / "run", num_steps=2)
    first.run()
    progress = first.observer.progress
    second = Scenario(tmp_path / "run", start=progress, num_steps=4)
    records = second.run()
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    uids = [b[0].uid for b in first.trainer.batches + second.trainer.batches]
    assert uids == ["p0", "p2", "p4", "p6"]
    assert second.trainer.events[0] == "publish 2"


def test_evaluations_and_checkpoints_come_when_they_are_due(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=5, save_every=3, evaluation={"every": 2, "samples": 4})
    records = scenario.run()
    assert [r["step"] for r in records if "reward/heldout_mean" in r] == [0, 2, 4, 5]
    assert records[0]["reward/heldout_mean"] == 0.5  # every second response is right
    assert [e.split()[1] for e in scenario.trainer.events if e.startswith("save")] == ["3", "5"]


def test_closing_the_buffer_ends_the_run_after_the_step_in_progress(tmp_path):
    async def stop_soon(scenario: Scenario) -> None:
        while scenario.trainer.version < 2:
            await asyncio.sleep(0.001)
        scenario.buffer.close()

    scenario = Scenario(tmp_path / "run", num_steps=1000)
    records = scenario.run(stop_soon)
    assert 2 <= records[-1]["step"] < 1000
    assert records[-1]["step"] == scenario.observer.progress.version == scenario.trainer.version


def test_a_dead_engine_ends_the_run_with_its_own_message(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=1000)
    scenario.engine.fails_after = 12
    with pytest.raises(ExceptionGroup) as caught:
        scenario.run()
    assert caught.value.subgroup(RunError) is not None
    assert 1 <= scenario.observer.progress.version < 1000


def test_a_trainer_that_hangs_is_named_at_the_deadline(tmp_path):
    scenario = Scenario(tmp_path / "run", step_timeout_s=0.2)
    scenario.trainer.delay_s = 60
    with pytest.raises(ExceptionGroup) as caught:
        scenario.run()
    (error,) = caught.value.exceptions
    assert "step 1, phase 'train' = not done after 0.2 s" in str(
        error
    ) and "loop.step_timeout_s = 0.2" in str(error)


def test_rollout_files_hold_what_training_needs(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=2)
    scenario.run()
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step_000002.parquet").to_pylist()
    assert len(table) == 8 and {row["uid"] for row in table} == {"p2", "p3"}
    assert sorted({row["reward"] for row in table}) == [0.0, 1.0]
    assert table[0]["response_ids"] == [5, 6] and len(table[0]["behavior_logp"]) == 2


def test_the_log_counts_the_verifications_that_timed_out_in_each_step(tmp_path):
    records = Scenario(tmp_path / "run", num_steps=2).run()
    assert [record["verifier/timeouts"] for record in records[1:]] == [1, 0]  # p0 is in the first batch


def test_a_sample_of_the_batch_can_be_rescored(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=1, rescored_sequences=3)
    (record,) = scenario.run()[1:]
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()
    assert [row["engine_logp"] is not None for row in rows] == [
        True,
        False,
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert record["mismatch/abs_max_nats"] < 1e-6


def test_a_failed_evaluation_leaves_the_finished_step_to_be_written_down(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=9, evaluation={"every": 2})
    scenario.engine.fails_on = "p99"
    with pytest.raises(ExceptionGroup):
        scenario.run()
    assert scenario.observer.progress.version == 2
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2]


def test_groups_without_signal_are_replaced_counted_and_never_trained(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=3, filter_groups=True, max_staleness=1)
    scenario.engine.no_signal = {"p0", "p3"}
    records = scenario.run()
    uids = [s.uid for batch in scenario.trainer.batches for s in batch[::4]]
    assert uids == ["p1", "p2", "p4", "p5", "p6", "p7"]
    assert sum(record["filter/dropped_groups"] for record in records[1:]) == 2
    assert scenario.prompts.ledger.count("filtered") == 2
    dropped = next(r for r in records[1:] if r["filter/dropped_groups"])
    # Half of the responses of a group with signal are right, none of p0's and p3's are.
    assert dropped["filter/dropped_reward_mean"] == 0.0 and dropped["filter/sampled_reward_mean"] < 0.5
    assert max(record["staleness/max_steps"] for record in records[1:]) <= 1


def test_oversampled_prompts_that_were_not_needed_are_sampled_again_for_later_steps(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=4, filter_groups=True, oversampling=2.0, max_staleness=0)
    records = scenario.run()
    uids = [s.uid for batch in scenario.trainer.batches for s in batch[::4]]
    assert uids == [f"p{i}" for i in range(8)]
    assert all(record["staleness/max_steps"] == 0 for record in records[1:])


def test_a_window_lets_fast_groups_overtake_and_keeps_the_bound(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=8, max_staleness=2, window=4)
    records = scenario.run()
    assert max(record["staleness/max_steps"] for record in records[1:]) <= 2
    assert sum(record["loop/overtaken_groups"] for record in records[1:]) > 0
    uids = [s.uid for batch in scenario.trainer.batches for s in batch[::4]]
    assert len(set(uids)) == 16


def test_training_goes_on_beside_an_evaluation_that_it_does_not_wait_for(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=6, evaluation={"every": 2, "waits": False, "samples": 2})
    scenario.engine.slow_on = {"p99": 0.05}
    records = scenario.run()
    evaluated = [r for r in records if "eval/heldout/avg" in r]
    assert [r["step"] for r in evaluated][-1] == 6 and evaluated[0]["step"] == 0
    assert all(r["eval/heldout/version_min"] <= r["eval/heldout/version_max"] for r in evaluated)
    assert evaluated[0]["eval/heldout/pass_at_k"] == 1.0 and evaluated[0]["eval/heldout/avg"] == 0.5


def test_a_checkpoint_knows_which_prompts_are_done_out_of_order(tmp_path):
    first = Scenario(tmp_path / "run", num_steps=3, max_staleness=2, window=4)
    first.run()
    done = [s.uid for batch in first.trainer.batches for s in batch[::4]]
    second = Scenario(tmp_path / "run", start=first.observer.progress, num_steps=9, max_staleness=2, window=4)
    second.run()
    after = [s.uid for batch in second.trainer.batches for s in batch[::4]]
    assert len(set(done + after)) == len(done + after) == 18


# ----------------------------------------------------------------------------------------------- instruments


def test_evidence_is_written_of_the_first_step_and_then_when_it_is_due(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=5, instruments={"every": 2, "sequences": 3})
    records = scenario.run()
    assert names(tmp_path / "run" / "evidence") == [f"step_{n:06d}.parquet" for n in (1, 2, 4)]
    events = [e for e in scenario.trainer.events if not e.startswith(("publish", "save"))]
    assert events == [
        "examine on 0", "step on 0", "examine on 1", "step on 1", "step on 2", "examine on 3", "step on 3", "step on 4",
    ]  # fmt: skip
    assert [r["step"] for r in records if "time/examine_s" in r] == [1, 2, 4]
    assert [len(examined) for examined in scenario.trainer.examined] == [3, 3, 3]
    assert all(s.experts is not None for examined in scenario.trainer.examined for s in examined)


def test_the_same_sequences_are_examined_in_the_same_step_of_a_resumed_run(tmp_path):
    instruments = {"every": 1, "sequences": 2}
    whole = Scenario(tmp_path / "whole", num_steps=3, max_staleness=0, instruments=instruments)
    whole.run()
    first = Scenario(tmp_path / "run", num_steps=2, max_staleness=0, instruments=instruments)
    first.run()
    second = Scenario(
        tmp_path / "run", start=first.observer.progress, num_steps=3, max_staleness=0, instruments=instruments
    )
    second.run()
    both = [[s.uid for s in examined] for examined in first.trainer.examined + second.trainer.examined]
    assert both == [[s.uid for s in examined] for examined in whole.trainer.examined]
    assert len({tuple(uids) for uids in both}) > 1, "always the same places are drawn"


def test_an_evidence_file_has_all_that_both_engines_said_about_the_examined_sequences(tmp_path):
    scenario = Scenario(
        tmp_path / "run", num_steps=2, rescored_sequences=1, instruments={"every": 1, "sequences": 3}
    )
    scenario.run()
    evidence = read_evidence(tmp_path / "run" / "evidence" / "step_000002.parquet")
    assert len(evidence.num_response) == 3 and evidence.is_routed.all()
    assert evidence.facts.num_experts == NUM_EXPERTS
    assert set(evidence.experts) == {"behavior", "engine", "natural", "shadow"}
    np.testing.assert_allclose(evidence.natural_logp, -0.2)  # the fakes' log-prob at version 1
    np.testing.assert_allclose(evidence.repeat_logp, -0.199, rtol=1e-6)
    np.testing.assert_allclose(evidence.replayed_logp, -0.21, rtol=1e-6)
    np.testing.assert_allclose(evidence.engine_logp, -0.2, rtol=1e-6)
    np.testing.assert_allclose(evidence.behavior_logp, -0.1 * (2 - evidence.version_gap), rtol=1e-6)
    np.testing.assert_allclose(evidence.entropy, 0.7, rtol=1e-6)
    np.testing.assert_array_equal(evidence.margin, 0.5)


def test_causes_of_the_examined_sequences_are_in_the_log_and_add_up(tmp_path):
    instruments = {"every": 1, "sequences": 8}
    records = Scenario(tmp_path / "run", num_steps=3, max_staleness=0, instruments=instruments).run()
    for record in records[1:]:
        # behavior = engine = natural = policy, and replaying takes 0.01 nats off: engine -0.01, routing +0.01.
        assert record["cause/engine_nats"] == pytest.approx(-0.01, abs=1e-6)
        assert record["cause/routing_nats"] == pytest.approx(0.01, abs=1e-6)
        assert record["cause/rerun_nats"] == record["cause/decode_nats"] == pytest.approx(0, abs=1e-6)
        assert record["floor/k3_nats"] == pytest.approx(0.001**2 / 2, rel=1e-2)
        assert record["router/mismatch"] == record["router/free"] == record["router/local"] == 0
        assert record["router/margin_p50"] == pytest.approx(0.5, rel=0.1)
        assert record["router/replayed_tokens"] == 0 and "router/replay_effect_max_nats" not in record


def test_experts_are_compared_on_so_many_tokens_as_are_asked_for(tmp_path):
    scenario = Scenario(tmp_path / "run", num_steps=4, instruments={"every": 0, "expert_tokens": 12})
    records = scenario.run()
    for places, batch, record in zip(
        scenario.trainer.routed, scenario.trainer.batches, records[1:], strict=True
    ):
        num = sum(len(batch[i].token_ids) for i in places)
        assert 0 < num <= 12 < sum(len(s.token_ids) for s in batch)
        assert record["experts/compared_tokens"] == num - len(places)  # of N tokens N - 1 are processed


def test_an_alert_is_told_once_filed_and_counted_until_it_is_over(tmp_path, caplog):
    scenario = Scenario(tmp_path / "run", num_steps=5)
    scenario.trainer.mismatches = {2: 0.2, 3: 0.2}  # nats, in the batches of these versions
    caplog.set_level("WARNING", "megatron_vespo")
    records = scenario.run()
    assert [record["alerts/active"] for record in records[1:]] == [0, 0, 1, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rule"], line["begins"]) for line in lines] == [
        (3, "engine_mismatch", True),
        (5, "engine_mismatch", False),
    ]
    assert len([r for r in caplog.records if "mismatch/k3_nats = 2.1e-02 nats: expected" in r.message]) == 1
    assert "version 5: the alert 'engine_mismatch' is over" in scenario.text.getvalue()


def test_a_resumed_run_does_not_repeat_an_alert_that_still_holds(tmp_path):
    first = Scenario(tmp_path / "run", num_steps=2)
    first.trainer.mismatches = {1: 0.2}
    first.run()
    second = Scenario(tmp_path / "run", start=first.observer.progress, num_steps=4)
    second.trainer.mismatches = {2: 0.2}
    records = second.run()
    assert [record["alerts/active"] for record in records[1:]] == [0, 1, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["begins"]) for line in lines] == [(2, True), (4, False)]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
