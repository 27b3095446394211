"""Chooses the tokens that a snapshot takes: the recipe of each modality in each corpus, and the facts of the modality."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests import modality as modality_table
from manifests.errors import ConfigError, LogError, ShardError, nearest
from manifests.modality import Modality

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog


def choose(catalog: "Catalog", asked: Sequence[str] | None, corpora: Collection[str]) -> list[dict[str, Any]]:
    """Returns the recipes of tokens of some corpora, at most one a corpus and modality, as rows of `Catalog.token_recipes`.

    `asked` are names of modalities, for their current recipes, or `name=DIGITS`, for those that begin so: then a corpus
    without such a recipe is without the modality. None is all current ones. Raises ConfigError for what is not there.
    """
    known = [recipe for recipe in catalog.token_recipes() if recipe["corpus"] in corpora]
    if asked is None:
        chosen = [recipe for recipe in known if recipe["is_current"]]
        if not chosen:
            raise ConfigError(f"no token shards of {', '.join(corpora)} yet; `modmill run FILE` makes them")
        return chosen
    if not asked:
        raise ConfigError("no modalities are named; leave them out for all that have tokens")
    chosen = []
    for modality, prefixes in named(asked).items():
        recipes = [recipe for recipe in known if recipe["modality"] == modality]
        if not recipes:
            raise ConfigError(_no_tokens(catalog, modality, known, corpora))
        if prefixes == [None]:
            current = [recipe for recipe in recipes if recipe["is_current"]]
            if not current:
                raise ConfigError(f"{modality} has no current token shards yet; {_choices(modality, recipes)}")
            chosen += current
            continue
        fingerprints = {_by_prefix(modality, str(prefix), recipes) for prefix in prefixes}
        chosen += [recipe for recipe in recipes if recipe["fingerprint"] in fingerprints]
    seen: set[tuple[str, str]] = set()
    for recipe in chosen:
        if (recipe["corpus"], recipe["modality"]) in seen:
            raise ConfigError(
                f"two recipes of {recipe['modality']} are named, and {recipe['corpus']} has both; name one"
            )
        seen.add((recipe["corpus"], recipe["modality"]))
    return chosen


def named(asked: Sequence[str]) -> dict[str, list[str | None]]:
    """Returns modalities with the prefixes of recipes that stand after them, [None] for the current recipe.

    Raises ConfigError if a modality is named twice, or without digits after `=`.
    """
    found: dict[str, list[str | None]] = {}
    for text in asked:
        written, equals, prefix = text.strip().partition("=")
        modality = modality_name(written)
        if equals and not prefix:
            raise ConfigError(f"modality {text!r}: expected the first digits of a recipe after =, or no =")
        prefixes = found.setdefault(modality, [])
        prefixes.append(prefix if equals else None)
        if len(prefixes) > 1 and None in prefixes:
            raise ConfigError(f"modality {modality!r} is named twice; keep one, or name a recipe each time")
    return found


def modality_name(written: str) -> str:
    """Returns the name by which the manifest knows a modality, which may be written `my_module:MODALITY`."""
    return modality_table.get(written).name if ":" in written else written


def _by_prefix(modality: str, prefix: str, recipes: Sequence[Mapping[str, Any]]) -> str:
    found = sorted({recipe["fingerprint"] for recipe in recipes if recipe["fingerprint"].startswith(prefix.lower())})
    if len(found) != 1:
        problem = f"{len(found)} recipes begin so" if found else "no recipe with token shards begins so"
        raise ConfigError(f"{modality}={prefix}: {problem}; {_choices(modality, recipes)}")
    return found[0]


def _choices(modality: str, recipes: Sequence[Mapping[str, Any]]) -> str:
    listed = sorted({(recipe["fingerprint"][:16], recipe["corpus"], recipe["is_current"]) for recipe in recipes})
    there = ", ".join(f"{digits} in {corpus}{' (current)' * is_current}" for digits, corpus, is_current in listed)
    return f"recipes of {modality} with token shards: {there}"


def _no_tokens(catalog: "Catalog", modality: str, known: Sequence[Mapping[str, Any]], corpora: Collection[str]) -> str:
    names = {recipe["modality"] for recipe in known}
    picked = ", ".join(corpora)
    elsewhere = sorted({recipe["corpus"] for recipe in catalog.token_recipes() if recipe["modality"] == modality})
    if elsewhere:
        return f"modality {modality!r} has token shards in {', '.join(elsewhere)}, but rows are picked of {picked} only"
    labels = {row["modality"] for row in catalog.coverage() if row["form"] == "label"}
    if modality in labels:
        there = ", ".join(sorted(names)) or "none"
        return f"modality {modality!r} is kept as labels only, without tokens; with token shards in {picked}: {there}"
    return f"no modality {modality!r} has token shards in {picked}; {nearest(modality, names)}"


def modalities(
    catalog: "Catalog", recipes: Sequence[Mapping[str, Any]], shards: pa.Table, *, is_asked: bool
) -> list[dict[str, Any]]:
    """Returns the modalities that any of the shards is of, by name, as rows of a snapshot's table of them.

    Raises ConfigError if one has several tokenizers, or was asked for and has no shard.
    """
    pairs = shards.group_by(["corpus", "modality"]).aggregate([]).to_pylist()
    there = {(pair["corpus"], pair["modality"]) for pair in pairs}
    used: dict[str, list[Mapping[str, Any]]] = {}
    for recipe in sorted(recipes, key=lambda recipe: (recipe["modality"], recipe["corpus"])):
        of_modality = used.setdefault(recipe["modality"], [])
        if (recipe["corpus"], recipe["modality"]) in there:
            of_modality.append(recipe)
    own = declared(catalog)
    records = []
    for name, of_modality in used.items():
        if of_modality:
            modality = own.get(name) or modality_table.get(name)
            records.append(_modality(modality, of_modality, shards))
        elif is_asked:
            raise ConfigError(f"modality {name!r} has no token shards of the parts that are picked; leave it out")
    return records


def _modality(modality: Modality, recipes: Sequence[Mapping[str, Any]], shards: pa.Table) -> dict[str, Any]:
    first = recipes[0]
    if first["tokenizer"] is None:
        raise LogError(
            f"the recipe {first['fingerprint'][:12]} of {modality.name} has a tokenizer that is missing in the log"
        )
    for other in recipes[1:]:
        if (other["digest"], other["vocabulary"]) != (first["digest"], first["vocabulary"]):
            raise ConfigError(
                f"{modality.name} has one tokenizer in {first['corpus']} (recipe {first['fingerprint'][:12]}) and another "
                f"in {other['corpus']} (recipe {other['fingerprint'][:12]}), a snapshot needs one; tokenize both with one "
                f"tokenizer, pick one corpus by a condition, or name recipes as {modality.name}=DIGITS"
            )
    tokens = modality.tokens
    if modality.kind not in ("structured", "text"):
        tokens = _tokens_a_row(modality, shards.filter(pc.field("modality") == modality.name))
    return {
        "modality": modality.name,
        "kind": modality.kind,
        "grain": modality.token_grain,
        "vocabulary": first["vocabulary"],
        "tokens": tokens,
        "tokenizer": first["tokenizer"],
        "tokenizer_family": first["family"],
        "tokenizer_digest": first["digest"],
        "tokenizer_path": first["path"],
    }


def _tokens_a_row(modality: Modality, shards: pa.Table) -> int | None:
    """Returns how many tokens each row has, by the records; the table of modalities says it if no row is ok."""
    with_tokens = shards.filter(pc.field("ok") > 0)
    if not with_tokens.num_rows:
        return modality.tokens
    each = with_tokens["tokens"].to_numpy() / with_tokens["ok"].to_numpy()
    if each.min() != each.max() or each[0] != int(each[0]):
        raise ShardError(
            f"rows of {modality.name} have {each.min():g} to {each.max():g} tokens by the log, expected one length; see "
            "`modmill verify`"
        )
    return int(each[0])


def declared(catalog: "Catalog") -> dict[str, Modality]:
    """Returns the modalities that pipeline files declared (`my_module:MODALITY`), by their own names."""
    configs = [json.loads(corpus["config"]) for corpus in catalog.corpora()]
    written = {name for config in configs for name in config.get("modalities", {}) if ":" in name}
    return {modality.name: modality for modality in map(modality_table.get, sorted(written))}
