"""Asks the machine for what a worker needs: its device, its threads, its memory."""

import ctypes
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def is_tensor(value: Any) -> bool:
    """Tells whether a label is a torch tensor, without importing torch."""
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def host(arrays: Sequence[Any]) -> "np.ndarray":
    """Returns arrays or tensors of one shape as one NumPy array (B, ...), in one copy from whatever device they are on."""
    import numpy as np

    first = arrays[0]
    if isinstance(first, np.ndarray):
        return np.stack([np.asarray(array) for array in arrays])
    import torch

    stacked = torch.stack(list(arrays)).detach()
    return (stacked.float() if stacked.dtype == torch.bfloat16 else stacked).cpu().numpy()


# Options of glibc's mallopt.
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_MAPPED_FROM_BYTES = 8 << 20
_KEPT_BYTES = 64 << 20
# Without one of these Linux has no GPU, which is known without loading torch.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl", "/dev/kfd")


def device_of(wanted: str) -> str:
    """Returns the device to compute on, which `auto` leaves to the machine."""
    if wanted != "auto":
        return wanted
    if sys.platform == "linux" and not any(Path(device).exists() for device in _GPU_DEVICES):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Gives the arithmetic of every process the same number of threads, so that it has the same result."""
    import cv2

    cv2.setNumThreads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    limit_torch(threads)


def loaded_torch() -> Any:
    """Returns the module torch if something has loaded it, else None: loading takes seconds, and many runs need no torch.

    If another thread is loading it, this one waits: until then the module is there, and most of its content is not.
    """
    if sys.modules.get("torch") is None:
        return None
    import torch

    return torch


def limit_torch(threads: int) -> None:
    """Does the same for torch, if it is loaded."""
    torch = loaded_torch()
    if torch is not None:
        torch.set_num_threads(threads)


def return_memory() -> None:
    """Has glibc give big images back to the system when they are freed, and keep few pools of small ones for threads.

    Measured with photographs of 100 megapixels: 740 MB at the most in place of 1,170, and 30 MB after in place of 480. Some
    memory is kept all the same: to ask the system again for that of each photograph took 6 % of the lightest labelers' time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(_M_ARENA_MAX, 2)
            library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def rss_bytes() -> int:
    """Returns how much memory this process uses, 0 if the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
