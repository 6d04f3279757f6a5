"""What a weight push costs: bytes per second next to memcpy, and the pause that requests see; real SGLang server on CPU.

    python benchmarks/weight_sync.py [--gather 500] [--bucket 64] [--models wide many]

Qwen3-30B-A3B scaled down in two ways to about 300 MB: `wide` keeps large tensors, `many` keeps all 18,867 of them.  The
iterator yields tensors at a given rate, as a gather over the trainer's ranks would.  Each row is the second of two pushes
(groups stand, files are cached), with requests retracted, while one request streams tokens.  Columns:

    staged    whether all buckets are gathered before the pause (disk always does)
    gather    seconds waiting for the iterator
    transfer  seconds from the first bucket to the last one loaded; shared memory moves nothing, so that is the loading alone
    MB/s      bytes of all tensors / transfer
    memcpy    the same / seconds that copying these bytes takes in one thread, in the same run
    paused    seconds from the pause to the return
    gap       longest time between two tokens of the streamed request
    total     seconds of the whole push
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import requests
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.config import RolloutConfig
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.server import Server
from megatron_vespo.rollout.weight_sync import PushOutcome, Target, WeightSync

MODELS = {
    "wide": {"num_hidden_layers": 4, "num_experts": 16, "hidden_size": 512, "moe_intermediate_size": 768},
    "many": {"num_hidden_layers": 48, "num_experts": 128, "hidden_size": 128, "moe_intermediate_size": 32},
}
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
ROWS = [
    ("broadcast", False), ("broadcast", True), ("shared_memory", False), ("shared_memory", True), ("disk", True)
]  # fmt: skip
HEAD = (
    f"{'model':6s}{'transport':>14s}{'staged':>8s}{'gather':>8s}{'transfer':>10s}{'MB/s':>8s}{'memcpy':>8s}"
    f"{'paused':>8s}{'gap':>7s}{'total':>7s}"
)


def write_model(directory: Path, shape: dict[str, int]) -> dict[str, Tensor]:
    """A random Qwen3-MoE directory of that shape, float32; returns its tensors."""
    write_tiny_model(directory, seed=0)
    config = json.loads((directory / "config.json").read_text())
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    config |= shape | heads | {"num_experts_per_tok": 8, "num_local_experts": shape["num_experts"]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: 0.05 * torch.randn(size) for name, size in shapes(shape, config["vocab_size"])}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def shapes(shape: dict[str, int], vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape["hidden_size"], shape["moe_intermediate_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "lm_head.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shape["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{name}self_attn.{part}_proj.weight", (heads * HEAD_DIM, hidden)
        yield f"{name}self_attn.o_proj.weight", (hidden, HEADS * HEAD_DIM)
        for norm, size in (("self_attn.q_norm", HEAD_DIM), ("self_attn.k_norm", HEAD_DIM),
                           ("input_layernorm", hidden), ("post_attention_layernorm", hidden)):  # fmt: skip
            yield f"{name}{norm}.weight", (size,)
        yield f"{name}mlp.gate.weight", (shape["num_experts"], hidden)
        for expert in range(shape["num_experts"]):
            yield f"{name}mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{name}mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{name}mlp.experts.{expert}.down_proj.weight", (hidden, inner)


def gathered(tensors: dict[str, Tensor], bytes_per_s: float) -> Iterator[tuple[str, Tensor]]:
    """The tensors at a steady rate, in steps of a few MB."""
    began, num_bytes, step = time.monotonic(), 0, 0
    for name, tensor in tensors.items():
        num_bytes, step = num_bytes + tensor.nbytes, step + tensor.nbytes
        if step > 4e6:
            time.sleep(max(began + num_bytes / bytes_per_s - time.monotonic(), 0))
            step = 0
        yield name, tensor


def memcpy_rate(tensors: dict[str, Tensor]) -> float:
    """Bytes per second of one thread that copies them all into one buffer; the best of three."""
    pieces = [tensor.view(-1).view(torch.uint8) for tensor in tensors.values()]
    flat = torch.zeros(sum(map(len, pieces)), dtype=torch.uint8)
    whole = torch.cat(pieces)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        flat.copy_(whole)
        seconds.append(time.perf_counter() - began)
    return len(flat) / min(seconds)


class Streaming:
    """One request that streams tokens while the context is open, and the longest time between two of them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._first = threading.Event()
        self.gap_s = 0.0

    def __enter__(self) -> Streaming:
        self._thread.start()
        assert self._first.wait(60), "the server gives no tokens"
        return self

    def __exit__(self, *exc: object) -> None:
        requests.post(self._url + "/abort_request", json={"rid": "", "abort_all": True}, timeout=60)
        self._thread.join()

    def _read(self) -> None:
        request = {
            "input_ids": list(b"What is"),
            "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
            "stream": True,
        }
        last = None
        with requests.post(self._url + "/generate", json=request, stream=True, timeout=600) as answer:
            for line in answer.iter_lines():
                if line:
                    now = time.monotonic()
                    self.gap_s = max(self.gap_s, now - last) if last else 0.0
                    last = now
                    self._first.set()


def measured_push(
    sync: WeightSync, url: str, tensors: dict[str, Tensor], rate: float
) -> tuple[PushOutcome, float]:
    """The second of two pushes, and the gap that a request saw."""
    gap_s = 0.0
    for version in (1, 2):
        with Streaming(url) as streaming:
            outcome = sync.push(gathered(tensors, rate), version, [Target("engine", url)])
        assert not outcome.failures and not outcome.incomplete, outcome
        gap_s = streaming.gap_s
    return outcome, gap_s  # pyright: ignore[reportPossiblyUnboundVariable]


async def measure(name: str, place: Path, args: argparse.Namespace) -> None:
    tensors = write_model(place / name, MODELS[name])
    base = RolloutConfig(device="cpu", dtype="float32", context_length=1000, partial_rollouts="retract")
    async with Server(base, place / name, place / f"{name}.log") as server:
        copy = memcpy_rate(tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        sys.stdout.write(
            f"{name}: {len(tensors):,} tensors, {num_bytes / 1e6:.0f} MB; memcpy {copy / 1e6:,.0f} MB/s\n"
        )
        for transport, staged in ROWS:
            cfg = RolloutConfig(
                **base.model_dump(include={"device", "dtype", "context_length", "partial_rollouts"}),
                sync_transport=transport,
                sync_directory=place / "weights" if transport == "disk" else None,
                sync_bucket_bytes=int(args.bucket * 1e6),
                sync_staging_bytes=num_bytes if staged else 0,
            )
            sync = WeightSync(place / name, cfg, torch.device("cpu"))
            outcome, gap_s = await asyncio.to_thread(
                measured_push, sync, server.url, tensors, args.gather * 1e6
            )
            await asyncio.to_thread(sync.close)
            rate, times = num_bytes / outcome.time_s["transfer"], outcome.time_s
            sys.stdout.write(
                f"{name:6s}{transport:>14s}{'yes' if staged else 'no':>8s}{times['gather']:8.2f}{times['transfer']:10.2f}"
                f"{rate / 1e6:8.0f}{rate / copy:8.1%}{times['paused']:8.2f}{gap_s:7.2f}{times['total']:7.2f}\n"
            )
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gather", type=float, default=500, help="MB/s at which the iterator yields")
    parser.add_argument("--bucket", type=float, default=64, help="MB of a bucket")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    torch.manual_seed(0)
    sys.stdout.write(HEAD + "\n")
    with tempfile.TemporaryDirectory() as place:
        for name in args.models:
            asyncio.run(measure(name, Path(place), args))


if __name__ == "__main__":
    main()
