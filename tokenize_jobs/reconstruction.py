"""Measures a grid tokenizer: errors of reconstruction in their units, and the use of the codebook."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Int64

from tokenize_jobs.grid import GridTokenizer, chunks
from tokenize_jobs.grids.coding import Coding

# An edge counts as found if another one is drawn within this distance.
_EDGE_TOLERANCE_PX = 2
# A perfect row would have an infinite PSNR and spoil the mean.
_PSNR_CAP_DB = 100.0


def measure(tokenizer: GridTokenizer, labels: np.ndarray) -> dict[str, float]:
    """Returns figures of labels (N, *shape), N >= 1, that the tokenizer was not fitted on.

    They are means over the rows that have any valid pixel, by the rule of the coding:

        range        psnr_db; for black-and-white line drawings also edge_f1 (0..1, lines within 2 px)
        direction    angle_deg, the mean angle between vectors
        standardize  abs_error_std, in trimmed standard deviations of the crop
        classes      pixel_accuracy and miou (over classes that occur), 0..1
        plain        cosine, the mean cosine between features, -1..1

    Each also comes with the prefix `flat_`, for the best picture of one color (or value, or class) a row: a tokenizer must
    beat that. Then follow `codebook_use` (codes used at all / codes), `entropy_bits` and `perplexity` of the codes.
    """
    coding = tokenizer.coding
    tokens = [tokenizer.encode(part) for part in chunks(labels)]
    counts = np.bincount(np.concatenate([row for part in tokens for row in part]), minlength=tokenizer.spec.vocabulary)
    # Generators, so that one batch is decoded at a time.
    decoded = ((part, tokenizer.decode(of_part)) for part, of_part in zip(chunks(labels), tokens, strict=True))
    flattened = ((part, flat(coding, part)) for part in chunks(labels))
    figures = figures_of(coding, decoded)
    figures |= {f"flat_{name}": value for name, value in figures_of(coding, flattened).items()}
    return figures | codebook_figures(counts)


def figures_of(coding: Coding, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Returns figures of labels against decoded labels, both (B, *shape), over all batches."""
    rows: dict[str, list[float]] = {}
    confusion = np.zeros((coding.classes, coding.classes), dtype=np.int64)
    for labels, decoded in pairs:
        if coding.rule == "classes":
            confusion += _confusion(coding, labels, decoded)
            continue
        for name, values in _errors(coding, labels, decoded).items():
            rows.setdefault(name, []).extend(values)
    if coding.rule == "classes":
        return _class_figures(confusion)
    return {name: float(np.mean(values)) for name, values in rows.items() if values}


def codebook_figures(counts: Int64[np.ndarray, "K"]) -> dict[str, float]:
    """Returns use, entropy in bits and perplexity of a codebook, from how often each code was chosen (not all 0)."""
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log2(share)).sum())
    return {"codebook_use": len(share) / len(counts), "entropy_bits": entropy, "perplexity": 2.0**entropy}


def flat(coding: Coding, labels: np.ndarray) -> np.ndarray:
    """Returns labels of one value a row: the mean of its valid pixels, or its commonest class."""
    inputs, valid = coding.prepare(labels, coding.scaling(labels))
    if coding.rule == "classes":
        kept = [np.bincount(row[mask], minlength=coding.classes) for row, mask in zip(inputs, valid, strict=True)]
        outputs = np.stack(kept)[:, None, None]
    else:
        weight = valid[..., None].astype(np.float32)
        outputs = (inputs * weight).sum((1, 2), keepdims=True) / weight.sum((1, 2), keepdims=True).clip(min=1)
    return np.broadcast_to(coding.finish(outputs), labels.shape)


def _errors(coding: Coding, labels: np.ndarray, decoded: np.ndarray) -> Mapping[str, list[float]]:
    """Returns the figures of each row that has a valid pixel."""
    valid = coding.valid(labels)
    kept = [i for i in range(len(labels)) if valid[i].any()]
    if coding.rule == "range":
        figures = {"psnr_db": [_psnr_db(coding, labels[i][valid[i]], decoded[i][valid[i]]) for i in kept]}
        if not coding.channel_axis and np.isin(labels, (coding.low, coding.high)).all():
            middle = (coding.low + coding.high) / 2
            figures["edge_f1"] = [edge_f1(labels[i] > middle, decoded[i] > middle) for i in kept]
        return figures
    if coding.rule == "direction":
        cosines = [(labels[i][valid[i]] * decoded[i][valid[i]]).sum(-1).clip(-1, 1) for i in kept]
        return {"angle_deg": [float(np.degrees(np.arccos(cosine)).mean()) for cosine in cosines]}
    if coding.rule == "plain":
        return {"cosine": [_cosine(labels[i][valid[i]], decoded[i][valid[i]]) for i in kept]}
    inputs, _ = coding.prepare(labels, coding.scaling(labels))
    target = inputs.reshape(labels.shape)
    return {"abs_error_std": [float(np.abs(target[i] - decoded[i])[valid[i]].mean()) for i in kept]}


def _cosine(label: np.ndarray, decoded: np.ndarray) -> float:
    lengths = np.linalg.norm(label, axis=-1) * np.linalg.norm(decoded, axis=-1)
    return float(((label * decoded).sum(-1) / lengths.clip(min=1e-12)).mean())


def _psnr_db(coding: Coding, label: np.ndarray, decoded: np.ndarray) -> float:
    error = float(np.square(label.astype(np.float64) - decoded).mean()) / (coding.high - coding.low) ** 2
    return min(_PSNR_CAP_DB, -10 * float(np.log10(max(error, 1e-12))))


def edge_f1(label: np.ndarray, decoded: np.ndarray) -> float:
    """Returns F1 of boolean line drawings (H, W); a line within 2 px of the other drawing's is a hit. 1 if both are empty."""
    if not label.any() and not decoded.any():
        return 1.0
    hit = (decoded & _widened(label)).sum() / max(1, decoded.sum())
    found = (label & _widened(decoded)).sum() / max(1, label.sum())
    return float(2 * hit * found / max(hit + found, 1e-9))


def _widened(lines: np.ndarray) -> np.ndarray:
    side = 2 * _EDGE_TOLERANCE_PX + 1
    picture = torch.from_numpy(lines.astype(np.float32))[None]
    return torch.nn.functional.max_pool2d(picture, side, stride=1, padding=_EDGE_TOLERANCE_PX)[0].numpy() > 0


def _confusion(coding: Coding, labels: np.ndarray, decoded: np.ndarray) -> Int64[np.ndarray, "classes classes"]:
    """Counts how many valid pixels of each class (row) were decoded as each class (column)."""
    valid = coding.valid(labels)
    pairs = labels[valid].astype(np.int64) * coding.classes + decoded[valid]
    return np.bincount(pairs, minlength=coding.classes**2).reshape(coding.classes, coding.classes)


def _class_figures(table: Int64[np.ndarray, "classes classes"]) -> dict[str, float]:
    hits, union = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    occurs = table.sum(1) > 0
    if not occurs.any():
        return {}
    return {"pixel_accuracy": float(hits.sum() / table.sum()), "miou": float((hits[occurs] / union[occurs]).mean())}
