from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo import routes
from megatron_vespo.types import RunError


def choices(seed: int, rows: int, layers: int, topk: int, num_experts: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.broadcast_to(np.arange(num_experts), (rows, layers, num_experts)), axis=-1)
    return ids[..., :topk].astype(np.int32)


SHAPES = {
    "seed": st.integers(0, 10**6), "rows": st.integers(0, 40), "layers": st.integers(1, 5),
    "topk": st.integers(1, 8), "num_experts": st.sampled_from([8, 128, 256, 257, 384]),
}  # fmt: skip


@given(**SHAPES)
def test_a_set_of_experts_survives_whatever_its_order(seed, rows, layers, topk, num_experts):
    experts = choices(seed, rows, layers, topk, num_experts)
    decoded = routes.decode(routes.encode(experts, num_experts))
    assert decoded.dtype == routes.narrowest(num_experts)
    assert (decoded == np.sort(experts, -1)).all() and decoded.shape == experts.shape


@given(**SHAPES)
def test_order_survives_where_it_is_asked_for(seed, rows, layers, topk, num_experts):
    experts = choices(seed, rows, layers, topk, num_experts)
    assert (routes.decode(routes.encode(experts, num_experts, ordered=True)) == experts).all()


def test_a_blob_says_what_it_holds():
    header = routes.read_header(routes.encode(choices(0, 7, 3, 2, 300), 300))
    assert (header.num_rows, header.num_layers, header.topk, header.num_experts) == (7, 3, 2, 300)


def test_rows_with_a_sentinel_are_missing_and_zero():
    experts = choices(0, 5, 2, 2, 8)
    experts[3, 1, 0] = -1
    blob = routes.encode(experts, 8)
    assert routes.missing_rows(blob).tolist() == [False, False, False, True, False]
    assert not routes.decode(blob)[3].any() and (routes.decode(blob)[4] == np.sort(experts[4], -1)).all()


@pytest.mark.parametrize(
    "change", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:10], lambda b: b"none"]
)
def test_a_damaged_blob_is_refused(change):
    with pytest.raises(RunError, match="routes"):
        routes.decode(change(routes.encode(choices(0, 50, 4, 2, 8), 8)))


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(RunError, match="8"):
        routes.encode(np.full((1, 1, 1), 8), 8)


def test_more_experts_than_the_format_holds_are_refused():
    with pytest.raises(RunError, match="65536"):
        routes.encode(np.full((1, 1, 1), 65536), 65537)


def test_what_sglang_sends_is_read_as_it_is():
    experts = choices(1, 6, 3, 2, 16)
    text = base64.b64encode(experts.astype("<i4").tobytes()).decode()
    assert (routes.from_base64(text, 3, 2) == experts).all()


def test_realistic_routes_shrink_at_least_sixfold_against_base64():
    rng = np.random.default_rng(0)
    popularity = rng.normal(0, 1, (8, 128)).astype(np.float32)
    scores = popularity + rng.gumbel(size=(1024, 8, 128)).astype(np.float32)
    experts = np.argpartition(-scores, 8, axis=-1)[..., :8].astype(np.int32)
    encoded = len(base64.b64encode(experts.tobytes()))
    assert encoded / len(routes.encode(experts, 128)) > 6
