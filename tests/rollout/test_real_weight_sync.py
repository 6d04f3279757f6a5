"""Pushes into a real SGLang server, by every way and in every mode, against transformers."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import requests
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_vespo.config import RolloutConfig
from megatron_vespo.rollout import broadcast
from megatron_vespo.rollout.weight_sync import Target, WeightSync

TRANSPORTS = ["broadcast", "shared_memory", "disk"]
MODES = ["abort", "retract", "in_place"]
PROMPT = list(b"12 plus 30 is what?")
NUM_LAYERS, TOP_K = 4, 2


@pytest.fixture(scope="module")
def old(served_model):
    return AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tensors(served_model):
    """Other weights of the same shape, under their Hugging Face names."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.3 * tensor.std().nan_to_num(0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(served_model / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def new(served_model, tensors, tmp_path_factory):
    """transformers' model of `tensors`."""
    directory = tmp_path_factory.mktemp("new")
    for file in served_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def pushing(sglang_server, tmp_path):
    """A function that pushes to the server in a certain way; connections are closed at the end."""
    made = {}

    def push(tensors, version, transport="broadcast", mode="retract", **fields):
        key = (transport, mode)
        if key not in made:
            settings = {"sync_timeout_s": 60, "sync_bucket_bytes": 400_000, "sync_staging_bytes": 500_000}
            cfg = RolloutConfig(
                device="cpu",
                sync_transport=transport,
                sync_directory=tmp_path / "weights" if transport == "disk" else None,
                partial_rollouts=mode,
                **(settings | fields),
            )
            made[key] = WeightSync(sglang_server.model, cfg, torch.device("cpu"))
        outcome = made[key].push(iter(tensors.items()), version, [Target("e", sglang_server.url)])
        return outcome

    yield push
    for sync in made.values():
        sync.close()


@dataclass
class Sampled:
    ids: list[int]
    logp: np.ndarray
    meta: dict

    @property
    def whole(self):
        return PROMPT + self.ids


