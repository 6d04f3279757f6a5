"""What a resume accepts, and which steps a rescue saves."""

import asyncio
import hashlib
import json
from dataclasses import asdict

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.control.progress import Progress, name_of_stream, rescue, start_of
from megatron_vespo.data.stream import Ledger
from megatron_vespo.types import RunError

STREAM = name_of_stream("train", 0, True, ["a", "b"])


class Ranks:
    """As much of a TrainerGroup as a rescue needs."""

    def __init__(self, versions: list[int] | None, saved_version: int = 0, lost: str = "") -> None:
        self._versions = versions
        self.saved_version = saved_version
        self.states: list[dict] = []
        self._writing = 0
        self._lost = lost

    async def versions(self) -> list[int]:
        if self._versions is None:
            raise RunError("trainer ranks, 'num_steps' (3 of 4 are done) = not done after 10.0 s")
        return self._versions

    async def save(self, version: int, state: dict) -> None:
        self.states.append(state)
        self._writing = version

    async def saved(self) -> None:
        if self._lost:
            lost, self._lost = self._lost, ""
            raise RunError(lost)
        self.saved_version = max(self.saved_version, self._writing)


def after_failure(ranks: Ranks, progress: Progress) -> str:
    told: list[str] = []

    def progress_at(version: int) -> Progress:
        return progress if version == progress.version else at(version)

    asyncio.run(rescue(ranks, progress.version, progress_at, told.append))  # type: ignore[arg-type]
    return "\n".join(told)


def at(version: int) -> Progress:
    """After `version` steps of 4 items each."""
    return Progress(stream=STREAM, version=version, ledger=Ledger(100, 4 * version).state())


def test_a_step_that_the_driver_did_not_see_end_is_saved_with_the_prompts_it_trained_on():
    """The server dies during step 3: the driver is torn away, the ranks complete the step."""
    ranks = Ranks([3, 3])
    told = after_failure(ranks, at(2))
    assert ranks.states == [asdict(at(3))]
    assert "checkpoint of version 3" in told


def test_ranks_that_are_further_than_one_step_ahead_are_not_believed():
    ranks = Ranks([4, 4])
    told = after_failure(ranks, at(2))
    assert ranks.states == [] and "ranks are at version 4, the driver at 2" in told


def test_a_step_that_only_some_ranks_took_is_not_saved():
    ranks = Ranks([3, 2])
    told = after_failure(ranks, at(2))
    assert ranks.states == [] and "ranks are at versions [2, 3]" in told


def test_ranks_that_hang_are_named_and_hide_no_other_error():
    told = after_failure(Ranks(None, saved_version=1), at(2))
    assert "steps after 1 are not saved: trainer ranks, 'num_steps' (3 of 4 are done)" in told


def test_what_is_saved_is_not_saved_again():
    ranks = Ranks([2, 2], saved_version=2)
    after_failure(ranks, at(2))
    assert ranks.states == []


def test_a_checkpoint_whose_write_failed_does_not_keep_the_next_one_from_being_saved():
    ranks = Ranks([3, 3], saved_version=1, lost="rank 1 cannot write its checkpoint")
    told = after_failure(ranks, at(3))
    assert ranks.states == [asdict(at(3))]
    assert (
        "a checkpoint could not be written: rank 1 cannot write" in told and "checkpoint of version 3" in told
    )


def checkpoint(run_dir, step=2, *, damaged=False, **state):
    directory = run_dir / "checkpoints" / f"step_{step:06d}"
    directory.mkdir(parents=True)
    (directory / "rank-00000.safetensors").write_bytes(b"abc")
    files = {"rank-00000.safetensors": {"bytes": 3 + damaged, "sha256": ""}}
    manifest = {"format": 2, "step": step, "state": state, "files": files}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_a_resume_starts_at_the_newest_checkpoint_and_a_fresh_run_at_0(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step, **asdict(at(step)))
    assert start_of(tmp_path, STREAM, resume="auto") == at(4)
    assert start_of(tmp_path, STREAM, resume=None) == Progress(stream=STREAM)
    assert start_of(tmp_path / "nothing", STREAM, resume="auto") == Progress(stream=STREAM)


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog):
    checkpoint(tmp_path, 2, **asdict(at(2)))
    checkpoint(tmp_path, 4, damaged=True, **asdict(at(4)))
    assert start_of(tmp_path, STREAM, resume="auto") == at(2)
    assert "step 4 is passed over" in caplog.text and "rank-00000.safetensors': is damaged" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(tmp_path):
    checkpoint(tmp_path, 2, damaged=True, **asdict(at(2)))
    with pytest.raises(RunError, match=r"--resume auto: all 1 checkpoint\(s\) in .* are damaged"):
        start_of(tmp_path, STREAM, resume="auto")


def test_a_resume_from_one_step_takes_that_one_or_lists_those_there_are(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step, **asdict(at(step)))
    checkpoint(tmp_path, 6, damaged=True, **asdict(at(6)))
    assert start_of(tmp_path, STREAM, resume=2) == at(2)
    with pytest.raises(
        ConfigError, match=r"--resume 3: no checkpoint of that step in .* \(there are: 6, 4, 2\)"
    ):
        start_of(tmp_path, STREAM, resume=3)
    with pytest.raises(ConfigError, match=r"--resume 6: .* is damaged"):
        start_of(tmp_path, STREAM, resume=6)
    with pytest.raises(ConfigError, match=r"--resume 3: .*\(there are: none\)"):
        start_of(tmp_path / "nothing", STREAM, resume=3)


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
    checkpoint(tmp_path, **asdict(at(2)))
    with pytest.raises(ConfigError, match="items would be repeated or skipped"):
        start_of(tmp_path, other, resume="auto")


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path):
    checkpoint(tmp_path, 2, stream=STREAM, version=2, consumed=8)
    with pytest.raises(
        ConfigError, match="another version of this program, which remembered stream, version, consumed"
    ):
        start_of(tmp_path, STREAM, resume="auto")
