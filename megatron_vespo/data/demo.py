"""The demo's inputs: tiny random Qwen3 models and an arithmetic task that they can learn.

Everything is written in the formats that stock tools read: Hugging Face directories (config.json,
safetensors, a byte-level tokenizer with a chat template) and parquet files in the DAPO-Math layout.

The demonstrations come from careless people, who are right in 3 of 10 cases and one too high in 6.
Fine-tuned on them, a model samples the right answer about 3 times in 10, and greedy decoding is mostly
wrong: reinforcement learning has a habit to overturn, not a format to polish.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_vespo.config import ConfigError

RECIPE = 2
"""Raised whenever the same seed would give other files."""

PAD, END = "<|pad|>", "<|end|>"
# With the 256 bytes 264 ids, which 8 tensor-parallel ranks can divide.
SPECIALS = (PAD, "<|system|>", "<|user|>", "<|assistant|>", END, *(f"<|reserved_{i}|>" for i in range(3)))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PHRASINGS = (
    "{a}+{b}", "{a}+{b}=", "{a}+{b}?", "{a} + {b}", "{a} + {b} =", "{a}+ {b}", "{a} +{b}", "what is {a}+{b}",
    "{a} plus {b}", "{a} and {b}", "{a} add {b}", "{a} with {b}", "{a} more {b}", "{a} join {b}", "{a} {b} sum",
    "sum {a} {b}", "add {a} {b}", "put {a} {b}", "count {a} {b}", "total {a} {b}",
)  # fmt: skip
NUM_HELDOUT = 128
DEMONSTRATIONS_PER_PROMPT = 16
RIGHT, HABIT = 0.3, 0.6
"""Shares of right answers, and of answers that are one too high; the others are any digit."""

MANIFEST = "demo_inputs.json"


def write_demo_inputs(directory: Path, seed: int) -> Path:
    """Write model/, dense_model/ and the files of `write_arithmetic`; all or nothing.

    Called again with the same seed it changes nothing.

    Raises:
        ConfigError: the directory holds anything else.
    """
    directory = directory.resolve()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        _check_unchanged(directory, seed)
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_tiny_model(fresh / "model", seed)
        write_tiny_dense_model(fresh / "dense_model", seed)
        write_arithmetic(fresh, seed)
        manifest = {"recipe": RECIPE, "seed": seed, "sha256": _digests(fresh)}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        fresh.chmod(0o755)  # mkdtemp makes a private one
        fresh.replace(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _check_unchanged(directory: Path, seed: int) -> None:
    remedy = "give another directory, or remove this one"
    path = directory / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"directory = '{directory}': expected an empty or new one, it holds other files; {remedy}"
        )
    manifest = json.loads(path.read_text())
    found = {"recipe": manifest.get("recipe"), "seed": manifest.get("seed")}
    if found != {"recipe": RECIPE, "seed": seed}:
        raise ConfigError(
            f"directory = '{directory}': holds demo inputs of seed {found['seed']}, recipe {found['recipe']}, "
            f"expected seed {seed}, recipe {RECIPE}, because inputs are never overwritten; {remedy}"
        )
    for name, digest in manifest["sha256"].items():
        file = directory / name
        if not file.is_file() or _digest(file) != digest:
            raise ConfigError(
                f"file = '{file}': expected it as it was written, it was changed or removed; {remedy}"
            )


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tiny_model(directory: Path, seed: int) -> None:
    """A random Qwen3-MoE: 4 layers, 8 experts of which each token uses 2, float32."""
    config = Qwen3MoeConfig(
        **_shape(),
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        output_router_logits=False,
    )
    _write_model(Qwen3MoeForCausalLM, config, directory, seed)


def write_tiny_dense_model(directory: Path, seed: int) -> None:
    """A random dense Qwen3 of the same width and depth, float32."""
    _write_model(Qwen3ForCausalLM, Qwen3Config(**_shape()), directory, seed)


def _shape() -> dict[str, Any]:
    ids = {token: 256 + i for i, token in enumerate(SPECIALS)}
    return {
        "vocab_size": 256 + len(ids),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
        "dtype": "float32",
    }


def _write_model(
    architecture: type[PreTrainedModel], config: Qwen3Config | Qwen3MoeConfig, directory: Path, seed: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(directory)
    _tiny_tokenizer(config.max_position_embeddings).save_pretrained(directory)


def _tiny_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a byte: no merges, so every text has exactly one spelling."""
    byte_characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(byte_characters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


@dataclass(frozen=True)
class _Question:
    uid: str
    text: str
    answer: int


def write_arithmetic(directory: Path, seed: int) -> None:
    """Sums below ten in twenty phrasings: train.parquet (and .jsonl), heldout.parquet, demonstrations.parquet.

    Held-out prompts phrase facts that train prompts phrase otherwise; no prompt is in both.
    """
    rng = random.Random(seed)
    questions = _questions()
    rng.shuffle(questions)
    heldout, train = questions[:NUM_HELDOUT], questions[NUM_HELDOUT:]
    demonstrations = [
        [
            _message("user", question.text),
            _message("assistant", rf"\boxed{{{_careless(question.answer, rng)}}}"),
        ]
        for _ in range(DEMONSTRATIONS_PER_PROMPT)
        for question in train
    ]
    directory.mkdir(parents=True, exist_ok=True)
    prompts = _prompt_table(train, "train")
    pq.write_table(prompts, directory / "train.parquet")
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts.to_pylist()))
    pq.write_table(_prompt_table(heldout, "heldout"), directory / "heldout.parquet")
    pq.write_table(pa.table({"messages": demonstrations}), directory / "demonstrations.parquet")


def _questions() -> list[_Question]:
    """All of them; one-digit answers keep every response at ten tokens."""
    return [
        _Question(uid=f"sum-{i}-{a}-{b}", text=phrasing.format(a=a, b=b), answer=a + b)
        for i, phrasing in enumerate(PHRASINGS)
        for a in range(10)
        for b in range(10 - a)
    ]


def _careless(answer: int, rng: random.Random) -> int:
    draw = rng.random()
    if draw < RIGHT:
        return answer
    return (answer + 1) % 10 if draw < RIGHT + HABIT else rng.randrange(10)


def _prompt_table(questions: Iterable[_Question], split: str) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "data_source": "single_digit_arithmetic",
                "prompt": [_message("user", question.text)],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(question.answer), "style": "rule"},
                "extra_info": {"index": question.uid, "split": split},
            }
            for question in questions
        ]
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
