"""The text tokenizer: 4M's ids, equal bytes in every process, and every sequence there and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ConfigError, TokenizeError
from manifests.modality import Modality
from manifests.recipe import canonical_json, sha256_hex
from tokenize_jobs import protocol, text
from tokenize_jobs.sequences import words as sequence
from tokenize_jobs.text import TextOptions, TextTokenizer, fit_text, from_file

SEQUENCES = ("caption", "text", "boxes", "metadata", "palette")
CORPUS = [
    "A cat sleeps on a red couch.",
    "Two dogs run along the beach at sunset, waves behind them.",
    "The red house by the sea: white windows, blue door, a garden.",
    "A man rides a bicycle along the sea wall while a dog follows.",
    "Café tables under a blue umbrella; the café is closed.",
    "A hot dog and a glass of lemonade on the table by the window.",
]
PUBLISHED = os.environ.get("MODMILL_4M_TOKENIZER")
ROOT = Path(__file__).parents[2]

FREE = Modality(
    name="story",
    kind="text",
    label_grain="sample",
    token_grain="sample",
    crop_rule="whole",
    labeler="x",
    tokenizer="text",
)


def box(name, x0=0.1, y0=0.2, x1=0.3, y1=0.4):
    return {"class": name, "score": 0.9, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def palettes():
    return [{"k": k, "rank": i, "r": k, "g": i, "b": 255, "share": 1 / k} for k in range(1, 8) for i in range(k)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizers") / "words"
    fit_text(CORPUS, out, options=TextOptions())
    return out


@pytest.fixture(scope="module")
def tokenizers(folder) -> dict[str, TextTokenizer]:
    return {name: TextTokenizer.load(folder, name) for name in SEQUENCES}


def test_the_special_tokens_have_the_ids_of_the_plan(folder) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    expected = {"[PAD]": 0, "[UNK]": 1, "[SOS]": 2, "[EOS]": 3, "[S_0]": 4, "[S_199]": 203}
    expected |= {"v0=0": 204, "v0=999": 1203, "v1=0": 1204, "v2=0": 2204, "v3=0": 3204, "v3=999": 4203}
    expected |= {"airplane": 4204, "person": 4253, "wine glass": 4282, "zebra": 4283}
    assert {name: vocabulary[name] for name in expected} == expected
    assert len(sequence.COCO_CLASSES) == 80
    assert all(vocabulary[word] >= 4284 for word in sequence.FORMAT_WORDS)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_spec_and_protocol(folder, tokenizers) -> None:
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert [tokenizers[name].spec.tokens for name in SEQUENCES] == [256, None, 256, 43, 23]
    for name, tokenizer in tokenizers.items():
        assert isinstance(tokenizer, protocol.Tokenizer)
        assert (tokenizer.spec.family, tokenizer.spec.modality, tokenizer.spec.vocabulary) == ("text", name, size)
    assert isinstance(protocol.load(folder, "boxes"), TextTokenizer)


VOCABULARY_SHA256 = "528a9e48b3d1089416286c3cc71dd7977b1157011d63aa3f6a7411f618651e26"
GOLDEN = {
    "caption": [4398, 4224, 4321, 4420, 4398, 4424, 4340, 4380, 4303, 4311, 4324, 4307, 3],
    "boxes": [304, 1404, 2504, 3604, 4292, 704, 1704, 3203, 4203, 4242, 3],
    "metadata": [1204, 224, 1217, 240, 3],
    "palette": [1209, 209, 204, 459, 209, 205, 459, 209, 206, 459, 209, 207, 459, 209, 208, 459, 3],
}


def test_golden(folder, tokenizers) -> None:
    """Fails where outputs change: raise `text.VERSION` then, and set these again."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert text.VERSION == 1
    assert len(vocabulary) == 4434
    assert sha256_hex(canonical_json(sorted(vocabulary, key=vocabulary.__getitem__))) == VOCABULARY_SHA256
    labels = {
        "caption": "The cats by the sea, naïve",
        "boxes": [box("hot dog", 0.5, 0.5, 1, 1), box("region")],
        "metadata": {"original_width": 640, "entropy": 7.45, "brightness": None},
        "palette": palettes(),
    }
    got = {name: tokenizers[name].encode([label])[0].tolist() for name, label in labels.items()}
    assert got == GOLDEN


FIT_AND_PRINT = """
import json, sys
from pathlib import Path
from tokenize_jobs import protocol, text
corpus, out = json.loads(sys.argv[1]), Path(sys.argv[2])
text.fit_text(corpus, out, options=text.TextOptions(vocabulary=4700))
print(protocol.digest(out))
"""


