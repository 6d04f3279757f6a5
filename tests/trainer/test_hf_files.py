"""Safetensors directories as stock tools read them, and what is refused in a damaged one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer.hf_files import HfReader, begin_directory, publish, write_weights

ALL = (slice(None),)


def some_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = {"norm": (5,), "a": (3, 4), "large": (40, 7), "b": (2, 2), "c": (1, 3)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def write(directory, tensors, file_bytes):
    sizes = {name: tuple(x.shape) for name, x in tensors.items()}
    (dtype,) = {x.dtype for x in tensors.values()}
    write_weights(directory, iter(tensors.items()), sizes, dtype, file_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_file_is_what_safetensors_reads(tmp_path, dtype):
    tensors = some_tensors(dtype)
    write(tmp_path, tensors, file_bytes=10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == dtype and torch.equal(read[name], tensors[name]) for name in tensors)


def test_files_are_bounded_and_the_index_finds_everything(tmp_path):
    tensors = some_tensors(torch.float32)  # 20, 48, 1120, 16 and 12 bytes
    write(tmp_path, tensors, file_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 20 + 48 + 1120 + 16 + 12
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {
        "norm": files[0], "a": files[0], "large": files[1], "b": files[2], "c": files[2]
    }  # fmt: skip
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
        assert torch.equal(HfReader(tmp_path).read(name, tuple(tensors[name].shape), ALL), tensors[name])


def test_a_window_of_a_tensor_is_read(tmp_path):
    tensors = some_tensors(torch.bfloat16)
    write(tmp_path, tensors, file_bytes=10**6)
    part = HfReader(tmp_path).read("large", (40, 7), (slice(None), slice(2, 5)))
    assert torch.equal(part, tensors["large"][:, 2:5])


def test_a_new_directory_has_the_small_files_and_the_dtype_and_appears_whole(tmp_path):
    source, partial, target = tmp_path / "source", tmp_path / ".partial", tmp_path / "new"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    (source / "tokenizer.json").write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (source / name).write_text("")
    begin_directory(partial, source, torch.bfloat16)
    assert not target.exists()
    publish(partial, target)
    assert not partial.exists()
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama", "dtype": "bfloat16"}


# ----------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def two_files(tmp_path):
    write(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(40)}, file_bytes=100)
    return tmp_path


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"):
        HfReader(tmp_path)


def test_an_index_that_is_none_is_refused(two_files):
    (two_files / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json holds no weight_map"):
        HfReader(two_files)


def test_a_file_that_the_index_names_and_nobody_has_is_named(two_files):
    (two_files / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"1 of the 2 files .* missing, the first is model-00002-of-00002\.safetensors"
    ):
        HfReader(two_files)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"cannot read model-00002-of-00002\.safetensors \(.*\); download it again"),
        (lambda data: data[:5], r"cannot read model-00002-of-00002\.safetensors"),
        (lambda data: b"", r"cannot read model-00002-of-00002\.safetensors"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
    ],
    ids=["one byte short", "no header", "empty", "pointer"],
)
def test_a_truncated_file_is_named(two_files, damage, message):
    file = two_files / "model-00002-of-00002.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    reader = HfReader(two_files)
    reader.check("a", (2, 3))
    with pytest.raises(ConfigError, match=message):
        reader.check("b", (40,))


def test_a_tensor_in_another_file_than_the_index_says_is_refused(two_files):
    index = json.loads((two_files / "model.safetensors.index.json").read_text())
    index["weight_map"]["a"] = index["weight_map"]["b"]
    (two_files / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"places 'a' in model-00002-of-00002\.safetensors, which lacks it"):
        HfReader(two_files).check("a", (2, 3))


def test_missing_misshapen_and_quantized_tensors_are_refused(tmp_path):
    save_file({"a": torch.ones(2, 3), "q": torch.ones(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    with pytest.raises(ConfigError, match="no tensor 'b' in its safetensors"):
        reader.check("b", (1,))
    with pytest.raises(
        ConfigError, match=r"'a' in model\.safetensors has shape \[2, 3\], config\.json implies \[3, 2\]"
    ):
        reader.check("a", (3, 2))
    with pytest.raises(ConfigError, match=r"'q' in model\.safetensors holds I8, expected one of F32"):
        reader.check("q", (4,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_are_refused_where_they_are_read(tmp_path, value, dtype):
    tensor = torch.zeros(4, 3, dtype=dtype)
    tensor[2, 1] = value
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    assert torch.equal(reader.read("a", (4, 3), (slice(0, 2),)), tensor[:2])
    with pytest.raises(ConfigError, match=r"'a' in model\.safetensors holds NaN or infinity"):
        reader.read("a", (4, 3), (slice(2, 4),))
