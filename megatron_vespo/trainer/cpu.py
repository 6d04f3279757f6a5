"""Run Megatron-Core on hosts without CUDA: chosen by `device = "cpu"`, never silently.

`install()` must be called before the first import of megatron in a process.  Three layers, each with the
smallest reach that works; nothing of megatron's own files changes:

1. `torch.cuda`: symbols that can only raise on a CPU build get CPU meanings.
2. megatron modules that spell the device "cuda" see a `torch` facade whose tensor factories answer with
   CPU tensors.  The real `torch` module is left alone.
3. five megatron functions (`PATCHED`) that inspect CUDA types, streams or generators.

`tests/trainer/test_cpu.py` compares all of it with the installed megatron-core and names what has drifted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_vespo.config import ConfigError
from megatron_vespo.types import RunError

OLDEST, NEWEST = (0, 16), (0, 19)
"""The minor versions of megatron-core whose CUDA sites were read and run on CPU."""

FACADE_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.utils",
)
"""Modules that name the device "cuda" (or pin memory) on a path that a trainer rank takes."""

PATCHED = (
    "megatron.core.jit.disable_jit_fuser",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.__init__",
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
)
"""Upstream names that `install` replaces or calls; the drift test checks that each still exists."""

_EXPECTED_WARNINGS = (
    r".*(Transformer Engine|transformer_engine|Apex|TE) .*not.* installed.*",
    r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    r".*`sequence_parallel` is set to `True`, but tensor model parallel size is 1.*",  # experts, with expert_tensor = 1
    r".*full scope is deprecated.*",
    r".*is deprecated. Please use `torch.distributed.*",
    r".*\.grad attribute of a Tensor that is not a leaf.*",  # DistributedOptimizer looks at shards that are views
)
"""Said by megatron at every start, about choices that are right on CPU."""

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Adapt this process; from here on CUDA does not exist in it, also on a machine that has a GPU.

    Raises:
        RunError: megatron was imported before, or its version is one that was never run on CPU.
    """
    global _installed
    if _installed:
        return
    if "megatron.core" in sys.modules:
        raise RunError(
            "megatron.core is already imported: the CPU adaptation must come first, because megatron reads its "
            "jit setting at import; call cpu.install() at the start of the process"
        )
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _patch_torch_cuda()
    with _without_compiler():
        _check_version(importlib.import_module("megatron.core").__version__)
        _patch_megatron()
    _installed = True


def require_cuda() -> None:
    """Refuse `device = "cuda"` on a machine without a usable GPU.

    Raises:
        ConfigError: no CUDA device is visible to this process.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device = 'cuda': no CUDA device is visible to torch "
            f"{torch.__version__} on this machine; run on a GPU machine, or set trainer.device = 'cpu' "
            "(gloo ranks, for small models)"
        )


def _check_version(version: str) -> None:
    minor = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= minor <= NEWEST:
        raise RunError(
            f"megatron-core = {version}: the CPU adaptation was made for {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}; install one of those, or extend trainer/cpu.py (tests/trainer/test_cpu.py "
            "lists what to read)"
        )


# ------------------------------------------------------------------------------------------ torch.cuda


class _Stream:
    """A CPU has one in-order queue, so every stream is the same stream."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    """Whatever was submitted before has finished already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _patch_torch_cuda() -> None:
    """One new function per name: torch._dynamo refuses an object that it finds under two names."""
    cuda: Any = torch.cuda
    cuda.is_available = _always(False)
    cuda.current_device = _always(_CPU)  # megatron passes it on as device=
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _always(None))
    cuda.Stream, cuda.Event = _Stream, _Event
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _always(_Stream()))
    cuda.stream = lambda stream=None: contextlib.nullcontext(stream)
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(int(seed)))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _always(0))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


# -------------------------------------------------------------------------------------- the torch facade


class _TorchFacade(types.ModuleType):
    """`torch`, but its tensor factories make CPU tensors where CUDA ones are asked for."""

    FACTORIES = (
        "zeros",
        "ones",
        "empty",
        "full",
        "tensor",
        "arange",
        "zeros_like",
        "ones_like",
        "empty_like",
    )

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self.FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


# ---------------------------------------------------------------------------------------------- megatron


def _load(module: str) -> Any:
    return importlib.import_module(module)


def _patch_megatron() -> None:
    _load("megatron.core.jit").disable_jit_fuser()  # for modules that are imported later

    rng = _load("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Its warning about the CPU generator is about the very thing that we do on purpose.
    logging.getLogger(rng.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    facade = _TorchFacade()
    for name in FACADE_MODULES:
        _load(name).torch = facade

    moe_utils = _load("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 reads this name also where TE is missing
    _load("megatron.core.transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = _split_sizes_to_host

    clip_grads, optimizer = (
        _load("megatron.core.optimizer.clip_grads"),
        _load("megatron.core.optimizer.optimizer"),
    )
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip
    distributed = _load("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    for cls in (distributed, optimizer.Float16OptimizerWithFloat16Params):
        cls.__init__ = _with_cuda_type_names(cls.__init__)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Megatron decorates functions with torch.compile while it is imported; on CPU they would start a C++ compiler."""
    real = torch.compile

    def unchanged(function: Any = None, **options: Any) -> Any:
        return function if function is not None else lambda f: f

    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real  # type: ignore[assignment]


def _split_sizes_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Upstream converts only CUDA tensors, but gloo's all-to-all wants plain integers too."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Inside, a CPU tensor's legacy type string carries the '.cuda' that upstream compares with."""
    tensor: Any = torch.Tensor
    if "type" in vars(tensor):  # already active
        yield
        return
    real = tensor.type  # inherited from the C base class

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return real(self, *args, **kwargs)
        return real(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = type_
    try:
        yield
    finally:
        del tensor.type  # the inherited method is visible again
