"""The real stack on one GPU: step time, and the log-probs of trainer, engine and transformers side by side.

Reach for it when a GPU is at hand, to see that nothing of the CPU path is baked in:

    python tools/gpu/one_gpu.py [--layers 2] [--implementation auto|local|transformer_engine]

It writes a random model of Qwen3-30B-A3B's shape with few layers, runs `megatron-vespo train configs/one_gpu.toml`
on it, and compares the first step's rollouts (weight version 0) with transformers in bfloat16 and float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from trainer import QWEN3_30B_A3B, write_model
from transformers import AutoModelForCausalLM

from megatron_vespo.algo.mismatch import token_gap
from megatron_vespo.data.demo import write_demo_inputs

ROOT = Path("runs/one_gpu")


def write_cut_model(num_layers: int) -> None:
    """Random weights in bfloat16, with the demo's byte-level tokenizer."""
    write_model(ROOT / "model", QWEN3_30B_A3B, num_layers, "bfloat16")
    torch.cuda.empty_cache()  # the run that follows has the whole GPU
    demo = write_demo_inputs(ROOT / "inputs", seed=0) / "model"
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / file, ROOT / "model" / file)


def reference_logp(row: dict, model: torch.nn.Module) -> np.ndarray:
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]], device="cuda")
    with torch.no_grad():
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(row["prompt_ids"]) :, None])[:, 0].cpu().numpy()


def compare() -> dict[str, dict[str, float]]:
    """Every pair of {trainer, engine, transformers in bf16, in fp32} on the first step's response tokens."""
    rows = pq.read_table(ROOT / "rl" / "rollouts" / "step_000001.parquet").to_pylist()[:16]
    logp = {
        "trainer": np.concatenate([np.array(row["policy_logp"], np.float32) for row in rows]),
        "engine": np.concatenate([np.array(row["engine_logp"], np.float32) for row in rows]),
    }
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(ROOT / "model", dtype=dtype).cuda().eval()
        logp[f"transformers {str(dtype).removeprefix('torch.')}"] = np.concatenate(
            [reference_logp(r, model) for r in rows]
        )
        del model
        torch.cuda.empty_cache()
    names = list(logp)
    return {f"{a} - {b}": token_gap(logp[a], logp[b]) for i, a in enumerate(names) for b in names[i + 1 :]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--implementation", default="auto")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("device = cpu: expected a CUDA GPU; run `make demo` for the CPU path")
    shutil.rmtree(ROOT, ignore_errors=True)
    write_cut_model(args.layers)
    command = [sys.executable, "-m", "megatron_vespo.cli", "train", "configs/one_gpu.toml"]
    subprocess.run([*command, f"trainer.implementation={args.implementation}"], check=True)
    records = [json.loads(line) for line in (ROOT / "rl" / "metrics.jsonl").read_text().splitlines()]
    keys = (
        "time/step_s",
        "time/train_s",
        "time/sync_s",
        "throughput/tokens_per_s",
        "mismatch/k3_nats",
        "experts/overlap_mean",
    )
    result = {
        "gpu": torch.cuda.get_device_name(),
        "median_after_first_step": {
            k: float(np.median([r[k] for r in records if r["step"] > 1])) for k in keys
        },
        "logp_gaps_nats": compare(),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
