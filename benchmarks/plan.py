"""The memory estimate of `megatron-vespo plan` against real ranks, on this machine, as one table.

    python benchmarks/plan.py [--only WORDS]

Every case trains one step on real CPU ranks (gloo) and measures on each of them the bytes of the weights, of Megatron's
gradient buffers, of the optimizer's tensors, and the most that autograd kept for backward passes at one time (distinct
storages that are not weights, over the whole pipeline schedule).  A row is the mean of one pipeline stage's ranks; the
error is estimate / measurement - 1.  Sequences are equally long, so that nothing is padding.  No allowance is made here for
unevenly loaded experts: with random routers that is the error of the layouts with EP (compare "even moe").
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.config import AlgorithmConfig, LayoutConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.trainer.estimate import Workload, estimate_memory
from megatron_vespo.trainer.hf_config import read_model_shape
from megatron_vespo.trainer.layout import Place, coordinates, rank_name
from megatron_vespo.types import TrainSequence

VOCAB = 1024
NUM_TOKENS = 128
"""Inputs of a sequence."""
NUM_SEQUENCES = 16
PARTS = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Case:
    layout: dict[str, int]
    model: str = "moe"
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainerConfig:
        fields = {"dtype": "float32", "max_tokens_per_microbatch": 4 * NUM_TOKENS} | self.options
        return TrainerConfig(
            device="cpu",
            layout=LayoutConfig(**self.layout),
            optimizer=OptimizerConfig(learning_rate=1e-4, **self.optimizer),
            collective_timeout_s=120,
            **fields,
        )

    @property
    def name(self) -> str:
        axes = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "data": "DP",
                "expert": "EP", "expert_tensor": "ETP"}  # fmt: skip
        grid = "x".join(f"{axes[name]}{size}" for name, size in self.layout.items()) or "1 rank"
        cfg = self.config
        words = [self.model, grid, {"float32": "fp32", "bfloat16": "bf16"}[cfg.dtype]]
        words += [f"{cfg.recompute} recompute"] if cfg.recompute != "none" else []
        words += ["fused activation"] if cfg.megatron else []
        words += [] if cfg.optimizer.distributed else ["whole optimizer"]
        return ", ".join(words)


BF16 = {"dtype": "bfloat16"}
FUSED = {"megatron": {"bias_activation_fusion": True}}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
CASES = (
    Case({}),
    Case({}, options=BF16),
    Case({}, options=BF16 | FUSED),
    Case({}, model="dense"),
    Case({}, model="dense", options=BF16 | FULL),
    Case({}, options=BF16 | FULL),
    Case({}, options=BF16 | SELECTIVE),
    Case({"data": 2, "expert": 2}, options=BF16),
    Case({"data": 2, "expert": 2}, options=BF16, optimizer={"distributed": False}),
    Case({"tensor": 2}, options=BF16),
    Case({"context": 2}, options=BF16),
    Case({"pipeline": 2}, options=BF16),
    Case({"pipeline": 2, "virtual_pipeline": 2}, options=BF16),
    Case({"pipeline": 4}, options=BF16 | FULL),
    Case({"tensor": 2, "pipeline": 2}, model="dense"),
    Case({"tensor": 2, "pipeline": 2, "expert": 2}),
    Case({"tensor": 2, "pipeline": 2, "expert": 2}, options=BF16),
    Case({"tensor": 2, "pipeline": 2, "expert": 2}, options=BF16 | FULL),
    Case({"tensor": 2, "pipeline": 2, "expert": 2}, model="even moe", options=BF16),
    Case({"tensor": 2, "pipeline": 2, "expert": 2}, model="even moe", options=BF16 | FULL),
    Case({"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2}, options=BF16),
)


# --------------------------------------------------------------------------------------------- measurement


class SavedTensors:
    """Bytes of the distinct storages that autograd holds for backward passes; the most at one time is `peak`."""

    def __init__(self, parameters: list[Any]) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in parameters}
        self._held: dict[int, int] = {}
        self._now = self.peak = 0

    def pack(self, tensor: Any) -> _Held:
        storage = tensor.untyped_storage()
        held = _Held(tensor)
        if (key := storage.data_ptr()) not in self._weights:
            self._now += 0 if self._held.get(key) else storage.nbytes()
            self._held[key] = self._held.get(key, 0) + 1
            self.peak = max(self.peak, self._now)
            weakref.finalize(held, self._release, key, storage.nbytes())
        return held

    def _release(self, key: int, num_bytes: int) -> None:
        self._held[key] -= 1
        self._now -= 0 if self._held[key] else num_bytes


class _Held:
    """What autograd keeps in the tensor's place; it dies when the backward pass has used it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def measure(case: Case, model: Path, place: Place) -> dict[str, float]:
    """One step on this rank; bytes by part."""
    import torch

    from megatron_vespo.trainer.layout import destroy_process_groups
    from megatron_vespo.trainer.step import TrainerRank

    rank = TrainerRank(
        case.config, model, AlgorithmConfig(name="reinforce"), temperature=1.0, seed=0, place=place
    )
    chunks = rank._optimizer.ddp_chunks
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    saved = SavedTensors(parameters)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        rank.step(batch(), 0, routed=())
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    measured = {
        "weights": float(sum(p.nbytes for p in parameters)),
        "gradients": float(sum(b.grad_data.nbytes for b in buffers)),
        "optimizer": float(optimizer_tensors(rank._optimizer.megatron, parameters)),
        "activations": float(saved.peak),
    }
    destroy_process_groups()
    return measured


