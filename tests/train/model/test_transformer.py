"""The model: packing changes nothing, targets see what they may, parameters come from their names."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from manifests.errors import ConfigError
from train.data.batch import MaskedBatch
from train.data.vocabulary import TokenModality, Vocabulary
from train.model import loss
from train.model.transformer import Layout, Model, ModelConfig, positions


def vocabulary() -> Vocabulary:
    marks = {"first_sentinel": 4, "sentinels": 4, "end": 3}
    facts = {"tokenizer": "t", "digest": "d", "path": "p"}
    return Vocabulary(
        modalities=(
            TokenModality(name="caption", sequence=True, vocabulary=20, tokens=12, offset=0, **facts, **marks),
            TokenModality(name="clip_global", sequence=False, vocabulary=8, tokens=6, offset=20, **facts),
            TokenModality(name="depth", sequence=False, vocabulary=10, tokens=9, offset=28, **facts),
            TokenModality(name="rgb", sequence=False, vocabulary=10, tokens=9, offset=38, **facts),
        ),
        size=48,
    )


def model(seed: int = 0, **config: int) -> Model:
    made = Model(vocabulary(), ModelConfig(**{"depth": 2, "dim": 16, "heads": 2, **config}))
    made.initialize(seed)
    return made.double()


def batch(samples: int = 3, seed: int = 0) -> MaskedBatch:
    """Samples of 1, 2, .. grid inputs, and for each five targets of rgb, three of depth and four of a caption."""
    rng = np.random.default_rng(seed)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    sample_in, position_in = [], []
    sample_out, modality_out, position_out, ids, previous = [], [], [], [], []
    for sample in range(samples):
        sample_in += [sample] * (sample + 1)
        position_in += list(range(sample + 1))
        for modality, count, most in ((0, 4, 20), (2, 3, 10), (3, 5, 10)):
            sample_out += [sample] * count
            modality_out += [modality] * count
            position_out += list(range(count))
            ids += rng.integers(0, most, count).tolist()
            previous += rng.integers(0, 20, count).tolist() if modality == 0 else [-1] * count
    return MaskedBatch(
        samples=samples,
        input_ids=tensor(rng.integers(28, 38, len(sample_in)).tolist()),
        input_modality=tensor([2] * len(sample_in)),
        input_position=tensor(position_in),
        input_sample=tensor(sample_in),
        target_ids=tensor(ids),
        previous_ids=tensor(previous),
        target_modality=tensor(modality_out),
        target_position=tensor(position_out),
        target_sample=tensor(sample_out),
    )


def only(masked: MaskedBatch, sample: int) -> MaskedBatch:
    """One sample of a batch as a batch."""
    taken = {"samples": 1}
    for name, tensor in masked.__dict__.items():
        if name != "samples":
            own = masked.input_sample if name.startswith("input") else masked.target_sample
            taken[name] = tensor[own == sample] * (0 if name.endswith("_sample") else 1)
    return MaskedBatch(**taken)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    net, masked = model(), batch()
    whole = net(masked)
    for sample in range(3):
        alone = net(only(masked, sample))
        torch.testing.assert_close(alone, whole[masked.target_sample == sample], rtol=1e-9, atol=1e-12)


def test_a_sample_without_inputs_has_finite_gradients() -> None:
    net, masked = model(), batch()
    kept = masked.input_sample != 1
    masked = replace(
        masked,
        **{
            name: getattr(masked, name)[kept]
            for name in ("input_ids", "input_modality", "input_position", "input_sample")
        },
    )
    loss.total(loss.sums(net, net(masked), masked), masked.counts(4)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def moved(masked: MaskedBatch, target: int) -> torch.Tensor:
    """Which targets' hidden states change when the token before one of a caption's targets is another."""
    net = model()
    before = net(masked)
    previous = masked.previous_ids.clone()
    previous[target] = (previous[target] + 1) % 20
    after = net(replace(masked, previous_ids=previous))
    return torch.nonzero((before - after).abs().sum(dim=1) > 1e-9).squeeze(1)


def test_a_sequence_sees_what_is_before_and_nothing_else_sees_it() -> None:
    masked = batch(samples=2)
    captions = torch.nonzero((masked.target_modality == 0) & (masked.target_sample == 1)).squeeze(1)
    for number, target in enumerate(captions.tolist()):
        assert moved(masked, target).tolist() == captions[number:].tolist()


def test_targets_of_a_grid_see_each_other_and_no_other_modality() -> None:
    net, masked = model(), batch(samples=1)
    before = net(masked)
    depth = torch.nonzero(masked.target_modality == 2).squeeze(1)
    position = masked.target_position.clone()
    position[depth[0]] = 8
    changed = (before - net(replace(masked, target_position=position))).abs().sum(dim=1) > 1e-9
    assert torch.nonzero(changed).squeeze(1).tolist() == depth.tolist()


def test_every_parameter_matters_and_starts_from_its_name() -> None:
    first, again, other = model(0), model(0), model(1)
    deeper = model(0, decoder_depth=3)
    states = deeper.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        # A part of a larger model begins as that of a smaller one.
        assert torch.equal(tensor, states[name])
        if tensor.std() > 0:
            assert not torch.equal(tensor, other.state_dict()[name])


def test_the_dial_sets_the_sizes_of_4m() -> None:
    sizes = {depth: (ModelConfig(depth=depth).width, ModelConfig(depth=depth).head_count) for depth in (6, 8, 12)}
    assert sizes == {6: (384, 6), 8: (512, 8), 12: (768, 12)}
    with torch.device("meta"):
        base = Model(vocabulary(), ModelConfig(depth=12))
    blocks = sum(p.numel() for name, p in base.named_parameters() if name.startswith(("encoder.", "decoder.")))
    # 4M's B has 198.8 million without embeddings.
    assert abs(blocks / 1e6 - 198.2) < 1


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4 x heads"):
        _ = ModelConfig(depth=2, dim=30, heads=4).width


def test_positions_are_shared_by_shape_and_distinct_within() -> None:
    table, starts = positions(vocabulary(), 16)
    assert starts[2] == starts[3]
    assert len(table) == 26 + 6 + 9
    assert len(torch.unique(table[starts[2] : starts[2] + 9], dim=0)) == 9
    assert len(torch.unique(table[starts[0] : starts[0] + 26], dim=0)) == 26


def test_layouts_go_there_and_back() -> None:
    sample = torch.tensor([0, 0, 2, 2, 2, 4])
    layout = Layout.of(sample, 5)
    rows = torch.randn(6, 3)
    assert torch.equal(layout.gather(layout.spread(rows)), rows)
    assert layout.filled().sum(dim=1).tolist() == [2, 0, 3, 0, 1]
    assert Layout.of(torch.empty(0, dtype=torch.int64), 2).filled().tolist() == [[False], [False]]


def test_logits_are_over_the_modality_s_own_tokens() -> None:
    net = model()
    hidden = torch.randn(5, 16, dtype=torch.float64)
    whole = hidden @ net.head.weight.T
    assert torch.equal(net.logits(hidden, 2), whole[:, 28:38]) or torch.allclose(net.logits(hidden, 2), whole[:, 28:38])
    assert net.logits(hidden, 0).shape == (5, 20)


def test_a_target_finds_its_own_cell_on_a_grid_of_14() -> None:
    """Each cell of one modality is a function of the same cell of another: what depth, edges and normals are of rgb."""
    side, codes, samples, asked = 14, 16, 8, 64
    cells = side * side
    grid = {"sequence": False, "vocabulary": codes, "tokens": cells, "tokenizer": "t", "digest": "t", "path": "t"}
    facts = tuple(TokenModality(name=name, offset=offset, **grid) for name, offset in (("depth", 0), ("rgb", codes)))
    net = Model(Vocabulary(modalities=facts, size=2 * codes), ModelConfig(depth=1, dim=96, heads=3))
    net.initialize(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    becomes = torch.randperm(codes, generator=generator)
    losses = []
    for _ in range(120):
        rgb = torch.randint(codes, (samples, cells), generator=generator)
        place = torch.rand(samples, cells, generator=generator).argsort(dim=1)[:, :asked].sort(dim=1).values
        batch = MaskedBatch(
            samples=samples,
            input_ids=rgb.flatten() + codes,
            input_modality=torch.ones(samples * cells, dtype=torch.int64),
            input_position=torch.arange(cells).repeat(samples),
            input_sample=torch.arange(samples).repeat_interleave(cells),
            target_ids=becomes[rgb.gather(1, place)].flatten(),
            previous_ids=torch.full((samples * asked,), -1),
            target_modality=torch.zeros(samples * asked, dtype=torch.int64),
            target_position=place.flatten(),
            target_sample=torch.arange(samples).repeat_interleave(asked),
        )
        value = loss.total(loss.sums(net, net(batch), batch), torch.tensor([samples * asked, 0]))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.1
