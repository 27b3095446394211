"""What rows become in 4M's layout, row by row."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from engine.export import fourm
from engine.export.tar_writer import TarRow
from engine.export.tokenizers import TokenizerFolder
from manifests.errors import ShardError
from manifests.recipe import canonical_json, sha256_hex
from manifests.store.storage import open_storage
from tokenize_jobs.sequences.words import METADATA, box_records


def row(value: Any) -> TarRow:
    return TarRow(corpus="photos", part=0, row=0, key="k", values=[[value]], statuses={})


def boxes(*scores: float | None) -> list[dict[str, Any]]:
    return [
        {"class": f"c{n} [EOS]", "score": score, "x0": 0.1 * n, "y0": 0.2, "x1": 0.9, "y1": 0.8}
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_every_box_that_the_tokenizer_writes_is_one_that_4m_keeps(minimum: float) -> None:
    labels = boxes(0.1, 0.5, None, 0.9)
    (data,) = fourm._boxes(minimum, row(labels)).values()
    found = json.loads(data)["instances"]
    assert {box["score"] for box in found} == {1}
    records = [f"v0={round(box['boxes'][0] * 999)} {box['class_name']}" for box in found]
    written = box_records(labels, minimum_score=minimum)
    assert [record.split(" ", 1)[0] + " " + record.split(" ", 4)[4] for record in written] == records
    assert len(found) == (4 if minimum == 0 else 3)


def test_the_score_is_that_of_the_corpus_own_tokenizer(tmp_path) -> None:
    storage = open_storage(tmp_path)
    data = json.dumps({"family": "text", "minimum_score": 0.3}).encode()
    path, digest = "tokenizers/text-0123456789ab", sha256_hex(canonical_json({"config.json": sha256_hex(data)}))
    storage.put(f"{path}/config.json", data)
    tokenizer = TokenizerFolder(path=path, digest=digest)
    assert tokenizer.read(storage) == {"config.json": data}
    column: Any = SimpleNamespace(modality=SimpleNamespace(name="boxes"), tokenizer=tokenizer)
    rows: Any = SimpleNamespace(columns=[column], catalog=SimpleNamespace(storage=storage))
    assert fourm._minimum_score(rows) == 0.3
    rows.columns = []
    assert fourm._minimum_score(rows) == 0
    (tmp_path / path / "config.json").write_bytes(b"{}")
    with pytest.raises(ShardError, match="are not those that were committed"):
        tokenizer.read(storage)


def test_metadata_has_no_more_than_the_40_tokens_of_4m() -> None:
    every = dict.fromkeys(METADATA, 1)
    (data,) = fourm._metadata(row(every)).values()
    fields = list(json.loads(data))
    assert sorted(fields) == sorted(list(METADATA)[:19])
    # Two tokens a field and [EOS].
    assert 2 * len(fields) + 1 <= 40
    (data,) = fourm._metadata(row({**every, "entropy": None, "n_humans": None})).values()
    assert set(json.loads(data)) == set(METADATA) - {"entropy", "n_humans"}


def test_a_null_is_never_a_value() -> None:
    empty = TarRow(corpus="photos", part=0, row=0, key="k", values=[None], statuses={})
    for encode in fourm._ENCODERS.values():
        assert fourm._or_null(encode)(empty) == {"null": b""}
