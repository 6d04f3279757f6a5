"""The demo's inputs: files that stock tools read, the same for the same seed, a task as it is described."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vespo.config import ConfigError, PromptsConfig, SftDataConfig
from megatron_vespo.data.demo import NUM_HELDOUT, write_arithmetic, write_demo_inputs
from megatron_vespo.data.prompts import load_demonstrations, load_prompts


@pytest.mark.parametrize(("name", "kind"), [("model", "qwen3_moe"), ("dense_model", "qwen3")])
def test_models_load_with_stock_transformers(demo, name, kind):
    tokenizer = AutoTokenizer.from_pretrained(demo / name)
    model = AutoModelForCausalLM.from_pretrained(demo / name)
    assert model.config.model_type == kind
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size and model.config.vocab_size % 8 == 0
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    logits = model(torch.tensor([tokenizer("3+4")["input_ids"]])).logits
    assert logits.shape == (1, 3, model.config.vocab_size)
    assert torch.isfinite(logits).all() and logits.std() > 0.1  # no constant, no explosion


def test_the_tokenizer_spells_every_text_byte_by_byte(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    for text in ["3 + 4 =", "\\boxed{7}", "  é\n\t漢\x00", "don't  stop"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_no_heldout_prompt_is_trained_on(demo):
    train, heldout = (pq.read_table(demo / f"{name}.parquet").to_pylist() for name in ("train", "heldout"))
    texts = [row["prompt"][0]["content"] for row in train + heldout]
    assert len(set(texts)) == len(texts) == 20 * 55
    assert len(heldout) == NUM_HELDOUT
    shown = {
        row["messages"][0]["content"] for row in pq.read_table(demo / "demonstrations.parquet").to_pylist()
    }
    assert shown == {row["prompt"][0]["content"] for row in train}


def test_the_jsonl_file_holds_the_same_prompts(demo, tokenizer):
    parquet, jsonl = (demo / f"train.{suffix}" for suffix in ("parquet", "jsonl"))
    first, second = (
        load_prompts(path, tokenizer, PromptsConfig(train=path, max_prompt_tokens=14))
        for path in (parquet, jsonl)
    )
    assert [(p.uid, p.text, p.answer) for p in first] == [(p.uid, p.text, p.answer) for p in second]


def test_answers_are_the_sums_of_the_two_digits(demo, tokenizer):
    path = demo / "train.parquet"
    prompts = load_prompts(path, tokenizer, PromptsConfig(train=path, max_prompt_tokens=14))
    for prompt in prompts:
        assert int(prompt.answer) == sum(int(c) for c in prompt.text if c.isdigit())


def test_demonstrators_are_right_three_times_in_ten_and_mostly_one_too_high(demo, tokenizer):
    path = demo / "demonstrations.parquet"
    off: Counter[int] = Counter()
    for sequence in load_demonstrations(path, tokenizer, SftDataConfig(train=path, max_tokens=24)):
        assert sequence.num_response_tokens == 10  # \boxed{d} and the end of the turn
        text = tokenizer.decode(sequence.token_ids)
        a, b, said = (int(c) for c in text if c.isdigit())
        off[(said - a - b) % 10] += 1
    shares = np.array([off[i] for i in range(10)]) / off.total()
    # 0.3 and 0.6 of intent, and the tenth part of the random 0.1 each
    np.testing.assert_allclose(shares, [0.31, 0.61] + [0.01] * 8, atol=0.02)


def test_writing_again_with_the_same_seed_changes_nothing(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert write_demo_inputs(demo, seed=0) == demo
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(demo, tmp_path):
    def digests(directory: Path) -> dict[str, str]:
        return json.loads((directory / "demo_inputs.json").read_text())["sha256"]

    again, other = write_demo_inputs(tmp_path / "a" / "b", seed=0), write_demo_inputs(tmp_path / "c", seed=1)
    assert digests(again) == digests(demo)
    changed = {name for name, digest in digests(other).items() if digest != digests(demo)[name]}
    data = {"train.parquet", "train.jsonl", "heldout.parquet", "demonstrations.parquet"}
    assert changed == data | {"model/model.safetensors", "dense_model/model.safetensors"}
    assert [
        path.name for path in tmp_path.iterdir() if path.name.startswith(".")
    ] == []  # no temporary remains


def test_other_inputs_are_never_overwritten(demo, tmp_path):
    with pytest.raises(ConfigError, match="holds demo inputs of seed 0, recipe 2, expected seed 1"):
        write_demo_inputs(demo, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match="it holds other files"):
        write_demo_inputs(tmp_path / "mine", seed=0)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    changed = write_demo_inputs(tmp_path / "changed", seed=0)
    write_arithmetic(changed, seed=1)
    with pytest.raises(ConfigError, match="expected it as it was written"):
        write_demo_inputs(changed, seed=0)
