"""Shows a run's state to people: a table on a terminal, and the same facts on one line elsewhere."""

from typing import TYPE_CHECKING

from engine.progress.state import STILL_S, AtWork, RunState, StageState
from manifests import units

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_MOST_ROWS = 24
_NAME_CHARACTERS = 28


def line(state: RunState) -> str:
    """Returns one line: time, parts, samples a second, how busy workers are, failures, ETA, cost, each modality's parts."""
    facts = [units.clock(state.t), *_totals(state)]
    if state.at_work:
        busy, queue, _ = _means(list(state.at_work.values()), state.ready)
        facts.insert(3, f"busy {busy}, queue {queue}")
    for name, modality in list(state.modalities.items())[:_MOST_ROWS]:
        facts.append(f"{name} {modality.parts:,}/{modality.total:,}")
    stuck = _stuck(state)
    if stuck:
        facts.append(stuck)
    return "  ".join(facts)


def stage_line(name: str, stage: StageState, t: float) -> str:
    """Returns one line on a stage that counts units."""
    return f"{name:<12} {_stage_facts(stage, t)}"


def table(state: RunState) -> "Group":
    """Shows the stages, the modalities, the workers, and the sums; at least 80 columns wide."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    pieces: list[Table | Text] = []
    # Stages that are over stay until labeling begins.
    shown = {name: one for name, one in state.stages.items() if state.work_began is None or one.done < one.total}
    if shown:
        stages = Table.grid(padding=(0, 1))
        for name, stage in list(shown.items())[-_MOST_ROWS:]:
            bar = ProgressBar(max(stage.total, 1), stage.done, width=24)
            stages.add_row(Text(f"{name:<12}"), bar, Text(_stage_facts(stage, state.t)))
        pieces.append(stages)
    if state.work_began is not None:
        pieces.append(_modality_table(state))
        if state.status is None:
            pieces.append(_worker_table(state))
        pieces.append(Text(units.clock(state.t) + "  " + "  ".join(_totals(state))))
        if state.last_alarm:
            pieces.append(Text(state.last_alarm, style="yellow"))
        if stuck := _stuck(state):
            pieces.append(Text(stuck, style="yellow"))
    return Group(*pieces)


# -- pieces -----------------------------------------------------------------------------------------------------------


def _modality_table(state: RunState) -> "Table":
    table = _headed("modality", "parts", "", "rows/s", "overall", "failed", "ETA")
    for name, modality in list(state.modalities.items())[:_MOST_ROWS]:
        recent, overall = state.rates_of(name)
        eta = state.eta_of(name)
        percent = f"{100 * (modality.parts + modality.lost) // max(modality.total, 1)} %"
        table.add_row(
            _short(name),
            f"{modality.parts:,}/{modality.total:,}",
            percent,
            rate_words(recent),
            rate_words(overall),
            f"{modality.failed:,}" if modality.failed else "",
            "done" if modality.finished else "" if eta is None else units.clock(eta),
        )
    more = len(state.modalities) - _MOST_ROWS
    if more > 0:
        table.add_row(f"{more} more", "", "", "", "", "", "")
    return table


def _worker_table(state: RunState) -> "Table":
    table = _headed("workers", "ready", "busy", "queue", "memory", "oldest item")
    names = list(state.pools) or [""]
    names += sorted({one.pool for one in state.at_work.values()} - set(names))
    for name in names[:_MOST_ROWS]:
        known = state.pools.get(name)
        # A worker whose pool nobody told stands with the first.
        ours = [one for one in state.at_work.values() if one.pool == name]
        ready = state.ready_of(name)
        wanted = known.wanted if known is not None else state.workers
        busy, queue, memory = _means(ours, ready)
        oldest = min(ours, key=lambda one: one.since, default=None)
        since = (
            ""
            if oldest is None
            else f"{_short(oldest.item)} {units.clock(state.t - oldest.since)} {oldest.stage}".rstrip()
        )
        table.add_row(name or "all", f"{ready:,}/{wanted:,}", busy, queue, memory, since)
    return table


def _headed(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for place, column in enumerate(columns):
        left = place == 0 or column == "oldest item"
        table.add_column(column, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    return table


def _totals(state: RunState) -> list[str]:
    done, total = state.parts
    facts = [f"{done:,}/{total:,} parts {100 * done // max(total, 1)} %"]
    rates = [state.rates_of(name) for name in state.modalities]
    recent, overall = sum(one[0] or 0.0 for one in rates), sum(one[1] or 0.0 for one in rates)
    if recent:
        facts.append(f"{rate_words(recent)} rows/s ({rate_words(overall)} overall)")
    elif overall:
        facts.append(f"{rate_words(overall)} rows/s overall")
    eta = state.eta()
    if eta is not None and state.status is None:
        # Of a modality that no worker has come to yet nobody knows how long it takes.
        facts.append(f"ETA {'' if eta[1] else '> '}{units.clock(eta[0])}")
    if state.cost is not None:
        facts.append(f"${state.cost:,.2f}")
    for count, one in (
        (state.failed_rows, "failed row"),
        (state.failed_items, "failed part"),
        (state.strikes, "lost worker"),
        (state.alarms, "alarm"),
    ):
        if count:
            facts.append(f"{count:,} {one}{'s' * (count != 1)}")
    if state.status is not None:
        facts.append(state.status.replace("_", " "))
    return facts


def _means(workers: list[AtWork], ready: int) -> tuple[str, str, str]:
    """Returns busy over all workers that are ready, how full the queues are, and the memory of the largest, in words."""
    if not workers:
        return "", "", ""
    busy = sum(one.busy for one in workers) / max(ready, len(workers))
    queue = sum(one.queue_fill for one in workers) / len(workers)
    return (
        f"{busy:.0%}".replace("%", " %"),
        f"{queue:.0%}".replace("%", " %"),
        units.memory(max(one.rss_bytes for one in workers)),
    )


def _stuck(state: RunState) -> str:
    """Names the worker that has not got on for longest; empty if that is not long."""
    found = min(state.at_work.items(), key=lambda pair: pair[1].moved, default=None)
    if found is None or state.t - found[1].moved < STILL_S:
        return ""
    worker, one = found
    return f"worker {worker} stands at row {one.rows:,} of {one.item} since {units.clock(state.t - one.moved)}"


def _stage_facts(stage: StageState, t: float) -> str:
    facts = [f"{stage.done:,}/{stage.total:,} {stage.unit}", f"{100 * stage.done // max(stage.total, 1)} %"]
    rate = stage.rate.last_minute(t, stage.done)
    if rate and stage.done < stage.total:
        facts += [f"{rate:,.1f}/s", f"ETA {units.clock((stage.total - stage.done) / rate)}"]
    if stage.note:
        facts.append(stage.note)
    return "  ".join(facts)


def rate_words(rate: float | None) -> str:
    """Returns a rate of things a second, with as many digits as it is worth; empty if it is unknown."""
    if rate is None:
        return ""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"…{name[1 - _NAME_CHARACTERS :]}"
