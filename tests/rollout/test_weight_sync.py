"""Pushes into several engines, any of which may be lost at any moment; the engines are fakes with real transfers.

What a push does to a real server is in test_real_weight_sync.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout import broadcast, engine_control, transports
from megatron_vespo.rollout.weight_sync import PushError, Target, WeightSync
from megatron_vespo.types import RunError
from tests.rollout.fake_receiver import FakeEngine, Fault, digest_of, fake_engines

TIMEOUT_S = 20.0
TRANSPORTS = ["broadcast", "shared_memory", "disk"]
UPDATES = {
    "broadcast": "/update_weights_from_distributed",
    "shared_memory": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
}
MOMENTS = [
    Fault("/server_info", ""),
    Fault("/init_weights_update_group", ""),
    Fault("/abort_request", ""),
    Fault("/pause_generation", ""),
    Fault("/begin_weight_update", ""),
    Fault("/update_weights_from_distributed", ""),
    Fault("/update_weights_from_distributed", "", nth=2),
    Fault("/end_weight_update", ""),
    Fault("/update_weight_version", ""),
    Fault("/flush_cache", "", nth=2),  # the first waits for requests that were aborted
    Fault("/model_info", ""),
    Fault("/continue_generation", ""),
]


@pytest.fixture(scope="module")
def tensors():
    """Three buckets of 8 MB, more than fits into socket buffers."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{i}.{kind}": torch.rand(1024 * 1024, generator=generator).to(dtype)
        for i in range(3)
        for kind, dtype in (("half", torch.bfloat16), ("single", torch.float32))
    }


