"""Generation with tiny models: what is drawn, in what order, from which seed, and that a trained mapping comes out."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as each
from hypothesis import strategies as st

from manifests.errors import ConfigError
from train.data.batch import Batch, Column, MaskedBatch
from train.data.hashing import combine, name_hash
from train.data.mask import Masking, Strategy, mask_batch
from train.data.vocabulary import TokenModality, Vocabulary
from train.generation.decoding import GenerateOptions, Order, Schedule, counts, draw, filtered
from train.generation.generator import UNKNOWN, generate
from train.generation.left_to_right import Prefix
from train.model import loss
from train.model.transformer import Model, ModelConfig

CELLS, CODES, WORDS, FIRST_WORD, END, SENTINEL, SENTINELS = 16, 8, 24, 16, 3, 4, 12


def modality(name: str, offset: int, *, sequence: bool) -> TokenModality:
    marks: dict[str, Any] = {"first_sentinel": SENTINEL, "sentinels": SENTINELS, "end": END} if sequence else {}
    return TokenModality(
        name=name,
        sequence=sequence,
        vocabulary=WORDS if sequence else CODES,
        tokens=6 if sequence else CELLS,
        offset=offset,
        tokenizer=name,
        digest=name,
        path=name,
        **marks,
    )


VOCABULARY = Vocabulary(
    modalities=(
        modality("caption", 0, sequence=True),
        modality("depth", WORDS, sequence=False),
        modality("palette", 0, sequence=True),
        modality("rgb", WORDS + CODES, sequence=False),
    ),
    size=WORDS + 2 * CODES,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def random_model() -> Model:
    model = Model(VOCABULARY, ModelConfig(depth=1, dim=32, heads=2))
    model.initialize(0)
    # Far enough from even odds that tokens matter.
    with torch.no_grad():
        model.head.weight *= 10
    return model.eval()


def pixels(rows: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(CODES, size=(rows, CELLS)))


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


# ---- the parts


@each(st.integers(1, 800), st.integers(1, 60), st.sampled_from(["cosine", "linear"]))
def test_every_step_decodes_a_cell_and_all_steps_decode_all(cells: int, steps: int, schedule: Schedule) -> None:
    plan = counts(cells, steps, schedule)
    assert sum(plan) == cells
    assert len(plan) == min(cells, steps)
    assert min(plan) >= 1


def test_schedules_have_their_shapes() -> None:
    assert counts(196, 4, "linear") == [49, 49, 49, 49]
    assert counts(100, 4, "cosine") == [8, 21, 33, 38]
    assert counts(0, 4, "cosine") == []


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64).log()
    assert filtered(logits, 2, 1.0).isfinite().tolist() == [[True, False, True, False]]
    assert filtered(logits, None, 0.65).isfinite().tolist() == [[True, False, True, False]]
    assert filtered(logits, None, 0.75).isfinite().tolist() == [[True, False, True, True]]
    assert filtered(logits, 1, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    # Equal ones: still no more than k.
    assert filtered(torch.zeros(1, 5, dtype=torch.float64), 3, 1.0).isfinite().sum() == 3


def test_draws_follow_the_distribution() -> None:
    shares = np.array([0.5, 0.0, 0.3, 0.2])
    logits = torch.from_numpy(shares).log().expand(10_000, 4)
    chances = (np.arange(10_000) + 0.5) / 10_000
    tokens, confidence = draw(logits, chances, 1.0)
    assert np.bincount(tokens, minlength=4).tolist() == [5000, 0, 3000, 2000]
    assert confidence == pytest.approx(shares[tokens])
    cold, _ = draw(logits, chances, 1e-9)
    greedy, _ = draw(logits, chances, 0)
    assert not cold.any()
    assert not greedy.any()
    hot, _ = draw(logits, chances, 1e9, top_k=3)
    assert np.bincount(hot, minlength=4) / 10_000 == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": None},
        {"steps": 2.5},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"guidance": float("inf")},
        {"order": "raster"},
        {"schedule": "square"},
        {"tokens": True},
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GenerateOptions(every=wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GenerateOptions(each={"rgb": wrong})


def test_options_of_one_modality_count_before_those_of_all() -> None:
    options = GenerateOptions(every={"steps": 3, "top_k": 9}, each={"depth": {"steps": 5}})
    assert options.of(VOCABULARY["depth"], ["rgb"]).steps == 5
    assert options.of(VOCABULARY["rgb"], []).steps == 3
    assert options.of(VOCABULARY["depth"], []).top_k == 9
    assert GenerateOptions().of(VOCABULARY["depth"], ["rgb"]).steps == 1
    assert GenerateOptions().of(VOCABULARY["depth"], ["caption"]).steps > 1
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        GenerateOptions(every={"temprature": 1.0})


# ---- a whole generation


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_the_seed_decides_and_neighbors_do_not(random_model: Model, order: Order) -> None:
    options = GenerateOptions(every={"order": order, "steps": 5, "temperature": 1.0, "top_p": 1.0, "guidance": 2.0})
    rgb, wanted = pixels(4), ["depth", "caption"]
    whole = generate(random_model, {"rgb": rgb}, wanted, options, seed=7)
    again = generate(random_model, {"rgb": rgb}, wanted, options, seed=7)
    other = generate(random_model, {"rgb": rgb}, wanted, options, seed=8)
    assert all(same(whole[name], again[name]) for name in wanted)
    assert not same(whole["depth"], other["depth"])
    assert not same(whole["caption"], other["caption"])
    for number in range(4):
        alone = generate(random_model, {"rgb": [rgb[number]]}, wanted, options, seed=7, first=number)
        for name in wanted:
            assert np.array_equal(alone[name][0], whole[name][number])
    equal = generate(random_model, {"rgb": [rgb[0]] * 4}, ["depth"], options, seed=7)["depth"]
    assert len({row.tobytes() for row in equal}) == 4
    for rows, facts in ((whole["depth"], VOCABULARY["depth"]), (whole["caption"], VOCABULARY["caption"])):
        assert all(row.min(initial=0) >= 0 and row.max(initial=0) < facts.vocabulary for row in rows)


def test_one_greedy_step_is_the_argmax_of_the_decoder(random_model: Model) -> None:
    rgb = pixels(3)
    options = GenerateOptions(every={"steps": 1, "temperature": 0, "guidance": 1.0})
    made = generate(random_model, {"rgb": rgb}, ["depth"], options, seed=0)["depth"]
    index, facts = VOCABULARY.index("rgb"), VOCABULARY["rgb"]
    for row, cells in zip(rgb, made, strict=True):
        place, zeros = torch.arange(CELLS), torch.zeros(CELLS, dtype=torch.int64)
        with torch.inference_mode():
            context = random_model.encode(torch.from_numpy(row) + facts.offset, zeros + index, place, zeros, 1)
            hidden = random_model.decode(context, zeros - 1, zeros + VOCABULARY.index("depth"), place, zeros)
            expected = random_model.logits(hidden, VOCABULARY.index("depth")).argmax(dim=-1)
        assert cells.tolist() == expected.tolist()


def test_guidance_of_one_is_the_condition_alone_and_of_none_is_without_it(random_model: Model) -> None:
    def made(rows: Sequence[np.ndarray], guidance: float) -> list[np.ndarray]:
        options = GenerateOptions(every={"steps": 4, "guidance": guidance, "temperature": 1.0, "top_p": 1.0})
        return generate(random_model, {"rgb": rows}, ["depth"], options, seed=3)["depth"]

    first, second = pixels(2, seed=1), pixels(2, seed=2)
    assert same(made(first, 1.0), made(first, 1.0 + 1e-12))
    assert same(made(first, 0.0), made(second, 0.0))
    assert not same(made(first, 1.0), made(second, 1.0))
    assert not same(made(first, 1.0), made(first, 4.0))
    free = GenerateOptions(every={"steps": 4, "temperature": 1.0, "top_p": 1.0})
    assert same(generate(random_model, {}, ["depth"], free, seed=3, samples=2)["depth"], made(first, 0.0))


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_known_cells_and_whole_rows_stay(random_model: Model, order: Order) -> None:
    part = np.where(np.arange(CELLS) % 3 == 0, np.arange(CELLS) % CODES, UNKNOWN)
    full = pixels(1)[0]
    options = GenerateOptions(every={"order": order, "steps": 4})
    made = generate(random_model, {"depth": [part, full, None]}, ["depth"], options, seed=0)["depth"]
    assert (made[0][part >= 0] == part[part >= 0]).all()
    assert np.array_equal(made[1], full)
    assert all((row >= 0).all() for row in made)
    words = np.array([FIRST_WORD, END])
    kept = generate(random_model, {"caption": [words, None]}, ["caption"], seed=0)["caption"]
    assert np.array_equal(kept[0], words)


def test_a_finished_modality_is_an_input_of_the_next(random_model: Model) -> None:
    options = GenerateOptions(every={"steps": 2, "temperature": 1.0, "top_p": 1.0})
    words = [np.array([FIRST_WORD + number, END]) for number in range(2)]
    chained = generate(random_model, {"caption": words}, ["depth", "rgb"], options, seed=5)
    given = generate(random_model, {"caption": words, "depth": chained["depth"]}, ["rgb"], options, seed=5)
    alone = generate(random_model, {"caption": words}, ["rgb"], options, seed=5)
    assert same(chained["rgb"], given["rgb"])
    assert not same(chained["rgb"], alone["rgb"])


def test_a_sequence_is_what_decoding_its_whole_prefix_gives(random_model: Model) -> None:
    rgb, index, facts = pixels(3), VOCABULARY.index("caption"), VOCABULARY["caption"]
    written = np.random.default_rng(0).integers(FIRST_WORD, WORDS, size=(3, 6))
    known = [torch.from_numpy(row) for row in (np.stack(rgb)[:2].ravel(), np.tile(np.arange(CELLS), 2))]
    ids, place = known[0] + VOCABULARY["rgb"].offset, known[1]
    # The third sample has no inputs.
    sample = torch.arange(2).repeat_interleave(CELLS)
    with torch.inference_mode():
        context = random_model.encode(ids, torch.full_like(ids, VOCABULARY.index("rgb")), place, sample, 3)
        previous = torch.from_numpy(written).flatten() + facts.offset
        position, owner = torch.arange(6).repeat(3), torch.arange(3).repeat_interleave(6)
        whole = random_model.decode(context, previous, torch.full_like(previous, index), position, owner)
        prefix = Prefix.start(random_model, context, index)
        rows = torch.arange(3)
        for step in range(6):
            hidden, prefix = prefix.extended(random_model, previous.view(3, 6)[rows, step])
            assert torch.allclose(hidden, whole.view(3, 6, -1)[rows, step], atol=1e-5)
            if step == 2:
                prefix, rows = prefix.only(torch.tensor([0, 2])), torch.tensor([0, 2])


def biased(model: Model, token: int) -> Model:
    """The same model, that says one word above all others."""
    found = Model(VOCABULARY, model.config)
    found.load_state_dict(model.state_dict())
    # Whatever the decoder makes of it.
    found.decoder_norm.register_forward_hook(lambda *taken: taken[-1].fill_(1.0))
    with torch.no_grad():
        found.head.weight[:WORDS] = 0
        found.head.weight[token] = 1
    return found


def test_a_sequence_ends_at_its_end_its_closing_sentinel_or_its_length(random_model: Model) -> None:
    def made(token: int, **options: object) -> list[int]:
        settings = GenerateOptions(every={"temperature": 0, **options})
        return generate(biased(random_model, token), {}, ["caption"], settings, seed=0, samples=1)["caption"][
            0
        ].tolist()

    assert made(END) == [END]
    assert made(SENTINEL + 2) == []
    assert made(FIRST_WORD) == [FIRST_WORD] * 6
    assert made(FIRST_WORD, tokens=2) == [FIRST_WORD] * 2
    # Another sentinel has no place there: the next best, all of which are equal.
    assert SENTINEL + 5 not in made(SENTINEL + 5)


def test_what_cannot_be_generated_is_refused(random_model: Model) -> None:
    rgb = pixels(1)
    for given, wanted, words in (
        ({"rgb": rgb}, ["dept"], "did you mean 'depth'"),
        ({"rbg": rgb}, ["depth"], "did you mean 'rgb'"),
        ({"rgb": rgb}, [], "at least one"),
        ({"rgb": rgb}, ["depth", "depth"], "each once"),
        ({"rgb": rgb, "caption": [None, None]}, ["depth"], "equally many"),
        ({}, ["depth"], "equally many"),
        ({"rgb": [rgb[0][:5]]}, ["depth"], "expected 16 tokens"),
        ({"rgb": [rgb[0] + CODES]}, ["depth"], "expected 0 to 7"),
        ({"rgb": [rgb[0] / 2]}, ["depth"], "integers"),
        ({"caption": [np.full(7, FIRST_WORD)]}, ["depth"], "at most 6"),
        ({"caption": [np.array([UNKNOWN])]}, ["depth"], "expected 0 to 23"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(random_model, given, wanted, seed=0)
    with pytest.raises(ConfigError, match="did you mean 'rgb'"):
        generate(random_model, {}, ["rgb"], GenerateOptions(each={"rbg": {"steps": 2}}), seed=0, samples=1)


# ---- a model that has learned something


def world(colors: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Pictures of one color, the color after it as depth, and two words for it."""
    return {
        "rgb": [np.full(CELLS, color) for color in colors],
        "depth": [np.full(CELLS, (color + 1) % CODES) for color in colors],
        "caption": [np.array([FIRST_WORD + color % 4, FIRST_WORD + 4 + color // 4, END]) for color in colors],
        "palette": [np.array([], dtype=np.int64) for _ in colors],
    }


# Mostly one modality is given, and a caption is given whole.
MASKING = Masking(
    inputs=(4, 12), targets=(12, 16), strategies=(Strategy(inputs={"*": 0.1}, keep="all"), Strategy(weight=0.5))
)


def masked(step: int, rows: int = 32) -> MaskedBatch:
    colors = np.random.default_rng(step).integers(CODES, size=rows)
    columns = {
        name: Column(values=np.concatenate(some), offsets=np.cumsum([0, *map(len, some)]))
        for name, some in world(colors).items()
    }
    none = np.zeros(rows, dtype=np.int64)
    batch = Batch(
        slots=none,
        sources=none,
        corpora=("world",),
        corpus=none,
        parts=none,
        rows=np.arange(rows),
        crops=none,
        epochs=none,
        keys=combine(name_hash("test", step), np.arange(rows)),
        columns=columns,
    )
    return mask_batch(batch, VOCABULARY, MASKING)


@pytest.fixture(scope="module")
def trained() -> Model:
    model = Model(VOCABULARY, ModelConfig(depth=1, dim=64, heads=2))
    model.initialize(0)
    steps = 160
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        batch = masked(step)
        value = loss.total(loss.sums(model, model(batch), batch), batch.counts(len(VOCABULARY.modalities)))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def test_what_was_learned_comes_out_of_every_side(trained: Model) -> None:
    colors = np.arange(CODES)
    known = world(colors)
    options = GenerateOptions(every={"temperature": 0, "guidance": 1.0})
    from_rgb = generate(trained, {"rgb": known["rgb"]}, ["depth", "caption"], options, seed=0)
    assert same(from_rgb["depth"], known["depth"])
    assert same(from_rgb["caption"], known["caption"])
    from_words = generate(trained, {"caption": known["caption"]}, ["rgb", "depth"], options, seed=0)
    assert same(from_words["rgb"], known["rgb"])
    assert same(from_words["depth"], known["depth"])


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_steps_agree_with_each_other_where_nothing_is_given(trained: Model, order: Order) -> None:
    def pictures(steps: int) -> np.ndarray:
        options = GenerateOptions(every={"temperature": 1.0, "top_p": 1.0, "steps": steps, "order": order})
        return np.stack(generate(trained, {}, ["rgb"], options, seed=1, samples=64)["rgb"])

    def agreeing(made: np.ndarray) -> float:
        return float(np.mean([np.bincount(row).max() for row in made]) / CELLS)

    stepped = pictures(CELLS)
    assert agreeing(stepped) > 0.9
    # In one step the cells do not know of each other.
    assert agreeing(pictures(1)) < 0.7
    # By confidence the color that is a little likelier wins nearly every time; random order keeps the variety.
    if order == "random":
        assert len(np.unique(stepped)) >= 4
