"""Commits the results of work items, and stops the run if too many of their rows failed."""

import time
from collections.abc import Mapping

from engine.pipeline.config import EngineConfig
from engine.plan.corpus import CorpusPlan
from engine.plan.items import ItemResult
from engine.progress.record import Execution
from engine.run.alarms import Alarms
from engine.run.runners.protocol import Pairs
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.errors import TooManyFailures
from manifests.log.actions import Action, RecipeAdded, RecipeCurrent

JUDGED_FROM_ROWS = 100
_NAMED = 5


def commit_recipes(catalog: Catalog, plans: Mapping[str, CorpusPlan], *, run: str) -> None:
    """Adds recipes that the log does not know yet, and says which are current from here on."""
    known = set(catalog.recipes())
    actions: list[Action] = []
    for corpus, planned in plans.items():
        current = catalog.current_recipes(corpus)
        for name, modality in planned.modalities.items():
            for form, recipe in modality.written().items():
                grains = planned.grains(name, form)
                crops = None if grains == (None,) else len(grains)
                if recipe.fingerprint not in known:
                    known.add(recipe.fingerprint)
                    actions.append(RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()))
                before = current.get((name, form))
                if before is None or (before.fingerprint, before.crops) != (recipe.fingerprint, crops):
                    actions.append(
                        RecipeCurrent(
                            corpus=corpus, modality=name, form=form, fingerprint=recipe.fingerprint, crops=crops
                        )
                    )
    if actions:
        catalog.commit(actions, run=run)


class FailureBudget:
    """Counts the rows of labels and tokens, and raises once too many failed. Judges from a hundred rows on."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.rows = 0
        self.failed = 0

    def add(self, rows: int, failed_rows: int) -> None:
        """Counts the rows of finished shards. Raises TooManyFailures."""
        self.rows += rows
        self.failed += failed_rows
        if self.rows >= JUDGED_FROM_ROWS and self.failed > self.most * self.rows:
            raise TooManyFailures(
                f"{self.failed:,} of {self.rows:,} rows failed, more than max_failed_fraction = {self.most:g} allows; ask "
                '`modmill sql WORKSPACE "SELECT class, message, count(*) FROM failures GROUP BY ALL"` why, then mend the '
                "source or raise engine.max_failed_fraction, and run again: what is done stays done"
            )


class Committer:
    """Commits what comes back from a runner, counts it, and stops the run if too much of it failed."""

    def __init__(self, execution: Execution, engine: EngineConfig) -> None:
        self._execution = execution
        self._engine = engine
        self._alarms = Alarms(execution.catalog)
        self._budget = FailureBudget(engine.max_failed_fraction)
        self._failed: list[tuple[str, Exception]] = []
        self._began = time.monotonic()
        self._samples = 0

    def add(self, pairs: Pairs) -> None:
        """Commits all results at hand in one log entry. Raises TooManyFailures."""
        catalog, progress, done = self._execution.catalog, self._execution.progress, self._execution.done
        results = [(item, result) for item, result in pairs if isinstance(result, ItemResult)]
        records = [record for _, result in results for record in result.records]
        if records:
            catalog.commit(records, run=done.run)
        rows, failed = sum(record.rows for record in records), sum(record.failed for record in records)
        self._samples += sum(result.rows for _, result in results)
        for name, more in (("shards", len(records)), ("rows", rows), ("failed_rows", failed)):
            done.add(name, more)
        progress.done_items(results)
        self._tell_alarms()
        for item, error in pairs:
            if isinstance(error, Exception):
                self._failed.append((item.name, error))
                done.add("failed_items", 1)
                progress.failed_item(item, error)
        self._budget.add(rows, failed)
        if len(self._failed) > self._engine.max_failed_parts:
            name, error = self._failed[-1]
            raise TooManyFailures(
                f"{len(self._failed):,} work items failed as a whole, more than engine.max_failed_parts = "
                f"{self._engine.max_failed_parts} allows; the last, {name}: {error}; mend that or raise "
                "engine.max_failed_parts, and run again: what is done stays done"
            ) from error

    def _tell_alarms(self, *, at_once: bool = False) -> None:
        if alarms := self._alarms.tell(self._execution.progress, at_once=at_once):
            self._execution.done.add("alarms", alarms)

    def summarize(self) -> None:
        """Says what was done, how fast, at what cost, and what is left."""
        self._tell_alarms(at_once=True)
        seconds = max(time.monotonic() - self._began, 1e-9)
        said = [
            f"labeled: {self._samples:,} samples read, {self._budget.rows:,} rows written in {units.span(seconds)}",
            f"{self._samples / seconds:,.1f} samples/s",
        ]
        if self._budget.failed:
            said.append(f"{self._budget.failed:,} rows failed")
        if (cost := self._execution.progress.cost) is not None:
            said.append(f"{cost:,.2f} dollars")
        self._execution.progress.say(", ".join(said))
        if alarms := self._execution.done.counts.get("alarms"):
            self._execution.progress.say(f"alarms: {alarms:,} figures depart from their history; see the view `alarms`")
        if self._failed:
            names = ", ".join(name for name, _ in self._failed[:_NAMED])
            more = f" and {len(self._failed) - _NAMED:,} more" if len(self._failed) > _NAMED else ""
            self._execution.progress.say(
                f"left to do: {len(self._failed):,} work items failed as a whole ({names}{more}); run again to try them"
            )
