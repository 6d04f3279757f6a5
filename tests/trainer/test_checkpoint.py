"""Checkpoints: a resumed run is the run that never stopped, in whatever layout; and nothing else is resumed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from megatron_vespo.trainer import checkpoint
from megatron_vespo.types import RunError
from tests.trainer.tiny import make_batch, trainer_config

ZERO1_OVERLAPPED = {"optimizer": {"distributed": True, "overlap": True}}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
ZERO1 = {"optimizer": {"distributed": True}}
BF16 = {"dtype": "bfloat16"}


def config(*, dtype="float32", freeze_router=False, **axes):
    return trainer_config(**axes).model_copy(update={"dtype": dtype, "freeze_router": freeze_router})


# ------------------------------------------------------------------------------------ same layout


def newest(root):
    """The newest checkpoint that is not damaged."""
    return next((one.directory for one in checkpoint.found(root) if one.damage is None), None)


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor": 2, "pipeline": 2, "expert": 2} | ZERO1,
        {"data": 2, "expert": 2} | ZERO1 | BF16,
        {},
        {"data": 2, "expert": 2} | BF16,
    ],
    ids=str,
)
def test_a_resumed_run_continues_bit_for_bit(pool, tiny_moe, tmp_path, settings):
    batches = [make_batch(4, seed=i) for i in range(4)]
    grid = pool.grid(config(**settings), tiny_moe)
    for i in (0, 1):
        grid.step(batches[i], i)
    grid.save(tmp_path / "step_000002", 2, {"prompts": {"epoch": 1}})
    uninterrupted = [grid.step(batches[i], i).loss for i in (2, 3)]
    final = grid.masters("weight")

    grid = pool.grid(config(**settings), tiny_moe)
    assert set(map(str, grid.call("load", tmp_path / "step_000002"))) == {"(2, {'prompts': {'epoch': 1}})"}
    assert grid.call("num_steps") == [2] * len(grid.call("num_steps"))
    assert [grid.step(batches[i], i).loss for i in (2, 3)] == uninterrupted
    assert same(grid.masters("weight"), final)
    assert checkpoint.read_state(tmp_path / "step_000002") == (2, {"prompts": {"epoch": 1}})


def same(got, wanted) -> bool:
    return got.keys() == wanted.keys() and all(np.array_equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "settings", [{"data": 2} | ZERO1, {"data": 2}, {"data": 2, "expert": 2} | ZERO1], ids=str
)
def test_low_precision_weights_are_the_rounded_master_weights_which_is_why_they_are_not_stored(
    pool, tiny_moe, settings
):
    grid = pool.grid(config(**settings, **BF16), tiny_moe)
    assert grid.call("rounding_gap") == [0.0, 0.0]
    for i in range(2):
        grid.step(make_batch(4, seed=i), i)
        assert grid.call("rounding_gap") == [0.0, 0.0]


def test_a_checkpoint_before_the_first_step_loads(pool, tiny_moe, tmp_path):
    grid = pool.grid(config(data=2, **ZERO1), tiny_moe)
    grid.save(tmp_path / "step_000000", 0, {})
    first = grid.step(make_batch(4), 0)
    grid = pool.grid(config(tensor=2), tiny_moe)
    grid.call("load", tmp_path / "step_000000")
    assert not any(values.any() for values in grid.masters("exp_avg").values())
    assert grid.step(make_batch(4), 0).loss == pytest.approx(first.loss, abs=1e-5)
    assert grid.step(make_batch(4), 1).grad_norm > 0


# ------------------------------------------------------------------------------------ other layouts


@pytest.mark.parametrize(
    ("kind", "written_by", "loaded_by"),
    [
        ("tiny_moe", {"tensor": 2, "pipeline": 2}, {"data": 2, "expert": 2}),
        ("tiny_moe", {"data": 2, "expert": 2} | ZERO1, {"tensor": 2}),
        ("tiny_moe", {}, {"pipeline": 2, "data": 2, "expert": 2} | ZERO1),
        ("tiny_moe", {"tensor": 2, "data": 2, "expert": 4} | ZERO1, {"context": 2}),
        ("tiny_moe", {"data": 4, "expert": 2} | ZERO1 | BF16, {"data": 2, "expert": 2} | BF16),
        ("tiny_moe", {"data": 2} | BF16, {"tensor": 2, "pipeline": 2, "expert": 2} | ZERO1 | BF16),
        ("tiny_moe", {"expert": 2, "data": 2} | ZERO1 | BF16, {}),
        (
            "tiny_moe",
            {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2} | ZERO1_OVERLAPPED,
            {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2} | ZERO1,
        ),
        (
            "tiny_moe",
            {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2} | BF16,
            {"pipeline": 2, "virtual_pipeline": 2, "data": 2} | ZERO1_OVERLAPPED | BF16,
        ),
        ("tiny_moe", {"pipeline": 2, "first_stage_layers": 1}, {"pipeline": 4} | ZERO1),
        ("tiny_llama", {"tensor": 2, "context": 2} | ZERO1, {"pipeline": 2}),
        ("tiny_dense", {"tensor": 2, "pipeline": 2} | ZERO1, {}),
        ("tiny_dense", {"tensor": 2}, {"pipeline": 2, "data": 2} | ZERO1),
        ("tiny_dense", {"pipeline": 4} | BF16, {"tensor": 2, "data": 2} | ZERO1 | BF16),
    ],
    ids=str,
)
def test_a_checkpoint_loads_into_another_layout(pool, request, tmp_path, kind, written_by, loaded_by):
    model = request.getfixturevalue(kind)
    grid = pool.grid(config(**written_by), model)
    for i in range(2):
        grid.step(make_batch(4, seed=i), i)
    grid.save(tmp_path / "step_000002", 2, {})
    before = {k: grid.masters(k) for k in KINDS}
    uninterrupted = grid.step(make_batch(4, seed=2), 2)

    grid = pool.grid(config(**loaded_by), model)
    assert grid.call("load", tmp_path / "step_000002")[0] == (2, {})
    for k in KINDS:
        assert same(grid.masters(k), before[k]), k
    low = loaded_by.get("dtype") == "bfloat16"
    for name, weight in grid.weights().items():
        np.testing.assert_array_equal(
            weight, rounded(before["weight"][name]) if low else before["weight"][name]
        )
    resumed = grid.step(make_batch(4, seed=2), 2)
    tolerance = 1e-5 if "dtype" not in {**written_by, **loaded_by} else 5e-2  # of bfloat16 routes
    assert resumed.loss == pytest.approx(uninterrupted.loss, abs=tolerance)
    assert resumed.grad_norm == pytest.approx(uninterrupted.grad_norm, rel=tolerance)


def rounded(values):
    import torch

    return torch.from_numpy(values).bfloat16().float().numpy()


def test_a_frozen_router_is_kept_and_must_stay_frozen(pool, tiny_moe, tmp_path):
    grid = pool.grid(config(data=2, expert=2, freeze_router=True, **ZERO1, **BF16), tiny_moe)
    grid.step(make_batch(4), 0)
    grid.call("fill", "mlp.router.weight", 0.25)
    grid.save(tmp_path / "step_000001", 1, {})

    grid = pool.grid(config(tensor=2, freeze_router=True), tiny_moe)
    grid.call("load", tmp_path / "step_000001")
    assert all((w == 0.25).all() for name, w in grid.weights().items() if name.endswith("mlp.gate.weight"))
    with pytest.raises(
        RunError, match=r"mlp\.gate\.weight: its exp_avg is not in the checkpoint, because it was frozen"
    ):
        pool.grid(config(), tiny_moe).call("load", tmp_path / "step_000001")


# ------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def original(pool, tiny_moe, tmp_path_factory):
    """A checkpoint of two ranks, not to be changed."""
    directory = tmp_path_factory.mktemp("original") / "step_000001"
    grid = pool.grid(config(data=2, expert=2, **ZERO1), tiny_moe)
    grid.step(make_batch(4), 0)
    grid.save(directory, 1, {})
    return directory


@pytest.fixture
def saved(original, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(original, tmp_path / original.name)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def without_pieces(file):
    """As a rank would have written it that did not know of some of its parameters."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(file, framework="numpy") as opened:
        pieces = json.loads(opened.metadata()["pieces"])
    pieces = [piece for piece in pieces if "model.norm.weight" not in piece["names"]]
    save_file(load_file(file), file, metadata={"pieces": json.dumps(pieces)})
    mend_manifest(file.parent)


