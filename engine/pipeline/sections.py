"""Defines the sections of a pipeline file: a corpus, its crops and modalities, fits of tokenizers, snapshots, the engine.

Descriptions are shown in messages and by editors. `engine/pipeline/config.py` puts the sections together.
"""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from manifests import modality as modalities
from manifests.errors import ConfigError
from manifests.formats.snapshots import HOLD_OUT
from manifests.recipe import canonical_json


class KindDefaults(NamedTuple):
    """Holds what a kind of corpus has by default, and whether of pixels; engine/sources/kinds.py reads its samples."""

    modalities: tuple[str, ...]
    has_pixels: bool


KIND_DEFAULTS = {
    "image": KindDefaults(modalities=("rgb", "edges", "boxes", "metadata", "palette", "caption"), has_pixels=True),
    "text": KindDefaults(modalities=("text",), has_pixels=False),
}


def _known_modality(name: str) -> str:
    try:
        modalities.get(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"holds what is no JSON value: {error}; write it in quotes") from error
    return value


def _increasing(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"is {list(value)}; expected [least, most] with 0 < least <= most")
    return value


def _as_mapping(value: Any) -> Any:
    """Turns a list of modalities into a mapping of them without options."""
    if isinstance(value, list | tuple):
        twice = next((name for name in value if value.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice!r} twice; keep one")
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"is {list(value)!r}; expected names of modalities, options are written as a mapping")
        return {name: {} for name in value}
    if isinstance(value, dict):
        return {name: {} if options is None else options for name, options in value.items()}
    return value


ModalityName = Annotated[str, AfterValidator(_known_modality)]
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
CorpusName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
PlainJson = Annotated[dict[str, Any], AfterValidator(_plain_json)]
Positive = Annotated[int, Field(ge=1)]
# As many workers, or rows at once, as anyone has; as many threads as a machine has.
Many = Annotated[int, Field(ge=1, le=65_536)]
Threads = Annotated[int, Field(ge=1, le=1024)]
DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]+)?)$"
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_increasing)]


class Section(BaseModel):
    """Takes strict types, so that `crops: "3"` and `keep: 1` are mistakes and not guesses."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModalityConfig(Section):
    """Says how one modality is made and kept."""

    labeler: Text | None = Field(
        default=None, description="the labeler: a file of labelers/, or my_module:MyLabeler; default: the modality's"
    )
    parameters: PlainJson = Field(default_factory=dict, description="the labeler's parameters")
    keep: bool | None = Field(
        default=None, description="whether labels are stored; default: structured ones are, pixels are not"
    )
    format: Literal["parquet", "webdataset"] | None = Field(
        default=None, description="the file format of tokens: parquet (default) or webdataset"
    )
    tokens: bool | None = Field(
        default=None, description="whether tokens are made; default: if the modality has a tokenizer"
    )


Modalities = Annotated[
    dict[ModalityName, ModalityConfig],
    BeforeValidator(_as_mapping, json_schema_input_type=list[ModalityName] | dict[ModalityName, ModalityConfig | None]),
]


class CropConfig(Section):
    """Says how crops after the first are drawn; the first is the center."""

    scale: Range = Field(default=(0.8, 1.0), description="share of the photograph's area: [least, most], up to 1")
    ratio: Range = Field(default=(0.75, 1.3333333333333333), description="width / height of the crop: [least, most]")
    flip: float = Field(default=0.5, ge=0, le=1, description="chance of a mirrored crop, 0 to 1")

    @field_validator("scale")
    @classmethod
    def _within_photograph(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError(f"is {list(value)}; a crop has at most the whole area of the photograph, 1")
        return value


class FetchConfig(Section):
    """Says how images of a list of URLs are fetched. Their servers are other people's: the defaults ask little of each."""

    parallel: Threads = Field(default=32, description="URLs fetched at once")
    per_host: int = Field(default=4, ge=1, le=256, description="URLs fetched at once from one host")
    tries: int = Field(default=3, ge=1, le=10, description="tries of a URL whose server is busy or out of reach")
    timeout_s: float = Field(default=60, gt=0, le=3600, description="seconds a URL may take, a try")
    max_mb: float = Field(default=32, gt=0, le=4096, description="megabytes an image may have")
    user_agent: Text | None = Field(
        default=None,
        pattern=r"^[\x20-\x7e]+$",
        description="what servers are told of who asks; name a page or an address there. Default: modmill/VERSION",
    )
    ignore_x_robots_tag: bool = Field(
        default=False, description="fetch images although their server answers `X-Robots-Tag: noai` or `noimageai`"
    )
    allow_private: bool = Field(
        default=False, description="fetch from addresses of this machine and of private networks too"
    )


