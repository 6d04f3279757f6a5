"""`doctor probe` on real parts: a stock SGLang server against checkpoints that are the same, and that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.algo.norms import level
from megatron_vespo.data.demo import write_arithmetic
from megatron_vespo.diagnose.causes import diagnose
from megatron_vespo.diagnose.examination import examine
from megatron_vespo.evidence import read_evidence

PATIENCE_S = 240
LAYER, EXPERT = 2, 3
NUM, MAX_TOKENS = 96, 48


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prompts")
    write_arithmetic(directory, seed=0)
    return directory / "train.jsonl"


def probe(server, checkpoint, prompts, output, *options):
    """What the command prints, its status, and the evidence it wrote."""
    argv = [
        "doctor", "probe", "--engine", server.url, "--checkpoint", str(checkpoint), "--prompts", str(prompts),
        "--output", str(output), "--num", str(NUM), "--max-tokens", str(MAX_TOKENS), *options,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vespo.cli", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.stdout + done.stderr, done.returncode


def named_causes(output):
    evidence = read_evidence(output / "probe.parquet")
    return [cause.name for cause in diagnose(evidence, examine(evidence)) if cause.is_failure], evidence


def changed(model: Path, directory: Path, change) -> Path:
    """A copy of a model with other weights."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_same_weights_are_healthy(sglang_server, served_model, prompts, tmp_path):
    told, status = probe(sglang_server, served_model, prompts, tmp_path)

    assert status == 0, told
    assert "in float32" in told and "0.00% of the experts' choices differ" in told
    causes, evidence = named_causes(tmp_path)
    assert causes == []
    assert len(evidence.num_response) == NUM and evidence.num_response.max() <= MAX_TOKENS
    assert np.abs(evidence.natural_logp - evidence.behavior_logp).max() < 1e-4
    assert np.abs(evidence.engine_logp - evidence.behavior_logp).max() < 1e-4
    assert np.abs(evidence.replayed_logp - evidence.natural_logp).max() < 1e-4
    for who in ("engine", "natural", "shadow"):
        assert (
            np.sort(evidence.experts[who], -1) == np.sort(evidence.experts["behavior"], -1)
        ).mean() > 0.999
    assert evidence.margin.min() >= 0


def test_one_wrong_expert_of_the_trainer_is_named(sglang_server, served_model, prompts, tmp_path):
    def wrong(tensors):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{LAYER}.mlp.experts.{EXPERT}.{part}.weight"
            tensors[name] = 3 * tensors[name.replace(f"layers.{LAYER}", "layers.0")]

    checkpoint = changed(served_model, tmp_path / "model", wrong)

    told, status = probe(sglang_server, checkpoint, prompts, tmp_path / "out")

    assert status == 0, told
    causes, _ = named_causes(tmp_path / "out")
    assert causes == ["wrong_expert"]


def test_a_server_that_still_has_the_weights_before_breaks_the_float32_norm(
    sglang_server, served_model, prompts, tmp_path
):
    generator = torch.Generator().manual_seed(0)

    def updated(tensors):
        for name, tensor in tensors.items():
            size = 0.02 * tensor.square().mean().sqrt()
            tensors[name] = tensor + size * torch.randn(tensor.shape, generator=generator)

    checkpoint = changed(served_model, tmp_path / "model", updated)

    told, status = probe(sglang_server, checkpoint, prompts, tmp_path / "out")

    assert status == 0, told
    k3 = examine(read_evidence(tmp_path / "out" / "probe.parquet")).metrics["mismatch/k3_nats"]
    assert level("mismatch/k3_nats", k3, "float32") != "healthy", k3


def test_what_the_server_has_no_room_for_is_refused(sglang_server, served_model, prompts, tmp_path):
    told, status = probe(sglang_server, served_model, prompts, tmp_path, "--max-tokens", "2000")

    assert status == 2
    assert "--max-tokens 2000: with the longest prompt" in told
