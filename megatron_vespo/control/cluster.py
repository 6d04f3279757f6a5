"""Where processes run: Ray, and the GPUs and cores that a run reserves in it, all or nothing.

Trainer ranks get a bundle each, packed onto few nodes.  Engines get a bundle each (a bundle never spans nodes), or,
colocated, the bundles of the trainer ranks whose GPUs they share.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo.config import ConfigError, RolloutConfig, TrainerConfig
from megatron_vespo.control.clock import bounded

_OBJECT_STORE_BYTES = 1024**3
LOOPBACK = "127.0.0.1"

Options = dict[str, Any]
"""Of one actor: resources and the place where it runs."""


def print_to(log_file: str) -> None:
    """Everything that this process prints, foreign libraries included, goes to `log_file`; for actors."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True
    )


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one kind of process needs."""

    what: str
    num: int
    bundle: Mapping[str, float]


class Cluster:
    """A Ray of our own on this machine, loopback only, or a running cluster that the configuration names.

    `async with` starts or joins it; leaving it ends (or leaves) it, with every actor that was placed.
    """

    def __init__(self, trainer: TrainerConfig, rollout: RolloutConfig | None, *, trains: bool = True) -> None:
        """
        Args:
            rollout: None where no engine is needed.
            trains: False where no trainer rank is needed.
        """
        self._trainer, self._rollout = trainer, rollout
        self._demands = [_ranks(trainer)] if trains else []
        if rollout and rollout.engines and rollout.placement == "apart":
            self._demands.append(_engines(rollout))
        self._groups: dict[str, PlacementGroup] = {}

    @property
    def is_local(self) -> bool:
        """Whether all of it is this machine, so that servers listen on its loopback address only."""
        return self._trainer.ray_address == "local"

    async def __aenter__(self) -> Cluster:
        try:
            await asyncio.to_thread(self._start)
            for demand in self._demands:
                self._groups[demand.what] = await self._reserve(demand)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for group in self._groups.values():
            remove_placement_group(group)  # in a cluster that goes on without us
        self._groups.clear()
        await asyncio.to_thread(ray.shutdown)

    def rank_options(self, rank: int) -> Options:
        """Of the actor of one trainer rank."""
        return self._in_bundle(_RANKS, rank) | {
            "num_cpus": 1,
            "num_gpus": int(self._trainer.device == "cuda"),
        }

    def engine_options(self, index: int) -> Options:
        """Of the actor that runs one engine.

        A colocated one has no GPUs of its own in Ray's books: it is put beside the first rank whose GPU it shares.
        """
        assert self._rollout is not None
        num_gpus = self._rollout.resolved_gpus_per_engine
        if self._rollout.placement == "colocated":
            return self._in_bundle(_RANKS, index * num_gpus) | {"num_cpus": 0, "num_gpus": 0}
        gpus = num_gpus if self._rollout.device == "cuda" else 0
        return self._in_bundle(_ENGINES, index) | {"num_cpus": 1, "num_gpus": gpus}

    def _in_bundle(self, what: str, index: int) -> Options:
        place = PlacementGroupSchedulingStrategy(self._groups[what], placement_group_bundle_index=index)
        return {"scheduling_strategy": place}

    def _start(self) -> None:
        cpu = self._trainer.device == "cpu"
        environment = {"OMP_NUM_THREADS": "1"} if cpu else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        shared: dict[str, Any] = {
            "log_to_driver": False,
            "runtime_env": {"env_vars": environment},
            "logging_level": logging.ERROR,
        }
        if not self.is_local:
            ray.init(address=self._trainer.ray_address, **shared)
            return
        ray.init(
            address="local",
            num_cpus=sum(demand.num for demand in self._demands) or 1,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            **shared,
        )

    async def _reserve(self, demand: Demand) -> PlacementGroup:
        """All bundles of one kind of process.

        Raises:
            ConfigError: a Ray of our own, which cannot grow, has too few GPUs.
            RunError: the cluster did not have the resources within trainer.placement_timeout_s.
        """
        present = ray.cluster_resources().get("GPU", 0)
        wanted = sum(d.num * d.bundle.get("GPU", 0) for d in self._demands)
        if self.is_local and present < wanted:
            raise ConfigError(
                f"GPUs = {present:g} on this machine: trainer ranks and engines need {wanted:g}; make trainer.layout or "
                "rollout.engines smaller, set rollout.placement = 'colocated' or trainer.ray_address to a cluster, or "
                "device = 'cpu'"
            )
        group = placement_group([dict(demand.bundle)] * demand.num, strategy="PACK")
        await bounded(
            asyncio.wrap_future(group.ready().future()),
            lambda: (
                f"placement of {demand.num} {demand.what} with {dict(demand.bundle)} each (Ray has "
                f"{ray.available_resources()} free)"
            ),
            deadline_s=self._trainer.placement_timeout_s,
            limit="trainer.placement_timeout_s",
        )
        return group


_RANKS, _ENGINES = "trainer ranks", "engines"


def _ranks(cfg: TrainerConfig) -> Demand:
    gpu = {"GPU": 1.0} if cfg.device == "cuda" else {}
    return Demand(what=_RANKS, num=cfg.layout.world_size, bundle={"CPU": 1.0, **gpu})


def _engines(cfg: RolloutConfig) -> Demand:
    gpus = {"GPU": float(cfg.resolved_gpus_per_engine)} if cfg.device == "cuda" else {}
    return Demand(what=_ENGINES, num=cfg.engines, bundle={"CPU": 1.0, **gpus})
