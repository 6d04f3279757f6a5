"""What one rank's failure becomes on all ranks; the collective is played, real ranks fail in test_hf_weights.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_vespo.trainer.together import together
from megatron_vespo.types import RunError


@pytest.fixture
def others(monkeypatch):
    """Problems of rank 1 and 2, to be filled in, and what this rank told them."""
    problems, told = [None, None], []

    def gather(everyone, mine):
        told.append(mine)
        everyone[:] = [mine, *problems]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return problems, told


def stopping():
    return together(RunError, OSError, "'file': cannot be read", "mend it")


def test_a_rank_that_did_well_raises_what_the_first_other_rank_met(others):
    problems, told = others
    with stopping():
        pass
    problems[:] = "of rank 1", "of rank 2"
    with pytest.raises(RunError, match=r"^of rank 1$"), stopping():
        pass
    assert told == [None, None]


def test_an_exception_of_the_kind_speaks_for_itself_and_a_foreign_one_is_explained(others):
    _, told = others
    with pytest.raises(RunError, match=r"^too late$"), stopping():
        raise RunError("too late")
    with pytest.raises(RunError), stopping():
        raise FileNotFoundError("no such file")
    assert told == ["too late", "'file': cannot be read (FileNotFoundError: no such file); mend it"]


def test_after_a_failure_of_another_sort_there_is_no_further_collective(others):
    with pytest.raises(ZeroDivisionError), stopping():
        1 / 0  # noqa: B018
    assert others[1] == []