@pytest.fixture(scope="module")
def model(tensors, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def make_sync(model, tmp_path):
    """WeightSync objects of a transport, closed at the end."""
    made = []

    def make(transport="broadcast", **fields):
        directory = tmp_path / "weights" if transport == "disk" else None
        settings = {
            "sync_timeout_s": TIMEOUT_S,
            "sync_bucket_bytes": 8 * 1024**2,
            "sync_directory": directory,
        }
        cfg = RolloutConfig(device="cpu", sync_transport=transport, **(settings | fields))
        made.append(WeightSync(model, cfg, torch.device("cpu")))
        return made[-1]

    yield make
    for sync in made:
        sync.close()


def targets(*engines):
    return [Target(engine.name, engine.url) for engine in engines]


def assert_serves(engine, version, tensors):
    state = engine.state()
    assert (state["version"], state["paused"], state["session"]) == (str(version), False, False)
    assert state["digest"] == digest_of(tensors)


@pytest.mark.parametrize("staging", [0, 10**9], ids=["unstaged", "staged"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_engines_serve_the_weights_that_were_pushed(make_sync, tensors, transport, staging):
    sync = make_sync(transport, sync_staging_bytes=staging)
    with fake_engines(FakeEngine("a"), FakeEngine("b")) as engines:
        outcome = sync.push(iter(tensors.items()), 7, targets(*engines))
        assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
        assert outcome.num_bytes == 3 * (2 + 4) * 1024**2
        assert outcome.digests == dict.fromkeys("ab", f"tp1-ep1-dp1 {digest_of(tensors)}")
        for engine in engines:
            assert_serves(engine, 7, tensors)
        times = outcome.time_s
        assert 0 < times["transfer"] <= times["paused"] <= times["total"] < TIMEOUT_S


@pytest.mark.parametrize("what", ["kill", "refuse"])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment.path[1:]}-{moment.nth}")
def test_an_engine_lost_at_any_moment_costs_the_others_nothing(make_sync, tensors, moment, what):
    began = time.monotonic()
    with fake_engines(FakeEngine("bad", moment._replace(what=what)), FakeEngine("good")) as engines:
        outcome = make_sync().push(iter(tensors.items()), 1, targets(*engines))
        assert list(outcome.failures) == ["bad"]
        assert moment.path in outcome.failures["bad"]
        assert outcome.incomplete == frozenset()
        assert_serves(engines[1], 1, tensors)
        assert outcome.digests == {"good": f"tp1-ep1-dp1 {digest_of(tensors)}"}
    assert time.monotonic() - began < TIMEOUT_S / 2, "noticed at the deadline only"


def test_an_engine_that_cannot_tell_a_digest_is_done_without(make_sync, tensors):
    with fake_engines(FakeEngine("a", Fault("/weights_checker", "refuse"))) as (a,):
        outcome = make_sync().push(iter(tensors.items()), 1, targets(a))
        assert (outcome.failures, outcome.incomplete, outcome.digests) == ({}, frozenset(), {})
        assert_serves(a, 1, tensors)


@pytest.mark.parametrize("what", ["kill", "refuse"])
@pytest.mark.parametrize("transport", TRANSPORTS[1:])
def test_other_transports_lose_an_engine_as_well(make_sync, tensors, transport, what):
    fault = Fault(UPDATES[transport], what)
    with fake_engines(FakeEngine("bad", fault), FakeEngine("good")) as engines:
        outcome = make_sync(transport).push(iter(tensors.items()), 1, targets(*engines))
        assert list(outcome.failures) == ["bad"]
        assert_serves(engines[1], 1, tensors)
    assert not list(transports.SHARED_MEMORY.glob(f"torch_{os.getpid()}_*"))


@pytest.mark.parametrize(
    "path", ["/server_info", "/pause_generation", "/continue_generation", *UPDATES.values()]
)
def test_the_others_do_not_wait_for_an_engine_that_hangs(make_sync, tensors, monkeypatch, path):
    monkeypatch.setattr(engine_control, "PATIENCE_S", 0.5)
    transport = next((name for name, update in UPDATES.items() if update == path), "broadcast")
    began = time.monotonic()
    with fake_engines(FakeEngine("bad", Fault(path, "stop")), FakeEngine("good")) as engines:
        outcome = make_sync(transport).push(iter(tensors.items()), 1, targets(*engines))
        assert list(outcome.failures) == ["bad"]
        assert "it hangs" in outcome.failures["bad"]
        assert_serves(engines[1], 1, tensors)
    assert time.monotonic() - began < TIMEOUT_S / 2


def test_the_only_engine_hangs_until_the_deadline_and_not_longer(make_sync, tensors):
    began = time.monotonic()
    with fake_engines(FakeEngine("bad", Fault("/update_weights_from_distributed", "stop", nth=2))) as engines:
        outcome = make_sync(sync_timeout_s=4).push(iter(tensors.items()), 1, targets(*engines))
        assert list(outcome.failures) == ["bad"]
    assert 2 <= time.monotonic() - began < 5


def test_no_engine_is_left_and_the_iterator_is_free_again(make_sync, tensors):
    """The caller must be able to drain it, because the trainer's other ranks send on."""
    stream = iter(tensors.items())
    with fake_engines(FakeEngine("bad", Fault("/update_weights_from_distributed", "kill"))) as engines:
        outcome = make_sync(sync_staging_bytes=0).push(stream, 1, targets(*engines))
    assert list(outcome.failures) == ["bad"]
    for _ in stream:
        pass


def test_groups_stand_until_their_engine_is_replaced(make_sync, tensors):
    sync = make_sync()
    with fake_engines(FakeEngine("a"), FakeEngine("b")) as (a, b):
        for version in (1, 2):
            sync.push(iter(tensors.items()), version, targets(a, b))
        assert [e.state()["calls"].count("/init_weights_update_group") for e in (a, b)] == [1, 1]
        os.kill(a.pid, signal.SIGKILL)
        with fake_engines(FakeEngine("a")) as (restarted,):
            sync.push(iter(tensors.items()), 2, targets(restarted))
            outcome = sync.push(iter(tensors.items()), 3, targets(restarted, b))
            assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
            for engine in (restarted, b):
                assert engine.state()["calls"].count("/init_weights_update_group") == 1
                assert_serves(engine, 3, tensors)
            sync.close()
            assert b.state()["calls"][-1] == "/destroy_weights_update_group"


class Communicator:
    """NCCL's part: formed at its first use, and gone for all its members once it is aborted; the bytes go through gloo."""

    form = staticmethod(broadcast._form)

    def __init__(self, backend, *terms) -> None:
        self._terms = terms
        self._gloo = None

    def name(self):
        return "nccl"

    def broadcast(self, tensors, options):
        if self._gloo is None:
            self._gloo = self.form("gloo", *self._terms)
        return self._gloo.broadcast(tensors, options)

    def abort(self):
        if self._gloo:
            dist.destroy_process_group(self._gloo)


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setattr(broadcast, "_form", Communicator)


def test_a_common_communicator_is_rebuilt_when_its_engines_change(nccl, make_sync, tensors):
    sync = make_sync(sync_backend="nccl")
    with fake_engines(FakeEngine("a"), FakeEngine("b"), FakeEngine("c")) as (a, b, c):
        for version, members in enumerate([(a, b), (a, b), (a, b, c), (c,), (a, b, c)], 1):
            outcome = sync.push(iter(tensors.items()), version, targets(*members))
            assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
            for engine in members:
                assert_serves(engine, version, tensors)
        invitations = [e.state()["calls"].count("/init_weights_update_group") for e in (a, b, c)]
    assert invitations == [3, 3, 3]  # {a b}, {a b c}, {c}, {a b c}


def test_a_common_communicator_that_loses_a_member_before_the_transfer_is_formed_anew(
    nccl, make_sync, tensors
):
    with fake_engines(FakeEngine("bad", Fault("/pause_generation", "kill")), FakeEngine("good")) as (
        bad,
        good,
    ):
        sync = make_sync(sync_backend="nccl")
        outcome = sync.push(iter(tensors.items()), 1, targets(bad, good))
        assert (list(outcome.failures), outcome.incomplete) == (["bad"], {"good"})
        assert good.state()["paused"]
        outcome = sync.push(iter(tensors.items()), 1, targets(good))
        assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
        assert_serves(good, 1, tensors)


def test_a_common_communicator_is_left_by_all_of_its_engines(nccl, make_sync, tensors):
    """Also by those that a push to a newcomer alone does not speak to."""
    sync = make_sync(sync_backend="nccl")
    with fake_engines(FakeEngine("a"), FakeEngine("b"), FakeEngine("c")) as (a, b, c):
        for version, members in enumerate([(a, b, c), (c,), (a, b, c), (c,), (a, b, c)], 1):
            sync.push(iter(tensors.items()), version, targets(*members))
        calls = [engine.state()["calls"] for engine in (a, b, c)]
        joined = [one.count("/init_weights_update_group") for one in calls]
        left = [one.count("/destroy_weights_update_group") for one in calls]
    assert joined == [3, 3, 5]
    assert left == [2, 2, 4]  # all but the one that stands


@pytest.mark.parametrize("what", ["kill", "refuse"])
def test_a_common_communicator_is_formed_without_engines_that_do_not_come(nccl, make_sync, tensors, what):
    fault = Fault("/init_weights_update_group", what)
    with fake_engines(FakeEngine("a"), FakeEngine("bad", fault), FakeEngine("b")) as (a, bad, b):
        outcome = make_sync(sync_backend="nccl").push(iter(tensors.items()), 1, targets(a, bad, b))
        assert (list(outcome.failures), outcome.incomplete) == (["bad"], frozenset())
        for engine in (a, b):
            assert_serves(engine, 1, tensors)


@pytest.mark.parametrize("what", ["kill", "refuse"])
def test_a_common_communicator_that_breaks_leaves_the_survivors_paused_and_ready(
    nccl, make_sync, tensors, what
):
    sync = make_sync(sync_backend="nccl")
    fault = Fault("/update_weights_from_distributed", what, nth=2)
    with fake_engines(FakeEngine("bad", fault), FakeEngine("good")) as (bad, good):
        outcome = sync.push(iter(tensors.items()), 1, targets(bad, good))
        assert (list(outcome.failures), outcome.incomplete) == (["bad"], {"good"})
        state = good.state()
        assert (state["version"], state["paused"], state["session"]) == ("0", True, False)
        outcome = sync.push(iter(tensors.items()), 1, targets(good))
        assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
        assert_serves(good, 1, tensors)


def test_a_common_communicator_does_not_wait_for_an_engine_that_hangs(nccl, make_sync, tensors, monkeypatch):
    monkeypatch.setattr(engine_control, "PATIENCE_S", 0.5)
    began = time.monotonic()
    fault = Fault("/update_weights_from_distributed", "stop", nth=2)
    with fake_engines(FakeEngine("bad", fault), FakeEngine("good")) as (bad, good):
        outcome = make_sync(sync_backend="nccl").push(iter(tensors.items()), 1, targets(bad, good))
        assert (list(outcome.failures), outcome.incomplete) == (["bad"], {"good"})
        assert good.state()["paused"]
    assert time.monotonic() - began < TIMEOUT_S / 2


@pytest.mark.parametrize("fault", ["unknown name", "wrong shape", "missing tensor", "given twice"])
@pytest.mark.parametrize("staging", [0, 10**9], ids=["unstaged", "staged"])
def test_wrong_tensors_are_refused_and_staging_spares_the_engines(make_sync, tensors, fault, staging):
    named = list(tensors.items())
    if fault == "unknown name":
        named[5] = ("layer.9.half", named[5][1])
    elif fault == "wrong shape":
        named[5] = (named[5][0], named[5][1][:-1])
    elif fault == "missing tensor":
        del named[-1]
    else:
        named[5] = named[4]
    sync = make_sync(sync_staging_bytes=staging)
    with fake_engines(FakeEngine("a")) as (a,):
        with pytest.raises(PushError, match="mend the export") as raised:
            sync.push(iter(named), 1, targets(a))
        assert raised.value.outcome.failures == {}
        assert raised.value.outcome.incomplete == (frozenset() if staging else {"a"})
        assert a.state()["paused"] == (not staging)
        sync.push(iter(tensors.items()), 1, targets(a))
        assert_serves(a, 1, tensors)


def test_what_the_trainer_raises_is_told_with_its_cause(make_sync, tensors):
    def failing():
        yield from list(tensors.items())[:4]  # a bucket, and what shows that it is full
        raise ValueError("rank 3 is gone")

    with fake_engines(FakeEngine("a")) as (a,):
        with pytest.raises(RunError, match="rank 3 is gone"):
            make_sync(sync_staging_bytes=0).push(failing(), 1, targets(a))
        assert a.state()["paused"]


def test_a_trainer_that_hangs_is_not_waited_for_beyond_the_deadline(make_sync, tensors):
    released = threading.Event()

    def hanging():
        yield from list(tensors.items())[:4]  # a bucket, and what shows that it is full
        released.wait(60)

    began = time.monotonic()
    with fake_engines(FakeEngine("a")) as (a,):
        with pytest.raises(PushError, match="rank 0 waits for the trainer's export") as raised:
            make_sync(sync_timeout_s=4, sync_staging_bytes=0).push(hanging(), 1, targets(a))
        assert raised.value.outcome.incomplete == {"a"}
        assert not a.state()["session"]
    assert time.monotonic() - began < 6
    released.set()


@pytest.mark.parametrize(("staging_mb", "layers_read"), [(0, 2), (6, 2), (7, 3), (100, 3)])
def test_as_much_as_the_staging_is_gathered_before_the_pause(
    make_sync, tensors, monkeypatch, staging_mb, layers_read
):
    """Buckets hold a layer of 6 MB; that one is full shows in the next layer.  A bucket waits even without staging."""
    read, at_pause = set(), []

    def counting():
        for name, tensor in tensors.items():
            read.add(name.split(".")[1])
            yield name, tensor

    pause = engine_control.EngineControl.pause

    async def observed(self, mode):
        at_pause.append(len(read))
        await pause(self, mode)

    monkeypatch.setattr(engine_control.EngineControl, "pause", observed)
    sync = make_sync(sync_staging_bytes=staging_mb * 1024**2, sync_bucket_bytes=6 * 1024**2)
    with fake_engines(FakeEngine("a")) as (a,):
        sync.push(counting(), 1, targets(a))
    assert at_pause == [layers_read]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_engines_that_sglang_cannot_update_are_refused(make_sync, tensors, transport):
    engines = {
        "stages": FakeEngine("stages", pp_size=2),
        "replicas": FakeEngine("replicas", dp_size=2),
        "attention": FakeEngine("attention", dp_size=2, enable_dp_attention=True),
    }
    with fake_engines(*engines.values()):
        outcome = make_sync(transport).push(iter(tensors.items()), 1, targets(*engines.values()))
    refused = {"stages"} if transport == "disk" else {"stages", "replicas"}  # files reach every replica
    assert outcome.failures.keys() == refused
    assert "pp_size 2" in outcome.failures["stages"]


def test_files_of_earlier_pushes_are_removed(make_sync, tensors, tmp_path):
    sync = make_sync("disk")
    with fake_engines(FakeEngine("a")) as (a,):
        for version in (1, 2):
            sync.push(iter(tensors.items()), version, targets(a))
            (only,) = (tmp_path / "weights").iterdir()
            assert only.name.startswith(f"version-{version:08d}")


def test_without_room_in_shared_memory_the_trainer_is_told_and_not_killed(make_sync, tensors, monkeypatch):
    monkeypatch.setattr(transports, "_free_bytes", lambda: 1000)
    with fake_engines(FakeEngine("a")) as (a,):
        with pytest.raises(PushError, match=r"1,000 bytes free.*--shm-size") as raised:
            make_sync("shared_memory").push(iter(tensors.items()), 1, targets(a))
        assert raised.value.outcome.incomplete == frozenset()
        assert not a.state()["paused"]


def test_an_engine_that_is_not_there_is_reported(make_sync, tensors):
    outcome = make_sync().push(iter(tensors.items()), 1, [Target("a", "http://127.0.0.1:9")])
    assert "no answer" in outcome.failures["a"]
