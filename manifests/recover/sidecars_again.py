"""Writes again the sidecars that are missing or damaged, from the log."""

import contextlib

from manifests.catalog.catalog import Catalog
from manifests.errors import ShardError
from manifests.formats.sidecars import Described, check, of_part, of_shard, of_tokenizer, path_of
from manifests.log.actions import Forgotten
from manifests.queries import audit, retention
from manifests.store.storage import Storage

_BATCH = 1000  # parts whose shards are held at once


def write_missing(catalog: Catalog) -> int:
    """Rewrites missing or damaged sidecars of live files and returns how many. Sidecars that match the log are not touched."""
    storage = catalog.storage
    recipes, corpora = catalog.recipes(), audit.corpora(catalog)
    written = 0
    for tokenizer in catalog.tokenizers():
        written += _write(storage, tokenizer, of_tokenizer(tokenizer))
    forgotten: dict[tuple[str, int], list[Forgotten]] = {}
    for action in retention.forgotten(catalog):
        forgotten.setdefault((action.corpus, action.part), []).append(action)
    for name, corpus in corpora.items():
        parts = catalog.parts(name)
        for part in parts:
            written += _write(storage, part, of_part(part, corpus, forgotten.get((name, part.part), ())))
        for first in range(0, len(parts), _BATCH):
            some = parts[first : first + _BATCH]
            for shard in catalog.live_shards(name, some[0].part, some[-1].part):
                if (recipe := recipes.get(shard.fingerprint)) is not None:
                    written += _write(storage, shard, of_shard(shard, recipe))
    return written


def _write(storage: Storage, described: Described, data: bytes) -> bool:
    with contextlib.suppress(ShardError):
        if check(storage, described):
            return False
    storage.remove(path_of(described))
    return storage.put(path_of(described), data)
