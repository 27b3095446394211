"""Tells which Ray cluster a run joins, and whether anything listens there. Ray itself is not imported."""

import os
import socket

from engine.pipeline.sections import EngineConfig
from manifests.errors import UserError

_CONNECT_S = 15.0


def address_of(engine: EngineConfig) -> str | None:
    """Returns the cluster to join: `engine.ray_address`, else RAY_ADDRESS; None for a Ray of this machine's own, or no Ray."""
    if engine.runner != "ray":
        return None
    return engine.ray_address or os.environ.get("RAY_ADDRESS")


def check_listens(address: str) -> None:
    """Raises UserError if nothing listens at a host:port; Ray itself would try for minutes.

    `auto` and `local` are not checked: their addresses are not known before Ray starts.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"{address!r} is no address of a Ray cluster; expected HOST:PORT of its head, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise out_of_reach(address, str(error)) from error


def out_of_reach(address: str, why: str) -> UserError:
    """Returns the error of a cluster that cannot be joined."""
    return UserError(
        f"the Ray cluster at {address} is out of reach: {why}; see that it runs (`ray status`), that --ray or "
        "engine.ray_address is its head's, and that RAY_AUTH_MODE and its token are set here as there"
    )
