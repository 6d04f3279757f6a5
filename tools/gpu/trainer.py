"""The trainer on one GPU: agreement with the CPU path, router replay, and the speed of a step of Qwen3-30B-A3B's shape.

Reach for it when a GPU is at hand, after `python benchmarks/logprobs.py --device cuda --dtype bfloat16`:

    python tools/gpu/trainer.py parity                          # float32, a tiny model: CUDA against CPU, with replay
    python tools/gpu/trainer.py step [--layers 4] [--implementation local|transformer_engine] [--recompute full]

`parity` runs one step of each implementation that is installed under each device in a process of its own, and prints
the largest differences of log-probs, gradients' norms, weights after the step and expert choices.  `step` writes random
weights of a cut of the model and prints seconds, tokens/s, MFU and memory by phase.  `--device cpu` (with `--tiny` for `step`) tries
the script out where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.config import AlgorithmConfig, OptimizerConfig, TrainerConfig
from megatron_vespo.types import StepOutput, TrainSequence

QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


def write_model(directory: Path, sizes: dict[str, int], num_layers: int, dtype: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=num_layers, norm_topk_prob=True, max_position_embeddings=40960,
        tie_word_embeddings=False, rope_parameters=rope,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory)


def batch_of(num: int, median: int, longest: int, vocab: int, seed: int = 0) -> list[TrainSequence]:
    """Log-normal lengths; behavior log-probs near those of a random model, so that phi(W) is not 0 everywhere."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(median), 1.0, num)), 8, longest - 8).astype(int)
    return [
        TrainSequence(
            uid=f"sequence {i}",
            token_ids=rng.integers(0, vocab, 8 + length).astype(np.int32),
            num_prompt_tokens=8,
            advantage=float(rng.standard_normal()),
            behavior_logp=np.full(length, -np.log(vocab), np.float32),
        )
        for i, length in enumerate(lengths)
    ]


def in_own_process(
    model: Path, cfg: TrainerConfig, batch: list[TrainSequence], num_steps: int
) -> dict[str, Any]:
    """One rank's steps: `device = "cpu"` takes CUDA away from the process it runs in."""
    with tempfile.TemporaryDirectory() as place:
        task, answer = Path(place) / "task", Path(place) / "answer"
        task.write_bytes(pickle.dumps((model, cfg, batch, num_steps)))
        subprocess.run([sys.executable, __file__, "worker", str(task), str(answer)], check=True)
        return pickle.loads(answer.read_bytes())


def worker(task: Path, answer: Path) -> None:
    from megatron_vespo.control.actors import free_port
    from megatron_vespo.trainer.layout import Place
    from megatron_vespo.trainer.outputs import merge_step
    from megatron_vespo.trainer.step import TrainerRank

    model, cfg, batch, num_steps = pickle.loads(task.read_bytes())
    place = Place(rank=0, world_size=1, master_addr="127.0.0.1", master_port=free_port("127.0.0.1"))
    # No correction for off-policy data: every token contributes, whatever the random model thinks of it.
    rank = TrainerRank(cfg, model, AlgorithmConfig(name="reinforce"), temperature=1.0, seed=0, place=place)
    steps = [merge_step([rank.step(batch, i)], batch) for i in range(num_steps)]
    weights = {}
    if num_steps == 1:
        weights = {name: tensor.float().cpu().numpy() for name, tensor in rank.export()}
    answer.write_bytes(pickle.dumps({"steps": steps, "weights": weights}))


def trainer_config(device: str, dtype: str, implementation: str, **fields: Any) -> TrainerConfig:
    # An eps of the size of gradients keeps Adam's first step from amplifying their noise.
    optimizer = OptimizerConfig(learning_rate=1e-3 if dtype == "float32" else 1e-6, eps=1e-2)
    return TrainerConfig(
        device=device, dtype=dtype, implementation=implementation, optimizer=optimizer, **fields
    )


