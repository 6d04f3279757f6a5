"""A run directory as the loop writes it, with invented but plausible numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.metrics import RunLog
from megatron_vespo.rundir import RunDirectory, rollout_rows, write_rollouts
from megatron_vespo.types import Group, Prompt, Response, Rollout, Scored, StepOutput, Update, VersionSpan

CONFIG = """\
run_dir = "runs/demo"
seed = 7
model = "models/tiny-qwen3-moe"

[trainer]
device = "cpu"
dtype = "float32"

[trainer.layout]
tensor = 2
pipeline = 2
expert = 2

[trainer.optimizer]
learning_rate = 1e-4
clip_grad_norm = 1.0

[rollout]
device = "cpu"
dtype = "float32"

[prompts]
train = "data/train.parquet"
heldout = "data/heldout.parquet"
max_prompt_tokens = 32

[sampling]
max_response_tokens = 16

[algorithm]
name = "vespo"

[algorithm.vespo]
k = [2.0, 3.0]
lam = [3.0, 2.0]

[loop]
num_steps = {num_steps}
prompts_per_step = 8
group_size = 8
max_staleness = 1
"""

SFT_CONFIG = """\
run_dir = "runs/sft"
model = "models/random-qwen3-moe"
num_steps = 40
batch_size = 32

[trainer]
device = "cpu"
dtype = "float32"

[trainer.optimizer]
learning_rate = 1e-3

