"""Writes and reads checkpoints: all that a run needs to go on, and all that a model needs to be used.

A checkpoint is a folder `<run>/checkpoints/step-00000400/`:

    model.safetensors       the parameters
    optimizer.safetensors   Adam's moments and step counts, `exp_avg.<parameter>`
    checkpoint.json         written last, so that a folder without it is no checkpoint: step, sizes and sha256 of the two,
                            loader, vocabulary, configuration, tokenizers and where they lie, generators, versions, losses;
                            its last member is `seal`, the sha256 of it without that (the first writers made none)

Everything goes through `Storage.put`, to a local folder and to an object store alike. No pickle.
"""

import contextlib
import errno
import os
import posixpath
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.errors import ConfigError, ShardError, UserError, WorkspaceError
from manifests.recipe import is_as_sealed, parsed_json, sealed_json, sha256_hex
from manifests.store.storage import Storage, open_storage, read_same
from train.data.vocabulary import TokenModality, Vocabulary
from train.model.transformer import Model, ModelConfig
from train.run.metrics import Window

FORMAT = 1
FOLDER = "checkpoints"
MARK = "checkpoint.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
_PREFIX = "step-"
_ANOTHER = "use another checkpoint of the run"
_STEP = re.compile(rf"{_PREFIX}\d+")
# What stands in every document, and what it is.
_OBJECTS = ("files", "loader", "vocabulary", "config", "model", "tokenizers", "generators", "window", "losses")
_FIELDS: Mapping[str, type] = {"step": int, "identity": str, "workspaces": list, **dict.fromkeys(_OBJECTS, dict)}
# What Adam keeps of a parameter.
_STATE = ("step", "exp_avg", "exp_avg_sq")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Holds a whole checkpoint on disk: its folder in the storage, and its document."""

    storage: Storage
    path: str
    document: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Returns the number of updates that were made."""
        return self.document["step"]

    @property
    def location(self) -> str:
        """Returns where it is, for messages."""
        return self.storage.location(self.path)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of one of its files, checked. Raises ShardError if the bytes are not those that were saved."""
        try:
            return safetensors.torch.load(self.read(name))
        except (SafetensorError, KeyError) as error:
            raise ShardError(f"{self.location}/{name} is no safetensors file: {error}") from error

    def read(self, name: str) -> bytes:
        """Returns the bytes of one of its files. Raises ShardError if they are not those that were saved."""
        sha256 = self.document["files"][name]["sha256"]
        return read_same(self.storage, posixpath.join(self.path, name), sha256, remedy=_ANOTHER)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Holds a checkpoint to use.

    `workspaces` has by modality the URI of the workspace that holds its tokenizer (at `vocabulary[name].path`).
    """

    model: Model
    vocabulary: Vocabulary
    workspaces: Mapping[str, str]
    step: int


# -- saving ----------------------------------------------------------------------------------------------------------


def folder_of(step: int) -> str:
    """Returns the folder of a step's checkpoint in a run's folder."""
    return f"{FOLDER}/{_PREFIX}{step:08d}"


def save(
    storage: Storage,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    document: Mapping[str, Any],
    keep: int,
) -> Saved:
    """Saves a step's checkpoint in a run's folder, then removes all but the newest `keep`; `document` has its further facts.

    Raises UserError if the disk is full: what was written of this checkpoint is removed, and those before it stay.
    """
    path = folder_of(step)
    try:
        # What a killed process left without a mark.
        storage.remove_folder(path)
        written = {
            MODEL: _put(storage, f"{path}/{MODEL}", _packed(model.state_dict())),
            OPTIMIZER: _put(storage, f"{path}/{OPTIMIZER}", _packed(_moments(model, optimizer))),
        }
        whole = {"format": FORMAT, "step": step, "files": written, **document}
        _put(storage, posixpath.join(path, MARK), sealed_json(whole))
    except (OSError, WorkspaceError) as error:
        with contextlib.suppress(OSError):
            storage.remove_folder(path)
        # The storage says it in words of its own if a full disk is the cause.
        if getattr(error.__cause__ or error, "errno", None) not in _DISK_FULL:
            raise
        before = [name for name in _folders(storage) if storage.exists(f"{FOLDER}/{name}/{MARK}")]
        left = f"the checkpoint {before[-1]} stays" if before else "there is no checkpoint before it"
        raise UserError(
            f"the disk of {storage.uri} is full: the checkpoint of step {step} could not be saved, {left}; free some "
            "of it (or lower checkpoint.keep), then go on with `--resume auto`"
        ) from error
    for name in _folders(storage)[:-keep]:
        storage.remove_folder(f"{FOLDER}/{name}")
    return Saved(storage=storage, path=path, document=whole)


