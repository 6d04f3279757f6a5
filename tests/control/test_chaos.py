"""Whatever happens to an engine: no prompt lost, none trained twice, the staleness bound held, the run goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_vespo.data.demo import write_tiny_model
from tests.control.chaos import FAULTS, PROMPTS, STALENESS, Fault, suffer, suffer_in_the_middle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chaos") / "model"
    write_tiny_model(directory, seed=0)
    return directory


@pytest.fixture
def directory(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    return tmp_path


TESTED = [fault for fault in FAULTS if not fault.tested_elsewhere]


@pytest.mark.parametrize("fault", TESTED, ids=lambda fault: fault.name)
def test_a_fault_costs_time_and_nothing_else(directory: Path, fault: Fault):
    outcome = asyncio.run(suffer_in_the_middle(fault, directory))
    assert outcome.steps == list(range(1, len(outcome.steps) + 1)), "a step is missing"
    assert outcome.ordinals == list(range(PROMPTS * len(outcome.steps))), "a prompt was lost or trained twice"
    assert outcome.staleness_max <= STALENESS
    assert outcome.restarts >= fault.loses
    if fault.loses:
        assert (
            "engine 0 is lost" in outcome.told
            and "engine 0 serves version" in outcome.told.split("engine 0 is lost")[1]
        )


def test_a_request_that_every_engine_refuses_ends_the_run_with_the_engines_words(directory: Path):
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(suffer_in_the_middle(Fault("refuses", suffer("refuse"), loses=0), directory))
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "/generate = HTTP 400" in str(error)