def mend_manifest(directory):
    """Make the manifest agree with the files."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        content = (directory / name).read_bytes()
        manifest["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(directory, manifest)


def write_manifest(directory, manifest):
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_damage_is_refused_by_name_on_every_rank_and_nothing_is_loaded(pool, tiny_moe, original, tmp_path):
    grid = pool.grid(config(data=2, **ZERO1), tiny_moe)
    before = grid.masters("weight")
    for number, (damage, name, message) in enumerate((
        (flip, "rank-00001.safetensors", r"rank-00001\.safetensors': is damaged: its sha256 is"),
        (cut, "rank-00001.safetensors", r"rank-00001\.safetensors': is damaged: it has \d+ bytes \(written were"),
        (lambda file: file.unlink(), "rank-00000.safetensors", r"rank-00000\.safetensors': is missing"),
        (lambda file: file.unlink(), "manifest.json", r"cannot read manifest\.json"),
        (cut, "manifest.json", r"cannot read manifest\.json"),
        (flip, "manifest.json", r"manifest\.json( was changed|)"),
        (without_pieces, "rank-00000.safetensors", r"parameter model\.norm\.weight: (is not|the checkpoint has)"),
    )):  # fmt: skip
        directory = shutil.copytree(original, tmp_path / str(number))
        damage(directory / name)
        for problem in grid.answers("load", directory):
            assert isinstance(problem, RunError) and re.search(message, str(problem)), (message, problem)
    assert same(grid.masters("weight"), before)
    assert set(grid.call("num_steps")) == {0}
    assert np.isfinite(grid.step(make_batch(2)).loss)  # the ranks are still in step with one another


def test_a_part_that_is_stored_twice_is_refused(pool, tiny_moe, saved):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    file = saved / "rank-00000.safetensors"
    with safe_open(file, framework="numpy") as opened:
        pieces = json.loads(opened.metadata()["pieces"])
    save_file(load_file(file), file, metadata={"pieces": json.dumps([*pieces, pieces[0]])})
    mend_manifest(saved)
    with pytest.raises(
        RunError, match=r"the checkpoint has \[\(0, \d+\), \(0, \d+\).*expected all of \[0, \d+\) once"
    ):
        pool.grid(config(), tiny_moe).call("load", saved)


def test_another_model_or_format_is_refused_by_name(pool, tiny_moe, tiny_dense, saved):
    grid = pool.grid(config(data=2), tiny_dense)
    with pytest.raises(
        RunError, match="its model has tied_embeddings = False, this run's has True; resume with the same"
    ):
        grid.call("load", saved)
    write_manifest(saved, {"format": 1})
    with pytest.raises(RunError, match="format = 1, expected 2; resume with the version"):
        grid.call("load", saved)


# ------------------------------------------------------------------------------------ saving


def test_what_is_saved_is_what_was_there_when_the_save_began(pool, tiny_moe, tmp_path):
    cfg = config(data=2, expert=2, **ZERO1, **BF16)
    grid = pool.grid(cfg, tiny_moe)
    grid.step(make_batch(4), 0)
    before = {kind: grid.masters(kind) for kind in KINDS}
    checkpoint.prepare(tmp_path / "step_000001")
    grid.call("begin_save", tmp_path / "step_000001")
    for i in (1, 2, 3):
        grid.step(make_batch(4, seed=i), i)
    assert newest(tmp_path) is None  # a crash now would leave nothing that looks like a checkpoint
    grid.commit(tmp_path / "step_000001", 1, {})
    grid.save(tmp_path / "step_000004", 4, {})  # into the same memory
    after = {kind: grid.masters(kind) for kind in KINDS}

    grid = pool.grid(cfg, tiny_moe)
    for directory, wanted in ((tmp_path / "step_000001", before), (tmp_path / "step_000004", after)):
        grid.call("load", directory)
        assert all(same(grid.masters(kind), wanted[kind]) for kind in KINDS)


def test_a_rank_that_cannot_write_says_so_and_leaves_no_checkpoint(pool, tiny_moe, tmp_path):
    grid = pool.grid(config(data=2), tiny_moe)
    grid.save(tmp_path / "step_000001", 1, {})
    checkpoint.prepare(tmp_path / "step_000002")
    (tmp_path / "step_000002.tmp" / "rank-00001.safetensors").symlink_to("/dev/full")
    grid.call("begin_save", tmp_path / "step_000002")
    with pytest.raises(
        RunError, match=r"rank-00001\.safetensors': rank 1 \(dp 1\) cannot write .*No space left"
    ):
        grid.commit(tmp_path / "step_000002", 2, {})
    checkpoint.discard(tmp_path / "step_000002")
    assert [d.name for d in tmp_path.iterdir()] == ["step_000001"]
    grid.save(tmp_path / "step_000002", 2, {})  # room was made
    assert newest(tmp_path) == tmp_path / "step_000002"


def test_a_checkpoint_is_never_overwritten(tmp_path):
    write_manifest(tmp_path / "step_000001", {})
    with pytest.raises(RunError, match="exists already; a checkpoint is never overwritten"):
        checkpoint.prepare(tmp_path / "step_000001")


# ------------------------------------------------------------------------------------ directories


def pretend(root, step, *, damaged=False):
    """A checkpoint, as far as `found` looks."""
    directory = checkpoint.directory_of(root, step)
    entry = {"bytes": 3 + damaged, "sha256": ""}
    write_manifest(
        directory, {"format": 2, "step": step, "state": {}, "files": {"rank-00000.safetensors": entry}}
    )
    (directory / "rank-00000.safetensors").write_bytes(b"abc")
    return directory


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_only_what_is_complete_is_seen(tmp_path):
    for step in (2, 10, 9):
        pretend(tmp_path, step)
    pretend(tmp_path, 12, damaged=True)
    pretend(tmp_path, 11).rename(tmp_path / "step_000011.tmp")  # a crash between write and commit
    (tmp_path / "step_000013").mkdir()
    assert newest(tmp_path) == tmp_path / "step_000010"
    seen = {one.step: one.damage for one in checkpoint.found(tmp_path)}
    assert list(seen) == [13, 12, 10, 9, 2] and seen[10] is None
    assert "rank-00000.safetensors': is damaged: it has 3 bytes (written were 4)" in seen[12]
    assert "cannot read manifest.json" in seen[13]
    assert newest(tmp_path / "none") is None


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    pretend(tmp_path, 2).rename(tmp_path / "step_000003")
    assert newest(tmp_path) is None
    assert "holds step 2; give it back its name" in checkpoint.found(tmp_path)[0].damage


def test_the_newest_checkpoints_and_those_of_round_steps_stay(tmp_path):
    for step in range(5, 55, 5):
        pretend(tmp_path, step)
    pretend(tmp_path, 60, damaged=True)
    (tmp_path / "step_000055.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2, keep_every=20)
    assert names(tmp_path) == [f"step_{n:06d}" for n in (20, 40, 45, 50, 60)]
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == [f"step_{n:06d}" for n in (50, 60)]


def test_checkpoints_that_a_run_goes_back_behind_are_moved_and_not_lost(tmp_path):
    for _ in range(2):
        for step in (2, 4, 6):
            if not checkpoint.directory_of(tmp_path, step).exists():
                pretend(tmp_path, step)
        checkpoint.set_aside(tmp_path, after=2)
    assert names(tmp_path) == ["step_000002", "superseded"]
    assert names(tmp_path / "superseded") == ["step_000004", "step_000004+", "step_000006", "step_000006+"]
