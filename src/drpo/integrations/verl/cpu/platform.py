"""The CPU as a platform of verl: gloo, no streams, and memory statistics that are zero."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Device(ModuleType):
    """``torch.cpu``, and what verl asks of ``torch.cuda`` beyond it."""

    def __init__(self) -> None:
        super().__init__("torch.cpu")
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            setattr(self, name, lambda *_: 0)
        for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "synchronize", "set_device"):
            setattr(self, name, lambda *_: None)
        self.mem_get_info = lambda *_: (0, 0)
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.get_rng_state, self.set_rng_state = torch.get_rng_state, torch.set_rng_state
        self.is_available = lambda: False
        self.current_device = lambda: "cpu"
        self.get_device_name = lambda *_: "CPU"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    _device = _Device()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> Any:
        return self._device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Only where VERL_PLATFORM asks for it.
        return False

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        # verl asks in order to make the process group of "cpu:gloo,DEVICE:NAME", in which torch refuses a second "cpu",
        # and makes none where there is one.
        if "RANK" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                init_method=os.environ.get("DIST_INIT_METHOD"),
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def cudart(self) -> None:
        return None
