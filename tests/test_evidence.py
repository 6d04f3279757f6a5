from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.evidence import Facts, read_evidence, write_evidence
from megatron_vespo.types import RunError

FACTS = Facts(
    model="m",
    num_experts=8,
    temperature=0.7,
    router_replay="off",
    trainer_dtype="bfloat16",
    versions={"sglang": "0.5.23"},
)
P, T, L, K = 3, 4, 2, 2


def row(i: int = 0, **changes: object) -> dict:
    rng = np.random.default_rng(i)
    experts = lambda: rng.permuted(np.tile(np.arange(8), (P + T - 1, L, 1)), axis=-1)[..., :K]  # noqa: E731
    logp = lambda: -rng.random(T).astype(np.float32)  # noqa: E731
    return {
        "step": 5, "train_version": 4, "uid": f"u{i}", "reward": 1.0, "advantage": 0.5,
        "prompt_ids": np.arange(P), "response_ids": np.arange(T) + 10, "versions": np.array([3, 3, 4, 4]),
        "behavior_logp": logp(), "policy_logp": logp(), "engine_logp": logp(), "natural_logp": logp(), "repeat_logp": logp(),
        "replayed_logp": logp(), "entropy": -logp(),
        **{f"{who}_experts": experts() for who in ("behavior", "engine", "natural", "shadow")},
        "margin": rng.random((P + T - 1, L)),
    } | changes  # fmt: skip


def dump(tmp_path, columns: dict) -> object:
    file = tmp_path / "dump.parquet"
    pq.write_table(pa.table(columns), file)
    return file


def test_what_is_written_is_read(tmp_path):
    rows = [row(0), row(1)]
    read = read_evidence(write_evidence(tmp_path / "e" / "step.parquet", rows, FACTS))
    assert read.facts == FACTS and read.uid == ["u0", "u1"]
    assert read.num_prompt.tolist() == [P, P] and read.num_response.tolist() == [T, T]
    for column in (
        "behavior_logp",
        "policy_logp",
        "natural_logp",
        "engine_logp",
        "repeat_logp",
        "replayed_logp",
        "entropy",
    ):
        assert (getattr(read, column) == np.concatenate([r[column] for r in rows])).all(), column
    assert read.version_gap.tolist() == [1, 1, 0, 0] * 2 and read.is_routed.all()
    for who, experts in read.experts.items():
        assert (experts == np.sort(np.concatenate([r[f"{who}_experts"] for r in rows]), -1)).all(), who
    assert np.allclose(read.margin, np.concatenate([r["margin"] for r in rows]), atol=1e-3)


def test_without_replay_the_policy_is_natural_and_with_it_replayed(tmp_path):
    bare = {key: row()[key] for key in ("response_ids", "behavior_logp", "policy_logp")}
    off = read_evidence(write_evidence(tmp_path / "a.parquet", [bare], FACTS))
    on = read_evidence(write_evidence(tmp_path / "b.parquet", [bare], replace(FACTS, router_replay="engine")))
    assert (off.natural_logp == bare["policy_logp"]).all() and off.replayed_logp is None
    assert (on.replayed_logp == bare["policy_logp"]).all() and on.natural_logp is None


def test_sequences_without_experts_stand_beside_those_with_them(tmp_path):
    rows = [row(0), row(1, behavior_experts=None), row(2)]
    read = read_evidence(write_evidence(tmp_path / "a.parquet", rows, FACTS))
    assert read.is_routed.tolist() == [True, False, True]
    assert len(read.experts["natural"]) == 2 * (P + T - 1)


def test_tokens_of_an_environment_are_marked(tmp_path):
    read = read_evidence(
        write_evidence(tmp_path / "a.parquet", [row(sampled=np.array([True, False, True, True]))], FACTS)
    )
    assert read.is_sampled.tolist() == [True, False, True, True]


def test_a_run_directory_gives_its_evidence_and_else_its_rollouts(tmp_path):
    (tmp_path / "config.toml").touch()
    write_evidence(tmp_path / "rollouts" / "step_000001.parquet", [row(0), row(1)], FACTS)
    assert len(read_evidence(tmp_path).num_response) == 2
    write_evidence(tmp_path / "evidence" / "step_000001.parquet", [row(0)], FACTS)
    assert len(read_evidence(tmp_path).num_response) == 1
    assert len(read_evidence(tmp_path, kind="rollouts").num_response) == 2


def test_a_limit_takes_sequences_evenly_and_says_so(tmp_path):
    read = read_evidence(
        write_evidence(tmp_path / "a.parquet", [row(i) for i in range(10)], FACTS), limit=5 * T
    )
    assert len(read.num_response) == 5 and "5 of 10" in read.name


