"""Starting, watching and ending the server process; a shell script plays the interpreter where no model is needed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_vespo.config import ConfigError, RolloutConfig
from megatron_vespo.data.demo import write_tiny_dense_model
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.model import read_facts
from megatron_vespo.rollout.server import External, Server, _living_members, command, free_port
from megatron_vespo.types import Prompt, RunError, Sampling


def config(**fields) -> RolloutConfig:
    return RolloutConfig(**({"device": "cpu", "dtype": "float32", "context_length": 512} | fields))


def interpreter(tmp_path, body, *, version="0.5.23"):
    """A program that answers the version question as Python would, and runs `body` as its server."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {version}; exit 0; fi\n{body}\n')
    script.chmod(0o755)
    return script


def values(argv, option):
    """The words after --option, up to the next option."""
    rest = argv[argv.index(f"--{option}") + 1 :]
    return list(rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))])


def wait_until(true, *, within_s):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_says_what_the_config_says(served_model):
    argv, env = command(
        config(tensor_parallel=2, max_running_requests=7), served_model, 4567, version=3, seed=5
    )
    assert argv[:3] == (sys.executable, "-m", "sglang.launch_server")
    assert values(argv, "model-path") == [str(served_model)]
    assert values(argv, "host") == ["127.0.0.1"]
    assert values(argv, "port") == ["4567"]
    assert values(argv, "dtype") == ["float32"]
    assert values(argv, "tensor-parallel-size") == ["2"]
    assert values(argv, "context-length") == ["520"]  # 512 and what SGLang keeps for itself
    assert values(argv, "max-running-requests") == ["7"]
    assert values(argv, "max-total-tokens") == ["3584"]  # 7 * 512
    assert values(argv, "weight-version") == ["3"]
    assert values(argv, "random-seed") == ["5"]
    assert "--enable-return-routed-experts" in argv
    assert env["SGLANG_PLATFORM"] == "plain_cpu"
    assert env["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"


def test_nothing_of_the_cpu_platform_reaches_a_cuda_server(served_model):
    argv, env = command(config(device="cuda", dtype="bfloat16"), served_model, 4567)
    assert not {"--attention-backend", "--sampling-backend", "--max-total-tokens"} & set(argv)
    assert not {"PYTHONPATH", "SGLANG_PLATFORM", "OMP_NUM_THREADS"} & set(env)


def test_an_engine_listens_on_its_machines_address_and_sees_its_own_gpus(served_model):
    argv, env = command(config(), served_model, 4567, host="10.0.0.7", gpus=[4, 5])
    assert values(argv, "host") == ["10.0.0.7"]
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "CUDA_VISIBLE_DEVICES" not in command(config(), served_model, 4567).env
    server = Server(config(), served_model, served_model / "log", name="engine 3", host="10.0.0.7")
    assert server.url.startswith("http://10.0.0.7:")


def test_options_of_parallel_engines_go_through_verbatim(served_model):
    options = {"ep-size": 8, "dp-size": 8, "enable-dp-attention": True, "pp-size": 2}
    argv, _ = command(config(sglang=options, gpus_per_engine=16), served_model, 4567)
    assert [values(argv, name) for name in ("ep-size", "dp-size", "pp-size")] == [["8"], ["8"], ["2"]]
    assert "--enable-dp-attention" in argv


def test_verbatim_options_win(served_model):
    options = {
        "attention-backend": "triton",
        "enable_metrics": True,
        "enable-return-routed-experts": False,
        "grammar_backend": None,
        "cuda-graph-bs": [1, 2, 4],
        "json-model-override-args": {"a": 1},
    }
    argv, _ = command(config(sglang=options), served_model, 4567)
    assert values(argv, "attention-backend") == ["triton"]
    assert values(argv, "enable-metrics") == []
    assert values(argv, "cuda-graph-bs") == ["1", "2", "4"]
    assert values(argv, "json-model-override-args") == ['{"a": 1}']
    assert not {"--enable-return-routed-experts", "--grammar-backend"} & set(argv)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("dtype", "set rollout.dtype"),
        ("model_path", "set model"),
        ("model", "set model"),
        ("tp", "set rollout.tensor_parallel"),
        ("tp-size", "set rollout.tensor_parallel"),
        ("tensor_parallel_size", "set rollout.tensor_parallel"),
        ("context-length", "set rollout.context_length"),
        ("weight-version", "it counts optimizer steps"),
        ("host", "it is an address of the engine's machine"),
        ("base_gpu_id", "an engine sees only the GPUs that it was given"),
    ],
)
def test_options_that_have_a_field_of_their_own_are_refused(served_model, key, instead):
    with pytest.raises(
        ConfigError, match=rf"rollout\.sglang\..*: cannot be overridden, {instead}; take it out"
    ):
        command(config(sglang={key: 1}), served_model, 4567)


