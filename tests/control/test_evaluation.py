"""avg@k and pass@k, by hand."""

import numpy as np
import pytest

from megatron_vespo.control.evaluation import Evaluated


def evaluated(reward) -> Evaluated:
    return Evaluated(
        name="aime", uids=("a", "b", "c"), reward=np.array(reward), length_mean=7.5, truncated_fraction=0.25, versions=(3, 4)
    )  # fmt: skip


def test_the_mean_over_all_responses_and_the_share_of_prompts_that_were_solved_at_all():
    one = evaluated([[1, 0], [0, 0], [1, 1]])
    assert one.k == 2 and one.avg == 0.5
    assert one.pass_at_k == pytest.approx(2 / 3)
    # Prompt means 1/2, 0, 1: standard deviation 1/2, over 3 prompts.
    assert one.standard_error == pytest.approx(0.5 / 3**0.5)
    assert one.describe() == "aime: avg@2 0.500 +- 0.289, pass@2 0.667 (3 prompts)"
    assert one.metrics() == {
        "eval/aime/avg": 0.5, "eval/aime/pass_at_k": pytest.approx(2 / 3), "eval/aime/length_mean": 7.5,
        "eval/aime/truncated_fraction": 0.25, "eval/aime/version_min": 3, "eval/aime/version_max": 4,
    }  # fmt: skip


def test_with_one_response_there_is_no_pass_at_k():
    one = evaluated([[1.0], [0.5], [0.0]])
    assert one.avg == 0.5 and "eval/aime/pass_at_k" not in one.metrics()
    assert "pass@" not in one.describe()
