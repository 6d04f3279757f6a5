import json
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megatron_vespo.algo.routers import expert_overlap
from megatron_vespo.diagnose import examination
from megatron_vespo.diagnose.examination import Examination, examine
from megatron_vespo.evidence import Evidence, Facts

B, P, T, L, K, E = 24, 5, 20, 3, 2, 16
S, R = B * T, B * (P + T - 1)
OPTIONAL = ("natural_logp", "engine_logp", "repeat_logp", "replayed_logp", "entropy", "version_gap", "step", "reward",
            "advantage", "log_w", "coefficient", "uid", "text", "margin")  # fmt: skip
COLUMNS = ("behavior", "engine", "natural", "shadow")


def top(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, -1)[..., :K].astype(np.uint8)


def rows_of(experts: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    return experts.reshape(B, -1, *experts.shape[1:])[sequences].reshape(-1, *experts.shape[1:])


@pytest.fixture(scope="module")
def whole() -> Evidence:
    """Everything recorded; every third sequence is half stale, and one token in 20 an environment wrote."""
    rng = np.random.default_rng(0)
    truth = -rng.exponential(1, S) - 0.5

    def near(size: float) -> np.ndarray:
        return np.minimum(truth + rng.normal(0, size, S), 0).astype(np.float32)

    natural = near(0.02)
    scores = rng.normal(size=(R, L, E))
    noisy = {name: top(scores + rng.normal(0, 0.03, scores.shape)) for name in COLUMNS if name != "natural"}
    order = -np.sort(-scores, -1)
    gap = np.zeros((B, T), np.int32)
    gap[::3, : T // 2] = 1
    return Evidence(
        name="made",
        facts=Facts(num_experts=E),
        num_prompt=np.full(B, P, np.int32),
        num_response=np.full(B, T, np.int32),
        tokens=rng.integers(0, 100, B * (P + T)).astype(np.int32),
        is_sampled=np.arange(S) % 20 != 7,
        behavior_logp=near(0.05),
        policy_logp=natural,
        natural_logp=natural,
        engine_logp=near(0.04),
        repeat_logp=near(0.01),
        replayed_logp=near(0.03),
        entropy=rng.exponential(1, S).astype(np.float32),
        version_gap=gap.ravel(),
        step=np.arange(B, dtype=np.int32),
        reward=rng.random(B),
        advantage=rng.normal(size=B),
        log_w=np.zeros(B),
        coefficient=np.ones(B),
        uid=[str(i) for i in range(B)],
        text=["x"] * B,
        is_routed=np.ones(B, np.bool_),
        experts={**noisy, "natural": top(scores)},
        margin=(order[..., K - 1] - order[..., K]).astype(np.float32),
    )


def assert_sound(found: Examination) -> None:
    assert [name for name, x in found.metrics.items() if not (type(x) is float and np.isfinite(x))] == []
    json.dumps(dict(found.tables), allow_nan=False)
    assert all(rows for rows in found.tables.values())


def without_experts(evidence: Evidence, *names: str) -> Evidence:
    kept = {name: x for name, x in evidence.experts.items() if name not in names}
    return replace(evidence, experts=kept, is_routed=evidence.is_routed & bool(kept))


def documented() -> set[str]:
    """Every word of the contract that could be a name."""
    return set(re.findall(r"[A-Za-z][\w]*", examination.__doc__ or ""))


def test_every_name_that_is_found_is_in_the_contract(whole: Evidence):
    words = documented()
    for evidence in (whole, replace(whole, facts=replace(whole.facts, router_replay="engine"))):
        found = examine(evidence)
        prefixes, names = zip(*(name.split("/") for name in found.metrics), strict=True)
        parts = r"(natural_)?(staleness|decode|unsplit|engine|routing|rerun|update)_(?=(nats|share|square_share|seq_nats|seq_share)$)"
        assert {re.sub(parts, "PART_", name) for name in names} - words == set()
        assert set(prefixes) <= words and set(found.tables) <= words
        assert {name.split("/")[1] for name in found.arrays} - words == set()
        assert {name for rows in found.tables.values() for row in rows for name in row} - words == set()


def test_every_name_of_the_contract_is_found_where_all_was_recorded(whole: Evidence):
    found = examine(whole)
    for prefix, pair in {"router": r"router/  ", "structure": r"structure/  ", "data": r"data/  "}.items():
        section = (examination.__doc__ or "").split("\n" + pair)[1].split("\n\n")[0]
        lines = [re.split(r" {3,}(?=\S)", line.strip())[0] for line in section.splitlines()[1:]]
        names = {name for line in lines for name in re.findall(r"(?<![\w(])[a-z]\w+_\w+(?![\w)])", line)}
        missing = {name for name in names if f"{prefix}/{name}" not in found.metrics}
        assert missing <= {"num_flips"}, prefix
    for name in ("mismatch", "total", "natural", "replayed", "floor", "stale", "decode", "routing"):
        assert f"{name}/k3_nats" in found.metrics
    arrays = re.findall(
        r"(?:mismatch|total|router|structure)/\w+(?= \[|,| histogram)",
        (examination.__doc__ or "").split("ARRAYS")[1],
    )
    assert set(arrays) <= set(found.arrays)
    tables = set(
        re.findall(
            r"^    (\w+) {2,}", (examination.__doc__ or "").split("TABLES")[1].split("ARRAYS")[0], re.M
        )
    )
    assert tables - set(found.tables) <= {"garbage", "permutation"}


def test_what_lacks_makes_no_error_and_no_nan(whole: Evidence):
    everything = examine(whole)
    assert_sound(everything)
    for name in OPTIONAL:
        found = examine(replace(whole, **{name: None}))
        assert_sound(found)
        more = set(found.metrics) - set(everything.metrics)
        assert all(x.startswith("cause/unsplit_") for x in more), name


def test_any_columns_of_experts_suffice(whole: Evidence):
    everything = examine(whole)
    for num in (1, 2, 3, 4):
        for names in combinations(COLUMNS, num):
            found = examine(without_experts(whole, *names))
            assert_sound(found)
            assert set(found.metrics) <= set(everything.metrics)
            assert ("router/mismatch" in found.metrics) == (
                {"natural", "engine"}.isdisjoint(names)
                or ("behavior" not in names and not {"natural", "shadow"} <= set(names))
            )


def test_the_required_columns_alone_are_examined(whole: Evidence):
    bare = without_experts(replace(whole, facts=Facts(), **dict.fromkeys(OPTIONAL)), *COLUMNS)
    found = examine(bare)
    assert_sound(found)
    assert {"mismatch/k3_nats", "total/seq_nats_std", "cause/engine_nats", "structure/logp_shift"} <= set(
        found.metrics
    )
    assert not any(name.startswith("router/") for name in found.metrics)


def test_nothing_sampled_is_no_error(whole: Evidence):
    assert_sound(examine(replace(whole, is_sampled=np.zeros(S, np.bool_))))


def test_engine_mismatch_is_of_sampled_tokens_under_the_same_weights(whole: Evidence):
    chosen = whole.is_sampled
    found = examine(whole).metrics
    d = (whole.policy_logp.astype(np.float64) - whole.engine_logp)[chosen]
    assert (found["mismatch/num_tokens"], found["mismatch/k1_nats"]) == (
        chosen.sum(),
        pytest.approx(-d.mean()),
    )
    d = (whole.policy_logp.astype(np.float64) - whole.behavior_logp)[chosen]
    assert found["total/k3_nats"] == pytest.approx((np.expm1(d) - d).mean())


def test_stale_tokens_do_not_count_where_only_the_behavior_is_known(whole: Evidence):
    # Stale and fresh tokens share sequences here: the stale ones are no numbers that went wrong, they are other weights'.
    found = examine(replace(whole, engine_logp=None))
    fresh = whole.is_sampled & (whole.version_gap == 0)
    d = (whole.policy_logp.astype(np.float64) - whole.behavior_logp)[fresh]
    assert found.metrics["mismatch/num_tokens"] == fresh.sum() < whole.is_sampled.sum()
    assert found.metrics["mismatch/nonfinite_fraction"] == found.metrics["natural/nonfinite_fraction"] == 0
    assert found.metrics["mismatch/abs_max_nats"] == pytest.approx(np.abs(d).max())
    assert all(row["version_gap"] == 0 for row in found.tables["extreme"])


def test_a_sequence_that_lacks_a_column_is_left_out_of_it_alone(whole: Evidence):
    engine = whole.engine_logp.copy()
    engine[:T] = np.nan  # sequence 0: half stale
    repeat = whole.repeat_logp.copy()
    repeat[:T] = np.nan
    found = examine(replace(whole, engine_logp=engine, repeat_logp=repeat)).metrics
    sampled, stale = whole.is_sampled, whole.version_gap > 0
    assert found["mismatch/num_tokens"] == sampled.sum() - (sampled & stale)[:T].sum()
    assert found["floor/num_tokens"] == sampled[T:].sum()
    assert found["mismatch/nonfinite_fraction"] == found["floor/nonfinite_fraction"] == 0


def test_a_log_prob_that_is_no_number_is_counted_and_listed_first(whole: Evidence):
    policy = whole.policy_logp.copy()
    policy[3] = np.nan
    found = examine(replace(whole, policy_logp=policy))
    assert_sound(found)
    assert found.metrics["mismatch/nonfinite_fraction"] == pytest.approx(1 / whole.is_sampled.sum())
    assert (found.tables["extreme"][0]["sequence"], found.tables["extreme"][0]["position"]) == (0, 3)


def test_the_router_is_compared_under_the_same_weights(whole: Evidence):
    found = examine(whole).metrics
    gap = expert_overlap(whole.experts["natural"], whole.experts["engine"])
    assert (found["router/num_rows"], found["router/mismatch"]) == (R, pytest.approx((gap < 1).mean()))
    # Without the engine's prefill: rows of fresh tokens.  A prompt's rows count as those of its first response token.
    found = examine(without_experts(whole, "engine")).metrics
    stale = np.zeros((B, P + T - 1), bool)
    stale[::3, : P - 1 + T // 2] = True
    gap = expert_overlap(whole.experts["natural"], whole.experts["behavior"])[~stale.ravel()]
    assert (found["router/num_rows"], found["router/mismatch"]) == (
        (~stale).sum(),
        pytest.approx((gap < 1).mean()),
    )


def test_sequences_without_experts_are_left_out_of_the_router_only(whole: Evidence):
    routed = np.arange(B) % 2 == 0
    experts = {name: rows_of(x, routed) for name, x in whole.experts.items()}
    found = examine(replace(whole, is_routed=routed, experts=experts, margin=rows_of(whole.margin, routed)))
    assert_sound(found)
    assert (
        found.metrics["router/num_rows"] == R / 2
        and found.metrics["mismatch/num_tokens"] == whole.is_sampled.sum()
    )
    assert found.metrics["structure/row_count_errors"] == 0
    listed = {row["sequence"]: row for row in found.tables["extreme"]}
    assert all(("flipped_layers" in row) == (sequence % 2 == 0) for sequence, row in listed.items())


def test_an_error_that_hangs_on_flips_and_on_one_expert_is_found(whole: Evidence):
    row = (
        np.arange(B)[:, None] * (P + T - 1) + P - 1 + np.arange(T)
    ).ravel()  # row P - 1 + t of each sequence
    used = (whole.experts["engine"][row, 1] == 9).any(-1)
    sign = np.where(np.arange(S) % 2, 0.3, -0.3)
    worse = (whole.engine_logp + np.where(used, sign, 0)).astype(np.float32)
    found = examine(replace(whole, engine_logp=worse))
    assert (found.metrics["router/blame_layer"], found.metrics["router/blame_expert"]) == (1, 9)
    assert found.metrics["router/blame_z_max"] > 5 and found.tables["experts"][0]["expert"] == 9
    flip = (expert_overlap(whole.experts["natural"], whole.experts["engine"])[row] < 1).any(-1)
    d = (whole.policy_logp.astype(np.float64) - worse)[whole.is_sampled]
    flip = flip[whole.is_sampled]
    assert found.metrics["router/flip_k2_share"] == pytest.approx((d[flip] ** 2).sum() / (d**2).sum())


def test_columns_of_another_number_of_rows_are_told_and_not_compared(whole: Evidence):
    short = {**whole.experts, "engine": whole.experts["engine"][:-1]}
    found = examine(replace(whole, experts=short))
    assert_sound(found)
    assert found.metrics["structure/row_count_errors"] == 1
    (row,) = (row for row in found.tables["structure"] if row["test"] == "row_count_errors")
    assert row["source"] == "engine" and not row["passed"]


def test_healthy_evidence_passes_every_structure_test_and_a_shifted_one_does_not(whole: Evidence):
    assert all(row["passed"] for row in examine(whole).tables["structure"])
    shifted = np.roll(whole.experts["engine"].reshape(B, -1, L, K), 1, 1).reshape(R, L, K)
    found = examine(replace(whole, experts={**whole.experts, "engine": shifted}))
    assert found.metrics["structure/token_shift"] == 1
    failed = {(row["test"], row["source"]) for row in found.tables["structure"] if not row["passed"]}
    assert ("token_shift", "natural against engine") in failed
    assert ("token_shift", "natural against behavior") not in failed


def test_conditioned_tables_share_out_all_tokens(whole: Evidence):
    found = examine(whole).tables
    for name in ("probability", "entropy", "position", "position_quartile", "length", "token_class"):
        assert sum(row["token_share"] for row in found[name]) == pytest.approx(1), name
        assert sum(row["k2_share"] for row in found[name]) == pytest.approx(1), name
    classes = {row["label"]: row["num_tokens"] for row in found["token_class"]}
    # Token 7 of 20 is an environment's in every sequence, so that token 8 comes after it.
    assert classes == {"first": B, "after_environment": B, "last": B, "middle": B * (T - 4)}


def test_intervals_hold_their_value_and_shares_add_up(whole: Evidence):
    found = examine(whole)
    for row in found.tables["intervals"]:
        assert row["low"] <= row["value"] <= row["high"] and row["value"] == pytest.approx(
            found.metrics[row["metric"]]
        )
    for share in ("share", "square_share", "seq_share"):
        assert sum(row[share] for row in found.tables["causes"]) == pytest.approx(1)
