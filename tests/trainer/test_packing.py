"""Packing: every sequence exactly once, budgets kept, nothing lost between plan, cut and merge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.config import LayoutConfig
from megatron_vespo.trainer.outputs import RankOutput, merge_scores
from megatron_vespo.trainer.packing import (
    DUMMY,
    Microbatch,
    cut,
    input_numbers,
    padded_length,
    plan,
    response_offsets,
    zigzag,
)
from megatron_vespo.types import RunError, TrainSequence


def sequence(num_tokens, num_prompt=1, uid="s", behavior=False):
    logp = -np.arange(num_tokens - num_prompt, dtype=np.float32) if behavior else None
    return TrainSequence(
        uid=uid,
        token_ids=np.arange(100, 100 + num_tokens, dtype=np.int32),
        num_prompt_tokens=num_prompt,
        behavior_logp=logp,
    )


def test_two_data_ranks_get_rows_of_equal_shape_longest_first():
    # inputs are one shorter than sequences: 9, 4, 7, 2, 5 -> sorted 9 7 | 5 4 | 2
    batch = [sequence(n) for n in (10, 5, 8, 3, 6)]
    assert plan(batch, LayoutConfig(data=2, tensor=2), max_tokens=10) == [
        [Microbatch((0,), 10), Microbatch((4,), 6), Microbatch((3,), 2)],
        [Microbatch((2,), 10), Microbatch((1,), 6), Microbatch((DUMMY,), 2)],
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=30),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(40, 200),
)
def test_every_sequence_is_in_exactly_one_row_and_within_the_budget(
    lengths, data_ranks, multiple, max_tokens
):
    batch = [sequence(n) for n in lengths]
    ranks = plan(batch, LayoutConfig(data=data_ranks, tensor=multiple), max_tokens=max_tokens)
    assert (
        len({tuple((mb.length, len(mb.rows)) for mb in rank) for rank in ranks}) == 1
    )  # the same shapes on all
    for mb in (mb for rank in ranks for mb in rank):
        assert mb.length % multiple == 0 and mb.length * len(mb.rows) <= max_tokens
        assert all(lengths[i] - 1 <= mb.length for i in mb.rows if i != DUMMY)
    rows = sorted(i for rank in ranks for mb in rank for i in mb.rows if i != DUMMY)
    assert rows == list(range(len(lengths)))


def test_inputs_are_padded_to_what_the_tensor_and_context_axes_divide():
    # 10 tokens are 9 inputs; context ranks hold two chunks each
    axes = ({}, {"tensor": 2}, {"context": 2}, {"tensor": 2, "context": 2}, {"data": 4, "pipeline": 4})
    assert [padded_length(10, LayoutConfig(**a)) for a in axes] == [9, 10, 12, 16, 9]


def test_a_sequence_longer_than_the_budget_is_named():
    with pytest.raises(RunError, match=r"sequence long: 12 padded tokens exceed .* = 8"):
        plan([sequence(10, uid="long")], LayoutConfig(tensor=4), max_tokens=8)


def test_zigzag_gives_each_context_rank_an_early_and_a_late_chunk():
    assert zigzag(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert zigzag(3, 1, 0).tolist() == [0, 1, 2]


def test_a_row_predicts_its_response_tokens_and_nothing_else():
    # tokens 100 .. 104, prompt of 2: inputs are 100 .. 103, and columns 1, 2, 3 predict 102, 103, 104
    batch = [sequence(3), sequence(5, num_prompt=2, behavior=True)]
    inputs = cut(batch, Microbatch((1, DUMMY), 6), context=1, context_rank=0)
    assert inputs.tokens.tolist() == [[100, 101, 102, 103, 0, 0], [0] * 6]
    assert inputs.label.tolist() == [102, 103, 104]
    assert inputs.at.tolist() == [1 * 2, 2 * 2, 3 * 2]  # [s, b] with b = 2
    assert inputs.token.tolist() == [2, 3, 4]  # after the 2 response tokens of sequence 0
    assert inputs.behavior_logp.tolist() == [0.0, -1.0, -2.0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4]),
)
def test_context_ranks_together_predict_every_response_token_once(sizes, context):
    batch = [sequence(n, num_prompt=min(p, n - 1)) for n, p in sizes]
    (microbatches,) = plan(batch, LayoutConfig(context=context), max_tokens=64)
    numbers, labels = [], []
    for mb in microbatches:
        for rank in range(context):
            inputs = cut(batch, mb, context=context, context_rank=rank)
            numbers += inputs.token.tolist()
            labels += inputs.label.tolist()
            # what stands at the position of a prediction is the token before the predicted one
            assert (inputs.tokens.T.reshape(-1)[inputs.at] == inputs.label - 1).all()
    assert sorted(numbers) == list(range(int(response_offsets(batch)[-1])))
    in_order = [label for _, label in sorted(zip(numbers, labels, strict=True))]
    assert in_order == np.concatenate([s.token_ids[s.num_prompt_tokens :] for s in batch]).tolist()


def test_router_rows_of_padding_and_dummies_have_no_number():
    batch = [sequence(3), sequence(4)]  # 2 and 3 inputs
    numbers = input_numbers(batch, Microbatch((1, 0, DUMMY), 4), np.arange(4))
    assert numbers.reshape(4, 3).tolist() == [[2, 0, -1], [3, 1, -1], [4, -1, -1], [-1, -1, -1]]


def test_merging_refuses_a_batch_with_a_missing_rank():
    batch = [sequence(3)]
    nothing = RankOutput(
        token=np.array([0]), logp=np.zeros(1, np.float32), entropy=np.zeros(1, np.float32), coefficient=np.zeros(0),
        sequence=np.array([0]), log_w=np.zeros(0), routing=(), time_s={},
    )  # fmt: skip
    with pytest.raises(RunError, match="logp of response token 1: came from no rank"):
        merge_scores([nothing], batch)