def generate(server, max_tokens, *, started=None, **fields):
    """Sample one response; `started` is called with the first token."""
    request = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": max_tokens, "ignore_eos": True},
        "return_logprob": True,
        "return_routed_experts": True,
        "stream": True,
    } | fields
    last = None
    with requests.post(server.url + "/generate", json=request, stream=True, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                last = line
                if started:
                    started()
    assert last is not None
    final = json.loads(last.removeprefix(b"data: "))
    logp = np.array([entry[0] for entry in final["meta_info"]["output_token_logprobs"]])
    return Sampled(final["output_ids"], logp, final["meta_info"])


def logp_of(model, sampled):
    with torch.no_grad():
        logits = model(torch.tensor([sampled.whole])).logits[0]
    logp = torch.log_softmax(logits.double(), -1)
    return logp[range(len(PROMPT) - 1, len(sampled.whole) - 1), sampled.ids].numpy()


def distance(sampled, model):
    return np.abs(sampled.logp - logp_of(model, sampled)).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_push_changes_what_the_server_computes(sglang_server, old, new, tensors, pushing, transport, mode):
    before = generate(sglang_server, 16, extra_key="0")
    assert distance(before, old) < 1e-4 < 1e-2 < distance(before, new)

    outcome = pushing(tensors, 1, transport, mode)

    assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
    assert outcome.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    # The prompt was cached under the old weights: nothing of that may be served now.
    after = generate(sglang_server, 16, extra_key="1" if mode == "in_place" else "0")
    assert distance(after, new) < 1e-4
    assert after.meta["weight_version"] == "1"


def across_a_push(server, push):
    """Eight responses that are under way when `push` is called."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        under_way = []
        for _ in range(8):
            first = iter([started.release])
            under_way.append(
                pool.submit(generate, server, 500, started=lambda first=first: next(first, int)())
            )
        for _ in under_way:
            assert started.acquire(timeout=60)
        outcome = push()
        assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
        return [future.result() for future in under_way]


def test_aborted_responses_come_back_at_once_and_whole(sglang_server, old, new, tensors, pushing):
    responses = across_a_push(sglang_server, lambda: pushing(tensors, 1, mode="abort"))
    for response in responses:
        assert response.meta["finish_reason"]["type"] == "abort"
        assert 0 < len(response.ids) < 500
        assert distance(response, old) < 1e-4
        experts = np.frombuffer(base64.b64decode(response.meta["routed_experts"]), np.int32)
        assert len(experts) == (len(response.whole) - 1) * NUM_LAYERS * TOP_K
    assert distance(generate(sglang_server, 16), new) < 1e-4


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_other_responses_go_on_under_the_new_version(sglang_server, old, new, tensors, pushing, mode):
    responses = across_a_push(sglang_server, lambda: pushing(tensors, 1, mode=mode))
    for response in responses:
        assert response.meta["finish_reason"]["type"] == "length"
        first, second = response.meta["weight_versions"]
        assert (first["version"], second["version"], second["end"]) == ("0", "1", 500)
        cut = first["end"]
        assert np.abs(response.logp - logp_of(old, response))[:cut].max() < 1e-4
        after = np.abs(response.logp - logp_of(new, response))[cut:].max()
        if mode == "retract":  # nothing of the old weights is left: these are pure new ones
            assert after < 1e-4
        else:  # the key-value cache still is of the old weights
            assert after > 1e-3


def test_bfloat16_and_float32_share_a_push(sglang_server, new, tensors, pushing):
    mixed = {n: t if "gate.weight" in n or "norm" in n else t.bfloat16() for n, t in tensors.items()}
    assert {t.dtype for t in mixed.values()} == {torch.float32, torch.bfloat16}
    rounded = {n: p.bfloat16().float() if p.dim() > 1 and "gate.weight" not in n else p
               for n, p in new.state_dict().items()}  # fmt: skip
    original = {name: parameter.clone() for name, parameter in new.state_dict().items()}
    try:
        new.load_state_dict(rounded)
        for transport in TRANSPORTS:
            pushing(mixed, 1, transport)
            assert distance(generate(sglang_server, 16), new) < 1e-4
    finally:
        new.load_state_dict(original)


def served_digest(tensors):
    """What SGLang says of one rank: SHA-256 over each of its parameters, which pad or fuse those of the checkpoint."""
    fused = {}
    for name, tensor in tensors.items():
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            fused[name] = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
        elif "_proj" not in name or "o_proj" in name:
            fused[name] = tensor
    for layer in range(NUM_LAYERS):
        attention, experts = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp.experts."
        fused[attention + "qkv_proj.weight"] = torch.cat(
            [tensors[f"{attention}{part}_proj.weight"] for part in "qkv"]
        )
        pieces = {
            part: [tensors[f"{experts}{e}.{part}_proj.weight"] for e in range(8)]
            for part in ("gate", "up", "down")
        }
        fused[experts + "w13_weight"] = torch.stack(
            [torch.cat(pair) for pair in zip(pieces["gate"], pieces["up"], strict=True)]
        )
        fused[experts + "w2_weight"] = torch.stack(pieces["down"])
    rank = hashlib.sha256()
    for name in sorted(fused):
        content = hashlib.sha256(fused[name].contiguous().numpy().tobytes()).digest()[:8]
        rank.update(name.encode() + content.hex().encode())
    return hashlib.sha256(rank.hexdigest().encode()).hexdigest()


def test_the_digest_is_that_of_all_weights(tensors, pushing):
    digests = {pushing(tensors, 1, transport).digests["e"] for transport in TRANSPORTS}
    assert digests == {f"tp1-ep1-dp1 {served_digest(tensors)}"}
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    changed = tensors | {name: tensors[name].clone()}
    changed[name][3, 4] += 1e-4
    digest = pushing(changed, 2).digests["e"]
    assert digest == f"tp1-ep1-dp1 {served_digest(changed)}"
    assert digest not in digests


def test_the_trainers_own_process_group_is_left_alone(tensors, pushing, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for version in (1, 2):
            assert pushing(tensors, version).digests.keys() == {"e"}
        counted = torch.ones(1)
        dist.all_reduce(counted)
        assert counted.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_server_that_waits_for_bytes_in_vain_comes_back(sglang_server, new, tensors, pushing, monkeypatch):
    """Its scheduler blocks in the broadcast until the group is given up, and then takes another push."""
    send = broadcast._Group._send

    def late(self, flat, device, timeout_s):
        time.sleep(timeout_s + 0.5)

    monkeypatch.setattr(broadcast._Group, "_send", late)
    outcome = pushing(tensors, 1, sync_timeout_s=8)
    assert (outcome.failures, outcome.incomplete) == ({}, {"e"})
    monkeypatch.setattr(broadcast._Group, "_send", send)
    outcome = pushing(tensors, 2)
    assert (outcome.failures, outcome.incomplete) == ({}, frozenset())
    assert distance(generate(sglang_server, 16), new) < 1e-4


def test_a_bucket_that_the_server_refuses_unread_leaves_nobody_waiting(tensors, pushing, monkeypatch):
    """The server answers 400 before it receives; 64 MB do not fit into socket buffers, so the sender would hang."""
    wire = broadcast.wire

    def nonsense(bucket):
        spelled = wire(bucket)
        return {**spelled, "shapes": [[-1] for _ in spelled["shapes"]]}

    monkeypatch.setattr(broadcast, "wire", nonsense)
    began = time.monotonic()
    outcome = pushing(tensors, 1)
    assert "Negative dimension" in outcome.failures["e"]
    assert time.monotonic() - began < 20
