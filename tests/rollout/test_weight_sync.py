"""Buckets on the wire, worked out by hand; the pushes themselves are in test_real_server.py."""

from __future__ import annotations

import http.server
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_vespo.rollout.weight_sync import WeightSync, _Group, buckets, describe, flatten
from megatron_vespo.types import RunError


def test_buckets_are_filled_up_to_the_limit_and_nothing_is_lost():
    """4-byte items: 16, 8, 40 and 4 bytes; 24 fit."""
    sizes = {"a": 4, "b": 2, "c": 10, "d": 1}
    cut = list(buckets(((name, torch.zeros(n)) for name, n in sizes.items()), 24))
    assert [[name for name, _ in bucket] for bucket in cut] == [["a", "b"], ["c"], ["d"]]


def test_a_bucket_is_read_from_the_stream_only_when_it_is_wanted():
    read = []

    def stream():
        for name in "abcd":
            read.append(name)
            yield name, torch.zeros(2)

    first = next(buckets(stream(), 16))
    assert [name for name, _ in first] == ["a", "b"]
    assert read == ["a", "b", "c"]  # c showed that the bucket was full


def test_larger_items_come_first_so_that_every_offset_is_aligned():
    """One bfloat16 (2 bytes) before two float32 (4 bytes each) would put these at offset 2."""
    named = [("half", torch.tensor([1.0], dtype=torch.bfloat16)), ("single", torch.tensor([1.0, 2.0]))]
    (bucket,) = buckets(iter(named), 100)
    assert describe(bucket) == {
        "names": ["single", "half"],
        "dtypes": ["float32", "bfloat16"],
        "shapes": [[2], [1]],
    }
    # little-endian: 1.0 = 00 00 80 3f, 2.0 = 00 00 00 40; bfloat16 1.0 = 80 3f
    assert flatten(bucket, torch.device("cpu")).tolist() == [0, 0, 0x80, 0x3F, 0, 0, 0, 0x40, 0x80, 0x3F]


def test_a_transposed_view_is_sent_in_its_own_order():
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T
    assert flatten([("w", tensor)], torch.device("cpu")).tolist() == [1, 3, 2, 4]


def connect(served_model, answers):
    """Connect to a server that gives each path its (status, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return WeightSync.connect(
                f"http://127.0.0.1:{server.server_port}",
                served_model,
                backend="gloo",
                device=torch.device("cpu"),
                bucket_bytes=100,
                timeout_s=20,
            )
        finally:
            server.shutdown()


INFO = b'{"tp_size": 1, "dp_size": 1, "pp_size": 1, "disable_radix_cache": false}'


def test_an_engine_that_declines_to_meet_is_not_waited_for(served_model):
    began = time.monotonic()
    answers = {"/server_info": (200, INFO), "/init_weights_update_group": (400, b"no room")}
    with pytest.raises(RunError, match=r"init_weights_update_group = HTTP 400: .*no room"):
        connect(served_model, answers)
    assert time.monotonic() - began < 5


def test_an_engine_with_data_parallel_replicas_is_refused(served_model):
    with pytest.raises(RunError, match="dp_size = 2"):
        connect(served_model, {"/server_info": (200, INFO.replace(b'"dp_size": 1', b'"dp_size": 2'))})


def test_an_engine_that_is_not_there_is_reported(served_model):
    with pytest.raises(RunError, match=r"http://127.0.0.1:9/server_info = .*refused.*the trainer waited"):
        WeightSync.connect(
            "http://127.0.0.1:9",
            served_model,
            backend="gloo",
            device=torch.device("cpu"),
            bucket_bytes=100,
            timeout_s=5,
        )


class Stuck:
    """A communicator that is being made, or an engine that never answers: nothing returns before `released`."""

    def __init__(self, left_s: float) -> None:
        self.url, self.timeout_s, self.left_s = "http://e", 5.0, left_s
        self.released = threading.Event()
        self.asked: list[str] = []

    def post(self, path, payload):
        self.asked.append(path)
        if path == "/update_weights_from_distributed":
            self.released.wait(20)

    def start_deadline(self, timeout_s=None):
        pass

    def broadcast(self, tensors, options):
        self.released.wait(20)
        raise RuntimeError("aborted")

    def abort(self):
        self.asked.append("abort")
        self.released.set()


def test_a_broadcast_that_blocks_misses_its_deadline_and_is_aborted():
    stuck = Stuck(left_s=0.3)
    group = _Group("g", stuck, None, ThreadPoolExecutor(2), "nccl")
    began = time.monotonic()
    with pytest.raises(RunError, match="a bucket of 1 tensors was not taken: trainer rank 0 waited 5 s"):
        group.broadcast(stuck, torch.zeros(1), {"names": ["w"]})
    assert time.monotonic() - began < 3
    assert stuck.asked == ["/update_weights_from_distributed", "/destroy_weights_update_group", "abort"]
    group.threads.shutdown(wait=True)
