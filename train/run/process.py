"""Sets device, threads, determinism and signals of the process for as long as a run lasts."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from manifests.errors import ConfigError


def device(wanted: str) -> torch.device:
    """Returns the device of a name; `auto` is a GPU if there is one. Raises ConfigError if it cannot be used."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wanted)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {wanted!r} cannot be used here ({str(error).splitlines()[0]}); try auto or cpu"
        ) from error
    return found


@contextmanager
def torch_settings(device: torch.device, wanted_threads: int | None) -> Iterator[None]:
    """Sets threads, and on a CPU deterministic algorithms, for the time of the run."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(wanted_threads or threads)
    torch.use_deterministic_algorithms(deterministic or device.type == "cpu")
    # Deterministic mode fills every new tensor, which took a fifth of a step; only reads of unwritten memory would differ.
    settings: Any = torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = filled


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C or SIGTERM sets; the second interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]

    def stop(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for kind in kinds:
        signal.signal(kind, stop)
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
