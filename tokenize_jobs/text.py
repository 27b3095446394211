"""Tokenizes sequences by WordPiece with 4M's plan of special tokens; one tokenizer serves captions, documents, boxes,
metadata and palettes.

A folder holds `tokenizer.json` (the format of Hugging Face's `tokenizers`) and `config.json`:

    {"family": "text", "version": 1, "classes": [...], "minimum_score": 0.0}

The first ids follow the plan of 4M's published tokenizer (apple/ml-4m, fourm/utils/tokenizer/text_tokenizer.py):

    0 [PAD]  1 [UNK]  2 [SOS]  3 [EOS]  4.. [S_0]..[S_199]  204.. v0=0..v0=999  1204.. v1=  2204.. v2=  3204.. v3=
    4204.. the class names, one token each, in captions too (COCO's 80, so the learned pieces begin at 4284)
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from manifests.errors import ConfigError, TokenizeError
from manifests.modality import Modality, get
from tokenize_jobs.protocol import TokenizerSpec
from tokenize_jobs.sequences import words as sequence

VERSION = 1
PAD, UNK, SOS, EOS = range(4)
SENTINELS = 200

_NORMALIZER = normalizers.BertNormalizer(lowercase=True)
_PREFIX = "##"
_WORD_MOST = 100
_ALPHABET = ascii_lowercase + digits + punctuation


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Holds what decides a fitted tokenizer besides its texts.

    vocabulary     the most ids that it may have, special tokens included; a small corpus gives fewer
    min_frequency  how often a pair of pieces (or a character beyond ASCII) must occur to become a piece
    classes        names that are one token each, from id 4204 on
    minimum_score  boxes with a lower score are not written; 4M's is `words.FOURM_MINIMUM_SCORE`
    """

    vocabulary: int = 30_000
    min_frequency: int = 2
    classes: tuple[str, ...] = sequence.COCO_CLASSES
    minimum_score: float = sequence.MINIMUM_SCORE


class TextTokenizer:
    """Turns labels of one sequence modality into WordPiece ids and back.

    Labels are as labelers make them: a str for kind `text`, a list of dicts for `boxes` and `palette`, a dict for
    `metadata`. A row of tokens ends with [EOS]. A row longer than the modality allows is cut: text after its first
    tokens, without [EOS], so that the cut can be seen; records between two of them, with [EOS].
    """

    def __init__(self, table: Tokenizer, modality: Modality, *, classes: Sequence[str], minimum_score: float) -> None:
        self.spec = TokenizerSpec(
            family="text",
            version=VERSION,
            modality=modality.name,
            vocabulary=table.get_vocab_size(),
            tokens=modality.tokens,
        )
        self._table = table
        # The table decodes a class name to its normal form; this restores the spelling.
        self._class_names = {_NORMALIZER.normalize_str(name): name for name in classes}
        self._fields = tuple(modality.fields)
        self._records, self._parse = self._format(modality, minimum_score)

    @classmethod
    def load(cls, folder: Path, modality: str) -> Self:
        """Loads the tokenizer in `folder` for `modality`.

        Raises ConfigError if the folder holds no tokenizer of this version, or if the modality has no sequence format.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            version, classes, minimum_score = config["version"], config["classes"], config["minimum_score"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: no text tokenizer's config.json ({error!r}); expected version, classes and minimum_score"
            ) from error
        if version != VERSION:
            raise ConfigError(
                f"{path}: version {version!r}, this code makes version {VERSION}; fit the tokenizer again"
            )
        table = _read_table(folder / "tokenizer.json", classes)
        return cls(table, get(modality), classes=classes, minimum_score=minimum_score)

    def encode(self, labels: Sequence[Any] | np.ndarray) -> list[np.ndarray]:
        """Returns B int64 arrays of at most `spec.tokens` ids. Raises TokenizeError if a label is not of its kind."""
        if self._records is None:
            return self._encode_text(labels)
        rows = [self._records(label) for label in labels]
        encoded = iter(self._encode_strings([record for row in rows for record in row]))
        return [self._whole_records([next(encoded) for _ in row]) for row in rows]

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """Returns B labels. Never raises, whatever the tokens are: records that are not well formed are left out.

        A row ends at its first [EOS]; [PAD], [SOS], sentinels and ids outside the table are dropped. [UNK] stays, since
        it stands for something in the label.
        """
        rows = [self._content(row) for row in tokens]
        return [self._parse(text) for text in self._table.decode_batch(rows, skip_special_tokens=False)]

    def _encode_text(self, labels: Sequence[Any] | np.ndarray) -> list[np.ndarray]:
        for label in labels:
            if not isinstance(label, str):
                raise TokenizeError(f"{self.spec.modality} label is a {type(label).__name__}, expected a str")
        rows = self._encode_strings([sequence.plain(label) for label in labels])
        return [np.array([*ids, EOS][: self.spec.tokens], dtype=np.int64) for ids in rows]

    def _encode_strings(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoded.ids for encoded in self._table.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            # The only str that the library does not take has lone surrogates, which no UTF-8 file can hold.
            raise TokenizeError(f"text is no valid Unicode ({error}); expected no lone surrogates") from error

    def _whole_records(self, records: list[list[int]]) -> np.ndarray:
        ids: list[int] = []
        for record in records:
            if self.spec.tokens is not None and len(ids) + len(record) + 1 > self.spec.tokens:
                break
            ids += record
        return np.array([*ids, EOS], dtype=np.int64)

    def _content(self, row: np.ndarray) -> list[int]:
        ids = np.asarray(row).tolist()
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return [i for i in ids if i == UNK or EOS + SENTINELS < i < self.spec.vocabulary]

    def _format(
        self, modality: Modality, minimum_score: float
    ) -> tuple[Callable[[Any], list[str]] | None, Callable[[str], Any]]:
        """Returns the writer of a label's records (None if a label is one string), and the parser of the whole string."""
        if modality.kind == "text":
            return None, str
        match modality.base_name:
            case "boxes":
                return partial(sequence.box_records, minimum_score=minimum_score), self._parse_boxes
            case "metadata":
                return sequence.metadata_records, self._parse_metadata
            case "palette":
                return sequence.palette_records, sequence.parse_palette
        raise ConfigError(
            f"modality {modality.name!r} has no sequence format; expected boxes, metadata, palette or one of kind text"
        )

    def _parse_boxes(self, text: str) -> list[dict[str, Any]]:
        boxes = sequence.parse_boxes(text)
        return [{**box, "class": self._class_names.get(box["class"], box["class"])} for box in boxes]

    def _parse_metadata(self, text: str) -> dict[str, Any]:
        found = sequence.parse_metadata(text)
        return {name: found.get(name) for name in self._fields}


