"""What a runner is: where work items are done, in this process or on Ray."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from engine.plan.items import FitItem, ItemResult, WorkItem
from engine.progress.progress import Progress
from manifests.log.actions import TokenizerAdded

Pairs = list[tuple[WorkItem, ItemResult | Exception]]


class Runner(Protocol):
    """Where items are done: `LocalRunner` (`local`), `RayRunner` (`ray.runner`)."""

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]: ...

    def work(self, items: Iterable[WorkItem], progress: Progress) -> Iterator[Pairs]:
        """Takes items as it needs them, on the thread that iterates; what is done at one tick, an Exception for good."""
        ...

    def close(self) -> None: ...
