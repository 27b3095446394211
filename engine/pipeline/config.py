"""Defines the pipeline file, and reads it.

    workspace: ../photos-workspace
    corpora:
      photos:
        source: ~/Pictures
        modalities: [rgb, edges, caption]

`load` reads a file, `PipelineConfig` is what it holds, `schema` describes it to editors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from engine.pipeline import file
from engine.pipeline.sections import (
    KIND_DEFAULTS,
    CorpusConfig,
    CorpusName,
    CropConfig,
    EngineConfig,
    FetchConfig,
    FilterConfig,
    GridFit,
    Modalities,
    ModalityConfig,
    PoolConfig,
    Section,
    SnapshotConfig,
    SnapshotName,
    TextFit,
)
from manifests import mistakes
from manifests import modality as modalities
from manifests.errors import ConfigError, nearest
from manifests.mistakes import KeyPath
from manifests.store import uris

TEXT_TOKENIZER = "text"


class PipelineConfig(Section):
    """Holds a whole pipeline file."""

    workspace: str = Field(min_length=1, description="where everything is written: a folder or an fsspec URI")
    corpora: dict[CorpusName, CorpusConfig] = Field(
        min_length=1, description="the corpora by name: 1 to 64 of a-z, 0-9 and _"
    )
    modalities: Modalities = Field(
        default_factory=dict, description="options of modalities in every corpus; a corpus's own go before them"
    )
    tokenizers: dict[str, GridFit | TextFit] = Field(
        default_factory=dict,
        description="how tokenizers are fitted: `text` for all sequences, a modality's name for its own",
    )
    fit_rows: int = Field(default=2000, ge=1, description="samples that tokenizers are fitted on")
    snapshots: dict[SnapshotName, SnapshotConfig] = Field(
        default_factory=dict,
        description="selections frozen for training when all is tokenized, by name: 1 to 64 of A-Z a-z 0-9 . _ -",
    )
    train: str | None = Field(
        default=None,
        min_length=1,
        description="a trainer file: what `modmill train` does with it, when all else is done",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="how the work is run")

    @field_validator("tokenizers", mode="before")
    @classmethod
    def _fits_by_name(cls, value: Any) -> Any:
        # The name decides the model; a union would report every mistake once for each of its members.
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return value
        problems: list[Any] = []
        fits = {}
        for name, options in value.items():
            model = TextFit if name == TEXT_TOKENIZER else GridFit
            try:
                fits[name] = model.model_validate({} if options is None else options)
            except ValidationError as error:
                problems += [{**line, "loc": (name, *line["loc"])} for line in error.errors(include_url=False)]
        if problems:
            raise ValidationError.from_exception_data("tokenizers", problems)
        return fits

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        problems = [*self._unused_modalities(), *self._unfit_tokenizers(), *self._workspace_in_source()]
        problems += self._unknown_in_snapshots()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _unused_modalities(self) -> list[str]:
        made = {name for corpus in self.corpora.values() for name in corpus.modalities}
        return [
            f"modalities.{name} has options, but no corpus makes {name}; {nearest(name, made)}; to make it, add it to "
            f"corpora.{next(iter(self.corpora))}.modalities"
            for name in self.modalities
            if name not in made
        ]

    def _unfit_tokenizers(self) -> list[str]:
        problems = []
        for name, fit in self.tokenizers.items():
            if not isinstance(fit, GridFit):
                continue
            try:
                modality = modalities.get(name)
            except ConfigError as error:
                problems.append(f"tokenizers.{name}: {error}")
                continue
            if modality.tokenizer != "grid":
                known = "shares the tokenizer `text`" if modality.tokenizer == "text" else "has no tokenizer"
                problems.append(f"tokenizers.{name}: {name} {known}; only image-like modalities have one of their own")
            elif fit.patch is not None and "h" in modality.axes and (side := modality.shape()[0]) % fit.patch:
                problems.append(
                    f"tokenizers.{name}.patch is {fit.patch}, which does not divide the size of {name}, {side}"
                )
        return problems

    def _unknown_in_snapshots(self) -> list[str]:
        # A workspace may hold more than this file makes; what no corpus could have is a mistake before the work is done.
        known = {modalities.get(name).name for corpus in self.corpora.values() for name in corpus.modalities}
        problems = []
        for snapshot, section in self.snapshots.items():
            for written in section.modalities or ():
                name = written.partition("=")[0].strip()
                try:
                    _ = name in known or modalities.get(name)
                except ConfigError as error:
                    problems.append(f"snapshots.{snapshot}.modalities: {error}")
        return problems

    def _workspace_in_source(self) -> list[str]:
        # Shards are Parquet files: a text corpus would take them for documents on the next run.
        return [
            f"workspace {self.workspace} lies inside corpora.{name}.source; put it beside that folder"
            for name, corpus in self.corpora.items()
            if not corpus.has_pixels and Path(self.workspace).is_relative_to(corpus.source)
        ]

    def modality_options(self, corpus: str) -> dict[str, ModalityConfig]:
        """Returns the options of each modality of a corpus: its own over those for every corpus.

        Parameters are merged one by one, unless the corpus names another labeler, which has others.
        """
        resolved = {}
        for name, own in self.corpora[corpus].modalities.items():
            shared = self.modalities.get(name, ModalityConfig())
            same_labeler = own.labeler in (None, shared.labeler)
            parameters = {**(shared.parameters if same_labeler else {}), **own.parameters}
            given = {field: value for field, value in own.model_dump().items() if value is not None}
            resolved[name] = shared.model_copy(update={**given, "parameters": parameters})
        return resolved

    def fit_options(self, tokenizer: str, kind: str = "image") -> dict[str, Any]:
        """Returns how a tokenizer (`text`, or a modality's own name) is fitted; what is left to its defaults is left out.

        `kind` is the modality's: a token of a feature map is a cell, and no labeler makes a mirrored map.
        """
        if tokenizer == TEXT_TOKENIZER:
            return self.tokenizers.get(tokenizer, TextFit()).model_dump(exclude_none=True)
        written = {modalities.get(name).name: name for name in self.tokenizers if name != TEXT_TOKENIZER}
        fit = self.tokenizers.get(written.get(tokenizer, tokenizer), GridFit())
        defaults = {"patch": 1, "mirror": False} if kind == "feature_map" else {"patch": 16}
        return {**defaults, **fit.model_dump(exclude_none=True)}


# The model of each section, to name the nearest option for an unknown one; `*` is any name.
_SECTIONS: dict[KeyPath, type[BaseModel]] = {
    (): PipelineConfig,
    ("engine",): EngineConfig,
    ("engine", "pools", "*"): PoolConfig,
    ("corpora", "*"): CorpusConfig,
    ("corpora", "*", "crop"): CropConfig,
    ("corpora", "*", "fetch"): FetchConfig,
    ("corpora", "*", "filter"): FilterConfig,
    ("corpora", "*", "modalities", "*"): ModalityConfig,
    ("modalities", "*"): ModalityConfig,
    ("tokenizers", "text"): TextFit,
    ("tokenizers", "*"): GridFit,
    ("snapshots", "*"): SnapshotConfig,
}


def load(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Reads the pipeline in a file, with `--set` overrides ("corpora.photos.crops=4") applied in their order.

    Relative paths in the file start at the file's folder, those in overrides at the current one; the value of an
    override is YAML, but for paths, which are taken as typed. Raises ConfigError that names every mistake, a line each.
    """
    document = file.read(path)
    parsed = [file.parse_override(text) for text in overrides]
    tree = document.tree
    for override in parsed:
        value = file.override_value(override, Path.cwd())
        tree = file.with_override(_spelled_out(tree, override.path), override, value)
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        found = mistakes.explain(error.errors(include_url=False), _SECTIONS, lambda at: document.where(at, parsed))
        raise ConfigError("\n".join(found)) from None


def _spelled_out(tree: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """Returns the tree with a corpus's default modalities written out if an override sets an option of one of them."""
    corpora = tree.get("corpora")
    if path[:1] != ("corpora",) or path[2:3] != ("modalities",) or len(path) == 3 or not isinstance(corpora, dict):
        return tree
    corpus = corpora.get(path[1])
    if not isinstance(corpus, dict) or "modalities" in corpus:
        return tree
    kind = KIND_DEFAULTS.get(str(corpus.get("kind", "image")))
    names = list(kind.modalities if kind else ())
    return {**tree, "corpora": {**corpora, path[1]: {**corpus, "modalities": names}}}


def check_labelers(config: PipelineConfig) -> None:
    """Checks that every modality has a labeler that makes it, with parameters that it takes; imports their modules.

    Raises ConfigError that names every mistake, a line each.
    """
    problems = []
    for corpus in config.corpora:
        for name, options in config.modality_options(corpus).items():
            try:
                _check_labeler(config.corpora[corpus], name, options)
            except ConfigError as error:
                problems.append(f"corpora.{corpus}.modalities.{name}: {error}")
    problems += _unknown_in_pools(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown_in_pools(config: PipelineConfig) -> list[str]:
    from labelers import protocol

    problems = []
    for pool, options in config.engine.pools.items():
        for name in options.labelers:
            try:
                protocol.find(name)
            except ConfigError as error:
                problems.append(f"engine.pools.{pool}.labelers: {error}")
    return problems


def _check_labeler(corpus: CorpusConfig, name: str, options: ModalityConfig) -> None:
    from labelers import protocol

    modality = modalities.get(name)
    if not (options.labeler or modality.labeler):
        raise ConfigError("the modality has no labeler of its own; name one with `labeler:`")
    labeler = protocol.find(options.labeler or modality.labeler)
    spec = labeler.spec
    if spec.outputs is not None and modality.base_name not in spec.outputs:
        raise ConfigError(f"labeler {spec.name!r} makes {', '.join(spec.outputs)}; name another with `labeler:`")
    if not corpus.has_pixels and not {"image", "source"}.isdisjoint(spec.inputs):
        raise ConfigError(f"labeler {spec.name!r} needs an image, but this is a corpus of kind {corpus.kind}")
    given = {"modality": name} if spec.outputs is None else {}
    protocol.parameters(labeler, {**given, **options.parameters})


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a pipeline file, for editors, with the parameters of every labeler that is installed."""
    from engine.pipeline import labeler_schema

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **PipelineConfig.model_json_schema()}
    return labeler_schema.added_to(schema)


def document(config: PipelineConfig | CorpusConfig) -> dict[str, Any]:
    """Returns a pipeline, or one corpus of it, as plain JSON values: defaults spelled out, no credentials in URIs."""
    return _scrubbed(config.model_dump(mode="json"))


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _scrubbed(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_scrubbed(below) for below in value]
    return uris.without_credentials(value) if isinstance(value, str) else value
