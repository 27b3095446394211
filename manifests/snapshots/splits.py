"""Splits a selection: disjoint conditions share its rows out by the hash of their keys."""

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

from manifests.errors import ConfigError
from manifests.formats import snapshots as snapshot_files
from manifests.snapshots import selection

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog


def conditions(
    catalog: "Catalog", name: str, where: str | None, shares: Mapping[str, Decimal], split_by: str | None = None
) -> dict[str, str | None]:
    """Returns the condition of each snapshot NAME-SPLIT, by that name; None if it picks every row.

    `shares` are cut off [0, 1) one behind the other, and a row is where `split_share` of its key is: their order and
    values alone decide. With `split_by`, a column of `samples`, its value takes the key's place. Raises ConfigError for
    shares that are none, a column that is missing and a split without rows, QueryError for the condition `where`.
    """
    if not shares or any(not share.is_finite() or share <= 0 for share in shares.values()) or sum(shares.values()) > 1:
        given = ", ".join(f"{split}={share}" for split, share in shares.items()) or "none"
        raise ConfigError(f"the splits of {name} are {given}; expected shares over 0 that are at most 1 together")
    for split in shares:
        snapshot_files.check_name(f"{name}-{split}")
    # By itself, or a parenthesis of it could let rows into several splits.
    if where is not None and catalog.select_rows(where).num_rows == 0:
        raise ConfigError(f"the condition {where!r} picks no row")
    share_of = f"split_share({selection.group_of(catalog, split_by)})"
    found: dict[str, str | None] = {}
    low = Decimal(0)
    for split, share in shares.items():
        high = low + share
        bounds = [f"{share_of} >= {low.normalize():f}"] * (low > 0)
        bounds += [f"{share_of} < {high.normalize():f}"] * (high < 1)
        # Its end on a line of its own, since it may end in a comment.
        bounds += [] if where is None else [f"({where}\n)" if "--" in where else f"({where})"]
        condition = " AND ".join(bounds) or None
        if catalog.select_rows(condition or "true").num_rows == 0:
            raise ConfigError(f"no row falls into {name}-{split}, the condition {condition!r}; give it a larger share")
        found[f"{name}-{split}"] = condition
        low = high
    return found
