"""Directories of Hugging Face datasets: cloned repositories and save_to_disk, read without `datasets`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.data.rows import read_rows

COLUMNS = {"question": "prompts.prompt_column", "meta.uid": "prompts.uid_column"}


def table(*uids: str) -> pa.Table:
    return pa.Table.from_pylist(
        [{"question": f"q{uid}", "meta": {"uid": uid, "n": 1}, "blob": "x"} for uid in uids]
    )


def parquet(file: Path, *uids: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(*uids), file)


def saved_to_disk(root: Path, shards: list[pa.Table], split: str | None) -> None:
    """What `datasets.Dataset.save_to_disk` of version 5.2 writes."""
    root.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with pa.OSFile(str(root / name), "wb") as sink, pa.ipc.new_stream(sink, shard.schema) as writer:
            writer.write_table(shard, max_chunksize=2)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": {}}))


def uids(path: Path, split: str = "train") -> list[str]:
    return [row.get("meta.uid") for row in read_rows(path, COLUMNS, split)]


def refusal(path: Path, split: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        read_rows(path, COLUMNS, split)
    return str(caught.value)


def test_a_cloned_repository_is_read_split_by_split_in_the_order_of_its_shards(tmp_path):
    for shard in (2, 10, 0, 1, *range(3, 10)):
        parquet(tmp_path / f"data/train-{shard:05d}-of-00011.parquet", f"a{shard}", f"b{shard}")
    parquet(tmp_path / "data/test-00000-of-00001.parquet", "t")
    parquet(tmp_path / "data/train_prefs-00000-of-00001.parquet", "other split")
    parquet(tmp_path / ".cache/train-00000-of-00001.parquet", "hidden")
    (tmp_path / "README.md").write_text("# a dataset\n")
    assert uids(tmp_path) == [f"{letter}{shard}" for shard in range(11) for letter in "ab"]
    assert uids(tmp_path, "test") == ["t"]
    row = read_rows(tmp_path, COLUMNS, "test")[0]
    assert row.where == "data/test-00000-of-00001.parquet row 0"
    assert set(row.fields) == {"question", "meta"}  # nothing else is read


@pytest.mark.parametrize(
    "name", ["train.parquet", "train/0000.parquet", "default/train/0000.parquet", "data/train-0.parquet"]
)
def test_other_names_of_shards_tell_the_split_too(tmp_path, name):
    parquet(tmp_path / name, "a")
    assert uids(tmp_path) == ["a"]


def test_shards_are_ordered_by_number_even_where_their_names_are_not(tmp_path):
    for shard in (10, 9, 0):
        parquet(tmp_path / f"train-{shard}.parquet", str(shard))
    assert uids(tmp_path) == ["0", "9", "10"]


def test_a_cloned_repository_of_jsonl_is_read_too(tmp_path):
    lines = [json.dumps({"question": "q", "meta": {"uid": uid}}) for uid in "ab"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "validation.jsonl").write_text(lines[0] + "\n")
    assert uids(tmp_path) == ["a", "b"]


def test_a_dataset_saved_to_disk_is_read_from_its_arrow_streams(tmp_path):
    saved_to_disk(tmp_path / "one", [table("a", "b", "c"), table("d")], "train")
    assert (
        uids(tmp_path / "one") == uids(tmp_path / "one", "any") == ["a", "b", "c", "d"]
    )  # there is nothing to choose
    assert read_rows(tmp_path / "one", COLUMNS)[3].where == "data-00001-of-00002.arrow row 0"


def test_a_dictionary_of_splits_saved_to_disk_is_read_by_split(tmp_path):
    for split in ("train", "test"):
        saved_to_disk(tmp_path / split, [table(split)], split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert uids(tmp_path) == ["train"] and uids(tmp_path, "test") == ["test"] == uids(tmp_path / "test")
    assert refusal(tmp_path, "tests").endswith("no split 'tests', found test, train; did you mean 'test'?")


def test_what_is_missing_ambiguous_or_incomplete_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no split 'train', found no parquet or jsonl file" in refusal(tmp_path / "empty")
    clone = tmp_path / "clone"
    parquet(clone / "main/train-00000-of-00001.parquet", "a")
    parquet(clone / "socratic/train-00000-of-00001.parquet", "b")
    message = refusal(clone)
    assert (
        "is there in 2 forms (main/train-00000-of-00001.parquet, socratic/train" in message
        and "give the folder" in message
    )
    assert uids(clone / "main") == ["a"]
    assert "no split 'trian', found train; did you mean 'train'?" in refusal(clone / "main", "trian")
    parquet(tmp_path / "partial/train-00001-of-00003.parquet", "a")
    assert "split 'train' has 1 of 3 shards, expected all" in refusal(tmp_path / "partial")
    pointer = tmp_path / "lfs" / "train.parquet"
    pointer.parent.mkdir()
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "it is a pointer to them; run `git lfs pull`" in refusal(tmp_path / "lfs")


def test_a_damaged_save_to_disk_is_refused_by_name(tmp_path):
    saved_to_disk(tmp_path / "gone", [table("a")], None)
    (tmp_path / "gone/data-00000-of-00001.arrow").unlink()
    assert "no such file, state.json names it" in refusal(tmp_path / "gone")
    saved_to_disk(tmp_path / "torn", [table("a")], None)
    (tmp_path / "torn/data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert "expected an Arrow stream" in refusal(tmp_path / "torn")
    (tmp_path / "torn/state.json").write_text("{}")
    assert "expected what `save_to_disk` writes, but KeyError: '_data_files'" in refusal(tmp_path / "torn")


def test_a_column_that_is_not_there_is_told_with_what_is(tmp_path):
    pq.write_table(pa.table({"questions": ["q"], "meta": [{"uid": "a"}]}), tmp_path / "train.parquet")
    assert refusal(tmp_path) == (
        "train.parquet: missing 'question', found questions, meta; rename 'questions', or set prompts.prompt_column"
    )
    pq.write_table(
        pa.table({"question": ["q", "q"], "meta": [{"uid": "a"}, None]}), tmp_path / "train.parquet"
    )
    assert "train.parquet row 1: missing 'meta', found question" in refusal(tmp_path)


def test_directories_are_read_as_datasets_wrote_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(table("a", "b", "c", "d").to_pylist())
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    assert uids(tmp_path / "one") == ["a", "b", "c", "d"]
    shuffled = whole.shuffle(seed=0)
    datasets.DatasetDict(train=shuffled, test=whole.select([3])).save_to_disk(tmp_path / "two")
    assert uids(tmp_path / "two") == shuffled.flatten()["meta.uid"] and uids(tmp_path / "two", "test") == [
        "d"
    ]
