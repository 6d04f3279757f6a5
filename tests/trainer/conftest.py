"""Fixtures of the trainer's tests: tiny models on disk, and real ranks to train them on."""

from __future__ import annotations

import pytest

from tests.trainer.ranks import Pool
from tests.trainer.tiny import make_moderate_batch, write_model


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory):
    """A random Qwen3-MoE: 4 layers, 8 experts top-2, untied embeddings."""
    return write_model(tmp_path_factory.mktemp("moe"), moe=True, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory):
    """A random dense Qwen3 with tied embeddings."""
    return write_model(tmp_path_factory.mktemp("dense"), moe=False, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama-3.2: tied embeddings, rotary frequencies scaled for its 64 original positions."""
    return write_model(tmp_path_factory.mktemp("llama"), moe=False, tie_word_embeddings=True, llama=True)


@pytest.fixture(scope="session")
def pool():
    """Four processes that import megatron once; grids are built on them one after another."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def moderate_batch(pool, tiny_moe):
    return make_moderate_batch(pool, tiny_moe)
