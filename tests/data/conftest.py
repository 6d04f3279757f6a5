"""The demo's inputs, written once per session, and the tokenizer that comes with them."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_vespo.data.demo import write_demo_inputs
from megatron_vespo.data.prompts import load_tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_inputs(tmp_path_factory.mktemp("demo") / "inputs", seed=0)


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(demo / "model")
