"""What kind of checkpoint a directory is."""

from __future__ import annotations

import json

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.control.checkpoints import find_checkpoint
from megatron_vespo.trainer.checkpoint import FORMAT, directory_of, prepare, publish


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def step_40(tmp_path):
    directory = directory_of(tmp_path / "run" / "checkpoints", 40)
    prepare(directory)
    publish(directory, {"format": FORMAT, "step": 40, "state": {}, "files": {}}, "rank 0")
    return directory


def test_a_hugging_face_directory_has_its_own_weights(model):
    found = find_checkpoint(model)

    assert (found.model, found.version, found.megatron) == (model, 0, None)


def test_a_checkpoint_of_a_run_starts_from_the_model_that_its_config_names(step_40, model):
    (step_40.parent.parent / "config.toml").write_text(f'model = "{model}"\n')

    found = find_checkpoint(step_40)

    assert (found.path, found.model, found.version) == (step_40, model, 40)


def test_a_checkpoint_without_its_run_needs_a_shape(step_40, model):
    with pytest.raises(ConfigError, match=r"expected the run's config\.toml at .*--model-shape"):
        find_checkpoint(step_40)

    assert find_checkpoint(step_40, model).model == model


def test_a_run_whose_model_has_moved_needs_a_shape(step_40):
    (step_40.parent.parent / "config.toml").write_text('model = "somewhere/else"\n')

    with pytest.raises(ConfigError, match=r"model 'somewhere/else', which is not there .*--model-shape"):
        find_checkpoint(step_40)


def test_of_megatrons_iterations_the_newest_is_taken(tmp_path, model):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1200\n")

    assert find_checkpoint(tmp_path, model).megatron == tmp_path / "iter_0001200"


def test_one_iteration_of_megatron_is_taken_as_it_is(tmp_path, model):
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))

    assert find_checkpoint(tmp_path, model).megatron == tmp_path
    with pytest.raises(ConfigError, match=r"names no architecture; .*--model-shape"):
        find_checkpoint(tmp_path)


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a Hugging Face directory .*give the path of one"):
        find_checkpoint(tmp_path)
