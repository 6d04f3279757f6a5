"""Learning-rate schedules by hand; what updates do is tested on real ranks in test_step.py and test_layouts.py."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_vespo.config import OptimizerConfig
from megatron_vespo.trainer.optimizer import learning_rate


def rates(*numbers, **fields):
    cfg = OptimizerConfig(learning_rate=1.0, **fields)
    return [learning_rate(cfg, number) for number in numbers]


def test_a_constant_rate_rises_linearly_and_stays():
    assert rates(0, 1, 3, 4, 900, warmup_steps=4) == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert rates(0, 5) == [1.0, 1.0]


def test_a_linear_rate_falls_from_the_end_of_the_warm_up_to_its_minimum():
    got = rates(0, 2, 4, 7, 10, 99, warmup_steps=4, schedule="linear", decay_steps=10, min_learning_rate=0.1)
    assert got == pytest.approx([0.25, 0.75, 1.0, 0.55, 0.1, 0.1])


def test_a_cosine_rate_is_half_way_down_in_the_middle():
    got = rates(0, 25, 50, 75, 100, schedule="cosine", decay_steps=100, min_learning_rate=0.2)
    assert got == pytest.approx([1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2], abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine"}, "decay_steps = 0: schedule = 'cosine' needs the update at which it ends"),
        ({"decay_steps": 5}, "decay_steps = 5: schedule = 'constant' needs none"),
        ({"schedule": "linear", "decay_steps": 5, "warmup_steps": 5}, "must be above warmup_steps = 5"),
        ({"min_learning_rate": 0.5}, "is never reached with schedule = 'constant'"),
        (
            {"min_learning_rate": 2.0, "schedule": "linear", "decay_steps": 9},
            "must not exceed learning_rate = 1.0",
        ),
        ({"overlap": True, "distributed": False}, "overlap = true: needs distributed = true"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        OptimizerConfig(learning_rate=1.0, **fields)
