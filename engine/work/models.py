"""Keeps the models of a worker: loads each once, and lets the least recently used go if they would be too many.

Who holds which is told to the driver by `identity`, so that it gives a worker what the worker can begin at once.
"""

import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from engine.plan import weights
from engine.plan.corpus import LabelerUse, identity, identity_of_tokenizer
from engine.work.isolate import MicroBatch
from labelers import protocol as labelers
from manifests.errors import ModmillError
from manifests.log.actions import TokenizerAdded
from manifests.store.storage import Storage
from tokenize_jobs import protocol as tokenizers
from tokenize_jobs.protocol import fetch_tokenizer

# Held by whoever loads a model, calls one for the first time, or imports late what several threads may import. A package
# that imports parts of itself as they are asked for (transformers, scikit-image) has cycles among them. If two threads
# enter such a cycle from two sides, Python shows one of them a module that is half made, and names are missing in it.
ALONE = threading.RLock()
_called: set[str] = set()


@contextmanager
def first_call(name: str) -> Iterator[None]:
    """Surrounds the calls of a labeler or a tokenizer: the first in a process is alone, since it may import too."""
    if name in _called:
        yield
        return
    with ALONE:
        yield
    _called.add(name)


class Models:
    """Holds loaded labelers and tokenizers, at most `limit_bytes` by their measured sizes, and always the last one.

    `load_s` is how many seconds all loading took. A model that is let go lives on for as long as someone uses it.
    """

    def __init__(self, device: str, limit_bytes: int, dtype: str = "auto", compile: bool = False) -> None:
        self.device = device
        self.limit_bytes = limit_bytes
        self.compile = compile
        self.load_s = 0.0
        self._dtype = dtype
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        # Of every model that is or was held: so much is freed before it is loaded another time.
        self._sizes: dict[str, int] = {}
        self._rows: dict[str, int] = {}

    @property
    def held(self) -> frozenset[str]:
        """Returns the identities of what is loaded."""
        return frozenset(self._loaded)

    def bytes_of(self, identity: str) -> int:
        """Returns the measured size of a model that is or was loaded; 0 of one that never was."""
        return self._sizes.get(identity, 0)

    def labeler(self, use: LabelerUse) -> labelers.Labeler:
        """Returns the labeler with its weights. Raises ConfigError if they do not have the digest of the plan."""

        def load() -> labelers.Labeler:
            given = dict(use.parameters)
            if use.weights is not None:
                given["checkpoint"] = str(weights.fetch(given["checkpoint"], use.weights).path)
            labeler = _built(use.name, given, self.device)
            if self.compile:
                _compile(labeler)
            return labeler

        return self._get(identity(use), load)

    def tokenizer(self, storage: Storage, known: TokenizerAdded, modality: str) -> tokenizers.Tokenizer:
        """Returns a tokenizer of the workspace, on the device. Raises ShardError if its files are not the committed ones."""
        return self._get(
            identity_of_tokenizer(known, modality),
            lambda: tokenizers.load(fetch_tokenizer(storage, known), modality, self.device),
        )

    def micro(self, identity: str, most: int) -> MicroBatch:
        """Returns how many rows a call of a model may have: `most`, or fewer if memory ran out with more before."""
        return MicroBatch(min(most, self._rows.get(identity, most)))

    def remember(self, identity: str, rows: int) -> None:
        """Remembers that memory ran out in a model's calls of more than so many rows."""
        self._rows[identity] = rows

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Surrounds calls of labelers: no gradients, and matrices in the dtype asked for. Tokenizers stay with float32."""
        import torch

        dtype = self.dtype
        with torch.inference_mode():
            if dtype == "float32":
                yield
            else:
                with torch.autocast(self.device.partition(":")[0], dtype=getattr(torch, dtype)):
                    yield

    @property
    def dtype(self) -> str:
        """Returns the dtype to compute in: `auto` is bfloat16 on CUDA, else float32."""
        if self._dtype != "auto":
            return self._dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"

    def _get(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._make_room(self.bytes_of(name))
            # Another worker of this process would also count the memory of this model as its own.
            with ALONE:
                start = time.monotonic()
                before = self._allocated()
                model = load()
                self._sizes[name] = max(self._allocated() - before, 0) if self._on_cuda else _bytes_of_modules(model)
                self.load_s += time.monotonic() - start
            self._make_room(self._sizes[name])
            self._loaded[name] = model
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _make_room(self, needed: int) -> None:
        """Lets the least recently used go, until so many bytes are left under the limit or nothing is held."""
        while self._loaded and needed + sum(map(self.bytes_of, self._loaded)) > self.limit_bytes:
            self._loaded.popitem(last=False)

    @property
    def _on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _allocated(self) -> int:
        """Returns the bytes of the GPU's memory that this process's tensors have."""
        if not self._on_cuda:
            return 0
        import torch

        return torch.cuda.memory_allocated(self.device)


def _built(name: str, parameters: Mapping[str, Any], device: str) -> labelers.Labeler:
    try:
        return labelers.build(labelers.find(name), parameters, device)
    except (ModmillError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ModmillError(f"labeler {name!r} does not load: {type(error).__name__}: {error}") from error


def _modules(model: Any) -> list[tuple[str, Any]]:
    """Returns the torch modules that are attributes of a labeler or tokenizer."""
    found = [(name, value) for name, value in vars(model).items() if hasattr(value, "parameters")]
    return [(name, value) for name, value in found if inspect.ismethod(value.parameters)]


def _bytes_of_modules(model: Any) -> int:
    """Returns the bytes of the parameters and buffers of a model's torch modules; 0 if it has no module."""
    tensors = [tensor for _, module in _modules(model) for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _compile(labeler: labelers.Labeler) -> None:
    """Puts each torch module of a labeler through torch.compile; batches have one shape, so one graph serves."""
    import torch

    for name, module in _modules(labeler):
        setattr(labeler, name, torch.compile(module))
