"""`modmill generate`: prompts of every kind, the files and the sheet that it writes, and what it refuses."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.cli import entry
from engine.inference import sheets
from manifests.errors import ConfigError
from manifests.modality import get
from manifests.pixels import images
from manifests.store import paths
from manifests.store.storage import open_storage
from tokenize_jobs import protocol
from tokenize_jobs.text import EOS, SENTINELS, TextOptions, fit_text
from train.data.vocabulary import TokenModality, Vocabulary
from train.fit.grid import GridOptions, fit_grid
from train.generation.generator import Tokenizers
from train.model.transformer import Model, ModelConfig
from train.run.checkpoint import open_checkpoint, save
from train.run.metrics import Window

# The smallest grids there are: 2 x 2 tokens of 16 px.
MAPS = ("rgb@32", "edges@32", "depth@32", "segmentation@32")
SEQUENCES = ("boxes", "caption", "metadata", "palette")


@dataclass(frozen=True)
class World:
    """A workspace with tokenizers, and checkpoints of a model that nobody trained: at step 0, and one that says 3."""

    workspace: Path
    random: str
    trained: str


def _labels(name: str) -> np.ndarray:
    facts = get(name)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, size=(12, 4, 4, *([facts.channels] if "c" in facts.axes else [])))
    labels = coarse.repeat(facts.size // 4, axis=1).repeat(facts.size // 4, axis=2)
    return (labels * (1 if facts.unit == "class index" else 85 if facts.dtype == "uint8" else 0.5)).astype(facts.dtype)


def _fit(workspace: Path, name: str) -> tuple[str, str]:
    folder = workspace / "tokenizers" / "fitting"
    if name == "text":
        fit_text(["a red cube left of a green sphere", "two dogs"], folder, options=TextOptions(vocabulary=4700))
    else:
        options = GridOptions(
            patch=16,
            codebook=8,
            latent=4,
            width=8,
            depth=1,
            steps=2,
            batch=2,
            window=32,
            start_patches=48,
            start_rounds=2,
        )
        labels = _labels(name)
        fit_grid(labels, get(name), options, folder, judged=labels[:2], threads=1)
    digest = protocol.digest(folder)
    path = paths.tokenizer(name, digest)
    folder.rename(workspace / path)
    return digest, path


def _modality(workspace: Path, name: str, fitted: tuple[str, str], offset: int) -> TokenModality:
    digest, path = fitted
    spec = protocol.load(workspace / path, name).spec
    is_sequence = name in SEQUENCES
    marks: dict[str, Any] = {"first_sentinel": EOS + 1, "sentinels": SENTINELS, "end": EOS} if is_sequence else {}
    return TokenModality(
        name=name,
        sequence=is_sequence,
        vocabulary=spec.vocabulary,
        tokens=48 if is_sequence else spec.tokens or 0,
        offset=offset,
        tokenizer="text" if is_sequence else name,
        digest=digest,
        path=path,
        **marks,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    # Threads that wait for each other take longer than this model.
    torch.set_num_threads(1)
    workspace = tmp_path_factory.mktemp("workspace")
    text = _fit(workspace, "text")
    offset = protocol.load(workspace / text[1], "caption").spec.vocabulary
    modalities = [_modality(workspace, name, text, 0) for name in SEQUENCES]
    for name in MAPS:
        modalities.append(_modality(workspace, name, _fit(workspace, name), offset))
        offset += modalities[-1].vocabulary
    modalities.sort(key=lambda one: one.name)
    vocabulary = Vocabulary(modalities=tuple(modalities), size=offset)
    config = ModelConfig(depth=1, dim=32, heads=2)
    model = Model(vocabulary, config)
    model.initialize(0)
    document = {
        "vocabulary": vocabulary.document(),
        "model": asdict(config),
        "config": {},
        "workspaces": [{"uri": str(workspace)}],
        "tokenizers": {one.name: {"workspace": 0} for one in modalities},
        "identity": "a" * 64,
        "loader": {},
        "window": asdict(Window.empty(1)),
        "losses": {},
        "generators": {},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    runs = [workspace / "runs" / f"step-{step}" for step in (0, 3)]
    for run, step in zip(runs, (0, 3), strict=True):
        save(open_storage(run), step=step, model=model, optimizer=optimizer, document=document, keep=1)
    yield World(workspace, str(runs[0]), str(runs[1]))
    torch.set_num_threads(threads)


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, str]:
    """A prompt of each kind; the photograph is a CMYK JPEG, turned by its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (90, 60), (0, 255, 255, 0)).save(tmp_path / "photo.jpg", exif=exif)
    Image.new("1", (50, 40), 1).save(tmp_path / "edges.png")
    np.save(tmp_path / "depth.npy", np.linspace(1, 9, 48 * 64, dtype=np.float32).reshape(48, 64))
    np.save(tmp_path / "classes.npy", np.ones((32, 32), np.uint8))
    boxes = [{"class": "cube", "x0": 0.1, "y0": 0.2, "x1": 0.5, "y1": 0.75}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return {
        "rgb@32": str(tmp_path / "photo.jpg"),
        "edges@32": str(tmp_path / "edges.png"),
        "depth@32": str(tmp_path / "depth.npy"),
        "segmentation@32": str(tmp_path / "classes.npy"),
        "boxes": str(tmp_path / "boxes.json"),
        "palette": "#ff0000, #00cc88",
        "metadata": "brightness=120,colorfulness=40",
        "caption": "a red cube left of a green sphere",
    }


def generate(checkpoint: str, given: dict[str, str], wanted: str, out: Path, *more: str) -> dict[str, Any]:
    """Runs the command and returns what it wrote of itself."""
    prompts = [word for name, value in given.items() for word in ("--from", f"{name}={value}")]
    arguments = ["generate", "--checkpoint", checkpoint, *prompts, "--to", wanted, "--out", str(out), *more]
    with pytest.raises(SystemExit) as end:
        entry.main(arguments)
    assert end.value.code == entry.DONE
    return json.loads((out / "generation.json").read_text())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            entry.main(["generate", *arguments])
        assert end.value.code == entry.USER_MISTAKE
        told = capsys.readouterr().err.splitlines(keepends=True)
        assert all(line.startswith("making ") for line in told[:-1])
        return told[-1]

    return run


def test_a_photograph_becomes_all_that_the_model_knows(world: World, prompts: dict[str, str], tmp_path: Path) -> None:
    wanted = "edges@32,depth@32,segmentation@32,boxes,palette,metadata,caption"
    given = {"rgb@32": prompts["rgb@32"]}
    out = tmp_path / "out"
    document = generate(
        world.trained, given, wanted, out, "--set", "steps=2", "--set", "depth@32.top_k=3", "--seed", "4"
    )
    assert document["from"] == given
    assert document["to"] == wanted.split(",")
    assert (document["step"], document["seed"], document["random_weights"]) == (3, 4, False)
    assert document["options"]["edges@32"]["steps"] == 2
    assert document["options"]["depth@32"]["top_k"] == 3
    assert document["options"]["edges@32"]["top_k"] is None
    assert "tokens" not in document["options"]["edges@32"]
    assert "steps" not in document["options"]["caption"]
    assert set(document["tokenizers"]) == {"rgb@32", *document["to"]}
    assert document["files"] == {
        "edges@32": ["edges@32.png"],
        "depth@32": ["depth@32.png", "depth@32.npy"],
        "segmentation@32": ["segmentation@32.png", "segmentation@32.npy"],
        "boxes": ["boxes.json"],
        "palette": ["palette.json"],
        "metadata": ["metadata.json"],
        "caption": ["caption.txt"],
    }
    listed = {name for files in document["files"].values() for name in files}
    assert {path.name for path in out.iterdir()} == {*listed, "generation.json", "contact-sheet.png"}
    assert images.decode_map((out / "edges@32.png").read_bytes()).shape == (32, 32)
    assert images.decode_npy((out / "depth@32.npy").read_bytes()).dtype == np.float32
    assert isinstance(json.loads((out / "boxes.json").read_text()), list)
    assert isinstance(json.loads((out / "metadata.json").read_text()), dict)
    sheet = np.array(Image.open(out / "contact-sheet.png"))
    # The photograph is there in its red, cut square.
    assert (np.abs(sheet.astype(int) - (255, 0, 0)).max(axis=-1) < 12).sum() > 0.9 * 224**2


def test_every_kind_of_prompt_and_what_was_generated_is_read(
    world: World, prompts: dict[str, str], tmp_path: Path
) -> None:
    for name in prompts:
        given = {other: value for other, value in prompts.items() if other != name}
        generate(world.trained, given, name, tmp_path / name, "--set", "steps=1", "--set", "temperature=0")
    back = {
        "rgb@32": "rgb@32.png",
        "edges@32": "edges@32.png",
        "depth@32": "depth@32.npy",
        "segmentation@32": "segmentation@32.npy",
        "boxes": "boxes.json",
        "metadata": "metadata.json",
    }
    given = {name: str(tmp_path / name / file) for name, file in back.items()}
    document = generate(world.trained, given, "caption", tmp_path / "back")
    assert list(document["from"]) == list(back)
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.array([0, 1, 2, 3], np.uint8))
    assert generate(world.trained, {"depth@32": str(tokens)}, "rgb@32", tmp_path / "tokens")["files"]


