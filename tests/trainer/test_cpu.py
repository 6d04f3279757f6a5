"""The CPU adaptation against the installed megatron-core: what it relies on must still be there.

When this fails after an upgrade: read the named upstream site, adapt trainer/cpu.py (or the list below), and run
tests/trainer again. The sources are read, not imported, so that nothing here patches the test process.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.trainer import cpu
from tests.trainer.tiny import make_batch, trainer_config

CORE = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"

NOT_ON_OUR_PATH = (
    "dist_checkpointing/", "distributed/fsdp/", "fp8_utils", "full_cuda_graph", "fusions/", "inference/", "models/hybrid/",
    "models/mimo/", "nccl_allocator", "optimizer/layer_wise_optimizer", "pipeline_parallel/hybrid_cp_schedule",
    "pipeline_parallel/utils", "pipeline_parallel/fine_grained_activation_offload", "tensor_parallel/data", "rerun_state_machine", "resharding/", "ssm/", "transformer/cuda_graphs",
    "transformer/moe/moe_layer", "transformer/moe/paged_stash", "transformer/moe/token_dispatcher", "energy_monitor",
)  # fmt: skip
"""Sources with a literal CUDA device that a trainer rank does not reach with our settings (read in 0.16.1, 0.19.2)."""


NEEDED_BY_THE_OLDEST_ALONE = ("megatron.core.transformer.moe.moe_utils",)
"""Facade modules without a CUDA site in the newer versions that we support."""


def source_of(module: str) -> str:
    return (CORE / Path(*module.split(".")[2:])).with_suffix(".py").read_text()


def literal_sites(text: str) -> int:
    return len(re.findall(r"""device\s*=\s*f?['"]cuda""", text))


def test_the_installed_version_is_one_that_was_run():
    cpu._check_version(version("megatron-core"))


def test_the_ranks_import_the_version_that_this_test_run_is_for(pool, tiny_moe, request):
    expected = request.config.getoption("--expect-megatron-core")
    if expected is None:
        pytest.skip("no --expect-megatron-core")
    (found,) = pool.grid(trainer_config(), tiny_moe).call("megatron_version")
    assert found.partition("+")[0] == expected  # 0.19 appends the commit of the directory it runs in


def test_an_unknown_version_is_refused_by_name():
    with pytest.raises(
        Exception, match=r"megatron-core = 0\.20\.0: the CPU adaptation was made for 0\.16 to 0\.19"
    ):
        cpu._check_version("0.20.0")


@pytest.mark.parametrize("name", cpu.PATCHED)
def test_every_patched_name_still_exists_upstream(name):
    *module, leaf = name.split(".")
    owner = None
    if module[-1][0].isupper():
        owner = module.pop()
    tree: ast.AST = ast.parse(source_of(".".join(module)))
    if owner:
        tree = next(
            (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner), ast.Module([], [])
        )
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    imported = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert leaf in defined | imported, (
        f"{name} is gone from megatron-core {version('megatron-core')}: adapt trainer/cpu.py"
    )


@pytest.mark.parametrize("module", cpu.FACADE_MODULES)
def test_every_facade_module_still_imports_torch_and_asks_for_cuda(module):
    text = source_of(module)
    assert "import torch" in text, f"{module} no longer imports torch by that name: the facade has no effect"
    if module in NEEDED_BY_THE_OLDEST_ALONE and not version("megatron-core").startswith("0.16."):
        return
    on_gpu = literal_sites(text) or "pin_memory" in text or ".cuda(" in text or "cuda.current_device" in text
    assert on_gpu, f"{module} no longer names CUDA: take it out of FACADE_MODULES"


def test_no_new_module_names_the_cuda_device():
    known = {module.removeprefix("megatron.core.").replace(".", "/") for module in cpu.FACADE_MODULES}
    for path in CORE.rglob("*.py"):
        name = path.relative_to(CORE).with_suffix("").as_posix()
        if name in known or name.startswith(NOT_ON_OUR_PATH):
            continue
        assert not literal_sites(path.read_text()), (
            f"megatron-core {version('megatron-core')}: core/{name}.py names the CUDA device: add it to FACADE_MODULES if a "
            "trainer rank reaches it, else to NOT_ON_OUR_PATH"
        )


def test_cuda_without_a_gpu_is_a_clear_error():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"trainer\.device = 'cuda': no CUDA device is visible"):
        cpu.require_cuda()


def test_a_late_installation_is_refused():
    code = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from megatron_vespo.trainer import cpu\ncpu.install()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "RunError: megatron.core is already imported: the CPU adaptation must come first" in done.stderr


def test_a_float32_and_a_bfloat16_trainer_run_where_cuda_is_not(pool, tiny_moe):
    batch = make_batch(4)
    exact = pool.grid(trainer_config(), tiny_moe).step(batch)
    cfg = trainer_config(data=2, expert=2, optimizer={"distributed": True}).model_copy(
        update={"dtype": "bfloat16"}
    )
    rough = pool.grid(cfg, tiny_moe).step(batch)
    assert rough.loss == pytest.approx(exact.loss, abs=0.05)
    assert rough.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