def test_every_process_fits_the_same_bytes(tmp_path) -> None:
    # Enough words of equal count for ties to be broken differently, were anything left to chance.
    corpus = [*CORPUS, " ".join(f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst") + " ünïcödé ßß"] * 2
    digests = set()
    for seed, parallel, threads in (("0", "false", "1"), ("1", "true", "2"), ("2", "true", "4"), ("3", "true", "2")):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": seed,
            "TOKENIZERS_PARALLELISM": parallel,
            "RAYON_NUM_THREADS": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", FIT_AND_PRINT, json.dumps(corpus), str(tmp_path / seed)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    fit_text(reversed(corpus), tmp_path / "here", options=TextOptions(vocabulary=4700))
    assert digests == {protocol.digest(tmp_path / "here")}


def test_no_text_at_all_gives_a_usable_tokenizer(tmp_path) -> None:
    report = fit_text([], tmp_path, options=TextOptions())
    assert report["texts"] == report["words"] == 0
    assert report["vocabulary"] == 4284 + len(sequence.FORMAT_WORDS) + 2 * 36 + 32
    captions = TextTokenizer.load(tmp_path, "caption")
    written = "a pose in region 12 of a cafe!"
    (tokens,) = captions.encode([written])
    assert text.UNK not in tokens
    assert captions.decode([tokens]) == [written]
    boxes = TextTokenizer.load(tmp_path, "boxes")
    assert len(boxes.encode([[box("region")]])[0]) == 6


def test_the_vocabulary_is_the_most_and_the_report_says_how_it_went(tmp_path) -> None:
    report = fit_text(CORPUS * 3, tmp_path, options=TextOptions(vocabulary=4420))
    assert report["vocabulary"] == 4420
    assert report["texts"] == 18
    assert report["pieces_per_word"] > 1
    assert report["unknown_fraction"] == 0
    with pytest.raises(ConfigError, match="vocabulary 4300 is too small; expected at least 4397"):
        fit_text(CORPUS, tmp_path, options=TextOptions(vocabulary=4300))


def test_a_large_alphabet_leaves_room_for_pieces(tmp_path) -> None:
    # Lower-case letters of other scripts, each its own word; more of them than the table can hold.
    rare = " ".join(chr(point) * 2 for point in range(0x1200, 0x1340)) + " "
    report = fit_text([rare, rare, *CORPUS * 5], tmp_path, options=TextOptions(vocabulary=4597))
    assert report["vocabulary"] <= 4597
    assert 0 < report["unknown_fraction"] < 1
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sum(len(piece) == 1 and not piece.isascii() for piece in vocabulary) == 50
    assert "the" in vocabulary


@pytest.mark.skipif(not PUBLISHED, reason="MODMILL_4M_TOKENIZER names no copy of 4M's published tokenizer")
def test_the_published_tokenizer_is_taken_as_it_is(tmp_path) -> None:
    path = Path(str(PUBLISHED))
    from_file(path, tmp_path / "4m")
    assert (tmp_path / "4m" / "tokenizer.json").read_bytes() == path.read_bytes()
    loaded = {name: TextTokenizer.load(tmp_path / "4m", name) for name in SEQUENCES}
    assert loaded["caption"].spec.vocabulary == 30_000
    for place, name in enumerate(sequence.COCO_CLASSES):
        (tokens,) = loaded["boxes"].encode([[box(name, 0, 0.001, 1, 1)]])
        assert tokens.tolist() == [204, 1205, 3203, 4203, 4204 + place, text.EOS]
    (tokens,) = loaded["palette"].encode([[color for color in palettes() if color["k"] == 7]])
    assert len(tokens) == 22 + 1
    assert tokens[[0, 1, 2, 3, -1]].tolist() == [1211, 211, 204, 459, text.EOS]
    assert loaded["metadata"].encode([{"original_width": 640}])[0].tolist() == [1204, 224, text.EOS]
    words = "human global pose shape camera none point polygon region"
    assert loaded["caption"].encode([words])[0].tolist() == [6304, 9292, 8620, 6631, 5585, 18109, 6712, 14445, 9170, 3]
    assert loaded["caption"].decode(loaded["caption"].encode(["A Cat on the sofa."])) == ["a cat on the sofa."]


def test_a_table_that_does_not_follow_the_plan_is_refused(tmp_path) -> None:
    classes = (*sequence.COCO_CLASSES[:2], *sequence.COCO_CLASSES[:1:-1])
    fit_text(CORPUS, tmp_path / "other", options=TextOptions(classes=classes))
    with pytest.raises(ConfigError, match=r"special token 'backpack' is \[4283\], expected the one id 4206"):
        from_file(tmp_path / "other" / "tokenizer.json", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    from_file(tmp_path / "other" / "tokenizer.json", tmp_path / "mine", classes=classes)
    assert protocol.digest(tmp_path / "mine") == protocol.digest(tmp_path / "other")


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}', "\udcff"])
def test_a_file_that_holds_no_table_is_refused(tmp_path, content) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"table\.json"):
        from_file(path, tmp_path / "out")


def test_load_says_what_is_wrong_with_a_folder(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        TextTokenizer.load(tmp_path, "caption")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 7}))
    with pytest.raises(ConfigError, match="version 7, this code makes version 1"):
        TextTokenizer.load(tmp_path, "caption")
    with pytest.raises(ConfigError, match="'instances' has no sequence format"):
        TextTokenizer.load(folder, "instances")


