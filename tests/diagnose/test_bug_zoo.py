"""The doctor on the bug zoo, at reduced size; tools/bug_zoo.py runs all of it."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from tools.zoo.failures import CASES, make
from tools.zoo.matrix import (
    HEALTHY,
    KNOWN,
    Outcome,
    confusion,
    num_false_alarms,
    outcomes,
    share_right,
    verdict,
)
from tools.zoo.nets import EXPERTS, LAYERS, TOPK
from tools.zoo.page import markdown
from tools.zoo.scene import Size

SMALL = Size(prompts=12, group=4, prompt_tokens=(10, 14), response_tokens=(24, 40))
SEED = 20
PATIENTS = [
    case
    for case in CASES
    if case not in ("healthy, long", "physical experts", "raw log-probs", "some other samples")
]
"""Without those that are variants of others."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def healthy():
    return make("healthy", SEED, size=SMALL)


def test_the_doctor_names_what_was_injected_and_calls_nobody_ill():
    found = list(
        chain.from_iterable(outcomes(case, [SEED], ["bfloat16"], ["everything"], SMALL) for case in PATIENTS)
    )

    wrong = [
        f"{outcome.case}: {outcome.diagnosed} ({outcome.text})" for outcome in found if not outcome.is_right
    ]
    assert share_right(found) >= 0.85, wrong
    assert num_false_alarms(found) == 0, wrong


def test_a_healthy_pair_differs_as_real_ones_do(healthy):
    gap = healthy.natural_logp - healthy.behavior_logp
    flips = np.sort(healthy.experts["natural"], -1) != np.sort(healthy.experts["behavior"], -1)

    assert 0.005 < np.abs(gap).mean() < 0.05
    assert 0.005 < flips.any(-1).mean() < 0.1
    replayed = healthy.replayed_logp - healthy.behavior_logp
    assert np.square(replayed).mean() < 0.8 * np.square(gap).mean()


def test_evidence_of_the_zoo_keeps_the_contract(healthy):
    num_tokens = int(healthy.num_response.sum())
    num_rows = int((healthy.num_prompt + healthy.num_response - 1).sum())

    assert len(healthy.tokens) == int((healthy.num_prompt + healthy.num_response).sum())
    for logp in (healthy.behavior_logp, healthy.engine_logp, healthy.repeat_logp, healthy.replayed_logp):
        assert logp.shape == (num_tokens,) and (logp <= 0).all()
    assert {who: rows.shape for who, rows in healthy.experts.items()} == dict.fromkeys(
        ("behavior", "engine", "natural", "shadow"), (num_rows, LAYERS, TOPK)
    )
    assert healthy.margin.shape == (num_rows, LAYERS) and (healthy.margin >= 0).all()
    assert all(rows.min() >= 0 and rows.max() < EXPERTS for rows in healthy.experts.values())


def test_the_same_seed_makes_the_same_evidence(healthy):
    again = make("healthy", SEED, size=SMALL)

    assert (again.tokens == healthy.tokens).all()
    assert (again.behavior_logp == healthy.behavior_logp).all()


def test_without_failure_two_exact_engines_agree():
    evidence = make("healthy", SEED, size=SMALL, background="float32")

    assert np.abs(evidence.natural_logp - evidence.behavior_logp).max() < 1e-4


@pytest.mark.parametrize("level", KNOWN)
def test_a_healthy_pair_is_healthy_however_little_is_known(healthy, level):
    assert verdict(KNOWN[level](healthy))[0] == HEALTHY


def outcome(injected, diagnosed, case="healthy"):
    return Outcome(
        case=case, seed=0, background="float32", known="everything", injected=injected, diagnosed=diagnosed,
        text="a | b", abs_mean=0.1,
    )  # fmt: skip


def test_counts_of_the_matrix():
    found = [
        outcome(HEALTHY, HEALTHY), outcome(HEALTHY, "noise"), outcome("noise", "noise"), outcome("noise", HEALTHY),
    ]  # fmt: skip

    assert (share_right(found), num_false_alarms(found)) == (0.5, 1)
    rows = [line for line in confusion(found).splitlines() if line.startswith("| **")]
    assert [row.count("50%") for row in rows] == [1, 1]


def test_the_page_escapes_what_the_doctor_says():
    page = markdown([outcome(HEALTHY, HEALTHY)])

    assert "100.0% of 1 are right; 0 healthy ones are called ill" in page
    assert "a \\| b" in page