def fit_text(texts: Iterable[str], out: Path, *, options: TextOptions) -> dict[str, float]:
    """Fits a tokenizer to captions and documents and writes its folder.

    The bytes depend on the texts and the options alone; without any text the table holds characters only. Returns
    `texts`, `words`, `vocabulary`, `pieces_per_word` and `unknown_fraction` of the texts. Raises ConfigError if the
    vocabulary cannot hold the plan and the characters, or if two classes have one name.
    """
    plan = _plan(options.classes)
    counts, total = _count_words(texts)
    pieces = _learn(counts, [token.content for token in plan], options)
    table = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=_WORD_MOST))
    table.normalizer = _NORMALIZER
    table.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    table.decoder = decoders.WordPiece(prefix=_PREFIX)
    table.add_special_tokens(plan)
    _write(out, table.to_str().encode(), options.classes, options.minimum_score)
    return {"texts": float(total), "vocabulary": float(len(pieces)), **_coverage(table, counts)}


def from_file(path: Path, out: Path, *, classes: Sequence[str] = sequence.COCO_CLASSES) -> None:
    """Copies a `tokenizers` JSON file, such as the one that 4M publishes, byte for byte into a tokenizer's folder.

    Raises ConfigError if it is no such file, or if a special token does not have the id of the plan.
    """
    _read_table(path, classes)
    _write(out, path.read_bytes(), classes, sequence.MINIMUM_SCORE)


def _plan(classes: Sequence[str]) -> list[AddedToken]:
    """Returns the special tokens; a token's place is its id."""
    differ = len({_NORMALIZER.normalize_str(name) for name in classes}) == len(classes)
    if not differ or not all(name and " ".join(sequence.plain(name).split()) == name for name in classes):
        raise ConfigError(
            f"classes {list(classes)}: expected names that differ in more than case and accents, "
            "that are not empty, single-spaced, and no special tokens such as [EOS]"
        )
    controls = [AddedToken(name, special=True, normalized=False) for name in ("[PAD]", "[UNK]", "[SOS]", "[EOS]")]
    marks = [f"[S_{i}]" for i in range(SENTINELS)]
    marks += [f"v{family}={i}" for family in range(sequence.VALUE_FAMILIES) for i in range(sequence.BINS)]
    return [
        *controls,
        *(AddedToken(mark, special=True, single_word=True, normalized=False) for mark in marks),
        *(AddedToken(name, special=True, single_word=True, normalized=True) for name in classes),
    ]