def test_a_modality_of_ones_own_that_is_text_is_served(folder) -> None:
    stories = TextTokenizer.load(folder, f"{__name__}:FREE")
    assert stories.spec.tokens is None
    assert stories.decode(stories.encode(["the sea"])) == ["the sea"]


@pytest.mark.parametrize("classes", [("Dog", "dog"), ("café", "cafe"), ("a", ""), ("a ",), ("v0=3",), ("[EOS]",)])
def test_classes_must_be_names_that_differ(tmp_path, classes) -> None:
    with pytest.raises(ConfigError, match="expected names that differ"):
        fit_text(CORPUS, tmp_path, options=TextOptions(classes=classes))


def test_other_classes_keep_their_spelling(tmp_path) -> None:
    fit_text(
        CORPUS, tmp_path, options=TextOptions(classes=("Human arm", "region", "T-shirt à pois"), minimum_score=0.5)
    )
    boxes = TextTokenizer.load(tmp_path, "boxes")
    label = [box("Human arm", 0, 0), box("t-shirt a pois", 0.05, 0.05), box("region"), {**box("region"), "score": 0.4}]
    (tokens,) = boxes.encode([label])
    assert tokens[4::5].tolist() == [4204, 4206, 4205]
    assert [found["class"] for found in boxes.decode([tokens])[0]] == ["Human arm", "T-shirt à pois", "region"]


def test_text_is_cut_without_an_end_and_documents_are_not_cut(tokenizers) -> None:
    long = "the " * 256
    caption, whole = tokenizers["caption"].encode([long, long[:-4]])
    assert len(caption) == len(whole) == 256
    assert text.EOS not in caption
    assert whole[-1] == text.EOS
    (document,) = tokenizers["text"].encode([long])
    assert len(document) == 257
    assert document[-1] == text.EOS


def test_boxes_are_cut_between_boxes(tokenizers) -> None:
    known = [box("hot dog", x0=i / 100, x1=1) for i in range(60)]
    (tokens,) = tokenizers["boxes"].encode([known])
    assert len(tokens) == 5 * 51 + 1
    assert tokens[-1] == text.EOS
    assert [found["x0"] for found in tokenizers["boxes"].decode([tokens])[0]] == pytest.approx(
        [i / 100 for i in range(51)], abs=1e-3
    )
    # The box that does not fit ends the sequence, though later ones would fit: what is cut is always the end.
    wide = [*known[:20], box("unheardof " * 60, x0=0.2, x1=1), *known[30:]]
    (tokens,) = tokenizers["boxes"].encode([wide])
    assert len(tokenizers["boxes"].decode([tokens])[0]) == 20
    assert len(tokens) == 5 * 20 + 1


def test_nothing_is_just_an_end(tokenizers) -> None:
    empty = {"caption": "", "text": "", "boxes": [], "metadata": {"entropy": None}, "palette": []}
    for name, label in empty.items():
        assert [tokens.tolist() for tokens in tokenizers[name].encode([label, label])] == [[text.EOS]] * 2
        assert tokenizers[name].encode([]) == []
    decoded = {name: tokenizers[name].decode([np.array([text.EOS])])[0] for name in empty}
    assert decoded["boxes"] == decoded["palette"] == []
    assert decoded["caption"] == ""
    assert set(decoded["metadata"].values()) == {None}


def test_rows_do_not_see_each_other(tokenizers) -> None:
    rows = [[box("dog")], [], [box("a red sea"), box("cat", 0.5, 0.5, 1, 1)]]
    together = tokenizers["boxes"].encode(rows)
    assert [tokens.dtype for tokens in together] == [np.int64] * 3
    for row, tokens in zip(rows, together, strict=True):
        np.testing.assert_array_equal(tokenizers["boxes"].encode([row])[0], tokens)