def test_a_bfloat16_server_makes_float32_logits_as_the_trainer_does(served_model):
    for dtype, wanted in (("bfloat16", True), ("float32", False)):
        argv, _ = command(config(dtype=dtype), served_model, 4567)
        assert ("--enable-fp32-lm-head" in argv) is wanted


def test_experts_are_recorded_only_where_there_are_some_and_they_are_wanted(tmp_path, served_model):
    write_tiny_dense_model(tmp_path / "dense", seed=0)
    for model, wanted in ((tmp_path / "dense", True), (served_model, False)):
        argv, _ = command(config(record_experts=wanted), model, 4567)
        assert "--enable-return-routed-experts" not in argv


def test_the_facts_of_a_model_are_read(served_model, tmp_path):
    facts = read_facts(served_model)
    assert (facts.vocab_size, facts.num_layers, facts.num_experts, facts.experts_per_token) == (264, 4, 8, 2)
    assert facts.router_layers == (0, 1, 2, 3)
    assert facts.stop_token_ids == (260,)
    write_tiny_dense_model(tmp_path, seed=0)
    assert not read_facts(tmp_path).is_moe


def test_layers_without_a_router_are_left_out(served_model, tmp_path):
    for file in served_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    text = text.replace('"decoder_sparse_step": 1', '"decoder_sparse_step": 2')
    (tmp_path / "config.json").write_text(text)
    assert read_facts(tmp_path).router_layers == (1, 3)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_an_incomplete_model_is_refused(served_model, tmp_path, missing):
    for file in served_model.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=rf"model = .*no {missing}"):
        command(config(), tmp_path, 4567)


def test_a_context_longer_than_the_models_is_refused(served_model):
    with pytest.raises(ConfigError, match=r"rollout.context_length = 1025: must be at most .* 1024"):
        command(config(context_length=1025), served_model, 4567)


def test_a_missing_interpreter_is_refused(served_model, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.python = .*no such program"):
        command(config(python=tmp_path / "nothing"), served_model, 4567)


def test_an_interpreter_without_sglang_is_refused(served_model, tmp_path):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="has no sglang"):
        asyncio.run(Server(config(python=script), served_model, tmp_path / "log").start())


def test_a_port_in_use_is_refused(served_model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"rollout.port = {port}: in use"):
            asyncio.run(Server(config(port=port), served_model, tmp_path / "log").start())


def test_free_ports_are_free_and_differ():
    for host in ("127.0.0.1", "127.0.0.2"):
        ports = {free_port(host) for _ in range(20)}
        assert len(ports) > 15
        for port in ports:
            with socket.socket() as probe:
                probe.bind((host, port))


def test_death_at_start_quotes_the_log_of_this_start_only(served_model, tmp_path):
    log = tmp_path / "deep" / "server.log"
    log.parent.mkdir()
    log.write_text("an earlier run\n")
    python = interpreter(tmp_path, "echo the reason >&2; exit 3")
    with pytest.raises(
        RunError, match=r"died while it started, exited with status 3(?s:.*)the reason"
    ) as caught:
        asyncio.run(Server(config(python=python), served_model, log).start())
    assert "an earlier run" not in str(caught.value)
    assert "an earlier run" in log.read_text()