def test_a_dump_of_slime_is_read(tmp_path):
    one = row()
    file = dump(tmp_path, {
        "tokens": [np.concatenate([one["prompt_ids"], one["response_ids"]])], "response_length": [T], "loss_mask": [[1, 1, 0, 1]],
        "rollout_log_probs": [one["behavior_logp"]], "log_probs": [one["policy_logp"]],
        "rollout_routed_experts": [base64.b64encode(one["behavior_experts"].astype("<i4").tobytes()).decode()],
    })  # fmt: skip
    read = read_evidence(file, experts_shape=(L, K))
    assert read.num_prompt.tolist() == [P] and read.is_sampled.tolist() == [True, True, False, True]
    assert (read.experts["behavior"] == one["behavior_experts"]).all()


def test_a_padded_dump_of_verl_is_read(tmp_path):
    one, pad = row(), 2
    logp = lambda name: np.concatenate([one[name], np.zeros(pad, np.float32)])  # noqa: E731
    file = dump(tmp_path, {
        "prompts": [np.concatenate([np.zeros(pad, int), one["prompt_ids"]])],
        "responses": [np.concatenate([one["response_ids"], np.zeros(pad, int)])],
        "attention_mask": [[0] * pad + [1] * (P + T) + [0] * pad], "response_mask": [[1] * T + [0] * pad],
        "rollout_log_probs": [logp("behavior_logp")], "old_log_probs": [logp("policy_logp")],
    })  # fmt: skip
    read = read_evidence(file)
    assert (read.num_prompt, read.num_response) == ([P], [T])
    assert (read.policy_logp == one["policy_logp"]).all()


def test_padding_is_taken_out_of_margins_as_out_of_experts(tmp_path):
    one, pad = row(), 2
    margin = np.arange((pad + P + T - 1) * L, dtype=np.float16).reshape(-1, L)
    experts = np.concatenate([np.zeros((pad, L, K), int), one["natural_experts"]])
    file = dump(tmp_path, {
        "prompt_ids": [[0] * pad + one["prompt_ids"].tolist()], "response_ids": [one["response_ids"]],
        "attention_mask": [[0] * pad + [1] * (P + T)], "behavior_logp": [one["behavior_logp"]],
        "policy_logp": [one["policy_logp"]], "natural_experts": [experts.tolist()], "margin": [margin.tobytes()],
    })  # fmt: skip
    assert (read_evidence(file).margin == margin[pad:]).all()


def test_a_dump_of_nemo_rl_is_read(tmp_path):
    one, whole = row(), np.zeros(P, np.float32)
    file = dump(tmp_path, {
        "input_ids": [np.concatenate([one["prompt_ids"], one["response_ids"]])], "token_mask": [[0] * P + [1] * T],
        "generation_logprobs": [np.concatenate([whole, one["behavior_logp"]])],
        "prev_logprobs": [np.concatenate([whole, one["policy_logp"]])],
    })  # fmt: skip
    read = read_evidence(file)
    assert (read.behavior_logp == one["behavior_logp"]).all() and read.num_prompt.tolist() == [P]


def test_any_other_name_can_be_said(tmp_path):
    one = row()
    file = dump(
        tmp_path,
        {"response_ids": [one["response_ids"]], "mu": [one["behavior_logp"]], "pi": [one["policy_logp"]]},
    )
    with pytest.raises(ConfigError, match="behavior_logp"):
        read_evidence(file)
    read = read_evidence(file, columns={"behavior_logp": "mu", "policy_logp": "pi"})
    assert (read.policy_logp == one["policy_logp"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy_logp": np.array([-1, np.nan, -1, -1], np.float32)},
            "row 0.*policy_logp.*nan at response token 1",
        ),
        (
            {"behavior_logp": np.array([-1, -1, 0.5, -1], np.float32)},
            "behavior_logp.*0.5 at response token 2",
        ),
        ({"engine_logp": np.zeros(2, np.float32)}, "engine_logp.*2 values"),
        ({"natural_experts": np.zeros((3, L, K), int)}, "natural_experts.*3 rows"),
        ({"margin": np.zeros((P + T - 1, L - 1))}, "margin.*12 bytes.*24 bytes"),
        ({"margin": np.zeros((2 * (P + T - 1), L))}, "margin.*48 bytes.*24 bytes"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_place(tmp_path, changes, message):
    file = write_evidence(tmp_path / "a.parquet", [row(**changes)], FACTS)
    with pytest.raises(RunError, match=message):
        read_evidence(file)


def test_what_is_no_evidence_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_evidence(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="no parquet files"):
        read_evidence(tmp_path)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(RunError, match="no parquet file"):
        read_evidence(tmp_path / "torn.parquet")


def test_lists_of_text_are_no_log_probs(tmp_path):
    columns = {"response_ids": [[1, 2]], "behavior_logp": [["-0.5", "-1"]], "policy_logp": [[-0.5, -1.0]]}
    with pytest.raises(ConfigError, match=r"behavior_logp.*string.*list of numbers"):
        read_evidence(dump(tmp_path, columns))


def test_files_of_two_models_are_refused(tmp_path):
    write_evidence(tmp_path / "a.parquet", [row()], FACTS)
    write_evidence(tmp_path / "b.parquet", [row()], replace(FACTS, model="other"))
    with pytest.raises(RunError, match="one model"):
        read_evidence(tmp_path)
