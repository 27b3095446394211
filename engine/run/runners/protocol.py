"""Defines what a runner is: where work items are done, in this process or on Ray."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from engine.plan.items import FitItem, ItemResult, WorkItem
from engine.progress.progress import Progress
from manifests.log.actions import TokenizerAdded

# A fit goes on as a work item does if its worker dies: a row that kills is found, and left out.
Item = TypeVar("Item", WorkItem, FitItem)
# Items that are done at one tick.
Pairs = list[tuple[WorkItem, ItemResult | Exception]]


class Runner(Protocol):
    """Does items: `LocalRunner` (`local`) in this process, `RayRunner` (`ray.runner`) on a cluster."""

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
        """Does fits; yields each tokenizer with its item as soon as it is ready."""
        ...

    def work(self, items: Iterable[WorkItem], progress: Progress) -> Generator[Pairs, None, None]:
        """Does work items; yields lists of those that are done, each with its result or the error it failed with for good.

        It takes items as it needs them, on the thread that iterates, and is to be closed before the runner is. The first
        Ctrl-C stops handing out, waits up to `engine.drain_s` for what is at work, and ends in KeyboardInterrupt.
        """
        ...

    def close(self) -> None:
        """Ends its workers."""
        ...