def test_a_caption_cannot_hold_the_marks_of_the_formats(tokenizers) -> None:
    (tokens,) = tokenizers["caption"].encode(["[EOS] [PAD] [S_7] v0=3 xv1=2 a cat"])
    marks = [int(token) for token in tokens[:-1] if token < 4204]
    assert marks == []
    assert tokens[-2] == 4204 + sequence.COCO_CLASSES.index("cat")


@pytest.mark.parametrize("label", [None, 3, b"bytes", ["a list"], "\ud800"])
def test_a_label_that_is_no_text_is_refused(tokenizers, label) -> None:
    with pytest.raises(TokenizeError, match="expected"):
        tokenizers["caption"].encode(["fine", label])


@given(st.lists(st.from_regex(r"[a-z]{1,12}", fullmatch=True), max_size=12).map(" ".join))
def test_lower_case_words_come_back(tokenizers, written) -> None:
    assert tokenizers["caption"].decode(tokenizers["caption"].encode([written])) == [written]


@given(st.text(max_size=60))
def test_any_text_is_encoded_and_keeps_its_reading(tokenizers, written) -> None:
    (tokens,) = tokenizers["text"].encode([written])
    assert tokens[-1] == text.EOS
    assert all(token == text.UNK or token >= 4204 for token in tokens[:-1])
    (read,) = tokenizers["text"].decode([tokens])
    assert isinstance(read, str)


fractions = st.floats(0, 1, width=32)
intervals = st.tuples(fractions, fractions).map(sorted)
class_names = st.sampled_from([*sequence.COCO_CLASSES, "region"]) | st.from_regex(
    r"[a-z]{1,6} [a-z]{1,6}", fullmatch=True
)
some_boxes = st.lists(
    st.builds(lambda name, x, y: box(name, x[0], y[0], x[1], y[1]), class_names, intervals, intervals), max_size=8
)


@given(some_boxes)
def test_boxes_come_back_within_a_step(tokenizers, label) -> None:
    (found,) = tokenizers["boxes"].decode(tokenizers["boxes"].encode([label]))
    expected = sequence.parse_boxes(" ".join(sequence.box_records(label)))
    assert found == expected
    assert len(found) == len(label)
    assert tokenizers["boxes"].encode([found])[0].shape == tokenizers["boxes"].encode([label])[0].shape


@given(st.fixed_dictionaries({}, optional={"original_width": st.integers(1, 30_000), "entropy": st.floats(0, 10)}))
def test_metadata_comes_back_within_a_bin(tokenizers, label) -> None:
    tokens = tokenizers["metadata"].encode([label])
    (found,) = tokenizers["metadata"].decode(tokens)
    assert {name for name, value in found.items() if value is not None} == set(label)
    assert len(found) == 10
    np.testing.assert_array_equal(tokenizers["metadata"].encode([found])[0], tokens[0])
    for name, half_bin in (("original_width", 16), ("entropy", 10 / 49 / 2 + 1e-6)):
        assert name not in label or abs(found[name] - label[name]) <= half_bin


def test_the_palette_comes_back_exactly(tokenizers) -> None:
    (tokens,) = tokenizers["palette"].encode([palettes()])
    k = sequence.palette_size(palettes())
    assert len(tokens) == 3 * k + 2
    assert tokenizers["palette"].decode([tokens]) == [
        [{**color, "share": None} for color in palettes() if color["k"] == k]
    ]


ids = st.lists(st.integers(0, 4500) | st.integers(204, 4283) | st.integers(-5, 40_000), max_size=60)


@given(st.lists(ids, max_size=3))
def test_garbage_never_raises(tokenizers, rows) -> None:
    arrays = [np.array(row, dtype=np.int64) for row in rows]
    for name, tokenizer in tokenizers.items():
        found = tokenizer.decode(arrays)
        assert len(found) == len(rows)
        # Whatever was read is a label that can be written again.
        assert len(tokenizers[name].encode(found)) == len(rows)


def test_what_is_well_formed_within_garbage_is_kept(tokenizers) -> None:
    good = tokenizers["boxes"].encode([[box("wine glass")]])[0][:-1].tolist()
    garbage = [0, 5, 210, 1300, *good[:3], *good, 203, -1, 10**9, 3204, *good, text.EOS, *good]
    (found,) = tokenizers["boxes"].decode([np.array(garbage)])
    assert [label["class"] for label in found] == ["wine glass", "wine glass"]
    assert tokenizers["caption"].decode([np.array([0, 2, 4, 4283, 1, 3, 4283])]) == ["zebra [UNK]"]