def test_an_option_that_the_server_does_not_know_is_the_configurations_fault(served_model, tmp_path):
    python = interpreter(tmp_path, "echo 'error: unrecognized arguments: --tpp' >&2; exit 2")
    with pytest.raises(
        ConfigError, match=r"engine 3 at .*exited with status 2(?s:.*)unrecognized arguments: --tpp"
    ):
        asyncio.run(Server(config(python=python), served_model, tmp_path / "log", name="engine 3").start())


def test_an_external_server_is_waited_for_and_never_ended():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        engine = External("engine 1", url, start_timeout_s=0.2)
        with pytest.raises(RunError, match=rf"engine 1 at {url} = no answer: waited 0 s"):
            asyncio.run(engine.start())
    asyncio.run(engine.stop())
    assert asyncio.run(engine.death_report()) is None


def test_a_server_that_is_never_ready_is_ended_at_the_deadline(served_model, tmp_path):
    python = interpreter(tmp_path, "echo still loading; sleep 100 & sleep 100")
    server = Server(config(python=python, start_timeout_s=1.0), served_model, tmp_path / "log")
    began = time.monotonic()
    with pytest.raises(RunError, match=r"waited 1 s for /health(?s:.*)still loading"):
        asyncio.run(server.start())
    assert time.monotonic() - began < 10
    assert _living_members(server.pid) == []


def test_a_server_deaf_to_sigterm_is_killed_with_its_children(served_model, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vespo.rollout.server.TERMINATE_WITHIN_S", 0.5)
    server = Server(config(), served_model, tmp_path / "log")
    deaf = "trap '' TERM; (trap '' TERM; sleep 100; sleep 100) & sleep 100; sleep 100"
    server._spawn(("/bin/sh", "-c", deaf), dict(os.environ))
    wait_until(lambda: len(_living_members(server.pid)) >= 4, within_s=10)
    asyncio.run(server.stop())
    assert _living_members(server.pid) == []
    asyncio.run(server.stop())  # a second time does nothing


def test_the_server_and_all_its_children_die_with_its_parent_even_if_that_is_killed(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from megatron_vespo.config import RolloutConfig; from megatron_vespo.rollout.server import Server\n"
        f"server = Server(RolloutConfig(), Path('.'), Path({str(tmp_path / 'log')!r}))\n"
        "server._spawn(('/bin/sh', '-c', 'sleep 100 & sleep 100; :'), dict(os.environ)); print(server.pid, flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        wait_until(lambda: len(_living_members(pid)) == 4, within_s=10)  # tether, shell, and its two children
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not _living_members(pid), within_s=10)


@pytest.mark.slow
def test_a_killed_server_is_found_at_once_started_again_and_its_prompt_goes_on(
    served_model, server_rollout_config, tmp_path
):
    """A real server of its own; its main process is killed while it samples."""
    told = []

    async def serve(fleet):
        await fleet.to_update(0)
        assert fleet.confirm("engine 0", 0)

    async def main():
        server = Server(server_rollout_config, served_model, tmp_path / "log")
        async with Fleet(server_rollout_config, served_model, [server], told.append) as fleet:
            await serve(fleet)
            (member,), first = fleet.members, server.pid
            prompt = Prompt(uid="p7", token_ids=np.arange(20, dtype=np.int32), text="", answer="")
            sampling = asyncio.create_task(
                fleet.sample(prompt, 32, Sampling(temperature=1.0, max_tokens=200))
            )
            while not member.num_under_way:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert not sampling.done()
            os.kill(server.pid, signal.SIGKILL)
            began = time.monotonic()
            while member.state is State.SERVING:
                await asyncio.sleep(0.01)
            assert time.monotonic() - began < 5
            await fleet.newcomer()
            assert server.pid != first
            assert _living_members(first) == []
            await serve(fleet)
            assert len(await sampling) == 32
        return server

    server = asyncio.run(main())
    assert _living_members(server.pid) == []
    (lost,) = [message for message in told if "is lost" in message]
    assert "its process was killed by SIGKILL; the end of" in lost
