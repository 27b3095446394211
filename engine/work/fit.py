"""Does one fit item: labels samples of the corpora, and fits a tokenizer on the labels, which are not kept.

Which rows, for how many steps and from which seed is all in the item, so that the tokenizer is the same bytes after any
crash; checkpoints lie in `runs/fit-<name>-<id12>/` until the tokenizer is committed.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.plan.corpus import CorpusPlan
from engine.plan.items import FitItem, FitRows, Target
from engine.plan.missing import fit_order, is_judged
from engine.work.machine import host, is_tensor
from engine.work.models import ALONE
from engine.work.rows import Outcome
from engine.work.worker import Worker
from manifests.errors import ConfigError
from manifests.formats import shards, sidecars
from manifests.formats.shards import Sample, Status
from manifests.log.actions import TokenizerAdded
from manifests.modality import Modality
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths
from manifests.store.storage import put_same
from tokenize_jobs import protocol

# Raised by hand when a fit's outcome changes: checkpoints of an older one are then not taken up.
FIT_VERSION = 1
_HELD_OUT_AT_LEAST = 32


def fit(item: FitItem, worker: Worker, on_step: Callable[[int, int, Mapping[str, float]], None]) -> TokenizerAdded:
    """Fits the tokenizer and writes its folder; returns the record to be committed.

    `on_step` is told (step, of steps, losses). Raises ConfigError if no row can be fitted on.
    """
    chosen = _chosen(item, worker)
    with tempfile.TemporaryDirectory(prefix="modmill-fit-") as scratch:
        out = Path(scratch) / "tokenizer"
        out.mkdir()
        if item.family == "text":
            rows, metrics = _fit_text(item, chosen, worker, out)
        else:
            rows, metrics = _fit_grid(item, chosen, worker, Path(scratch), on_step)
        digest = protocol.digest(out)
        path = paths.tokenizer(item.name, digest)
        for file in sorted(out.iterdir()):
            data = file.read_bytes()
            put_same(worker.storage, f"{path}/{file.name}", data, sha256_hex(data))
        spec = protocol.load(out, item.modalities[0].name).spec
    fitted = TokenizerAdded(
        name=item.name,
        digest=digest,
        path=path,
        family=item.family,
        family_version=spec.version,
        vocabulary=spec.vocabulary,
        options=dict(item.options),
        rows=rows,
        metrics=metrics,
    )
    worker.storage.put(sidecars.path_of(fitted), sidecars.of_tokenizer(fitted))
    return fitted


@dataclass(frozen=True, kw_only=True)
class FitSamples:
    """Holds samples of one corpus, in the order of their parts; their numbers in the item's `attempt` begin at `first`."""

    plan: CorpusPlan
    samples: list[Sample]
    first: int


# Of each corpus the samples to fit on, and those to judge by.
Chosen = Sequence[tuple[FitSamples, FitSamples]]


def checkpoint_folder(item: FitItem, chosen: Chosen) -> str:
    """Returns the folder of a fit's checkpoints: every other fit has another, so that none resumes from a stranger's."""
    identity: dict[str, Any] = {
        "version": FIT_VERSION,
        "name": item.name,
        "options": dict(item.options),
        "labels": [
            rows.plan.modalities[modality.name].label.fingerprint
            for rows in item.rows
            for modality in item.modalities
            if modality.name in rows.plan.modalities
        ],
        "keys": [
            [shards.keys_digest([sample.key for sample in part.samples]) for part in selection] for selection in chosen
        ],
        "crops": [rows.plan.crops for rows in item.rows],
    }
    if item.attempt.killers:
        identity["left_out"] = sorted(item.attempt.killers)
    return paths.fit(item.name, sha256_hex(canonical_json(identity)))


def _chosen(item: FitItem, worker: Worker) -> Chosen:
    found: list[tuple[FitSamples, FitSamples]] = []
    first = 0
    for rows in item.rows:
        pair = []
        for samples in _choose(rows, worker):
            pair.append(FitSamples(plan=rows.plan, samples=samples, first=first))
            first += len(samples)
        found.append((pair[0], pair[1]))
    return found


