"""What a resume accepts, and which steps a rescue saves."""

import asyncio
import json

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.control.progress import Progress, name_of_stream, rescue, start_of
from megatron_vespo.types import RunError

STREAM = name_of_stream("train", 0, True, ["a", "b"])


class Ranks:
    """As much of a TrainerGroup as a rescue needs."""

    def __init__(self, versions: list[int] | None, saved_version: int = 0) -> None:
        self._versions = versions
        self.saved_version = saved_version
        self.saved: list[dict] = []

    async def versions(self) -> list[int]:
        if self._versions is None:
            raise RunError("trainer ranks, 'num_steps' (3 of 4 are done) = not done after 10.0 s")
        return self._versions

    async def save(self, version: int, state: dict) -> None:
        self.saved.append(state)
        self.saved_version = version


def after_failure(ranks: Ranks, progress: Progress) -> str:
    told: list[str] = []
    asyncio.run(rescue(ranks, progress, 4, told.append))  # type: ignore[arg-type]
    return "\n".join(told)


def test_a_step_that_the_driver_did_not_see_end_is_saved_with_the_prompts_it_trained_on():
    """The server dies during step 3: the driver is torn away, the ranks complete the step."""
    ranks = Ranks([3, 3])
    told = after_failure(ranks, Progress(stream=STREAM, version=2, consumed=8))
    assert ranks.saved == [{"stream": STREAM, "version": 3, "consumed": 12}]
    assert "checkpoint of version 3" in told


def test_a_step_that_only_some_ranks_took_is_not_saved():
    ranks = Ranks([3, 2])
    told = after_failure(ranks, Progress(stream=STREAM, version=2, consumed=8))
    assert ranks.saved == [] and "ranks are at versions [2, 3]" in told


def test_ranks_that_hang_are_named_and_hide_no_other_error():
    told = after_failure(Ranks(None, saved_version=1), Progress(stream=STREAM, version=2, consumed=8))
    assert "steps after 1 are not saved: trainer ranks, 'num_steps' (3 of 4 are done)" in told


def test_what_is_saved_is_not_saved_again():
    ranks = Ranks([2, 2], saved_version=2)
    after_failure(ranks, Progress(stream=STREAM, version=2, consumed=8))
    assert ranks.saved == []


def checkpoint(run_dir, **state):
    directory = run_dir / "checkpoints" / "step_000002"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"step": 2, "state": state}))


def test_a_resume_starts_at_the_newest_checkpoint_and_a_fresh_run_at_0(tmp_path):
    checkpoint(tmp_path, stream=STREAM, version=2, consumed=8)
    assert start_of(tmp_path, STREAM, resume=True) == Progress(stream=STREAM, version=2, consumed=8)
    assert start_of(tmp_path, STREAM, resume=False) == Progress(stream=STREAM)
    assert start_of(tmp_path / "nothing", STREAM, resume=True) == Progress(stream=STREAM)


@pytest.mark.parametrize(
    "other",
    [
        name_of_stream("sft", 0, True, ["a", "b"]),
        name_of_stream("train", 1, True, ["a", "b"]),
        name_of_stream("train", 0, False, ["a", "b"]),
        name_of_stream("train", 0, True, ["b", "a"]),
    ],
)
def test_a_resume_that_would_consume_other_prompts_is_refused(tmp_path, other):
    checkpoint(tmp_path, stream=STREAM, version=2, consumed=8)
    with pytest.raises(ConfigError, match="items would be repeated or skipped"):
        start_of(tmp_path, other, resume=True)
