"""Out-of-tree SGLang platform: plain PyTorch on CPU, no compiled kernels.

SGLang's own CPU platform needs `sgl_kernel`, which exists as source only.  This one is found through the
entry points beside it, and every fused operator falls back to its PyTorch form.  `rollout/server.py` puts
this folder on the server's PYTHONPATH when `rollout.device = "cpu"`; nothing else imports it.
"""

import torch
from sglang.srt.platforms import interface
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

# SGLang 0.5.20 asks the platform for its memory pools; 0.5.23 has capabilities with the right defaults instead.
_ASKS_FOR_POOLS = not hasattr(interface, "PlatformCapabilities")


def activate() -> str | None:
    """Name the platform class, or None to decline where SGLang has a real accelerator."""
    return None if torch.cuda.is_available() else f"{__name__}.PlainCpuPlatform"


class PlainCpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
    """The device hooks of SGLang's CPU platform without its kernels."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    if _ASKS_FOR_POOLS:

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator


def register_hooks() -> None:
    """Replace page-locking of host buffers (the routed-experts cache asks for it): it needs CUDA."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in ("_cuda_host_register", "_cuda_host_unregister"):
        HookRegistry.register(
            f"sglang.srt.mem_cache.pool_host.common.{name}", lambda *args, **kwargs: None, HookType.REPLACE
        )
