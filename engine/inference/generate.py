"""Generates for `modmill generate`: takes prompts, and writes a folder of labels with a contact sheet."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engine.inference import prompts, sheets
from engine.show import pictures
from engine.show.contact import modality_of
from manifests.errors import ConfigError
from manifests.pixels import images
from train.generation.decoding import OF_GRIDS, OF_SEQUENCES, GenerateOptions
from train.generation.generator import Tokenizers, generate
from train.run.checkpoint import Checkpoint, open_checkpoint

_SAMPLES_AT_ONCE = 16
_TEXTS_TOLD = 4


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Holds what is asked of `modmill generate`: `samples` variations of the wanted modalities, made in their order.

    checkpoint  a checkpoint, or a run's folder
    given       prompts, each MODALITY=VALUE
    out         a folder that is missing or empty; None for the first free `generated-<n>`
    settings    decode options: MODALITY.OPTION=VALUE for one modality, OPTION=VALUE for all
    """

    checkpoint: str
    given: Sequence[str]
    wanted: Sequence[str]
    out: Path | None = None
    samples: int = 1
    seed: int = 0
    settings: Sequence[str] = ()


def run(request: GenerateRequest, say: Callable[[str], None]) -> Path:
    """Generates what is asked for and writes it; returns the folder. Nothing is written before everything is made.

    `say` is told what is being made, and the texts that were. Raises ConfigError on what cannot be given, wanted or set.
    """
    every, each = _settings(request.settings)
    options = GenerateOptions(every=every, each=each)
    folder = _free_folder(request.out)
    opened = open_checkpoint(request.checkpoint)
    wanted, samples = request.wanted, request.samples
    for name in wanted:
        opened.vocabulary.index(name)
        if any(argument.partition("=")[0] == name for argument in request.given):
            raise ConfigError(f"{name} is in --from and in --to; give it, or have it made")
    tokenizers = Tokenizers(opened.vocabulary, opened.workspaces)
    for name in wanted:
        tokenizers.get(name)
    found = prompts.read(request.given, tokenizers)
    tokens = {name: prompt.tokens for name, prompt in found.items()}
    generated = _generate(opened, tokenizers, tokens, request, options, say)
    labels = {
        name: tokenizers.decode(name, [prompt.tokens])[0] if prompt.label is None else prompt.label
        for name, prompt in found.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: _write(folder, name, rows, is_random=opened.step == 0) for name, rows in generated.items()}
    rows = [
        sheets.SheetLine(
            given=labels,
            generated={name: some[number] for name, some in generated.items()},
            title=f"{number}" if samples > 1 else "",
        )
        for number in range(samples)
    ]
    about = f"{request.checkpoint}, step {opened.step:,}, seed {request.seed}"
    sheet = sheets.sheet(rows, title=_title(found, wanted), note=about, random_weights=opened.step == 0)
    (folder / "contact-sheet.png").write_bytes(images.encode_png(sheet))
    document = {
        "checkpoint": request.checkpoint,
        "step": opened.step,
        "random_weights": opened.step == 0,
        "from": {name: prompt.text for name, prompt in found.items()},
        "to": list(wanted),
        "samples": samples,
        "seed": request.seed,
        "options": _used(opened, list(found), wanted, options),
        "tokenizers": {
            name: f"{opened.vocabulary[name].tokenizer}-{opened.vocabulary[name].digest[:12]}"
            for name in (*found, *wanted)
        },
        "files": files,
    }
    _write_json(folder / "generation.json", document)
    return folder


def _generate(
    opened: Checkpoint,
    tokenizers: Tokenizers,
    tokens: Mapping[str, np.ndarray],
    request: GenerateRequest,
    options: GenerateOptions,
    say: Callable[[str], None],
) -> dict[str, list[Any]]:
    """Returns the labels of all samples of one prompt, by modality; the model makes some samples at a time."""
    wanted, samples = request.wanted, request.samples
    model = opened.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    made: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    for first in range(0, samples, _SAMPLES_AT_ONCE):
        many = min(_SAMPLES_AT_ONCE, samples - first)
        given = {name: [row] * many for name, row in tokens.items()}
        numbers = f"{first + 1} to {first + many} of {samples}" if samples > 1 else "1 of 1"
        say(f"making {', '.join(wanted)}: sample {numbers}")
        for name, rows in generate(model, given, wanted, options, seed=request.seed, samples=many, first=first).items():
            made[name] += rows
    generated = {name: tokenizers.decode(name, rows) for name, rows in made.items()}
    for name, labels in generated.items():
        for text in labels[:_TEXTS_TOLD]:
            if isinstance(text, str):
                say(f"{name}: {text or '(no words)'}")
    return generated