def parity(device: str) -> dict[str, dict[str, float]]:
    """Every implementation on CUDA against the local one on CPU; with and without replay of foreign choices."""
    import importlib.util

    implementations = ["local"]
    if importlib.util.find_spec("transformer_engine_torch"):
        implementations.append("transformer_engine")
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        write_model(model, TINY, num_layers=4, dtype="float32")
        batch = batch_of(12, median=40, longest=200, vocab=512)
        settings = {"max_tokens_per_microbatch": 256}
        cpu = in_own_process(model, trainer_config("cpu", "float32", "local", **settings), batch, 1)
        foreign = [
            replace(s, experts=((x.experts + 1) % 8).astype(np.int16))
            for s, x in zip(batch, cpu["steps"][0].scored, strict=True)
        ]
        replay = settings | {"router_replay": "engine"}
        cpu_replay = in_own_process(model, trainer_config("cpu", "float32", "local", **replay), foreign, 1)
        for name in implementations:
            for recompute in ("none", "full"):
                options = {"recompute": recompute}
                free = in_own_process(
                    model, trainer_config(device, "float32", name, **settings, **options), batch, 1
                )
                rows[f"{name}, recompute {recompute}"] = gaps(free, cpu)
                same = in_own_process(
                    model, trainer_config(device, "float32", name, **replay, **options), foreign, 1
                )
                rows[f"{name}, recompute {recompute}, replay"] = gaps(same, cpu_replay)
    return rows


def gaps(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    (a,), (b,) = ours["steps"], reference["steps"]
    both = list(zip(a.scored, b.scored, strict=True))
    return {
        "logp_abs_max": max(float(np.abs(x.logp - y.logp).max()) for x, y in both),
        "entropy_abs_max": max(float(np.abs(x.entropy - y.entropy).max()) for x, y in both),
        "experts_equal": float(np.mean([(np.sort(x.experts) == np.sort(y.experts)).mean() for x, y in both])),
        "grad_norm_ratio": a.grad_norm / b.grad_norm,
        "weights_abs_max": max(
            float(np.abs(weight - reference["weights"][name]).max())
            for name, weight in ours["weights"].items()
        ),
    }


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the steps after the first."""
    sizes = TINY if args.tiny else QWEN3_30B_A3B
    cfg = trainer_config(
        args.device,
        "bfloat16",
        args.implementation,
        recompute=args.recompute,
        max_tokens_per_microbatch=args.tokens,
    )
    batch = batch_of(args.sequences, args.median, args.tokens, sizes["vocab_size"])
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "model", sizes, args.layers, "bfloat16")
        steps: list[StepOutput] = in_own_process(Path(place) / "model", cfg, batch, args.steps)["steps"][1:]
    seconds = statistics.median(sum(s.time_s.values()) for s in steps)
    flops_s = steps[0].model_flops / seconds
    peak = steps[0].peak_flops_s
    return {
        "layers": args.layers,
        "implementation": args.implementation,
        "recompute": args.recompute,
        "tokens": sum(len(s.token_ids) - 1 for s in batch),
        "microbatches": steps[0].updates[0].num_microbatches,
        "seconds": seconds,
        "seconds_by_phase": {k: statistics.median(s.time_s[k] for s in steps) for k in steps[0].time_s},
        "tokens_per_s": sum(len(s.token_ids) - 1 for s in batch) / seconds,
        "tflops_per_s": flops_s / 1e12,
        "mfu": flops_s / peak if peak else None,
        "peak_gib_by_phase": {k: round(v / 1024**3, 2) for k, v in steps[-1].memory_bytes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    same = commands.add_parser("parity")
    same.add_argument("--device", default="cuda")
    speed = commands.add_parser("step")
    speed.add_argument("--layers", type=int, default=4)
    speed.add_argument("--implementation", default="auto")
    speed.add_argument("--recompute", default="none")
    speed.add_argument(
        "--tokens", type=int, default=16384, help="packed tokens of one microbatch, and the longest sequence"
    )
    speed.add_argument("--sequences", type=int, default=32)
    speed.add_argument("--median", type=int, default=2048, help="median response length")
    speed.add_argument("--steps", type=int, default=4)
    speed.add_argument("--device", default="cuda")
    speed.add_argument("--tiny", action="store_true")
    inner = commands.add_parser("worker")
    inner.add_argument("task", type=Path)
    inner.add_argument("answer", type=Path)
    args = parser.parse_args()
    if args.command == "worker":
        worker(args.task, args.answer)
        return
    result = parity(args.device) if args.command == "parity" else step(args)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