def _read_table(path: Path, classes: Sequence[str]) -> Tokenizer:
    """Reads the table in a JSON file and checks that it follows the plan."""
    try:
        table = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: no tokenizers JSON file that can be read ({error})") from error
    table.no_truncation()
    table.no_padding()
    plan = [token.content for token in _plan(classes)]
    for place, encoded in enumerate(table.encode_batch_fast(plan, add_special_tokens=False)):
        if encoded.ids != [place]:
            raise ConfigError(
                f"{path}: special token {plan[place]!r} is {encoded.ids}, expected the one id {place} of 4M's plan; "
                "give the classes that the table was made with, or fit a tokenizer"
            )
    if max(table.get_vocab().values()) + 1 != table.get_vocab_size():
        raise ConfigError(f"{path}: the ids of its {table.get_vocab_size()} tokens have gaps; expected 0, 1, 2, ...")
    return table


def _write(out: Path, table: bytes, classes: Sequence[str], minimum_score: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_bytes(table)
    # Written last, so that a folder with a config.json is whole.
    config = {"family": "text", "version": VERSION, "classes": list(classes), "minimum_score": minimum_score}
    (out / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _count_words(texts: Iterable[str]) -> tuple[Counter[str], int]:
    """Counts how often each word occurs, split as for encoding, and how many texts there are."""
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        total += 1
        counts.update(word for word, _ in splitter.pre_tokenize_str(_NORMALIZER.normalize_str(text)))
    return counts, total


def _learn(counts: Counter[str], plan: list[str], options: TextOptions) -> dict[str, int]:
    """Learns all pieces and their ids: the plan, the words of the formats, characters inside words, characters, merges.

    The library's trainer numbers the characters inside words (`##a`) as it meets them in a hash map of random order,
    and breaks ties between pairs by those numbers, so two runs of it differ. Given to it as special tokens in sorted
    order, the characters have their numbers before it starts, and equal texts give equal tables. (They end as ordinary
    pieces.) The words of the formats are given in the same way: WordPiece takes the longest piece it finds, so a whole
    word in the table is one token, with or without merges that lead to it.
    """
    words = [word for word in sequence.FORMAT_WORDS if word not in plan]
    letters = set(ascii_lowercase + digits)
    base = len(plan) + len(words) + len(letters) + len(_ALPHABET)
    if options.vocabulary < base:
        raise ConfigError(f"vocabulary {options.vocabulary} is too small; expected at least {base}")
    alphabet = _alphabet(counts, options.min_frequency, most=(options.vocabulary - base) // 4)
    # A word that is too long, or has a character outside the alphabet, is [UNK] as a whole: nothing can be learned of it.
    known = {word: n for word, n in counts.items() if len(word) <= _WORD_MOST and alphabet.issuperset(word)}
    inside = sorted(letters.union(*(word[1:] for word in known)))
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.vocabulary,
        min_frequency=options.min_frequency,
        show_progress=False,
        special_tokens=[*plan, *words, *(_PREFIX + character for character in inside)],
        initial_alphabet=sorted(alphabet),
        continuing_subword_prefix=_PREFIX,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_repeated(known), trainer)
    return learner.get_vocab()


def _alphabet(counts: Counter[str], min_frequency: int, *, most: int) -> set[str]:
    """Returns ASCII, and the `most` commonest of the other characters that occur `min_frequency` times.

    Each may become two pieces (`x` and `##x`): given a quarter of the free vocabulary they leave half of it to merges.
    """
    others: Counter[str] = Counter()
    for word, n in counts.items():
        for character in word:
            if character not in _ALPHABET:
                others[character] += n
    common = sorted((-n, character) for character, n in others.items() if n >= min_frequency)[:most]
    return {*_ALPHABET, *(character for _, character in common)}


def _repeated(counts: Mapping[str, int], block: int = 1000) -> Iterator[str]:
    """Yields every word as often as it was counted, in sorted order, `block` to a string; the trainer counts them again."""
    for word in sorted(counts):
        whole, rest = divmod(counts[word], block)
        for n in (*[block] * whole, rest):
            yield " ".join([word] * n)


def _coverage(table: Tokenizer, counts: Counter[str], block: int = 10_000) -> dict[str, float]:
    """Returns `words`, `pieces_per_word` and `unknown_fraction`, each word counted as often as it occurs in the texts."""
    words = list(counts)
    pieces = unknown = 0
    for start in range(0, len(words), block):
        some = words[start : start + block]
        for word, encoded in zip(some, table.encode_batch_fast(some, add_special_tokens=False), strict=True):
            pieces += counts[word] * len(encoded.ids)
            unknown += counts[word] * (UNK in encoded.ids)
    total = max(1, counts.total())
    return {"words": float(counts.total()), "pieces_per_word": pieces / total, "unknown_fraction": unknown / total}


TOKENIZER = TextTokenizer
