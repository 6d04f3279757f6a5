"""The architecture, as a test: who may import whom, who may touch which engine, and that every config loads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megatron_vespo
from megatron_vespo.config import SftConfig, TrainConfig, load_config

PACKAGE = Path(megatron_vespo.__file__).parent
REPOSITORY = Path(__file__).parent.parent

MAY_IMPORT = {
    "cli": {"control", "diagnose", "data", "algo", "config", "types"},
    "control": {
        "trainer",
        "rollout",
        "data",
        "algo",
        "metrics",
        "rundir",
        "evidence",
        "routes",
        "config",
        "types",
    },
    "diagnose": {"algo", "metrics", "rundir", "evidence", "routes", "config", "types"},
    "trainer": {"algo", "config", "types"},
    "rollout": {"routes", "config", "types"},
    "data": {"config", "types"},
    "metrics": {"rundir", "config", "types"},
    "evidence": {"rundir", "routes", "config", "types"},
    "routes": {"types"},
    "rundir": {"config", "types"},
    "algo": {"config", "types"},
    "config": set(),
    "types": set(),
}
HOME = {"megatron": "trainer", "transformer_engine": "trainer", "sglang": "rollout", "ray": "control"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write absolute imports"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_every_import_obeys_the_floors():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top == PACKAGE.name:
                target = rest.split(".")[0]
                assert target in MAY_IMPORT[room] | {room}, f"{path.name}: {room} may not import {target}"
            elif top in HOME:
                assert room == HOME[top], f"{path.name}: {top} may only be imported in {HOME[top]}/"


def test_there_is_no_utils():
    assert not [path for path in PACKAGE.rglob("*") if path.stem in ("utils", "util", "helpers", "common")]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_says_what_it_is_and_loads(path: Path):
    assert path.read_text().startswith("# "), "first line: purpose, hardware, expected result"
    load_config(SftConfig if "sft" in path.stem else TrainConfig, path)
