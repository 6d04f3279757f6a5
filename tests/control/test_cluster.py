"""Which GPUs an engine is told; what Ray does with places is seen in the end-to-end tests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vespo.config import RolloutConfig
from megatron_vespo.control.actors import TrainerGroup
from megatron_vespo.control.engines import RayEngine
from megatron_vespo.control.run import _fleet
from megatron_vespo.types import RunError


def engines(cfg: Any, **gpus: Any) -> list[RayEngine]:
    cluster = SimpleNamespace(engine_options=lambda index: {}, is_local=True)
    return _fleet(cfg, cluster, cfg.run_dir, print, **gpus)._engines  # type: ignore[arg-type, return-value]


@pytest.fixture
def cfg(served_model, tmp_path) -> Any:
    return SimpleNamespace(
        rollout=RolloutConfig(engines=2, tensor_parallel=2, external=("http://127.0.0.1:30000",)),
        model=served_model, run_dir=tmp_path, seed=5, sampling=SimpleNamespace(temperature=1.0),
    )  # fmt: skip


def test_an_engine_with_gpus_of_its_own_sees_those_that_ray_gave_it(cfg):
    first, second, external = engines(cfg)
    assert [engine._options["gpus"] for engine in (first, second)] == [None, None]
    assert [engine._options["seed"] for engine in (first, second)] == [5, 6]
    assert [engine.name for engine in (first, second, external)] == ["engine 0", "engine 1", "external 0"]


def test_a_colocated_engine_sees_those_of_its_ranks(cfg):
    first, second, _ = engines(cfg, gpus={0: (0, 1), 1: (2, 3)})
    assert [engine._options["gpus"] for engine in (first, second)] == [(0, 1), (2, 3)]


class Ranks(TrainerGroup):
    def __init__(self, places: list[tuple[str, tuple[int, ...]]]) -> None:
        self.places = places

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return self.places


async def shared(places: list[tuple[str, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
    return await Ranks(places).gpus_of_engines(RolloutConfig(engines=2, tensor_parallel=2))


def test_colocated_engines_share_the_gpus_of_consecutive_ranks():
    places = [("a", (4,)), ("a", (5,)), ("b", (0,)), ("b", (1,))]
    assert asyncio.run(shared(places)) == {0: (4, 5), 1: (0, 1)}
    with pytest.raises(RunError, match=r"engine 1 = GPUs of trainer ranks 2\.\.3, on several nodes"):
        asyncio.run(shared([("a", (4,)), ("a", (5,)), ("a", (6,)), ("b", (0,))]))