def remove_after(storage: Storage, step: int) -> list[str]:
    """Removes the checkpoints after the step from which a run goes on, and returns their names."""
    newer = [name for name in _folders(storage) if name > posixpath.basename(folder_of(step))]
    for name in newer:
        storage.remove_folder(f"{FOLDER}/{name}")
    return newer


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _put(storage: Storage, path: str, data: bytes) -> dict[str, Any]:
    # An object store may refuse our own file as already there: its answer to the first attempt got lost.
    if not storage.put(path, data) and storage.read(path) != data:
        raise UserError(
            f"{storage.location(path)} stands already: another process trains in this run's folder; end one"
        )
    return {"sha256": sha256_hex(data), "size_bytes": len(data)}


# -- finding ---------------------------------------------------------------------------------------------------------


def latest(storage: Storage, say: Callable[[str], None]) -> Saved | None:
    """Returns the newest whole checkpoint of a run's folder, or None. `say` is told of each that is skipped."""
    for name in reversed(_folders(storage)):
        try:
            saved = read(storage, f"{FOLDER}/{name}")
            for file in saved.document["files"]:
                saved.read(file)
        except ShardError as error:
            say(f"passed over: {error}")
        else:
            return saved
    return None


def read(storage: Storage, path: str) -> Saved:
    """Reads the checkpoint in a folder, but not its large files. Raises ShardError if it is missing or incomplete."""
    where = storage.location(path)
    try:
        data = storage.read(posixpath.join(path, MARK))
        document = parsed_json(data)
        if not is_as_sealed(data):
            raise ValueError("it is not what its seal says: it was altered")
        if document["format"] > FORMAT:
            raise ConfigError(
                f"{where} has format {document['format']}, this modmill reads up to {FORMAT}; install a newer one"
            )
        _check_document(document)
        # A folder that was moved alone has a name of its own.
        if _STEP.fullmatch(name := posixpath.basename(path)) and int(name.removeprefix(_PREFIX)) != document["step"]:
            raise ValueError(f"it says step {document['step']}")
        sizes = {name: file["size_bytes"] for name, file in document["files"].items()}
    except FileNotFoundError:
        raise ShardError(f"{where} is no whole checkpoint (no {MARK}): its saving was cut off") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ShardError(f"{where}/{MARK} cannot be read ({reason}); {_ANOTHER}") from error
    for name, size in sizes.items():
        if not storage.exists(posixpath.join(path, name)) or storage.size(posixpath.join(path, name)) != size:
            raise ShardError(f"{where}/{name} is missing or has not its {size:,} bytes; {_ANOTHER}")
    return Saved(storage=storage, path=path, document=document)


