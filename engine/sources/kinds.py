"""Names the kinds of corpora: how the samples of each are listed and read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.pipeline.sections import CorpusConfig
from engine.sources.documents import DocumentReader, scan_documents
from engine.sources.images import scan_images
from engine.sources.listing import Listing, Notes, Scanned
from engine.sources.read import SourceBytes, SourceReader
from manifests.formats.shards import SourcePlace
from manifests.store.storage import Storage


@dataclass(frozen=True, kw_only=True)
class CorpusKind:
    """Holds the functions of a kind: `scan` lists the samples of a source, `reader` reads those of some rows."""

    scan: Callable[[CorpusConfig, Listing, Notes], Scanned]
    reader: Callable[..., SourceReader]


# What a pipeline file may say of a kind is in engine/pipeline/sections.py.
KINDS = {
    "image": CorpusKind(scan=scan_images, reader=SourceBytes),
    "text": CorpusKind(scan=scan_documents, reader=DocumentReader),
}


def open_source(
    root: str,
    config: CorpusConfig,
    rows: Sequence[SourcePlace],
    storage: Storage | None = None,
    *,
    beside: Sequence[Sequence[tuple[str, int, int]]] = (),
) -> SourceReader:
    """Opens the samples of some rows of a samples file by their place; to be closed.

    `storage` is the workspace, for rows that were packed into it. `beside` are the suffix, offset and size of members
    beside each row, which are read with it.
    """
    return KINDS[config.kind].reader(root, config, rows, storage, beside=beside)
