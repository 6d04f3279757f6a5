"""What a weight push sees of an SGLang server: its HTTP answers and its end of the transfer, in a process that can be ended.

The process group is real (gloo), as are the shared memory and the files.  "Weights" are the bytes by name; a fault is what
happens from the n-th time on that a path is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import signal
import threading
import urllib.request
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.rollout.fake_receiver"])


class Fault(NamedTuple):
    path: str
    what: str
    """"kill", "stop" (SIGSTOP), "refuse" (HTTP 400)."""
    nth: int = 1


class FakeEngine:
    """The handle that a test holds."""

    def __init__(self, name: str, *faults: Fault, **info: object) -> None:
        self.name = name
        pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_serve, args=(theirs, faults, info), daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{pipe.recv()}"

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def state(self):
        with urllib.request.urlopen(self.url + "/state", timeout=10) as answer:
            return json.load(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


@contextmanager
def fake_engines(*engines: FakeEngine):
    try:
        yield engines
    finally:
        for engine in engines:
            engine.end()


def digest_of(tensors) -> str:
    """As a fake engine computes it."""
    content = {
        name: _hash(tensor.contiguous().view(-1).view(torch.uint8)) for name, tensor in tensors.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(data: torch.Tensor) -> str:
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _serve(pipe, faults, info) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.scheduler = _Scheduler(faults, info)
    pipe.send(server.server_port)
    server.serve_forever()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        status, answer = self.server.scheduler.answer(path, body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *args):
        pass


class _Scheduler:
    def __init__(self, faults, info) -> None:
        self.lock = threading.Lock()
        self.faults = faults
        self.info = {
            "tp_size": 1, "dp_size": 1, "pp_size": 1, "enable_dp_attention": False, "disable_radix_cache": False,
            "startup_time": {"total": os.getpid()},
        } | info  # fmt: skip
        self.calls: list[str] = []
        self.paused, self.session, self.version = False, False, "0"
        self.groups, self.weights = {}, {}

    def answer(self, path, body):
        if path == "/state":
            return 200, {
                "paused": self.paused, "session": self.session, "version": self.version, "calls": self.calls,
                "digest": self.digest(),
            }  # fmt: skip
        self.calls.append(path)
        for fault in self.faults:
            if fault.path == path and fault.nth <= self.calls.count(path):
                if fault.what == "refuse":
                    return 400, {"message": "asked too much"}
                os.kill(os.getpid(), signal.SIGKILL if fault.what == "kill" else signal.SIGSTOP)
                threading.Event().wait()  # this thread may run on for a moment
        if path == "/server_info":
            return 200, self.info
        if path == "/model_info":
            return 200, {"weight_version": self.version}
        handle = getattr(self, path[1:], None)
        if handle is None:
            return 404, {}
        with self.lock:  # one thing at a time, as SGLang's scheduler
            return handle(body)

    def digest(self):
        return hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()

    def abort_request(self, body):
        return 200, {}

    def flush_cache(self, body):
        return 200, {}

    def pause_generation(self, body):
        self.paused = True
        return 200, {}

    def continue_generation(self, body):
        self.paused = False
        return 200, {}

    def begin_weight_update(self, body):
        if self.session:
            return 400, {"message": "already open"}
        self.session = True
        return 200, {}

    def end_weight_update(self, body):
        if not self.session:
            return 400, {"message": "none open"}
        self.session = False
        return 200, {}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return 200, {}

    def weights_checker(self, body):
        return 200, {"per_engine_checksum": self.digest()}

    def init_weights_update_group(self, body):
        """With NCCL, members meet at its first use."""
        self.groups[body["group_name"]] = body if body["backend"] == "nccl" else _join(body)
        return 200, {}

    def destroy_weights_update_group(self, body):
        if body["group_name"] not in self.groups:
            return 400, {}
        group = self.groups.pop(body["group_name"])
        if not isinstance(group, dict):
            dist.destroy_process_group(group)
        return 200, {}

    def update_weights_from_distributed(self, body):
        sizes = [
            getattr(torch, dtype).itemsize * torch.Size(shape).numel()
            for dtype, shape in zip(body["dtypes"], body["shapes"], strict=True)
        ]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        name = body["group_name"]
        try:
            if isinstance(self.groups[name], dict):
                self.groups[name] = _join(self.groups[name])
            dist.broadcast(flat, src=0, group=self.groups[name])
        except (RuntimeError, KeyError) as err:
            return 400, {"message": f"Failed to receive weights: {err}"}
        return self.load(dict(zip(body["names"], flat.split(sizes), strict=True)))

    def update_weights_from_tensor(self, body):
        content = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        flat = content["flattened_tensor"]
        return self.load({m.name: flat[m.start_idx : m.end_idx] for m in content["metadata"]})

    def update_weights_from_disk(self, body):
        files = sorted(os.listdir(body["model_path"]))
        for file in files:
            tensors = load_file(os.path.join(body["model_path"], file))
            self.weights |= {name: _hash(t.view(-1).view(torch.uint8)) for name, t in tensors.items()}
        return 200, {}

    def load(self, tensors):
        if not self.session:
            return 400, {"message": "must run between begin and end"}
        self.weights |= {name: _hash(data) for name, data in tensors.items()}
        return 200, {}


def _join(terms):
    name, size = terms["group_name"], terms["world_size"]
    address, port = terms["master_address"], terms["master_port"]
    store = dist.TCPStore(address, port, size, is_master=False, timeout=timedelta(seconds=60))
    group, _ = _new_process_group_helper(
        size, terms["rank_offset"], [], Backend("gloo"), PrefixStore(name, store),
        group_name=name, timeout=timedelta(minutes=30),
    )  # fmt: skip
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
