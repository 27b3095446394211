"""Writes and reads sidecars: they hold beside each file what the log says of it, so that a lost log can be rebuilt.

    data/.../part-0000000.c00-<sha8>.json         {"format": 1, "shard": {...}, "recipe": {...}}
    data/<corpus>/_samples/part-0000000-<sha8>.json
                                                  {"format": 1, "part": {...}, "corpus": {...}, "forgotten": [{...}, ...]}
    tokenizers/<name>-<digest12>.json             {"format": 1, "tokenizer": {...}}

The objects hold the fields of `ShardAdded`, `PartAdded`, `CorpusAdded`, `Forgotten` and `TokenizerAdded`, `recipe` what its
fingerprint is the hash of. A sidecar is written after its file and before the commit; `manifests/recover` reads them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from manifests.errors import LogError, ShardError
from manifests.log import actions
from manifests.log.actions import CorpusAdded, Forgotten, PartAdded, ShardAdded, TokenizerAdded
from manifests.recipe import canonical_json
from manifests.store import paths
from manifests.store.storage import Storage

FORMAT = 1
Described = PartAdded | ShardAdded | TokenizerAdded
# If two workers make the same bytes, they may differ in these; the sidecar of the first stays.
_INCIDENTAL = {"device", "micro_batch", "metrics"}


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Holds a sidecar as read: `of` is the record of its file; only shards have a `recipe`, only parts the other two."""

    of: Described
    recipe: Mapping[str, Any] | None = None
    corpus: CorpusAdded | None = None
    forgotten: tuple[Forgotten, ...] = ()


def path_of(described: Described) -> str:
    """Returns the path of the sidecar of a file, or of a tokenizer's folder."""
    return paths.sidecar(described.path)


def of_shard(shard: ShardAdded, recipe: Mapping[str, Any]) -> bytes:
    """Writes the sidecar of a shard; `recipe` is the document of the recipe that made it."""
    return canonical_json({"format": FORMAT, "shard": asdict(shard), "recipe": dict(recipe)})


def of_part(part: PartAdded, corpus: CorpusAdded, forgotten: Sequence[Forgotten] = ()) -> bytes:
    """Writes the sidecar of a part's samples file; `forgotten` is everything that was ever forgotten of it."""
    document = {"format": FORMAT, "part": asdict(part), "corpus": asdict(corpus)}
    return canonical_json(document | ({"forgotten": [asdict(each) for each in forgotten]} if forgotten else {}))


def of_tokenizer(tokenizer: TokenizerAdded) -> bytes:
    """Writes the sidecar of a tokenizer's folder."""
    return canonical_json({"format": FORMAT, "tokenizer": asdict(tokenizer)})


def read(storage: Storage, path: str) -> Sidecar:
    """Reads the sidecar at a path. Raises FileNotFoundError, and ShardError if it is damaged or of a newer format."""
    data = storage.read(path)
    try:
        document = json.loads(data)
        if document["format"] > FORMAT:
            raise ShardError(
                f"the sidecar has format {document['format']}, this modmill reads up to {FORMAT}; install a newer one"
            )
        kind = next(kind for kind in (ShardAdded, PartAdded, TokenizerAdded) if kind.action in document)
        corpus = document.get("corpus")
        return Sidecar(
            of=cast(Described, _action(kind, document[kind.action])),
            recipe=document.get("recipe"),
            corpus=None if corpus is None else cast(CorpusAdded, _action(CorpusAdded, corpus)),
            forgotten=tuple(cast(Forgotten, _action(Forgotten, each)) for each in document.get("forgotten", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, LogError) as error:
        raise ShardError(
            f"the sidecar cannot be read ({type(error).__name__}: {error}); it is cut or altered"
        ) from error


def check(storage: Storage, described: Described) -> bool:
    """Tells whether a file has a sidecar. Raises ShardError if that is damaged, or differs from the log."""
    try:
        wrong = differences(read(storage, path_of(described)).of, described)
    except FileNotFoundError:
        return False
    if wrong:
        raise ShardError(f"the sidecar says another {wrong[0]} than the log")
    return True


def differences(said: Described, logged: Described) -> list[str]:
    """Returns the fields in which a sidecar differs from the log, except those that may differ between equal bytes."""
    one, other = _plain(said), _plain(logged)
    if type(said) is not type(logged):
        return ["kind"]
    return [name for name in one if name not in _INCIDENTAL and one[name] != other[name]]


def _plain(described: Described) -> dict[str, Any]:
    return json.loads(canonical_json(asdict(described)))


def _action(kind: type[actions.Action], fields: Mapping[str, Any]) -> actions.Action:
    found = actions.from_json({**fields, "action": kind.action})
    if found is None:
        raise ValueError(f"no {kind.action}")
    actions.check_paths(kind, vars(found), where=f"its {kind.action}")
    return found