def _check_document(document: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError if a document has not what a run goes on by, or a model is opened by."""
    for name, kind in _FIELDS.items():
        if not isinstance(document[name], kind):
            raise ValueError(f"its {name} is {reprlib.repr(document[name])}, expected {kind.__name__}")
    if document["step"] < 0 or any(len(document["files"][name]["sha256"]) != 64 for name in (MODEL, OPTIMIZER)):
        raise ValueError("its step is below 0, or a sha256 has not 64 digits")
    Vocabulary.from_document(document["vocabulary"])
    TypeAdapter(ModelConfig).validate_python(vars(ModelConfig(**document["model"])))
    Window(**document["window"])
    homes = [str(home["uri"]) for home in document["workspaces"]]
    if any(facts["workspace"] not in range(len(homes)) for facts in document["tokenizers"].values()):
        raise ValueError("a tokenizer is of a workspace that it does not name")


def _folders(storage: Storage) -> list[str]:
    return [name for name in storage.names(FOLDER) if name.startswith(_PREFIX)]


# -- loading ---------------------------------------------------------------------------------------------------------


def check_vocabulary(saved: Saved, vocabulary: Vocabulary) -> None:
    """Raises ConfigError, with modality and digests, if a model of this vocabulary cannot go on from the checkpoint."""
    held = {one.name: one for one in Vocabulary.from_document(saved.document["vocabulary"]).modalities}
    wanted = {one.name: one for one in vocabulary.modalities}
    for name in sorted(held.keys() | wanted.keys()):
        ours, theirs = held.get(name), wanted.get(name)
        if ours != theirs:
            raise ConfigError(
                f"{saved.location} was trained on another {name!r} than the snapshots have: it has {_form(ours)}, they have "
                f"{_form(theirs)}; give it the snapshot that it was trained on, or train a new one"
            )


def _form(one: TokenModality | None) -> str:
    if one is None:
        return "no such modality"
    return f"{one.tokens} tokens a row of {one.tokenizer}-{one.digest[:12]}, at {one.offset}"


def load_model(saved: Saved, model: nn.Module) -> None:
    """Puts the checkpoint's parameters into a model. Raises ConfigError if they are of another model."""
    try:
        model.load_state_dict(saved.tensors(MODEL))
    except RuntimeError as error:
        raise ConfigError(f"{saved.location} holds another model: {str(error).splitlines()[-1].strip()}") from error


def load_optimizer(saved: Saved, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts the checkpoint's moments into the optimizer of `model`."""
    tensors = saved.tensors(OPTIMIZER)
    fused = {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        for kind in _STATE:
            value = tensors.get(f"{kind}.{name}")
            if value is not None:
                # A step count stays on the CPU, unless a fused step reads it on the device.
                there = kind != "step" or parameter in fused
                optimizer.state[parameter][kind] = value.to(parameter.device) if there else value


def open_checkpoint(uri: str | os.PathLike[str]) -> Checkpoint:
    """Opens the checkpoint in a folder, or the newest whole one of a run's folder. Its model is on the CPU, ready to evaluate.

    Raises ConfigError if there is no checkpoint, ShardError if a file is not the one that was saved.
    """
    saved = find(str(uri).rstrip("/"))
    document = saved.document
    vocabulary = Vocabulary.from_document(document["vocabulary"])
    model = Model(vocabulary, ModelConfig(**document["model"]))
    load_model(saved, model)
    homes = [resolved(one["uri"], saved.storage) for one in document["workspaces"]]
    return Checkpoint(
        model=model.eval(),
        vocabulary=vocabulary,
        workspaces={name: homes[facts["workspace"]] for name, facts in document["tokenizers"].items()},
        step=saved.step,
    )


def find(uri: str) -> Saved:
    """Finds the checkpoint in a folder, or the newest whole one of a run's folder. Raises ConfigError if there is none."""
    storage = open_storage(uri)
    if storage.exists(MARK):
        run, _, step = storage.uri.rpartition(f"/{FOLDER}/")
        return read(open_storage(run), f"{FOLDER}/{step}") if run else read(storage, "")
    passed: list[str] = []
    saved = latest(storage, passed.append)
    if saved is None:
        why = f" ({'; '.join(passed)})" if passed else ""
        raise ConfigError(f"{uri} is no checkpoint and no run's folder with one{why}; `modmill train FILE` makes one")
    return saved


# -- where workspaces are --------------------------------------------------------------------------------------------


def relative_uri(workspace: Storage, run: Storage) -> str:
    """Returns how a run's folder names a workspace: relative if the run lies in it, so that both can be moved together."""
    inside = run.uri.removeprefix(f"{workspace.uri.rstrip('/')}/")
    return workspace.uri if inside == run.uri else "/".join([".."] * len(inside.split("/")))


def resolved(uri: str, run: Storage) -> str:
    """Returns the URI of a workspace that `relative_uri` named in the run's folder `run`."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    scheme, separator, path = run.uri.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(posixpath.join(path, uri))}"
