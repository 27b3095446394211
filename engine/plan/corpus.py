"""Decides what becomes of a corpus: its labelers in the order they must run, a recipe for each modality and form, its crops."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.pipeline.config import TEXT_TOKENIZER, CorpusConfig, ModalityConfig, PipelineConfig
from engine.plan import weights
from labelers import protocol as labelers
from manifests import modality as modalities
from manifests.errors import ConfigError
from manifests.log.actions import TokenizerAdded
from manifests.modality import Form, Modality
from manifests.pixels.crops import CropRule
from manifests.pixels.images import CONTAINER_VERSIONS, DECODER_VERSION
from manifests.recipe import Recipe, canonical_json


@dataclass(frozen=True, kw_only=True)
class LabelerUse:
    """Holds a labeler as a corpus uses it: all its parameters, and the modalities wanted of it.

    `weights` is the sha256 digest of the files of its checkpoint, None for a labeler without weights; `model_bytes` is the
    size of those files.
    """

    name: str
    parameters: Mapping[str, Any]
    outputs: tuple[Modality, ...]
    weights: str | None = None
    model_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ModalityPlan:
    """Holds what becomes of one modality. `token` is None if no tokens are wanted, or if their tokenizer is not fitted yet."""

    modality: Modality
    label: Recipe
    token: Recipe | None
    keep: bool
    wants_tokens: bool
    token_format: Literal["parquet", "webdataset"]

    @property
    def tokenizer(self) -> str:
        """Returns the name of the tokenizer in the workspace: one text tokenizer serves every sequence."""
        return TEXT_TOKENIZER if self.modality.tokenizer == "text" else self.modality.name

    def written(self) -> dict[Form, Recipe]:
        """Returns the recipe of each form that is written to shards."""
        forms: dict[Form, Recipe] = {"label": self.label} if self.keep else {}
        if self.token is not None:
            forms["token"] = self.token
        return forms


@dataclass(frozen=True, kw_only=True)
class CorpusPlan:
    """Holds all that a worker needs to know of a corpus. `labelers` are in the order they must run."""

    corpus: str
    root: str
    config: CorpusConfig
    rule: CropRule
    crops: int
    labelers: tuple[LabelerUse, ...]
    modalities: Mapping[str, ModalityPlan]

    def grains(self, name: str, form: Form) -> tuple[int | None, ...]:
        """Returns the crop numbers that a form of a modality has shards for; (None,) if its grain is sample."""
        modality = self.modalities[name].modality
        grain = modality.label_grain if form == "label" else modality.token_grain
        return tuple(range(self.crops)) if grain == "crop" else (None,)

    def uses_for(self, names: Iterable[str]) -> list[LabelerUse]:
        """Returns the labelers that make these modalities, and those whose labels these need, in their order."""
        needed = set(names)
        found: list[LabelerUse] = []
        for use in reversed(self.labelers):
            if any(output.name in needed for output in use.outputs):
                found.append(use)
                needed |= set(labelers.find(use.name).spec.inputs)
        return found[::-1]


def tokenizer_names(config: PipelineConfig) -> set[str]:
    """Returns the names of all tokenizers that a pipeline may need."""
    written = (name for corpus in config.corpora for name in config.modality_options(corpus))
    return {TEXT_TOKENIZER, *(modalities.get(name).name for name in written)}


def corpus_plan(
    config: PipelineConfig,
    corpus: str,
    root: str,
    tokenizers: Mapping[str, TokenizerAdded | None],
    suffixes: Collection[str] = (),
) -> CorpusPlan:
    """Returns the plan of one corpus. Raises ConfigError if labelers do not fit together.

    `suffixes` are those of the names of its samples. Modalities whose tokenizer is not there yet have no token recipe.
    """
    section = config.corpora[corpus]
    rule = CropRule(seed=section.seed, scale=section.crop.scale, ratio=section.crop.ratio, flip=section.crop.flip)
    # Shards and the manifest know a modality by its own name; the pipeline file may name it `my_module:MODALITY`.
    asked = {modalities.get(name).name: (name, options) for name, options in config.modality_options(corpus).items()}
    resolver = _LabelerResolver(corpus, rule, asked, _decoder(section, suffixes))
    for name in asked:
        resolver.add(name)
    return CorpusPlan(
        corpus=corpus,
        root=root,
        config=section,
        rule=rule,
        crops=section.crops if section.has_pixels else 1,
        labelers=tuple(resolver.uses.values()),
        modalities={
            name: _modality_plan(corpus, modalities.get(written), options, resolver.recipes[name], tokenizers, rule)
            for name, (written, options) in asked.items()
        },
    )


class _LabelerResolver:
    """Finds the labeler of each modality and, before it, those of its inputs."""

    def __init__(
        self, corpus: str, rule: CropRule, asked: Mapping[str, tuple[str, ModalityConfig]], decoder: str
    ) -> None:
        self._where = f"corpora.{corpus}.modalities"
        self._decoder = decoder
        self._rule = rule
        self._asked = asked
        self.recipes: dict[str, Recipe] = {}
        # By what tells them apart, in the order they must run.
        self.uses: dict[tuple[str, int | None], LabelerUse] = {}

    def add(self, name: str, wanted_by: tuple[str, ...] = ()) -> None:
        """Adds the modality's labeler and recipe, its inputs' first."""
        if name in self.recipes:
            return
        if name in wanted_by:
            raise ConfigError(f"{self._where}: labelers need each other in a circle: {' → '.join((*wanted_by, name))}")
        written, options = self._asked.get(name, (name, ModalityConfig()))
        modality = modalities.get(written)
        labeler_name = options.labeler or modality.labeler
        labeler = labelers.find(labeler_name)
        given = dict(options.parameters)
        if labeler.spec.outputs is None:
            given = {"modality": written, **given}
        inputs = {needed: self._input(name, labeler.spec, needed, wanted_by) for needed in labeler.spec.inputs}
        told = labelers.parameters(labeler, given)
        digest, model_bytes = None, 0
        if checkpoint := told.get("checkpoint"):
            found = self._weights(name, checkpoint)
            digest, told["checkpoint"], model_bytes = found.digest, found.checkpoint, found.size_bytes
        self.recipes[name] = Recipe(
            modality=name,
            form="label",
            producer=labeler.spec.name,
            version=labeler.spec.version,
            weights=digest,
            # Where the weights lie decides nothing; what they are does.
            parameters={option: value for option, value in told.items() if option != "checkpoint"},
            crop=_crop_document(self._rule, modality) if modality.label_grain == "crop" else None,
            inputs=inputs,
        )
        use = LabelerUse(name=labeler_name, parameters=told, outputs=(), weights=digest, model_bytes=model_bytes)
        # Crops of two sizes are labeled in two passes, by one loaded model.
        key = identity(use), modality.size if labeler.spec.scope == "crop" else None
        use = self.uses.get(key, use)
        self.uses[key] = replace(use, outputs=(*use.outputs, modality))

    def _weights(self, name: str, checkpoint: Any) -> weights.Weights:
        try:
            if not isinstance(checkpoint, str):
                raise ConfigError(f"checkpoint is {checkpoint!r}; expected a path, a URI or a hub id")
            return weights.resolve(checkpoint)
        except ConfigError as error:
            raise ConfigError(f"{self._where}.{name}: {error}; see parameters.checkpoint") from error

    def _input(self, name: str, spec: labelers.LabelerSpec, needed: str, wanted_by: tuple[str, ...]) -> str:
        """Returns the fingerprint of one input."""
        if needed == "image":
            return self._decoder
        if needed in ("columns", "source"):
            return "source"
        self.add(needed, (*wanted_by, name))
        producer = next(use for use in self.uses.values() if any(made.name == needed for made in use.outputs))
        if spec.scope == "image" and labelers.find(producer.name).spec.scope == "crop":
            raise ConfigError(
                f"{self._where}.{name}: labeler {spec.name!r} labels whole photographs and needs {needed}, which "
                f"{producer.name!r} makes of crops only"
            )
        return self.recipes[needed].fingerprint


def suffixes_in(inputs: Iterable[str]) -> frozenset[str]:
    """Returns suffixes that raise what recipes have as their input `image` as these recipes do."""
    texts = list(inputs)
    return frozenset(held[0] for name, _, held in CONTAINER_VERSIONS if any(f"-{name}" in text for text in texts))


def _decoder(section: CorpusConfig, suffixes: Collection[str]) -> str:
    """Returns the fingerprint of photographs as an input: what decides their pixels.

    A container whose decoding changed since version 1 raises the fingerprints of the corpora that hold such files by their
    names, so that a corpus of JPEGs stays current.
    """
    scaled = "" if section.decode_short is None else f"-short{section.decode_short}"
    raised = "".join(
        f"-{name}{version}" for name, version, held in CONTAINER_VERSIONS if not set(held).isdisjoint(suffixes)
    )
    return f"decoder-{DECODER_VERSION}{scaled}{raised}"


def _modality_plan(
    corpus: str,
    modality: Modality,
    options: ModalityConfig,
    label: Recipe,
    tokenizers: Mapping[str, TokenizerAdded | None],
    rule: CropRule,
) -> ModalityPlan:
    if options.tokens is True and not modality.tokenizer:
        raise ConfigError(
            f"corpora.{corpus}.modalities.{modality.name}.tokens: no tokenizer family encodes {modality.name} yet"
        )
    plan = ModalityPlan(
        modality=modality,
        label=label,
        token=None,
        keep=modality.keep if options.keep is None else options.keep,
        wants_tokens=bool(modality.tokenizer) and options.tokens is not False,
        token_format=options.format or "parquet",
    )
    tokenizer = tokenizers.get(plan.tokenizer)
    if not plan.wants_tokens or tokenizer is None:
        return plan
    return replace(plan, token=_token_recipe(plan, tokenizer, rule))


def _crop_document(rule: CropRule, modality: Modality) -> dict[str, Any]:
    size = {"size": modality.size} if "h" in modality.axes.split() else {}
    return {**rule.document(), **size}


def _token_recipe(plan: ModalityPlan, tokenizer: TokenizerAdded, rule: CropRule) -> Recipe:
    return Recipe(
        modality=plan.modality.name,
        form="token",
        producer=tokenizer.family,
        version=tokenizer.family_version,
        weights=tokenizer.digest,
        parameters={"tokenizer": tokenizer.name},
        crop=_crop_document(rule, plan.modality) if plan.modality.token_grain == "crop" else None,
        inputs={plan.modality.name: plan.label.fingerprint},
    )


def identity(use: LabelerUse) -> str:
    """Returns what tells two loaded labelers apart: name, weights, and parameters but for where the weights lie."""
    given = {name: value for name, value in use.parameters.items() if use.weights is None or name != "checkpoint"}
    return f"labeler {use.name} {(use.weights or '')[:12]} {canonical_json(given).decode()}"


def identity_of_tokenizer(known: TokenizerAdded, modality: str) -> str:
    """Returns what tells two loaded tokenizers apart."""
    return f"tokenizer {known.digest[:12]} {modality}"