def _choose(rows: FitRows, worker: Worker) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples of one corpus to fit on and to judge by, in the order of their parts."""
    fit_samples: list[Sample] = []
    judged: list[Sample] = []
    for part in rows.parts:
        for sample in shards.read_samples(worker.storage.read(part.path)):
            (judged if is_judged(sample.key) else fit_samples).append(sample)
    most_judged = max(_HELD_OUT_AT_LEAST, rows.fit_rows // 10)
    return _first(fit_samples, rows.fit_rows), _first(judged, most_judged)


def _first(samples: list[Sample], most: int) -> list[Sample]:
    wanted = {sample.key for sample in sorted(samples, key=lambda sample: fit_order(sample.key))[:most]}
    return [sample for sample in samples if sample.key in wanted]


def _labels(item: FitItem, chosen: FitSamples, modality: Modality, worker: Worker) -> Iterator[Any]:
    """Yields the labels of a modality that can be made of these samples, in order: every crop's, or every sample's."""
    for found in _outcomes(item, chosen, modality, worker):
        if found.status is Status.OK:
            yield host([found.value])[0] if is_tensor(found.value) else found.value


def _outcomes(item: FitItem, chosen: FitSamples, modality: Modality, worker: Worker) -> Iterator[Outcome]:
    plan = chosen.plan
    targets = [
        Target(modality=modality.name, form="token", fingerprint="", crop=crop)
        for crop in plan.grains(modality.name, "token")
    ]
    known = {"name": item.name, "first": chosen.first, "attempt": item.attempt}
    for batch in worker.labels(plan, chosen.samples, targets, **known):
        for labels in batch:
            for target in targets:
                yield labels.of(target)


def _why_none(item: FitItem, modality: Modality, chosen: Chosen, worker: Worker) -> str:
    """Tells, in brackets, what failed first if nothing came of the samples of a fit; "" if nothing failed."""
    for samples, _ in chosen:
        if modality.name not in samples.plan.modalities:
            continue
        some = replace(samples, samples=samples.samples[: worker.settings.batch])
        for found in _outcomes(item, some, modality, worker):
            if found.failure is not None:
                return (
                    f" (the first failed at {found.failure.stage}, {found.failure.class_name}: {found.failure.message})"
                )
    return ""


def _fit_text(item: FitItem, chosen: Chosen, worker: Worker, out: Path) -> tuple[int, dict[str, float]]:
    with ALONE:
        from tokenize_jobs import text

    options = dict(item.options)
    file = options.pop("file", None)
    if file is not None:
        text.from_file(Path(file), out)
        return 0, {}
    texts: list[str] = []
    for samples, _ in chosen:
        for modality in item.modalities:
            if modality.kind == "text" and modality.name in samples.plan.modalities:
                texts.extend(_labels(item, samples, modality, worker))
    if not texts:
        # A corpus may be without captions, but if it has some, one of them must be readable.
        for modality in item.modalities:
            if modality.kind == "text" and (why := _why_none(item, modality, chosen, worker)):
                raise ConfigError(
                    f"tokenizers.{item.name}: no row has a label of {modality.name} to fit on{why}; mend that"
                )
    return len(texts), text.fit_text(texts, out, options=text.TextOptions(**options))


def _fit_grid(
    item: FitItem,
    chosen: Chosen,
    worker: Worker,
    scratch: Path,
    on_step: Callable[[int, int, Mapping[str, float]], None],
) -> tuple[int, dict[str, float]]:
    with ALONE:
        from train.fit import grid

    modality = item.modalities[0]
    fit_labels = _array(item, [samples for samples, _ in chosen], modality, worker, scratch / "fit.npy")
    judged = _array(item, [samples for _, samples in chosen], modality, worker, scratch / "judged.npy")
    if not len(fit_labels):
        raise ConfigError(
            f"tokenizers.{item.name}: no row of {', '.join(rows.plan.corpus for rows in item.rows)} has a label of "
            f"{modality.name} to fit on{_why_none(item, modality, chosen, worker)}; mend that, or set `tokens: false` for it"
        )
    options = grid.GridOptions(**item.options)
    folder = checkpoint_folder(item, chosen)

    def save(step: int, data: bytes) -> None:
        # One name, replaced whole: a crash leaves the one before.
        worker.storage.replace(paths.fit_checkpoint(folder, step), data)

    metrics = grid.fit_grid(
        fit_labels,
        modality,
        options,
        scratch / "tokenizer",
        judged=judged if len(judged) else fit_labels[: worker.settings.batch],
        threads=worker.settings.threads,
        resume=_newest_checkpoint(worker, folder),
        save=save,
        on_step=lambda step, losses: on_step(step, options.steps, losses),
    )
    return len(fit_labels), {**metrics, "held_out_rows": float(len(judged))}


def _newest_checkpoint(worker: Worker, folder: str) -> tuple[int, bytes] | None:
    found = [paths.FIT_CHECKPOINT.parse(f"{folder}/{name}") for name in worker.storage.names(folder)]
    steps = sorted(fields["step"] for fields in found if fields)
    if not steps:
        return None
    return steps[-1], worker.storage.read(paths.fit_checkpoint(folder, steps[-1]))


def _array(item: FitItem, chosen: Sequence[FitSamples], modality: Modality, worker: Worker, path: Path) -> np.ndarray:
    """Returns labels of these samples as one array on disk, (n, *shape)."""
    most = sum(len(part.samples) * part.plan.crops for part in chosen)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=modality.dtype, shape=(max(most, 1), *modality.shape()))
    count = 0
    for part in chosen:
        for label in _labels(item, part, modality, worker):
            array[count] = label
            count += 1
    return array[:count]
