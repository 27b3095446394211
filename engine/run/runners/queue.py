"""Decides which work item a worker gets next. A policy: no Ray, no threads, no clock.

Items are pulled from an iterator only as far as workers need them, so that a driver holds as much for a million items as
for a thousand.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic

from engine.plan.corpus import identity, identity_of_tokenizer
from engine.plan.items import WorkItem
from engine.run.runners.protocol import Item

# Items held to choose from. More are pulled, up to the second number, only if a pool would stand still.
_WINDOW = 256
_MOST_HELD = 8192


@dataclass
class _Waiting(Generic[Item]):
    """Holds items that need the same models, in their order."""

    pool: str
    needs: frozenset[str]
    items: deque[Item] = field(default_factory=deque)


class ItemQueue(Generic[Item]):
    """Holds items that were not handed out yet, by group; first in line are those to be done again.

    `needs` tells the identities of the models that an item needs, as `Models.held` names them.
    """

    def __init__(self, items: Iterable[Item], needs: Callable[[Item], frozenset[str]], window: int = _WINDOW) -> None:
        self._items = iter(items)
        self._needs = needs
        self._window = window
        self._groups: dict[tuple[str, ...], _Waiting[Item]] = {}
        self._waiting: dict[str, int] = {}
        self._exhausted = False

    def next(self, pool: str, held: frozenset[str] = frozenset(), *, alone: bool = True) -> Item | None:
        """Returns the item for a worker of a pool that holds these models, None if no item is there for it.

        The group with the fewest models to load comes first, of equal ones the older. A worker that has another item at
        hand (not `alone`) gets none that must run alone.
        """
        self._pull(pool)
        best: tuple[int, _Waiting[Item]] | None = None
        for group in self._groups.values():
            if group.pool != pool or not group.items or not (alone or not group.items[0].attempt.alone):
                continue
            to_load = len(group.needs - held)
            if best is None or to_load < best[0]:
                best = (to_load, group)
        if best is None:
            return None
        self._waiting[pool] -= 1
        return best[1].items.popleft()

    def put_back(self, item: Item) -> None:
        """Takes back an item to be done (again) before all others of its group."""
        self._group(item).items.appendleft(item)
        self._waiting[item.pool] = self._waiting.get(item.pool, 0) + 1

    def waiting(self, pool: str) -> int:
        """Counts the items of the pool that could be handed out at once, as far as it is worth knowing (see `_WINDOW`)."""
        self._pull(pool)
        return self._waiting.get(pool, 0)

    @property
    def exhausted(self) -> bool:
        """Tells whether nothing is left to hand out."""
        self._pull("")
        return self._exhausted and not any(self._waiting.values())

    def _pull(self, pool: str) -> None:
        held = sum(self._waiting.values())
        while not self._exhausted and (held < self._window or (not self._waiting.get(pool) and held < _MOST_HELD)):
            item = next(self._items, None)
            if item is None:
                self._exhausted = True
                # A group without items costs nothing, but groups of all corpora would pile up.
                self._groups = {key: group for key, group in self._groups.items() if group.items}
                return
            self._group(item).items.append(item)
            self._waiting[item.pool] = self._waiting.get(item.pool, 0) + 1
            held += 1

    def _group(self, item: Item) -> _Waiting[Item]:
        if item.alike not in self._groups:
            self._groups[item.alike] = _Waiting(item.pool, self._needs(item))
        return self._groups[item.alike]


def needed_models(item: WorkItem) -> frozenset[str]:
    """Returns the identities of the models that an item's targets need: labelers with their parameters, tokenizers."""
    found = {identity(use) for use in item.plan.uses_for(target.modality for target in item.targets)}
    for name in {target.modality for target in item.targets if target.form == "token"}:
        found.add(identity_of_tokenizer(item.tokenizers[item.plan.modalities[name].tokenizer], name))
    return frozenset(found)


def in_turn(parts: Iterable[Iterator[WorkItem]]) -> Iterator[WorkItem]:
    """Yields items of several iterators by turns, so that no pool's workers wait for another pool's items to end."""
    rest = deque(parts)
    while rest:
        source = rest.popleft()
        item = next(source, None)
        if item is not None:
            rest.append(source)
            yield item