def test_variations_differ_and_seeds_repeat_them(world: World, tmp_path: Path) -> None:
    given = {"caption": "two dogs"}
    more = ("--samples", "18", "--set", "temperature=1", "--set", "top_p=1", "--set", "steps=2")
    first = generate(world.trained, given, "rgb@32", tmp_path / "first", *more)
    generate(world.trained, given, "rgb@32", tmp_path / "again", *more)
    files = first["files"]["rgb@32"]
    assert files == [f"rgb@32-{number}.png" for number in range(18)]
    contents = [(tmp_path / "first" / file).read_bytes() for file in files]
    assert len(set(contents)) > 9
    assert contents == [(tmp_path / "again" / file).read_bytes() for file in files]
    # The second lot that the model makes together goes on where the first ended.
    fewer = generate(world.trained, given, "rgb@32", tmp_path / "fewer", "--samples", "17", *more[2:])
    assert [(tmp_path / "fewer" / file).read_bytes() for file in fewer["files"]["rgb@32"]] == contents[:17]


def test_random_weights_say_so_on_every_picture(world: World, tmp_path: Path) -> None:
    document = generate(world.random, {}, "rgb@32,edges@32,caption", tmp_path / "out")
    assert document["random_weights"]
    for name in ("rgb@32.png", "edges@32.png", "contact-sheet.png"):
        shown = np.array(Image.open(tmp_path / "out" / name))
        assert (shown == sheets._WARNING).all(axis=-1).any()
    generate(world.trained, {}, "rgb@32", tmp_path / "trained")
    shown = np.array(Image.open(tmp_path / "trained" / "contact-sheet.png"))
    assert not (shown == sheets._WARNING).all(axis=-1).any()


