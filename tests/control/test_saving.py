"""How the driver saves while training goes on: at most one checkpoint at a time, none that is not on disk."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vespo.config import AlgorithmConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.control.actors import PolicySpec, TrainerGroup
from megatron_vespo.trainer import checkpoint
from megatron_vespo.types import RunError


class Ranks(TrainerGroup):
    """A TrainerGroup whose two ranks answer as told; `polls` says how often they are still writing."""

    def __init__(self, root: Path, *, polls: int = 0, full: bool = False, async_save: bool = True) -> None:
        cfg = TrainerConfig(optimizer=OptimizerConfig(learning_rate=1e-3), async_save=async_save)
        spec = PolicySpec(
            cfg=cfg, model=root, algorithm=AlgorithmConfig(), temperature=1.0, seed=0, updates_per_batch=1
        )
        run = SimpleNamespace(checkpoints=root / "checkpoints", logs=root / "logs")
        super().__init__(SimpleNamespace(), spec, run, version=0, records_experts=False)  # type: ignore[arg-type]
        self.root, self.polls, self.full = root / "checkpoints", polls, full
        self.calls: list[str] = []
        self._actors = [SimpleNamespace(commit=SimpleNamespace(remote=self._commit))]

    async def _all(self, method, *args):
        self.calls.append(method)
        if method == "written" and self.full:
            raise RunError(
                "'rank-00001.safetensors': rank 1 cannot write its checkpoint (No space left on device)"
            )
        if method == "written" and self.polls:
            self.polls -= 1
            return [SimpleNamespace(), None]
        return [SimpleNamespace(), SimpleNamespace()]

    async def _gather(self, what, calls, *limits):
        return [await call for call in calls]

    async def _commit(self, directory, version, state, files):
        self.calls.append(f"commit {version}")
        directory.with_name(directory.name + ".tmp").rename(directory)

    async def poll(self) -> None:
        """What every step begins with."""
        await self._commit_if_written()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


def test_a_checkpoint_counts_when_it_is_on_disk_and_not_before(tmp_path):
    async def run():
        ranks = Ranks(tmp_path, polls=2)
        await ranks.save(4, {})
        for _ in range(2):
            await ranks.poll()
            assert ranks.saved_version == 0 and ranks.names() == ["step_000004.tmp"]
        await ranks.poll()
        assert ranks.saved_version == 4 and ranks.names() == ["step_000004"]
        await ranks.poll()
        assert ranks.calls == ["begin_save", "written", "written", "written", "commit 4"]

    asyncio.run(run())


def test_a_second_save_waits_for_the_first(tmp_path):
    async def run():
        ranks = Ranks(tmp_path, polls=2)
        await ranks.save(4, {})
        await ranks.save(8, {})
        assert ranks.calls[-2:] == ["commit 4", "begin_save"] and ranks.saved_version == 4
        await ranks.saved()
        assert ranks.saved_version == 8 and ranks.names() == ["step_000004", "step_000008"]

    asyncio.run(run())


def test_without_async_save_the_save_waits(tmp_path):
    async def run():
        ranks = Ranks(tmp_path, polls=2, async_save=False)
        await ranks.save(4, {})
        assert ranks.saved_version == 4

    asyncio.run(run())


def test_a_failed_write_is_raised_and_leaves_the_older_checkpoints(tmp_path):
    async def run():
        ranks = Ranks(tmp_path)
        await ranks.save(4, {})
        await ranks.saved()
        ranks.full = True
        await ranks.save(8, {})
        with pytest.raises(RunError, match=r"rank-00001\.safetensors': rank 1 cannot write"):
            await ranks.poll()
        assert ranks.saved_version == 4 and ranks.names() == ["step_000004"]
        ranks.full = False
        await ranks.save(8, {})  # the failure is over
        await ranks.saved()
        assert ranks.saved_version == 8

    asyncio.run(run())


def test_a_run_that_went_back_writes_the_later_steps_anew(tmp_path):
    async def run():
        ranks = Ranks(tmp_path)
        for version in (4, 8):
            await ranks.save(version, {})
            await ranks.saved()
        checkpoint.set_aside(tmp_path / "checkpoints", 4)  # as run.py does before anything starts
        await ranks._load(4)
        assert ranks.saved_version == 4 and ranks.names() == ["step_000004", "superseded"]
        await ranks.save(8, {})
        await ranks.saved()
        assert ranks.names() == ["step_000004", "step_000008", "superseded"]

    asyncio.run(run())
