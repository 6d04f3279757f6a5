"""Prompt and demonstration files: what is read, what is refused and in which words."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError, PromptsConfig, SftDataConfig
from megatron_vespo.data import prompts
from megatron_vespo.data.prompts import load_demonstrations, load_prompts, load_tokenizer


def row(uid: Any = "u0", content: Any = "1+1", answer: Any = "2", role: str = "user") -> dict[str, Any]:
    return {
        "prompt": [{"role": role, "content": content}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": uid},
    }


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    return path


def prompts_config(path: Path, max_prompt_tokens: int = 64, **more: Any) -> PromptsConfig:
    return PromptsConfig(train=path, max_prompt_tokens=max_prompt_tokens, **more)


def refusal(path: Path, tokenizer: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(path, tokenizer, prompts_config(path, **more))
    return str(caught.value)


def test_a_prompt_is_its_rendered_chat_with_answer_and_uid(tmp_path, tokenizer):
    path = jsonl(tmp_path / "p.jsonl", [row("a", "1+1", "2"), row(7, "hé", "\\frac{1}{2}")])
    first, second = load_prompts(path, tokenizer, prompts_config(path))
    assert (first.uid, first.text, first.answer) == ("a", "<|user|>1+1<|end|><|assistant|>", "2")
    assert first.token_ids.dtype == np.int32
    assert len(first.token_ids) == 6  # three specials, three bytes
    assert (second.uid, second.answer) == ("7", "\\frac{1}{2}")
    assert len(second.token_ids) == 6  # é is two bytes


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_prompts(tmp_path, tokenizer):
    rows = [row(f"u{i}", f"{i}+1", str(i + 1)) for i in range(5)]
    lines, table = jsonl(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    for one, other in zip(
        *(load_prompts(p, tokenizer, prompts_config(p)) for p in (lines, table)), strict=True
    ):
        assert (one.uid, one.text, one.answer) == (other.uid, other.text, other.answer)
        assert np.array_equal(one.token_ids, other.token_ids)


def test_other_columns_and_bare_texts_are_read_and_rows_numbered(tmp_path, tokenizer):
    rows = [
        {"question": "1+1", "meta": {"gold": {"value": 2}}},
        {"question": "1+1", "meta": {"gold": {"value": 2.5}}},
    ]
    columns = {"prompt_column": "question", "answer_column": "meta.gold.value", "uid_column": ""}
    path = jsonl(tmp_path / "p.jsonl", rows)
    first, second = load_prompts(path, tokenizer, prompts_config(path, **columns))
    assert (first.uid, first.text, first.answer) == ("0", "<|user|>1+1<|end|><|assistant|>", "2")
    assert (second.uid, second.text, second.answer) == ("1", first.text, "2.5")
    assert "missing 'meta.gold.text', found value" in refusal(
        path, tokenizer, **columns | {"answer_column": "meta.gold.text"}
    )


def test_a_large_file_is_tokenized_in_batches_to_the_same_prompts(tmp_path, tokenizer, monkeypatch):
    path = jsonl(tmp_path / "p.jsonl", [row(i, f"{i}+1", str(i + 1)) for i in range(10)])
    whole = load_prompts(path, tokenizer, prompts_config(path))
    monkeypatch.setattr(prompts, "TOKENIZER_BATCH", 3)
    for one, other in zip(whole, load_prompts(path, tokenizer, prompts_config(path)), strict=True):
        assert one.uid == other.uid and one.token_ids.tolist() == other.token_ids.tolist()


def without(*keys: str) -> dict[str, Any]:
    fields = row()
    *parents, leaf = keys
    holder = fields
    for parent in parents:
        holder = holder[parent]
    del holder[leaf]
    return fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            without("prompt") | {"prompts": []},
            ["p.jsonl line 1: missing 'prompt', found", "rename 'prompts', or set"],
        ),
        (
            without("reward_model"),
            ["missing 'reward_model', found prompt, extra_info; add it, or set prompts.answer_column"],
        ),
        (without("reward_model", "ground_truth"), ["missing 'reward_model.ground_truth', found style"]),
        (
            without("extra_info", "index"),
            ["missing 'extra_info.index', found nothing; add it, or set prompts.uid_column"],
        ),
        (row() | {"reward_model": "2"}, ["'reward_model' = '2': expected a table with 'ground_truth'"]),
        (row(answer="  "), ["'reward_model.ground_truth' = '  ': expected the answer"]),
        (row(answer=["2"]), ["'reward_model.ground_truth' = ['2']: expected the answer as a text"]),
        (row(answer=True), ["'reward_model.ground_truth' = True: expected the answer as a text"]),
        (row() | {"prompt": []}, ["'prompt' = []: expected at least one message"]),
        (row() | {"prompt": " "}, ["'prompt[0].content' = ' ': expected a text"]),
        (row() | {"prompt": 11}, ["'prompt' = 11: expected a list of {role, content}"]),
        (
            row() | {"prompt": [{"role": "user"}]},
            ["p.jsonl line 1: prompt[0]: missing 'content', found role"],
        ),
        (row(content=" \n"), ["'prompt[0].content' = ' \\n': expected a text"]),
        (row(role="human"), ["'prompt[0].role' = 'human': expected one of"]),
        (row(role="assistant"), ["'prompt' ends with role 'assistant': expected user or tool"]),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_by_name(tmp_path, tokenizer, fields, words):
    message = refusal(jsonl(tmp_path / "p.jsonl", [fields]), tokenizer)
    assert all(word in message for word in words), message


def test_a_duplicate_uid_names_both_rows(tmp_path, tokenizer):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([row("a"), row("b"), row("a")]), path)
    assert "uid 'a': p.parquet row 0 and p.parquet row 2 both have it" in refusal(path, tokenizer)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, tokenizer):
    (tmp_path / "broken.jsonl").write_text(json.dumps(row()) + "\n\n{'prompt': \n")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "p.csv").write_text("prompt")
    for name, words in {
        "none.jsonl": "no such file",
        "p.csv": "expected a name that ends in .parquet or .jsonl, or a dataset's directory",
        "broken.jsonl": "line 3: expected one JSON object",
        "list.jsonl": "line 1: expected one JSON object",
        "latin.jsonl": "line 1: expected one JSON object",
        "empty.jsonl": "expected at least one row",
        "broken.parquet": "expected parquet",
    }.items():
        message = refusal(tmp_path / name, tokenizer)
        assert words in message, message
        assert name in message


def test_long_prompts_stop_the_run_or_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    path = jsonl(tmp_path / "p.jsonl", [row("short", "1+1"), row("long", "1 + 1"), row("longest", "1 + 1 =")])
    message = refusal(path, tokenizer, max_prompt_tokens=7)
    assert "prompt 'long'" in message and "has 8 tokens, 2 of 3" in message and "(longest: 10)" in message
    with caplog.at_level(logging.WARNING):
        kept = load_prompts(path, tokenizer, prompts_config(path, 7, on_long_prompt="skip"))
    assert [prompt.uid for prompt in kept] == ["short"]
    assert "2 of 3 prompts are too long" in caplog.text
    assert "none is left" in refusal(path, tokenizer, max_prompt_tokens=3, on_long_prompt="skip")


def test_a_tokenizer_directory_is_checked_before_it_is_used(tmp_path, demo):
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(broken)
    bare = shutil.copytree(demo / "model", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        load_tokenizer(bare)


def demonstration(answer: str = "\\boxed{2}", question: str = "1+1") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load_sft(path: Path, tokenizer: Any, max_tokens: int = 64) -> Any:
    return load_demonstrations(path, tokenizer, SftDataConfig(train=path, max_tokens=max_tokens))


def test_a_demonstration_is_split_where_the_assistant_begins(tmp_path, tokenizer):
    (sequence,) = load_sft(jsonl(tmp_path / "d.jsonl", [demonstration()]), tokenizer)
    assert tokenizer.decode(sequence.token_ids) == "<|user|>1+1<|end|><|assistant|>\\boxed{2}<|end|>"
    assert sequence.num_prompt_tokens == 6
    assert sequence.num_response_tokens == 10  # nine bytes and the end of the turn
    assert sequence.behavior_logp is None and sequence.advantage == 1.0
    assert sequence.uid == "d.jsonl line 1"


QWEN_LIKE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_what_the_template_writes_after_the_end_of_the_turn_is_left_out(tmp_path, demo):
    tokenizer = load_tokenizer(demo / "model")
    tokenizer.chat_template = QWEN_LIKE
    (sequence,) = load_sft(jsonl(tmp_path / "d.jsonl", [demonstration()]), tokenizer)
    assert tokenizer.decode(sequence.token_ids) == "<|user|>1+1<|end|>\n<|assistant|>\\boxed{2}<|end|>"
    tokenizer.chat_template = QWEN_LIKE.replace("<|end|>\n", "<|end|>bye")
    with pytest.raises(ConfigError, match="writes 'bye' after the end-of-turn token"):
        load_sft(tmp_path / "d.jsonl", tokenizer)


def test_a_template_that_cannot_be_learned_from_is_refused(tmp_path, demo):
    path = jsonl(tmp_path / "d.jsonl", [demonstration()])
    tokenizer = load_tokenizer(demo / "model")
    for template, words in [
        ("{{ messages | length }}" + QWEN_LIKE, "no prefix of the whole"),
        (QWEN_LIKE.replace("<|end|>", "<|pad|>"), "expected the end-of-turn token '<|end|>' once"),
        ("{{ raise_exception('no system turn') }}", "the chat template refuses it: no system turn"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ConfigError) as caught:
            load_sft(path, tokenizer)
        assert words in str(caught.value)


def test_a_demonstration_that_is_none_is_refused_by_name(tmp_path, tokenizer):
    for fields, words in [
        ({"message": []}, "missing 'messages', found message; rename 'message'"),
        ({"messages": demonstration()["messages"][:1]}, "ends with role 'user': expected assistant"),
        (demonstration(answer=""), "'messages[1].content' = '': expected a text"),
        (demonstration(answer="2<|end|>3"), "found it 2 times"),
        (demonstration(answer="2" * 60), "d.jsonl line 1 has 67 tokens, 1 of 1 demonstrations are too long"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_sft(jsonl(tmp_path / "d.jsonl", [fields]), tokenizer)
        assert words in str(caught.value), caught.value
