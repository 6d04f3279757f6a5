"""One real SGLang server for the whole test session, and the tiny model that it serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vespo.config import RolloutConfig
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.server import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expect-megatron-core", metavar="VERSION", help="fail unless the ranks import this version"
    )


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory behind `sglang_server`: weight version 0."""
    directory = tmp_path_factory.mktemp("served") / "model"
    write_tiny_model(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def server_rollout_config() -> RolloutConfig:
    return RolloutConfig(
        device="cpu",
        dtype="float32",
        context_length=1024,
        max_running_requests=64,
        request_timeout_s=60,
        start_timeout_s=300,
    )


@pytest.fixture(scope="session")
def _session_server(
    server_rollout_config: RolloutConfig, served_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = Server(server_rollout_config, served_model, tmp_path_factory.mktemp("server") / "server.log")
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture
def sglang_server(_session_server: Server) -> Iterator[Server]:
    """A real server (about 40 s to start, once); every test finds it idle with the weights of version 0."""
    assert asyncio.run(_session_server.death_report()) is None, (
        f"an earlier test killed the server: {_session_server.log}"
    )
    yield _session_server
    if asyncio.run(_session_server.death_report()) is not None:
        return
    with contextlib.suppress(urllib.error.HTTPError):  # refused where no push failed half-way, and by 0.5.20
        _post(_session_server, "/end_weight_update", {})
    _post(_session_server, "/continue_generation", {})
    _post(_session_server, "/abort_request", {"rid": "", "abort_all": True})
    restored = {"model_path": str(_session_server.model), "weight_version": "0", "flush_cache": True}
    _post(_session_server, "/update_weights_from_disk", restored)


def _post(server: Server, path: str, payload: dict[str, object]) -> None:
    request = urllib.request.Request(
        server.url + path, data=json.dumps(payload).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
