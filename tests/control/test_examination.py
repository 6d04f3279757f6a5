"""Causes of the examined sequences, on numbers that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.control.examination import Case, case_metrics
from megatron_vespo.evidence import Facts
from megatron_vespo.types import Examined, Prompt, Response, Rollout, Scored, VersionSpan

FACTS = Facts(num_experts=8)
VERSION = 5
T, P = 4, 2
ROWS = P + T - 1
SAME = np.zeros((ROWS, 1, 2), np.uint8) + np.array([0, 1], np.uint8)
OTHER = np.where(np.arange(ROWS)[:, None, None] >= 3, SAME + np.array([0, 3], np.uint8), SAME)
"""A flip in rows 3 and 4, on which the log-probs of response tokens 2 and 3 hang (P - 1 + t)."""


def scored(logp, experts=SAME) -> Scored:
    return Scored(logp=np.full(T, logp, np.float32), experts=experts, entropy=np.full(T, 0.5, np.float32))


def case(*, version=VERSION, sampled=None, experts=None, **logps) -> Case:
    """All log-probs are -1 but those that are given, all experts SAME; `policy` and `repeat` are `natural`."""
    m = {"behavior": -1.0, "engine": -1.0, "natural": -1.0, "replayed": -1.0} | logps
    e = {"behavior": SAME, "engine": SAME, "shadow": SAME} | (experts or {})
    response = Response(
        token_ids=np.arange(T, dtype=np.int32), text="", behavior_logp=np.full(T, m["behavior"], np.float32),
        spans=(VersionSpan(version=version, start=0, end=T),), experts=e["behavior"], finish_reason="stop", sampled=sampled,
    )  # fmt: skip
    prompt = Prompt(uid="p", token_ids=np.arange(P, dtype=np.int32), text="", answer="")
    return Case(
        rollout=Rollout(prompt=prompt, response=response, reward=1.0, advantage=1.0),
        examined=Examined(
            natural=scored(m["natural"]),
            repeat=np.full(T, m.get("repeat", m["natural"]), np.float32),
            replayed=None if m["replayed"] is None else scored(m["replayed"], e["shadow"]),
            margin=np.ones((ROWS, 1), np.float32),
        ),
        policy=scored(m.get("policy", m["natural"])),
        engine=None if m["engine"] is None else scored(m["engine"], e["engine"]),
        train_version=VERSION,
    )


def parts(metrics: dict[str, float], of: str = "nats") -> dict[str, float]:
    names = {
        key: value for key, value in metrics.items() if key.startswith("cause/") and key.endswith(f"_{of}")
    }
    return {
        key.removeprefix("cause/").removesuffix(f"_{of}"): value
        for key, value in names.items()
        if "seq" not in key
    }


def test_a_fresh_sequence_splits_into_decode_engine_and_routing():
    got = parts(case_metrics([case(behavior=-1.0, engine=-0.9, replayed=-0.7, natural=-0.3)], FACTS))
    assert got == pytest.approx(
        {"staleness": 0.0, "decode": 0.1, "engine": 0.2, "routing": 0.4, "rerun": 0.0}, abs=1e-6
    )


def test_experts_of_older_weights_blame_neither_engine_nor_router():
    stale = case(behavior=-1.0, engine=-0.5, replayed=-2.0, natural=-0.5, version=VERSION - 1)
    got = case_metrics([stale], FACTS)
    assert parts(got)["staleness"] == pytest.approx(0.5)
    assert parts(got)["engine"] == parts(got)["routing"] == pytest.approx(0, abs=1e-6)
    assert not got.keys() & {"cause/routing_r", "router/free", "router/local"}


def test_under_engine_replay_the_replayed_pass_is_the_way_whatever_its_age():
    one = case(behavior=-1.0, engine=-0.5, replayed=-0.8, natural=-0.5, policy=-0.8, version=VERSION - 1)
    got = parts(case_metrics([one], Facts(num_experts=8, router_replay="engine")))
    assert got == pytest.approx({"staleness": 0.5, "decode": 0.0, "engine": -0.3, "rerun": 0.0}, abs=1e-6)


def test_shares_of_tokens_and_sequences_add_up():
    cases = [case(natural=-0.5, engine=-0.8), case(natural=-1.2, replayed=-1.1), case(engine=-0.9)]
    got = case_metrics(cases, FACTS)
    for of in ("share", "seq_share"):
        assert sum(
            value for key, value in got.items() if key.endswith(f"_{of}") and ("seq" in key) == ("seq" in of)
        ) == (pytest.approx(1.0))


def test_the_routing_verdict_is_what_replaying_takes_off_the_squares():
    fresh = case(natural=-0.8, replayed=-0.9)
    stale = case(natural=-9.0, replayed=-1.0, version=VERSION - 1)
    assert case_metrics([fresh, stale], FACTS)["cause/routing_r"] == pytest.approx(
        1 - 0.1**2 / 0.2**2, rel=1e-5
    )


def test_the_floor_verdict_compares_the_engine_with_the_trainers_own_noise():
    def k3(d):
        return np.exp(d) - 1 - d

    got = case_metrics([case(natural=-0.8, repeat=-0.9)], FACTS)
    assert got["floor/k3_nats"] == pytest.approx(k3(0.1), rel=1e-5)
    assert got["cause/floor_z"] == pytest.approx(k3(0.2) / k3(0.1), rel=1e-4)
    assert "cause/floor_z" not in case_metrics([case(natural=-0.8)], FACTS), (
        "the trainer repeats itself exactly"
    )


def test_free_and_local_flips_are_counted_on_fresh_sequences():
    shadow = np.where(np.arange(ROWS)[:, None, None] == 3, SAME, OTHER)
    got = case_metrics([case(experts={"behavior": OTHER, "engine": OTHER, "shadow": shadow})], FACTS)
    assert got["router/mismatch"] == got["router/free"] == pytest.approx(2 / 5)
    assert got["router/local"] == pytest.approx(1 / 5) and got["router/cascade_share"] == pytest.approx(1 / 2)


def test_the_effect_of_a_replay_is_looked_for_where_sampled_tokens_have_other_experts():
    sampled = np.array([True, True, True, False])
    idle = case_metrics([case(experts={"behavior": OTHER}, sampled=sampled)], FACTS)
    assert idle["router/replayed_tokens"] == 1 and idle["router/replay_effect_max_nats"] == 0
    real = case_metrics([case(experts={"behavior": OTHER}, replayed=-0.75)], FACTS)
    assert real["router/replayed_tokens"] == 2 and real["router/replay_effect_max_nats"] == pytest.approx(
        0.25
    )


def test_tokens_of_an_environment_count_for_nothing():
    sampled = np.array([True, False, True, True])
    one = case(engine=-0.9, sampled=sampled)
    one.rollout.response.behavior_logp[1] = 50.0
    assert parts(case_metrics([one], FACTS))["decode"] == pytest.approx(0.1)


def test_without_an_engine_and_without_routers_the_rest_is_told():
    got = case_metrics([case(engine=None, replayed=None, natural=-0.5)], FACTS)
    assert parts(got) == pytest.approx({"engine": 0.5, "unsplit": 0.0, "rerun": 0.0}, abs=1e-6)
    assert not [key for key in got if key.startswith("router/")] and "cause/floor_z" not in got
