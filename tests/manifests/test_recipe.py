"""Fingerprints: the rule by which shards are found may never change."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.recipe import Recipe, canonical_json, sha256_hex

RECIPE = Recipe(
    modality="depth",
    form="token",
    producer="grid",
    version=3,
    weights="5e" * 32,
    parameters={"size": 224, "scale": 0.1, "name": "über", "flags": [True, None], "nested": {"b": 1, "a": 1e-7}},
    crop={"seed": 7, "scale": [0.2, 1.0], "ratio": [0.75, 4 / 3], "flip": True},
    inputs={"depth": "a1" * 32},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=8,
)


def reordered(value: Any) -> Any:
    """The same value with the keys of all objects in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(below) for below in value] if isinstance(value, list) else value


def test_the_rule_of_the_fingerprint_never_changes() -> None:
    # Where this fails the code is wrong, not these lines: every workspace's shards would be orphans.
    assert canonical_json(RECIPE.document()).decode() == (
        '{"crop":{"flip":true,"ratio":[0.75,1.3333333333333333],"scale":[0.2,1.0],"seed":7},"form":"token",'
        '"inputs":{"depth":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1"},"modality":"depth",'
        '"parameters":{"flags":[true,null],"name":"über","nested":{"a":1e-07,"b":1},"scale":0.1,"size":224},'
        '"producer":"grid","version":3,"weights":"5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e"}'
    )
    assert RECIPE.fingerprint == "98c60c7605eb3b015d28deed02f018f57255b0f96ca045d7fd814be390a64b4e"
    plain = Recipe(modality="caption", form="label", producer="caption", version=1)
    assert plain.fingerprint == "61343267b67ec4552e5d13ed29d32fce6e51667f0d29ec9bda8bbe09154a2d46"


def test_the_order_of_keys_does_not_matter() -> None:
    other = replace(
        RECIPE,
        parameters=reordered(dict(RECIPE.parameters)),
        crop=reordered(dict(RECIPE.crop or {})),
        inputs=reordered(dict(RECIPE.inputs)),
    )
    assert list(other.parameters) != list(RECIPE.parameters)
    assert other.fingerprint == RECIPE.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"modality": "normals"},
        {"form": "label"},
        {"producer": "grid2"},
        {"version": 4},
        {"weights": "5f" * 32},
        {"weights": None},
        {"parameters": {**RECIPE.parameters, "size": 448}},
        {"parameters": {**RECIPE.parameters, "size": 224.0}},
        {"parameters": {**RECIPE.parameters, "size": "224"}},
        {"parameters": {**RECIPE.parameters, "new": None}},
        {"parameters": {}},
        {"crop": None},
        {"crop": {**(RECIPE.crop or {}), "seed": 8}},
        {"crop": {**(RECIPE.crop or {}), "scale": [1.0, 0.2]}},
        {"inputs": {"depth": "a2" * 32}},
        {"inputs": {"normals": "a1" * 32}},
        {"inputs": {}},
    ],
    ids=str,
)
def test_every_field_matters(change: dict[str, Any]) -> None:
    assert replace(RECIPE, **change).fingerprint != RECIPE.fingerprint


def test_a_fingerprint_is_64_hex_digits() -> None:
    assert len(RECIPE.fingerprint) == 64
    assert set(RECIPE.fingerprint) <= set("0123456789abcdef")


@given(parameters=st.dictionaries(st.text(), JSON, max_size=4))
def test_a_recipe_survives_the_log(parameters: dict[str, Any]) -> None:
    recipe = Recipe(modality="rgb", form="label", producer="rgb", version=1, parameters=parameters)
    found = Recipe(**json.loads(canonical_json(recipe.document())))
    assert found.fingerprint == recipe.fingerprint
    assert sha256_hex(canonical_json(reordered(recipe.document()))) == recipe.fingerprint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        _ = replace(RECIPE, parameters={"threshold": value}).fingerprint


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        _ = replace(RECIPE, parameters={"device": object()}).fingerprint


@given(value=JSON)
def test_canonical_json_is_one_spelling(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert canonical_json(reordered(value)) == text