def test_a_free_folder_is_found_and_a_used_one_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(SystemExit):
            entry.main(["generate", "--checkpoint", world.trained, "--to", "rgb@32"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generated-1", "generated-2"]
    error = refused("--checkpoint", world.trained, "--to", "rgb@32", "--out", "generated-1")
    assert "has files in it" in error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rbg@32=x.png", "did you mean 'rgb@32'?"),
        ("rgb@32", "expected MODALITY=VALUE"),
        ("rgb@32=missing.jpg", "missing.jpg: cannot be read"),
        ("rgb@32=words.txt", "expected one whole JPEG"),
        ("depth@32=words.txt", "words.txt"),
        ("depth@32=five.npy", "expected 4 tokens"),
        ("depth@32=bands.npy", "bands.npy"),
        ("edges@32=colors.png", "colors.png"),
        ("caption=" + "dogs " * 40, "the model sees 48"),
        ("boxes=words.txt", "expected a .json file, or JSON"),
        ("boxes=[{]", "is no JSON"),
        ('boxes=[{"class": "a"}]', "x0"),
        ('boxes=[{"class": "a", "x0": 0.5, "y0": 0, "x1": 0.1, "y1": 1}]', "x0 <= x1"),
        ("boxes=[3]", "does not fit"),
        ("palette=red", "is no color"),
        ("palette=" + ",".join(["#000000"] * 8), "expected 1 to 7"),
        ("palette=[[0, 0, 256]]", "is no color"),
        ("metadata=brigthness=3", "did you mean 'brightness'?"),
        ("metadata=brightness=high", "FIELD=NUMBER"),
        ('metadata={"brightness": "high"}', "expected a number"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    world: World,
    given: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("these are words")
    np.save("five.npy", np.arange(5))
    np.save("bands.npy", np.zeros((8, 8, 5)))
    Path("colors.png").write_bytes(images.encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)))
    error = refused("--checkpoint", world.trained, "--from", given, "--to", "segmentation@32", "--out", "out")
    assert words in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "rbg@32"), "did you mean 'rgb@32'?"),
        (("--to", "caption", "--from", "caption=x"), "in --from and in --to"),
        (("--to", "caption", "--from", "palette=#000000", "--from", "palette=#ffffff"), "given twice"),
        (("--to", "caption,caption"), "each once"),
        (("--to", "caption", "--set", "temperature=-1"), "temperature"),
        (("--to", "caption", "--set", "caption.topp=1"), "did you mean 'top_p'"),
        (("--to", "caption", "--set", "captoin.top_p=1"), "did you mean 'caption'"),
        (("--to", "caption", "--set", "top_p"), "MODALITY.OPTION=VALUE"),
        (("--to", "caption", "--set", "topp=1"), "did you mean 'top_p'"),
        (("--to", "caption", "--set", "caption.top_p=[1"), "not a number or a word"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    world: World, arguments: tuple[str, ...], words: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert words in refused("--checkpoint", world.trained, *arguments, "--out", str(tmp_path / "out"))


def test_another_tokenizer_than_the_one_trained_with_is_refused(
    world: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = open_checkpoint(world.trained).vocabulary["rgb@32"].path
    config = world.workspace / path / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    try:
        error = refused("--checkpoint", world.trained, "--to", "rgb@32", "--out", str(tmp_path / "out"))
    finally:
        config.write_bytes(before)
    assert "the model was trained with" in error
    assert "no checkpoint" in refused("--checkpoint", str(tmp_path), "--to", "rgb@32")


def test_tokenizers_come_from_an_object_store_too(world: World) -> None:
    vocabulary = open_checkpoint(world.trained).vocabulary
    path = vocabulary["caption"].path
    store = open_storage("memory://generate")
    for file in (world.workspace / path).iterdir():
        store.put(f"{path}/{file.name}", file.read_bytes())
    tokenizers = Tokenizers(vocabulary, {name: "memory://generate" for name in SEQUENCES})
    row = tokenizers.encode("caption", "Two dogs")
    assert row[-1] == EOS
    assert tokenizers.decode("caption", [row]) == ["two dogs"]
    store.replace(f"{path}/config.json", b"{}")
    with pytest.raises(ConfigError, match=r"memory://.*the model was trained with"):
        Tokenizers(vocabulary, tokenizers.workspaces).get("caption")


def test_sheets_show_each_kind_of_label() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    labels = {
        "rgb@32": pixels,
        "boxes": [{"class": "cube", "score": None, "x0": 0.1, "y0": 0.1, "x1": 0.9, "y1": 0.9}],
        "palette": [{"k": 1, "rank": 0, "r": 9, "g": 200, "b": 7, "share": None}],
        "metadata": {"brightness": 12.34567, "contrast": None},
        "caption": "a cube",
    }
    boxes = sheets.tile("boxes", labels)
    assert isinstance(boxes, np.ndarray)
    # Over the pixels, which are black.
    assert (boxes == 0).all(axis=-1).mean() > 0.5
    assert (boxes != 0).any()
    palette = sheets.tile("palette", labels)
    assert isinstance(palette, np.ndarray)
    assert palette[0, 0].tolist() == [9, 200, 7]
    assert sheets.tile("metadata", labels) == "brightness  12.35"
    assert sheets.tile("caption", labels) == "a cube"
    assert sheets.tile("boxes", {"boxes": []}) == "no boxes"
    assert sheets.tile("caption", {"caption": ""}) == "no words"
    row = sheets.SheetLine(given={"caption": "word " * 200}, generated={"rgb@32": pixels}, title="0")
    one, two = (sheets.sheet([row] * rows, title="t" * 500) for rows in (1, 2))
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > one.shape[0] > 224
    buffer = io.BytesIO(images.encode_png(two))
    assert Image.open(buffer).size == (two.shape[1], two.shape[0])
