"""Reads whole photographs from where they lie, for an export."""

import io
import tempfile
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from engine.pipeline.sections import CorpusConfig
from engine.sources import listing
from engine.sources.kinds import open_source
from engine.sources.read import SourceReader
from manifests.errors import RowError, SourceError
from manifests.formats.shards import Sample, Status
from manifests.log.actions import CorpusAdded
from manifests.pixels.images import as_plain
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage


class Photographs:
    """Holds the photographs of some rows of a part, as files that any reader decodes alike.

    `statuses` is uint8 (n,), NOT_SELECTED for rows that were not read. `problems` says what is wrong with those that cannot
    be had. The files lie in a temporary file: a part may be larger than the memory.
    """

    def __init__(self, storage: Storage, corpus: CorpusAdded, samples: Sequence[Sample], picked: np.ndarray) -> None:
        self.statuses = np.full(len(samples), Status.NOT_SELECTED, np.uint8)
        self.problems: list[str] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: dict[int, tuple[str, int, int]] = {}
        # Only what says where the bytes lie is needed of the section, which an older modmill may have recorded.
        config = CorpusConfig.model_construct(**corpus.config)
        root = "" if config.url is not None else listing.root_of(corpus.source)
        with closing(open_source(root, config, samples, storage)) as source:
            for row in np.flatnonzero(picked).tolist():
                self.statuses[row] = self._read(source, samples[row], row)

    def __getitem__(self, row: int) -> list[tuple[str, bytes]] | None:
        """Returns the suffix and the bytes of a row's photograph, None if it has none."""
        if row not in self._places:
            return None
        suffix, begin, size = self._places[row]
        self._file.seek(begin)
        return [(suffix, self._file.read(size))]

    def _read(self, source: SourceReader, sample: Sample, row: int) -> Status:
        if sample.is_forgotten:
            return Status.FORGOTTEN
        try:
            data = source.read(row)
            if data is None:
                return Status.ABSENT
            if sha256_hex(data) != (sample.sha256 or b"").hex():
                raise SourceError(f"{sample.source} is not the file that was ingested; put that back")
            suffix, data = as_plain(data)
        except RowError as error:
            self.problems.append(str(error))
            return Status.FAILED
        self._places[row] = suffix, self._file.seek(0, io.SEEK_END), len(data)
        self._file.write(data)
        return Status.OK