class FilterConfig(Section):
    """Says which new samples are left out before anything is made of them; each is recorded in the view `dropped`."""

    min_width: Positive | None = Field(default=None, description="px, of the upright photograph")
    min_height: Positive | None = Field(default=None, description="px, of the upright photograph")
    min_side: Positive | None = Field(default=None, description="px of the shorter side")
    aspect: Range | None = Field(default=None, description="width / height: [least, most]")
    duplicates: Literal["none", "within", "across"] = Field(
        default="none",
        description="leave out samples whose bytes another has: within the corpus, or across all of the workspace",
    )

    @property
    def needs_size(self) -> bool:
        """Tells whether it looks at the size of photographs."""
        return any(value is not None for value in (self.min_width, self.min_height, self.min_side, self.aspect))


class CorpusConfig(Section):
    """Names a set of samples and what is made of them."""

    source: Text = Field(
        description="where the samples are: a folder, a glob, a file, or an fsspec URI; of files, or of tars or Parquet files "
        "with images in them; with `url`, a list of URLs"
    )
    kind: Literal["image", "text"] = Field(default="image", description="what the samples are: image or text")
    crops: int = Field(
        default=1, ge=1, le=999, description="crops of each photograph, 1 to 999; more may be added later"
    )
    decode_short: Positive | None = Field(
        default=None,
        description="JPEGs are decoded at the smallest of 1/1, 1/2, 1/4, 1/8 whose shorter side has so many px; "
        "default: full size",
    )
    part_rows: int = Field(
        default=2048, ge=1, le=1_000_000, description="samples a part; fixed when the corpus is made"
    )
    seed: Seed = Field(default=0, description="seed of the crops; fixed when the corpus is made")
    crop: CropConfig = Field(default_factory=CropConfig, description="how crops after the first are drawn")
    table: Text | None = Field(
        default=None, description="CSV, TSV, Parquet or JSONL file with more columns of the images"
    )
    key: Text | None = Field(
        default=None,
        description="text: the field that is a document's key; image: the table's column that names the image; in Parquet "
        "and lists of URLs: the column of keys; in tars `source`, for names that repeat from tar to tar",
    )
    image: Text | None = Field(
        default=None,
        description="Parquet: the column that holds images; tars: the ending of their members, such as jpg or rgb.png",
    )
    url: Text | None = Field(
        default=None,
        description="the source is a list of URLs (txt, CSV, TSV, Parquet, JSONL): the column that has them",
    )
    pack: bool = Field(
        default=False,
        description="whether source bytes are copied into the workspace; those of URLs always are",
    )
    max_mb: float = Field(
        default=1024, gt=0, le=65536, description="megabytes that the file of a sample may have; larger ones fail"
    )
    follow_links: bool = Field(
        default=False, description="take what symbolic links lead to outside of the source's folder too"
    )
    fetch: FetchConfig = Field(default_factory=FetchConfig, description="how URLs are fetched")
    filter: FilterConfig = Field(default_factory=FilterConfig, description="which new samples are left out")
    text: Text = Field(default="text", description="text corpora: the field that holds the document")
    modalities: Modalities = Field(
        default_factory=dict,
        description="what is made: names, or names with options; default for images: "
        f"{' '.join(KIND_DEFAULTS['image'].modalities)}; for text: {' '.join(KIND_DEFAULTS['text'].modalities)}",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_modalities(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "modalities" in data:
            return data
        kind = KIND_DEFAULTS.get(str(data.get("kind", "image")))
        return {**data, "modalities": kind.modalities if kind else ()}

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if not self.modalities:
            raise ValueError("modalities is empty; expected at least one")
        if self.has_pixels:
            if self.text != "text":
                raise ValueError("text names a field of documents, but this is a corpus of images; add `kind: text`")
            if self.url is not None and (self.table is not None or self.image is not None):
                raise ValueError(
                    "url says that the source is a list of URLs, whose columns are its own; drop table and image"
                )
            return self
        for name in ("image", "url", "pack"):
            if getattr(self, name):
                raise ValueError(f"{name} is for images, but this is a corpus of kind {self.kind}")
        if self.filter.needs_size:
            raise ValueError(
                f"filter looks at sizes of images, but this is a corpus of kind {self.kind}; it can have duplicates"
            )
        if self.table is not None:
            raise ValueError("table is for images; rows of JSONL and Parquet documents carry their own columns")
        for name in self.modalities:
            modality = modalities.get(name)
            if "crop" in (modality.label_grain, modality.token_grain):
                raise ValueError(f"modalities.{name} is made of images, but this is a corpus of kind {self.kind}")
        return self

    @property
    def most_bytes(self) -> int:
        """Returns how many bytes the file of a sample may have."""
        return int(self.max_mb * 1e6)

    @property
    def has_pixels(self) -> bool:
        """Tells whether samples are decoded to pixels, and cropped."""
        return KIND_DEFAULTS[self.kind].has_pixels


class GridFit(Section):
    """Says how the tokenizer of an image-like modality is fitted. What is left out is the tokenizer's own default."""

    patch: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="pixels a token covers, across; divides the modality's size; default: 16, of a feature map 1 cell",
    )
    codebook: int = Field(default=1024, ge=2, le=1_048_576, description="vocabulary: how many codes")
    steps: Positive = Field(default=400, description="optimizer steps")
    batch: Many | None = Field(default=None, description="windows of crops a step; default: 24")
    window: int | None = Field(default=None, ge=2, description="side of a window, px; default: 128")
    seed: Seed = Field(default=0, description="seed of weights and order")
    checkpoint_every: Positive = Field(default=50, description="steps between checkpoints of the fit")
    latent: Positive | None = Field(default=None, description="channels of a code; default: 32")
    width: Positive | None = Field(default=None, description="channels of the networks; default: 128")
    depth: Positive | None = Field(default=None, description="blocks of either network; default: 2")
    rate: float | None = Field(
        default=None, gt=0, description="learning rate of vectors, kernels and linear maps; default: 0.004"
    )


class TextFit(Section):
    """Says how the one tokenizer of all sequences is fitted, or names the file that holds one."""

    vocabulary: int = Field(default=30_000, ge=4397, le=1_048_576, description="tokens at most")
    min_frequency: Positive = Field(default=2, description="how often a pair of tokens must occur to become one")
    file: Text | None = Field(default=None, description="a tokenizers JSON file to use, such as 4M's published one")


class SnapshotConfig(Section):
    """Selects rows and modalities that are frozen for training."""

    where: Text | None = Field(
        default=None, description="SQL condition over `samples`, such as corpus = 'photos'; default: all rows"
    )
    modalities: list[str] | None = Field(
        default=None,
        min_length=1,
        description="names, or NAME=DIGITS for the recipe that begins so; default: all that have tokens",
    )
    hold_out: float = Field(
        default=HOLD_OUT, ge=0, lt=1, description="share of the keys that is never trained on, 0 to less than 1"
    )
    complete: bool = Field(
        default=False, description="only rows that have every modality; default: rows that have any of them"
    )


class PoolConfig(Section):
    """Gives some labelers workers of their own, if dependencies conflict or nodes differ."""

    labelers: list[str] = Field(min_length=1, description="the labelers that these workers serve, and no others")
    workers: Many | None = Field(default=None, description="workers; default: as many as fit")
    threads: Threads | None = Field(default=None, description="default: engine.threads")
    batch: Many | None = Field(default=None, description="default: engine.batch")
    gpus: float | None = Field(default=None, ge=0, le=64, description="default: engine.gpus; 0: no GPU is seen")
    memory_mb: Positive | None = Field(default=None, description="default: engine.memory_mb")
    node_labels: dict[str, str] = Field(default_factory=dict, description="Ray labels that a node must have")
    runtime_env: PlainJson = Field(
        default_factory=dict, description="Ray's runtime_env of these workers, over engine.runtime_env"
    )


class EngineConfig(Section):
    """Says how the work is run."""

    runner: Literal["ray", "local"] = Field(
        default="ray", description="ray: processes on all machines; local: in this process"
    )
    workers: Many | None = Field(default=None, description="worker processes; default: as many as cores or GPUs allow")
    threads: Threads = Field(default=1, description="torch threads of a worker, and of a fit")
    batch: Many = Field(default=32, description="rows a call of a labeler or tokenizer")
    decode_threads: Threads | None = Field(
        default=None,
        description="threads that decode images, in each worker; default: 4 with a GPU, else as many as `threads`",
    )
    queue_mb: Positive = Field(default=512, description="megabytes of decoded images that may wait in a worker")
    models_mb: Positive = Field(
        default=16_384, description="megabytes of models that a worker keeps loaded, and a group of labelers needs"
    )
    memory_mb: Positive | None = Field(
        default=None, description="megabytes of memory that Ray sets aside for a worker; default: none"
    )
    device: str = Field(default="auto", pattern=DEVICE, description="auto, cpu, cuda, cuda:N or mps")
    gpus: float = Field(
        default=1, ge=0, le=64, description="GPUs of a worker if it works on one; 0.5 puts two workers on each"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="what models compute in; auto: bfloat16 on CUDA, else float32"
    )
    compile: bool = Field(default=False, description="whether models go through torch.compile")
    ray_address: Text | None = Field(default=None, description="a running Ray cluster; default: one of this machine")
    node_labels: dict[str, str] = Field(default_factory=dict, description="Ray labels that a worker's node must have")
    runtime_env: PlainJson = Field(
        default_factory=dict, description="Ray's runtime_env of the workers: pip, py_modules, env_vars, ..."
    )
    pools: dict[CorpusName, PoolConfig] = Field(
        default_factory=dict, description="workers of their own for some labelers, by name"
    )
    batch_deadline_s: float = Field(
        default=600, gt=0, description="seconds a batch may take before its worker is taken to hang"
    )
    spill_after_s: float = Field(
        default=600,
        gt=0,
        description="seconds of an item after which its finished rows are written aside, again and again",
    )
    drain_s: float = Field(default=120, ge=0, description="seconds that Ctrl-C or SIGTERM waits for items at work")
    max_failed_fraction: float = Field(
        default=0.25, ge=0, le=1, description="share of failed rows that stops a run, 0 to 1"
    )
    max_failed_parts: int = Field(
        default=0, ge=0, description="work items that may fail as a whole before the run stops; they stay to be done"
    )
    gpu_hour_price: float | None = Field(
        default=None, ge=0, description="price of a worker's hour (GPU or node), for estimates and the progress table"
    )

    @model_validator(mode="after")
    def _one_pool_a_labeler(self) -> Self:
        served = [name for pool in self.pools.values() for name in pool.labelers]
        twice = next((name for name in served if served.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"pools: labeler {twice!r} is served by two pools; keep one")
        return self