def optimizer_tensors(optimizer: Any, parameters: list[Any]) -> int:
    """Bytes of main weights and moments; main weights that are the model's own are not counted again."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        mains = [p for group in inner.param_groups for p in group["params"]]
        tensors = [t for t in mains if t.untyped_storage().data_ptr() not in own]
        tensors += [inner.state[p][moment] for p in mains for moment in ("exp_avg", "exp_avg_sq")]
        total += sum(t.nbytes for t in tensors)
    return total


def batch() -> list[TrainSequence]:
    rng = np.random.default_rng(0)
    return [
        TrainSequence(
            uid=str(i),
            token_ids=rng.integers(0, VOCAB, NUM_TOKENS + 1).astype(np.int32),
            num_prompt_tokens=1,
            advantage=1.0,
        )
        for i in range(NUM_SEQUENCES)
    ]


def write_models(root: Path) -> dict[str, Path]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 256,
        "initializer_range": 0.02,
    }  # fmt: skip
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    torch.manual_seed(0)
    models = {
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False)),
        # Every token goes to every expert, so that no rank has more than the mean.
        "even moe": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, **experts | {"num_experts_per_tok": 16}, tie_word_embeddings=False)
        ),
        "dense": Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        (root / name / "tokenizer_config.json").write_text("{}\n")
    return {name: root / name for name in models}


# -------------------------------------------------------------------------------------------------- driver


def serve(rank: int, orders: Any) -> None:
    """One rank: measures what it is told to, until the driver hangs up."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            case, model, port = orders.recv()
        except EOFError:
            return
        world_size = case.config.layout.world_size
        place = Place(rank=rank, world_size=world_size, master_addr="127.0.0.1", master_port=port)
        try:
            orders.send(measure(case, model, place))
        except Exception:  # noqa: BLE001  # a process boundary: the driver prints it
            orders.send(traceback.format_exc())


def run(cases: list[Case], models: dict[str, Path]) -> Iterator[list[dict[str, float]]]:
    """What every rank of every case measures."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(max(case.config.layout.world_size for case in cases)):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(rank, theirs), daemon=True).start()
        pipes.append(ours)
    for case in cases:
        mine, port = pipes[: case.config.layout.world_size], free_port()
        for pipe in mine:
            pipe.send((case, models[case.model], port))
        yield [_answer(case, rank, pipe) for rank, pipe in enumerate(mine)]


def _answer(case: Case, rank: int, pipe: Any) -> dict[str, float]:
    if not pipe.poll(300):
        sys.exit(f"{case.name}: {rank_name(case.config.layout, rank)} gave no answer in 300 s")
    answer = pipe.recv()
    if isinstance(answer, str):
        sys.exit(f"{case.name}, {rank_name(case.config.layout, rank)}:\n{answer}")
    return answer


def rows(case: Case, measured: list[dict[str, float]], model: Path) -> list[tuple[str, list[float]]]:
    """For each stage: measured MiB and error of every part."""
    work = Workload(
        num_sequences=NUM_SEQUENCES, max_tokens=NUM_TOKENS, mean_tokens=NUM_TOKENS, mean_response_tokens=NUM_TOKENS
    )  # fmt: skip
    lines = []
    for memory in estimate_memory(read_model_shape(model), case.config, work):
        mine = [
            m
            for rank, m in enumerate(measured)
            if coordinates(case.config.layout, rank).pipeline == memory.stage
        ]
        numbers = []
        for part in PARTS:
            found = statistics.mean(m[part] for m in mine)
            numbers += [found / 1024**2, getattr(memory, part) / found - 1]
        lines.append((f"{case.name}" if memory.stage == 0 else "", [memory.stage, *numbers]))
    return lines


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these words")
    only = parser.parse_args().only
    cases = [case for case in CASES if any(word in case.name for word in only)]
    head = "".join(f"{part + ' MiB':>17} {'error':>7}" for part in PARTS)
    lines, errors = [f"{'case':<44} stage{head}"], {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as root:
        models = write_models(Path(root))
        for case, measured in zip(cases, run(cases, models), strict=True):
            for name, (stage, *numbers) in rows(case, measured, models[case.model]):
                pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
                lines.append(
                    f"{name:<44} {stage:5.0f}" + "".join(f"{mib:17.2f} {error:+7.1%}" for mib, error in pairs)
                )
                for part, (_, error) in zip(PARTS, pairs, strict=True):
                    errors[part].append(abs(error))
    for part in PARTS:
        lines.append(
            f"{part}: |error| median {statistics.median(errors[part]):.2%}, most {max(errors[part]):.2%}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
