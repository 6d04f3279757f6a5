"""Environments: what a chat template writes between two turns, to the token, and the calculator."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_vespo.config import ConfigError, EnvironmentConfig
from megatron_vespo.data.environments import Calculator, between_turns, calculate, make_environment
from tests.data.test_verifiers import prompt, response

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: thoughts of all but the last turn are taken out, which a last turn without any gets empty ones, and
# tools speak as the user.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def merging_tokenizer(chat_template: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE with merges, so that one text has many spellings."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "user\n",
        "assistant\n",
        "system\nYou are helpful.",
        "<result>12</result>\n",
        "<calc>6*7</calc>",
        "12 + 30\n\n",
    ]
    backend.train_from_iterator(corpus * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=chat_template
    )


@pytest.fixture(scope="module", params=["demo", "chatml"])
def appending(request, tokenizer) -> PreTrainedTokenizerBase:
    """Tokenizers whose templates only ever append."""
    return tokenizer if request.param == "demo" else merging_tokenizer(CHATML)


def rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], begin: bool) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=begin)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=20)


@settings(deadline=None)
@given(question=CONTENT, answer=CONTENT, reply=CONTENT)
def test_between_turns_is_what_the_whole_rendering_has_there(appending, question, answer, reply):
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    front = rendered(appending, chat, begin=False)
    end = len(front) - front[::-1].index(appending.eos_token_id)  # just after the end-of-turn token
    more = [{"role": "user", "content": reply}]
    ids = between_turns(appending, more)
    assert ids.dtype == np.int32
    assert front[:end] + ids.tolist() == rendered(appending, chat + more, begin=True)


def test_a_template_that_rewrites_earlier_turns_still_gives_what_it_writes_between_them():
    tokenizer = merging_tokenizer(QWEN3)
    user = tokenizer.decode(between_turns(tokenizer, [{"role": "user", "content": "go on"}]))
    assert user == "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    tools = tokenizer.decode(between_turns(tokenizer, [{"role": "tool", "content": c} for c in ("42", "43")]))
    assert tools == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML.replace("<|im_end|>", "<|im_start|>"),
            r"expected '<\|im_end\|>' right after the assistant's turn, found '<\|im_st",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }}\n"),
            r"right after the assistant's turn, found '\\n<\|im_end\|>",
        ),
        (CHATML.replace("{{ m.content }}", "?"), "right after the assistant's turn, found ''"),
        (
            "{% if messages[2:] %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML,
            "roles user .*: one turn only",
        ),
    ],
)
def test_a_template_that_does_not_end_turns_where_the_engine_stops_is_refused(template, words):
    with pytest.raises(ConfigError, match=f"chat template: .*{words}"):
        between_turns(merging_tokenizer(template), [{"role": "user", "content": "go on"}])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 1 + 2 * -3 ", "-5"),
        ("(1+2)*3", "9"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("1/3", "0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("10**20 + 1", "100000000000000000001"),
        ("+1.5e3", "1500"),
        ("1/0", "error: division by zero"),
        ("0**-1", "error: division by zero"),
        ("9**9**9", "error: an exponent is no integer up to 64"),
        ("2**0.5", "error: an exponent is no integer up to 64"),
        ("10**31", "error: a number is too large"),
        ("1/10**31", "error: a number is too large"),
        ("1e999", "error: not an arithmetic expression"),
        ("9" * 201, "error: longer than 200 characters"),
        ("1" + "0" * 199, "error: a number is too large"),
    ],
)
def test_the_calculator_computes_exactly_or_says_why_not(expression, value):
    assert calculate(expression) == value


NO_ARITHMETIC = (
    "", "2 +", "x", "__import__('os')", "(1).real", "[1]", "True", "1j", "1 < 2", "1 if 1 else 2", "'a'*9", "1;2", "\0",
    "6&1", "(" * 100 + ")" * 100, "(" * 200, "lambda: 1", "~1", "a:=1",
)  # fmt: skip


@pytest.mark.parametrize("expression", NO_ARITHMETIC)
def test_the_calculator_knows_nothing_but_arithmetic(expression):
    assert calculate(expression) == "error: not an arithmetic expression"


@settings(deadline=None)
@given(st.text(st.sampled_from("0123456789.e+-*/%() "), max_size=200))
def test_the_calculator_answers_whatever_it_is_asked(expression):
    assert calculate(expression)


def replied(environment: Calculator, tokenizer: PreTrainedTokenizerBase, said: str) -> str | None:
    ids = asyncio.run(environment.reply(prompt("84"), response(said)))
    return None if ids is None else str(tokenizer.decode(ids))


def test_the_calculator_answers_every_call_of_a_turn_and_ends_without_one(tokenizer):
    environment = make_environment(EnvironmentConfig(name="calculator"), tokenizer)
    assert isinstance(environment, Calculator)
    said = "First <calc>12*7</calc>, then <calc>1/0</calc>; <calc>unfinished"
    assert replied(environment, tokenizer, said) == (
        "<|user|><result>84</result>\n<result>error: division by zero</result><|end|><|assistant|>"
    )
    assert replied(environment, tokenizer, "It is 84.") is None
    assert str(replied(environment, tokenizer, "<calc>1</calc>" * 9)).count("<result>") == 8


def test_no_environment_is_none(tokenizer):
    assert make_environment(EnvironmentConfig(), tokenizer) is None


def test_an_environment_of_the_users_own_is_loaded_from_a_file_or_module(tokenizer, tmp_path, monkeypatch):
    text = "class Mine:\n    def __init__(self, tokenizer): self.tokenizer = tokenizer\n    async def reply(self, prompt, response): return None\n"
    for name in ("in_file", "in_module_of_test"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (f"{tmp_path / 'in_file.py'}:Mine", "in_module_of_test:Mine"):
        environment = make_environment(EnvironmentConfig(name=name), tokenizer)
        assert type(environment).__name__ == "Mine" and environment.tokenizer is tokenizer


def test_an_environment_that_is_none_is_refused_by_name(tokenizer, tmp_path: Path):
    (tmp_path / "e.py").write_text(
        "class Mute:\n    def __init__(self, tokenizer): pass\n"
        "class Broken:\n    def __init__(self, tokenizer): raise KeyError('port')\n"
    )
    for name, words in [
        ("Mute", r"has no method `reply\(prompt, response\)`"),
        ("Broken", "constructed with the tokenizer, but KeyError: 'port'"),
        ("Brokn", "has no 'Brokn'; did you mean 'Broken'?"),
    ]:
        with pytest.raises(ConfigError, match=f"environment.name = '.*e.py:{name}': .*{words}"):
            make_environment(EnvironmentConfig(name=f"{tmp_path / 'e.py'}:{name}"), tokenizer)
    with pytest.raises(
        ConfigError, match=r"environment.name = 'calculater': expected 'package\.module:name'"
    ):
        make_environment(EnvironmentConfig(name="calculater"), tokenizer)
