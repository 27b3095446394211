"""The processes of a run; the only place of collectives. One process is a world of one."""

from torch import distributed


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _is_up() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _is_up() else 0


def is_main() -> bool:
    """Whether this process writes what is written once: checkpoints, metrics, messages."""
    return rank() == 0


def _is_up() -> bool:
    return distributed.is_available() and distributed.is_initialized()