def _settings(settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns settings for all modalities (OPTION=VALUE), and those for each modality (MODALITY.OPTION=VALUE)."""
    every: dict[str, Any] = {}
    each: dict[str, dict[str, Any]] = {}
    for setting in settings:
        place, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected MODALITY.OPTION=VALUE or OPTION=VALUE, such as rgb.steps=8")
        name, dot, option = place.rpartition(".")
        try:
            (each.setdefault(name, {}) if dot else every)[option] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: {value!r} is not a number or a word") from error
    return every, each


def _free_folder(out: Path | None) -> Path:
    if out is None:
        candidates = (Path(f"generated-{number}") for number in itertools.count(1))
        return next(path for path in candidates if not path.exists())
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file; expected a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: the folder has files in it; name a new one, or remove it")
    return out


def _write(folder: Path, name: str, labels: Sequence[Any], *, is_random: bool) -> list[str]:
    """Writes the labels of a modality as pictures, text or JSON; returns the names of the files.

    A PNG is for looking at. If it does not hold the numbers, a .npy beside it does.
    """
    plain = name.replace(":", "-")
    written = []
    for number, label in enumerate(labels):
        stem = plain if len(labels) == 1 else f"{plain}-{number}"
        if isinstance(label, np.ndarray):
            written += _write_array(folder, stem, name, label, is_random=is_random)
        elif isinstance(label, str):
            (folder / f"{stem}.txt").write_text(label + "\n", encoding="utf-8")
            written.append(f"{stem}.txt")
        else:
            _write_json(folder / f"{stem}.json", label)
            written.append(f"{stem}.json")
    return written


def _write_array(folder: Path, stem: str, name: str, label: np.ndarray, *, is_random: bool) -> list[str]:
    facts = modality_of(name)
    is_classes = facts is not None and facts.unit == "class index"
    written = []
    is_picture = label.ndim == 2 or (label.ndim == 3 and label.shape[2] <= 4)
    if is_picture:
        # One channel of bytes stays one, so that `--from` takes the file again.
        is_gray = label.ndim == 2 and label.dtype == np.uint8 and not is_classes
        shown = label if is_gray and not is_random else pictures.picture(facts, label)
        shown = sheets.marked(shown) if is_random else shown
        (folder / f"{stem}.png").write_bytes(images.encode_png(shown))
        written.append(f"{stem}.png")
    if not is_picture or label.dtype != np.uint8 or is_classes:
        (folder / f"{stem}.npy").write_bytes(images.encode_npy(label))
        written.append(f"{stem}.npy")
    return written


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _used(
    opened: Checkpoint, given: Sequence[str], wanted: Sequence[str], options: GenerateOptions
) -> dict[str, dict[str, Any]]:
    """Returns the decode options that each modality was made with."""
    used = {}
    for place, name in enumerate(wanted):
        facts = opened.vocabulary[name]
        chosen = dict(options.of(facts, [*given, *wanted[:place]]))
        unused = OF_GRIDS if facts.sequence else OF_SEQUENCES
        used[name] = {option: value for option, value in chosen.items() if option not in unused}
    return used


def _title(found: Mapping[str, prompts.Prompt], wanted: Sequence[str]) -> str:
    # A file by its name only: generation.json has the whole path.
    texts = {
        name: Path(prompt.text).name if Path(prompt.text).suffix and "/" in prompt.text else prompt.text
        for name, prompt in found.items()
    }
    given = ", ".join(f"{name}={text}" for name, text in texts.items())
    return f"{given or 'nothing'} to {', '.join(wanted)}"
