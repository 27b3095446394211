"""The vocabulary: places in the tables, marks of sequences, and snapshots that one model cannot read together."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from manifests.errors import ConfigError
from train.data.vocabulary import Vocabulary, of_snapshots

Make = Callable[..., object]
MODALITIES = ("rgb", "depth", "caption", "metadata", "boxes")


@pytest.fixture(scope="module")
def made(token_workspace: Make, tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> object:
    return token_workspace(tmp_path_factory.mktemp("vocabulary") / "work", {"photos": (12, MODALITIES)})


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_tokenizers_have_their_own_rows_and_sequences_share_those_of_theirs(made) -> None:
    snapshot = made.snapshot("all")
    vocabulary = of_snapshots([snapshot])
    assert [modality.name for modality in vocabulary.modalities] == sorted(MODALITIES)
    rows = {modality.digest: (modality.offset, modality.vocabulary) for modality in vocabulary.modalities}
    assert sum(size for _, size in rows.values()) == vocabulary.size
    spans = sorted(rows.values())
    assert all(first + size == begin for (first, size), (begin, _) in itertools.pairwise(spans))
    assert len({vocabulary[name].offset for name in ("caption", "metadata", "boxes")}) == 1
    assert vocabulary["rgb"].side == 14
    assert vocabulary["caption"].side is None


def test_marks_are_those_of_the_text_tokenizer(made) -> None:
    snapshot = made.snapshot("all")
    caption, metadata = (of_snapshots([snapshot])[name] for name in ("caption", "metadata"))
    tokens = json.loads((Path(snapshot.storage.root) / caption.path / "tokenizer.json").read_text())["added_tokens"]
    names = {token["id"]: token["content"] for token in tokens}
    assert names[caption.end] == "[EOS]"
    assert names[caption.first_sentinel] == "[S_0]"
    assert names[caption.first_sentinel + caption.sentinels - 1] == f"[S_{caption.sentinels - 1}]"
    assert caption.record_start is None
    assert metadata.record_start is not None
    assert (names[metadata.record_start[0]], names[metadata.record_start[1] - 1]) == ("v1=0", "v1=999")


def test_sequences_are_cut_and_grids_are_not(made) -> None:
    vocabulary = of_snapshots([made.snapshot("all")], most_tokens=20)
    assert vocabulary["caption"].tokens == vocabulary["metadata"].tokens == 20
    assert vocabulary["rgb"].tokens == 196


def test_a_document_is_the_vocabulary_again(made) -> None:
    vocabulary = of_snapshots([made.snapshot("all")])
    assert Vocabulary.from_document(json.loads(json.dumps(vocabulary.document()))) == vocabulary


def test_snapshots_of_other_tokenizers_are_refused_and_unknown_names_are_told(made) -> None:
    snapshot = made.snapshot("all")
    changed = [replace(one, tokenizer_digest="0" * 64) for one in snapshot.modalities if one.modality == "rgb"]
    with pytest.raises(ConfigError, match="modality 'rgb' is tokenized by rgb-000000000000"):
        of_snapshots([snapshot, replace(snapshot, modalities=tuple(changed))])
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        of_snapshots([snapshot])["dept"]
    with pytest.raises(ConfigError, match="no modality with tokens"):
        of_snapshots([])


def test_a_text_tokenizer_without_its_marks_is_told(made, tmp_path: Path) -> None:
    snapshot = made.snapshot("all")
    moved = [replace(one, tokenizer_path="tokenizers/none") for one in snapshot.modalities if one.is_sequence]
    with pytest.raises(ConfigError, match=r"tokenizers/none/tokenizer.json: no text tokenizer with \[EOS\]"):
        of_snapshots([replace(snapshot, modalities=tuple(moved))])
