"""Which sequences of a batch are examined, re-scored and compared."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.config import TrainConfig, parse_config
from megatron_vespo.control.selection import Selection
from megatron_vespo.types import TrainSequence


def config(seed=0, rescored=None, **instruments) -> TrainConfig:
    return parse_config(TrainConfig, {
        "run_dir": "none",
        "model": "none",
        "seed": seed,
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 8},
        "sampling": {"max_response_tokens": 8},
        "trainer": {"device": "cpu", "optimizer": {"learning_rate": 1e-3}},
        "loop": {"num_steps": 6, "prompts_per_step": 2} | ({"rescored_sequences": rescored} if rescored else {}),
        "instruments": instruments,
    })  # fmt: skip


def batch(*lengths: int) -> list[TrainSequence]:
    return [
        TrainSequence(uid=str(i), token_ids=np.zeros(length, np.int32), num_prompt_tokens=1)
        for i, length in enumerate(lengths)
    ]


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 200),
    st.none() | st.integers(1, 20),
    st.integers(1, 60),
)
def test_a_selection_keeps_every_bound(lengths, sequences, tokens, rescored, step):
    cfg = config(rescored=rescored, sequences=sequences, expert_tokens=tokens)
    one = Selection.of(cfg, step, batch(*lengths))
    is_due = step == 1 or step % 20 == 0
    assert len(one.examined) == (min(sequences, len(lengths)) if is_due else 0)
    assert set(one.examined) <= set(one.routed) <= set(one.rescored) and one.routed
    assert min(rescored or len(lengths), len(lengths)) <= len(one.rescored) <= len(lengths)
    others = [lengths[i] for i in one.routed]
    assert sum(others) <= tokens or len(others) == 1 or set(one.routed) == set(one.examined)
    for places in (one.examined, one.rescored, one.routed):
        assert list(places) == sorted(set(places))
    assert one == Selection.of(cfg, step, batch(*lengths))


def test_steps_and_seeds_draw_differently_and_every_sequence_comes_in_its_turn():
    many = batch(*[10] * 30)
    steps = [Selection.of(config(every=1, sequences=4), step, many).examined for step in range(1, 60)]
    assert len(set(steps)) == len(steps)
    assert set().union(*map(set, steps)) == set(range(30))
    assert Selection.of(config(seed=1, every=1, sequences=4), 1, many).examined != steps[0]


def test_no_evidence_means_none_even_at_the_first_step():
    assert Selection.of(config(every=0), 1, batch(5, 5)).examined == ()