[data]
train = "data/sft.parquet"
max_tokens = 64
"""

NUM_LAYERS = 4


@pytest.fixture(scope="session")
def rl_run() -> Callable[..., Path]:
    return write_rl_run


@pytest.fixture(scope="session")
def sft_run() -> Callable[..., Path]:
    return write_sft_run


def write_rl_run(
    path: Path, *, num_steps: int = 4, done: int | None = None, groups: int = 2, noise: float = 3e-5
) -> Path:
    """`done` of `num_steps` steps with `groups` prompts of 8 responses; only a complete run has final/."""
    rng = np.random.default_rng(0)
    done = num_steps if done is None else done
    with RunDirectory(path, CONFIG.format(num_steps=num_steps)) as run, RunLog(run) as log:
        log.log(0, {"reward/heldout_mean": 0.22, "time/eval_s": 1.9})
        for step in range(1, done + 1):
            success = 0.2 + 0.75 / (1 + np.exp(-8 * (step / num_steps - 0.45)))
            rollouts, output, engine = invent_batch(rng, step, groups, success, noise)
            visits = [
                Group(rollouts=tuple(rollouts[8 * g : 8 * (g + 1)]), ordinal=(step - 1) * groups + g)
                for g in range(groups)
            ]
            write_rollouts(run.rollouts, rollout_rows(visits, output, engine, step=step))
            log.log(step, invent_metrics(rng, step, num_steps, success, rollouts, output, engine))
        if done == num_steps:
            run.final.mkdir()
    return path


def invent_batch(rng: np.random.Generator, step: int, groups: int, success: float, noise: float):
    rollouts, scored, engine, log_w, phi = [], [], [], [], []
    for group in range(groups):
        left, right = rng.integers(10, 99, 2)
        prompt = Prompt(
            uid=f"{step:04d}-{group}",
            token_ids=np.arange(12, dtype=np.int32),
            text=f"<|im_start|>user\n{left} + {right} = ?<|im_end|>\n<|im_start|>assistant\n",
            answer=str(left + right),
        )
        correct = rng.random(8) < success
        correct[:2] = True, False
        for right_one in correct:
            length = int(rng.integers(4, 16))
            response, reward = invent_response(rng, step, length, prompt.answer, bool(right_one))
            advantage = (reward - correct.mean()) / correct.std(ddof=1)
            drift = 0.0 if response.versions[0] == step - 1 else 0.04 * advantage
            now = response.behavior_logp + rng.normal(drift, 0.12 * abs(drift) ** 0.5, length)
            policy = (now + rng.standard_t(3, length) * noise).astype(np.float32)
            x = float(np.sum(policy.astype(np.float64) - response.behavior_logp))
            k, lam = (2, 3) if advantage >= 0 else (3, 2)
            rollouts.append(Rollout(prompt=prompt, response=response, reward=reward, advantage=advantage))
            scored.append(Scored(logp=policy, experts=None, entropy=None))
            engine.append(Scored(logp=now.astype(np.float32), experts=None))
            log_w.append(x)
            phi.append(np.exp(k * x - lam * np.expm1(x)))
    output = StepOutput(
        scored=tuple(scored),
        log_w=np.array(log_w),
        coefficient=np.array(phi),
        updates=(
            Update(
                loss=0.02,
                grad_norm=float(0.5 + rng.gamma(2, 0.1)),
                learning_rate=1e-4 * min(1, step / 5),
                entropy=1.0,
                kl=None,
                num_tokens=100,
                num_microbatches=2,
                num_inputs=99,
                num_packed=100,
            ),
        ),
    )
    return rollouts, output, engine


def invent_response(
    rng: np.random.Generator, step: int, length: int, answer: str, correct: bool
) -> tuple[Response, float]:
    stale = step > 1 and rng.random() < 0.7
    switch = int(rng.integers(1, length)) if stale and rng.random() < 0.3 else length
    first = step - 2 if stale else step - 1
    spans = (VersionSpan(version=first, start=0, end=switch),)
    if switch < length:
        spans += (VersionSpan(version=first + 1, start=switch, end=length),)
    text = f"\\boxed{{{answer if correct else int(answer) + 10}}}"
    response = Response(
        token_ids=np.arange(length, dtype=np.int32),
        text=text + "<|im_end|>",
        behavior_logp=-rng.gamma(0.3, 1.0, length).astype(np.float32),
        spans=spans,
        experts=None,
        finish_reason="stop" if rng.random() < 0.95 else "length",
    )
    return response, float(correct)


def invent_metrics(rng, step: int, num_steps: int, success: float, rollouts, output, engine) -> dict:
    gap = np.concatenate([s.logp.astype(float) - e.logp for s, e in zip(output.scored, engine, strict=True)])
    versions = np.concatenate([r.response.versions for r in rollouts])
    staleness = step - 1 - versions
    positive = np.array([r.advantage >= 0 for r in rollouts])
    overlap = 1 - np.array([1, 2, 3, 5]) * 4e-4 * rng.gamma(3, 0.3, NUM_LAYERS)
    lengths = [len(r.response.token_ids) for r in rollouts]
    seconds = {
        "wait": rng.gamma(4, 0.1),
        "train": rng.gamma(40, 0.05),
        "sync": rng.gamma(30, 0.02),
        "score": rng.gamma(9, 0.03),
    }
    metrics = {
        "reward/train_mean": float(np.clip(success + rng.normal(0, 0.05), 0, 1)),
        "reward/signal_fraction": float(rng.uniform(0.5, 0.9)),
        "response/length_mean": float(np.mean(lengths)),
        "response/truncated_fraction": float(
            np.mean([r.response.finish_reason == "length" for r in rollouts])
        ),
        "staleness/mean_steps": float(staleness.mean()),
        "staleness/max_steps": int(staleness.max()),
        "staleness/histogram": np.bincount(staleness, minlength=2),
        "algo/log_w_mean": output.log_w.mean(),
        "algo/log_w_std": output.log_w.std(),
        "algo/log_w_min": output.log_w.min(),
        "algo/log_w_max": output.log_w.max(),
        "algo/phi_mean": output.coefficient.mean(),
        "algo/phi_pos_mean": output.coefficient[positive].mean(),
        "algo/phi_neg_mean": output.coefficient[~positive].mean(),
        "algo/ess_fraction": 0.93,
        "algo/dead_fraction": 0.02,
        "algo/net_advantage": 0.1,
        "algo/top1pct_share": 0.04,
        "algo/phi_mean_updates": [0.99, 0.8, 0.7],
        "algo/ess_phi_fraction_updates": [0.98, 0.8, 0.75],
        "algo/ess_fraction_updates": [0.95, 0.6, 0.4],
        "algo/log_w_lag_count": [40, 24],
        "algo/log_w_lag_mean": [-0.01, -0.2],
        "algo/log_w_lag_std": [0.1, 0.4],
        "algo/entropy_nats": float(0.6 - 0.4 * step / num_steps + rng.normal(0, 0.02)),
        "mismatch/k1_nats": -gap.mean(),
        "mismatch/k3_nats": (np.expm1(gap) - gap).mean(),
        "mismatch/abs_mean_nats": np.abs(gap).mean(),
        "mismatch/abs_p99_nats": np.quantile(np.abs(gap), 0.99),
        "mismatch/abs_max_nats": np.abs(gap).max(),
        "mismatch/seq_nats_mean": 1e-5,
        "mismatch/seq_nats_abs_max": 3e-4,
        "stale/seq_nats_mean": float(output.log_w.mean()),
        "stale/seq_nats_std": float(output.log_w.std()),
        "experts/overlap_mean": overlap.mean(),
        "experts/mismatch_fraction": 2 * (1 - overlap.mean()),
        "experts/any_flip_fraction": 7 * (1 - overlap.mean()),
        "experts/overlap_layer": overlap,
        "experts/stale_overlap_layer": overlap - 0.01,
        "optim/loss": output.loss,
        "optim/grad_norm": output.grad_norm,
        "optim/learning_rate": output.learning_rate,
        "sync/bytes": 4_200_000,
        "sync/canary_abs_max_nats": 2e-5,
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "time/step_s": sum(seconds.values()),
        "throughput/tokens_per_s": sum(lengths) / sum(seconds.values()),
        "verifier/timeouts": 0,
    }
    if step % 5 == 0 or step == num_steps:
        metrics |= {"reward/heldout_mean": float(success - 0.02), "time/eval_s": 1.8}
    return metrics


def write_sft_run(path: Path, num_steps: int = 4) -> Path:
    with RunDirectory(path, SFT_CONFIG) as run, RunLog(run) as log:
        for step in range(10, 10 * num_steps + 1, 10):
            log.log(step, {
                "optim/loss": 3 * np.exp(-step / 20),
                "optim/grad_norm": 1.0,
                "optim/learning_rate": 1e-3,
                "time/step_s": 0.4,
                "throughput/tokens_per_s": 5400.0,
            })  # fmt: skip
        run.final.mkdir()
    return path
