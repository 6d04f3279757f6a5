"""When an alert begins and ends, what it says, and that healthy runs raise none."""

from __future__ import annotations

import pytest

from megatron_vespo.config import TrainConfig, parse_config
from megatron_vespo.control.alerts import Watch

HEALTHY = {
    "mismatch/k3_nats": 1.5e-3,
    "response/length_p95": 500.0,
    "algo/dead_fraction": 0.05,
    "sync/canary_abs_mean_nats": 0.012,
    "sync/changed": 1,
    "optim/learning_rate": 1e-6,
    "optim/grad_norm": 0.3,
    "experts/mismatch_fraction": 0.1,
    "router/mismatch": 0.12,
    "router/replayed_tokens": 900.0,
    "router/replay_effect_max_nats": 0.4,
}


def watch(**algorithm) -> Watch:
    return Watch(parse_config(TrainConfig, {
        "run_dir": "none",
        "model": "none",
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 8},
        "sampling": {"max_response_tokens": 8},
        "trainer": {"device": "cpu", "optimizer": {"learning_rate": 1e-3}},
        "algorithm": algorithm,
        "loop": {"num_steps": 6, "prompts_per_step": 2, "updates_per_batch": 2},
    }))  # fmt: skip


def begun(watch: Watch, *records: dict) -> list[tuple[int, str]]:
    """(step, rule) of what begins when these follow twelve healthy steps."""
    alerts = [watch.see(step, HEALTHY) for step in range(1, 13)]
    assert not any(alerts)
    steps = [watch.see(step, HEALTHY | record) for step, record in enumerate(records, 13)]
    return [(alert.step, alert.rule) for alerts in steps for alert in alerts if alert.begins]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"response/length_p95": 700.0}, "sequence_budget"),  # 1.05 nats
        ({"algo/dead_fraction": 0.51}, "dead_weight"),
        ({"sync/canary_abs_mean_nats": 0.2}, "canary_jump"),  # as trl 5312 saw it
        ({"sync/changed": 0}, "unchanged_weights"),
        ({"router/replay_effect_max_nats": 0.0}, "idle_replay"),
        ({"router/mismatch": 0.4}, "router_mismatch"),
        ({"response/length_p95": 10.0, "mismatch/k3_nats": 1.1e-2}, "engine_mismatch"),
        (
            {"response/length_p95": 10.0, "mismatch/k3_nats": 7.6e-3},
            "engine_mismatch",
        ),  # 5.07 times the start
    ],
)
def test_each_condition_raises_its_alert_once_and_again_only_after_it_was_over(record, rule):
    assert begun(watch(), record, record, {}, {}, record) == [(13, rule), (17, rule)]


@pytest.mark.parametrize(
    "record",
    [
        {"response/length_p95": 660.0},  # 0.99 nats
        {"algo/dead_fraction": 0.5},
        {"sync/canary_abs_mean_nats": 0.035},
        {"sync/changed": 0, "optim/learning_rate": 0.0},  # the first update of a warm-up
        {"sync/changed": 0, "optim/grad_norm": 0.0},  # no sequence had an advantage
        {"router/replay_effect_max_nats": 0.0, "router/replayed_tokens": 15.0},
        {"response/length_p95": 10.0, "mismatch/k3_nats": 7.4e-3},
    ],
)
def test_what_lies_within_bounds_raises_none(record):
    assert begun(watch(), record, record) == []


def test_the_budget_counts_only_where_the_engine_is_in_the_weight():
    long = {"response/length_p95": 9000.0}
    assert begun(watch(reference="proximal"), long) == []


def test_a_jump_needs_a_history_and_one_that_stays_remains_a_jump():
    young = watch()
    assert not young.see(1, HEALTHY) and not young.see(2, HEALTHY | {"sync/canary_abs_mean_nats": 0.2})
    jump = {"sync/canary_abs_mean_nats": 0.2}
    assert begun(watch(), *[jump] * 30) == [(13, "canary_jump")]


def test_rounding_of_float32_is_no_jump_and_no_growth():
    small = watch()
    quiet = HEALTHY | {"sync/canary_abs_mean_nats": 1e-7, "mismatch/k3_nats": 1e-13}
    flipped = HEALTHY | {"sync/canary_abs_mean_nats": 3e-4, "mismatch/k3_nats": 4e-6}
    assert not any(small.see(step, flipped if step % 13 == 0 else quiet) for step in range(1, 40))


def test_a_step_without_the_numbers_leaves_an_alert_as_it_was():
    one = watch()
    idle = {"router/replay_effect_max_nats": 0.0, "router/replayed_tokens": 50.0}
    assert [alert.rule for alert in one.see(1, idle)] == ["idle_replay"]
    assert not one.see(2, {}) and list(one.active) == ["idle_replay"]
    (over,) = one.see(3, idle | {"router/replay_effect_max_nats": 0.1})
    assert not over.begins and not one.active


def test_messages_say_what_is_what_was_expected_and_what_to_do():
    one = watch()
    for step in range(1, 13):
        one.see(step, HEALTHY)
    (alert,) = one.see(13, HEALTHY | {"sync/canary_abs_mean_nats": 0.2})
    assert alert.message == (
        "canary after the weight push = 2.0e-01 nats from the trainer per token: expected about 1.2e-02, as after earlier pushes; "
        "the weights did not all arrive, or the engine's cache is of older ones: look at sync/changed and the engines' logs, and "
        "restart the engines"
    )
    (alert,) = one.see(14, HEALTHY | {"response/length_p95": 4096.0, "sync/canary_abs_mean_nats": 0.2})
    assert alert.message.startswith(
        "engine mismatch = 1.5e-03 nats per token x 4096 tokens (95th percentile) = 6.1 nats of log W: expected at most 1, "
    )
