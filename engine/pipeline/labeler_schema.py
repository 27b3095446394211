"""Adds the parameters of labelers to the JSON schema of a pipeline file.

A modality that names its labeler gets that labeler's parameters, one without `labeler` those of the labeler that it has by
default. Unknown parameters are no mistakes of the schema: an editor cannot know what a labeler elsewhere in the file takes.
"""

import inspect
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from labelers import protocol
from labelers.protocol import LabelerParameter
from manifests.errors import ConfigError
from manifests.modality import MODALITIES

_CONFIG = {"$ref": "#/$defs/ModalityConfig"}


def added_to(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a pipeline file, changed in place: with a definition for each labeler, and references to them."""
    definitions = schema["$defs"]
    known: dict[str, dict[str, Any]] = {}
    for name in protocol.names():
        try:
            parameters = protocol.described(protocol.find(name))
        except ConfigError:  # A package that it needs is not installed.
            continue
        known[name] = {"properties": {"parameters": {"$ref": f"#/$defs/parameters of {name}"}}}
        definitions[f"parameters of {name}"] = {
            "type": "object",
            "description": f"parameters of the labeler {name}",
            "properties": {parameter.name: _property(parameter) for parameter in parameters},
        }
    modalities = {
        name: _of_modality(known[modality.labeler])
        for name, modality in MODALITIES.items()
        if modality.labeler in known
    }
    for section in (schema, definitions["CorpusConfig"]):
        for choice in section["properties"]["modalities"]["anyOf"]:
            if choice.get("type") == "object":
                choice["properties"] = modalities
    definitions["ModalityConfig"]["allOf"] = [
        {"if": {"properties": {"labeler": {"const": name}}, "required": ["labeler"]}, "then": then}
        for name, then in known.items()
    ]
    return schema


def _of_modality(then: dict[str, Any]) -> dict[str, Any]:
    by_default = {"if": {"not": {"properties": {"labeler": {"type": "string"}}, "required": ["labeler"]}}, "then": then}
    return {"anyOf": [{"allOf": [_CONFIG, by_default]}, {"type": "null"}]}


def _property(parameter: LabelerParameter) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str):
        try:
            found = TypeAdapter(parameter.annotation).json_schema()
        except PydanticUserError:  # A type that JSON has no word for.
            found = {}
    if parameter.meaning:
        found["description"] = parameter.meaning
    if not parameter.is_required:
        found["default"] = parameter.default
    return found
