"""The loss: nats a target, whatever a step is cut into."""

import math

import pytest
import torch
from torch import nn

from train.data.batch import MaskedBatch
from train.data.vocabulary import TokenModality, Vocabulary
from train.model import loss
from train.model.transformer import Model, ModelConfig

FACTS = {"tokenizer": "t", "digest": "d", "path": "p", "sequence": False, "tokens": 4}
VOCABULARY = Vocabulary(
    modalities=(
        TokenModality(name="depth", vocabulary=5, offset=0, **FACTS),
        TokenModality(name="edges", vocabulary=3, offset=5, **FACTS),
        TokenModality(name="rgb", vocabulary=7, offset=8, **FACTS),
    ),
    size=15,
)


def targets(modality: list[int], ids: list[int]) -> MaskedBatch:
    nothing = torch.empty(0, dtype=torch.int64)
    count = torch.zeros(len(ids), dtype=torch.int64)
    return MaskedBatch(
        samples=1,
        input_ids=nothing,
        input_modality=nothing,
        input_position=nothing,
        input_sample=nothing,
        target_ids=torch.tensor(ids),
        previous_ids=count - 1,
        target_modality=torch.tensor(modality),
        target_position=count,
        target_sample=count,
    )


@pytest.fixture
def model() -> Model:
    made = Model(VOCABULARY, ModelConfig(depth=1, dim=8, heads=1))
    made.initialize(0)
    return made


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary(model: Model) -> None:
    nn.init.zeros_(model.head.weight)
    masked = targets([0, 0, 2], [1, 4, 6])
    found = loss.sums(model, torch.randn(3, 8), masked)
    assert found.tolist() == pytest.approx([2 * math.log(5), 0.0, math.log(7)])
    assert loss.total(found, masked.counts(3)).item() == pytest.approx((math.log(5) + math.log(7)) / 2)


def test_micro_batches_add_up_to_the_step(model: Model) -> None:
    hidden = torch.randn(6, 8)
    modality, ids = [0, 0, 0, 1, 2, 2], [0, 1, 2, 2, 3, 6]
    whole = targets(modality, ids)
    counts = whole.counts(3)
    expected = loss.total(loss.sums(model, hidden, whole), counts)
    parts = []
    for chosen in ([0, 3], [1, 2, 4, 5]):
        some = targets([modality[i] for i in chosen], [ids[i] for i in chosen])
        parts.append(loss.total(loss.sums(model, hidden[chosen], some), counts))
    torch.testing.assert_close(sum(parts), expected)


def test_weights_weigh_the_modalities_that_are_there() -> None:
    sums, counts = torch.tensor([6.0, 0.0, 4.0]), torch.tensor([2, 0, 4])
    weights = torch.tensor([3.0, 100.0, 1.0])
    assert loss.total(sums, counts, weights).item() == pytest.approx((3 * 3 + 1 * 1) / 4)
    assert loss.total(torch.zeros(3), torch.zeros(3, dtype=torch.int64)).item() == 0.0
