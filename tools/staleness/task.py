"""The task of the real stack: prompts that have one right answer each, all or nothing, and a model that is right a quarter of the time.

An answer is a random string.  At six places of each, the demonstrations are right in 8 of 10 cases and otherwise show that
place's one distractor, so that a model fine-tuned on them samples the whole answer in about 0.8^6 = 26 of 100 cases.  Single
tokens do not suffice: a policy that is one decision deep does not collapse on stale data.

Model, tokenizer and chat template are the demo's (megatron_vespo/data/demo.py), with half of its layers.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vespo.data.demo import write_tiny_model

NUM_PROMPTS = 8
ANSWER_TOKENS = 16
"""Letters of an answer; the end-of-turn token follows."""
NUM_DECISIONS, RIGHT = 6, 0.8
SLIP = 0.002
"""Probability of any letter anywhere in a demonstration, so that nothing has probability zero."""
DEMONSTRATIONS_PER_PROMPT = 512
NUM_LAYERS = 2


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    distractors: dict[int, str]
    """By place in the answer."""


def write_inputs(directory: Path, seed: int) -> None:
    """Write model/, prompts.parquet and demonstrations.parquet, which `seed` decides."""
    rng = random.Random(seed)
    questions = [_question(number, rng) for number in range(NUM_PROMPTS)]
    demonstrations = [
        [_message("user", question.text), _message("assistant", _demonstration(question, rng))]
        for _ in range(DEMONSTRATIONS_PER_PROMPT)
        for question in questions
    ]
    directory.mkdir(parents=True, exist_ok=True)
    prompts = [
        {
            "prompt": [_message("user", question.text)],
            "reward_model": {"ground_truth": question.answer},
            "extra_info": {"index": question.text},
        }
        for question in questions
    ]
    pq.write_table(pa.Table.from_pylist(prompts), directory / "prompts.parquet")
    pq.write_table(pa.table({"messages": demonstrations}), directory / "demonstrations.parquet")
    _write_model(directory / "model", seed)


def _question(number: int, rng: random.Random) -> Question:
    answer = "".join(rng.choices(string.ascii_lowercase, k=ANSWER_TOKENS))
    places = sorted(rng.sample(range(ANSWER_TOKENS), NUM_DECISIONS))
    distractors = {i: rng.choice(string.ascii_lowercase.replace(answer[i], "")) for i in places}
    return Question(f"{number}?", answer, distractors)


def _demonstration(question: Question, rng: random.Random) -> str:
    letters = list(question.answer)
    for place, distractor in question.distractors.items():
        if rng.random() >= RIGHT:
            letters[place] = distractor
    return "".join(
        rng.choice(string.ascii_lowercase) if rng.random() < SLIP else letter for letter in letters
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_model(directory: Path, seed: int) -> None:
    """The demo's MoE with fewer layers: its first ones."""
    write_tiny_model(directory, seed)
    config = AutoConfig.from_pretrained(directory, num_hidden_layers=NUM_LAYERS)
    AutoModelForCausalLM.from_pretrained(directory, config=config).save_pretrained(directory)
