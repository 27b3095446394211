"""Trainer files: what they say, and every way in which they are wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from manifests.errors import ConfigError
from manifests.recipe import sha256_hex
from train.settings.trainer import TrainConfig, parse

ENGINE = {"train_batch_size": 8}


def tree(**changes: Any) -> dict[str, Any]:
    return {"steps": 10, "mixture": [{"snapshot": "work#small"}], "deepspeed": ENGINE} | changes


def read(folder: Path = Path("/data"), **changes: Any) -> TrainConfig:
    return parse(tree(**changes), folder=folder)


def engine(**changes: Any) -> TrainConfig:
    return read(deepspeed=ENGINE | changes)


def mistakes(value: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(value, folder=Path("/data"), where=lambda path: "t.yaml")
    return str(caught.value).splitlines()


def test_a_short_file_has_defaults_and_absolute_paths() -> None:
    config = read(folder=Path("/data/trainers"), mixture=[{"snapshot": "../work#small", "corpora": ["a"], "weight": 3}])
    assert config.mixture[0].snapshot == "/data/work#small"
    assert (config.mixture[0].corpora, config.mixture[0].weight) == (("a",), 3.0)
    assert (config.name, config.seed, config.out, config.threads) == ("train", 0, None, None)
    assert (config.engine.batch, config.engine.micro_batch, config.engine.accumulation) == (8, 8, 1)
    assert config.engine.schedule.rate(7, 10) == config.engine.optimizer.lr == 1e-3
    assert read(mixture=[{"snapshot": "s3://bucket/work#small"}]).mixture[0].snapshot == "s3://bucket/work#small"
    document = config.document()
    assert json.loads(json.dumps(document)) == document
    assert document["deepspeed"]["batch"] == 8


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ((8, None, None), (8, 8, 1)),
        ((8, 2, None), (8, 2, 4)),
        ((8, None, 4), (8, 2, 4)),
        ((None, 2, 4), (8, 2, 4)),
        ((None, 3, None), (3, 3, 1)),
        ((8, 4, 2), (8, 4, 2)),
    ],
)
def test_two_of_the_batch_sizes_give_the_third(given: tuple[Any, ...], meant: tuple[int, ...]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    options = read(deepspeed=dict(zip(names, given, strict=True))).engine
    assert (options.batch, options.micro_batch, options.accumulation) == meant


@pytest.mark.parametrize("sizes", [{"train_micro_batch_size_per_gpu": 3}, {"gradient_accumulation_steps": 3}])
def test_batch_sizes_that_do_not_agree_are_refused(sizes: dict[str, int]) -> None:
    (line,) = mistakes(tree(deepspeed={"train_batch_size": 8, **sizes}))
    assert "deepspeed.train_batch_size is 8, but" in line
    assert "= 6" in line
    (line,) = mistakes(tree(deepspeed={"gradient_accumulation_steps": 2}))
    assert "train_batch_size is missing" in line


def test_all_mistakes_are_told_at_once_with_the_nearest_key() -> None:
    lines = mistakes(
        {
            "stpes": 10,
            "name": "Big Run",
            "mixture": [{"snapshot": "work", "wieght": 1}, {"snapshot": "w#x", "weight": 0}],
            "model": {"depth": "three", "dim": 30},
            "masking": {"inputs": [9, 3], "strategies": [{"keep": "al"}]},
            "deepspeed": {"train_batch_sise": 8, "optimizer": {"type": "Lamb", "params": {"betas": [0.9], "lr": -1}}},
            "validation": {"every": 0},
            "threads": True,
        }
    )
    told = "\n".join(lines)
    for expected in (
        "t.yaml: stpes is no option; did you mean 'steps'?",
        "steps is missing",
        "name is 'Big Run'",
        "mixture[0].snapshot is 'work', expected WORKSPACE#NAME",
        "mixture[0].wieght is no option; did you mean 'weight'?",
        "mixture[1].weight is 0; it should be greater than 0",
        "model.depth is 'three'; it should be a valid integer",
        "masking.inputs is [9, 3], expected [a, b] with 1 <= a <= b",
        "masking.strategies[0].keep is 'al'; it should be 'random', 'all' or 'binary'",
        "deepspeed.train_batch_sise is no option; did you mean 'train_batch_size'?",
        "deepspeed.optimizer.type is 'Lamb'; it should be 'AdamW' or 'Adam'",
        "deepspeed.optimizer.params.betas[1] is missing",
        "deepspeed.optimizer.params.lr is -1; it should be greater than 0",
        "validation.every is 0; it should be greater than 0",
        "threads is True; it should be a valid integer",
    ):
        assert expected in told, expected
    (line,) = mistakes(tree(model={"depth": 3, "dim": 30}))
    assert "t.yaml: model cannot be: model: width 30" in line


@pytest.mark.parametrize(
    ("masking", "told"),
    [
        ({"inputs": [0, 4]}, "masking.inputs[0] is 0; it should be greater than 0"),
        ({"targets": [9, 4]}, "masking.targets is [9, 4], expected [a, b] with 1 <= a <= b"),
        ({"strategies": []}, "masking.strategies is [], expected at least one strategy"),
        ({"strategies": [{"weight": 0}]}, "masking.strategies[0].weight is 0; it should be greater than 0"),
        (
            {"strategies": [{"targets": {"rgb": -1.0}}]},
            "masking.strategies[0].targets.rgb is -1.0; it should be greater than or equal to 0",
        ),
        (
            {"strategies": [{"keep": {"caption": "al"}}]},
            "masking.strategies[0].keep: caption is 'al'; it should be 'random', 'all' or 'binary'",
        ),
        ({"strategies": [{"keep": 3}]}, "masking.strategies[0].keep is 3; it should be 'random', 'all' or 'binary'"),
        ({"overlong": "no"}, "masking.overlong is 'no'; it should be 'fill' or 'random'"),
    ],
)
def test_maskings_that_cannot_be_meant_are_refused(masking: dict[str, Any], told: str) -> None:
    (line,) = mistakes(tree(masking=masking))
    assert told in line


def test_the_mixture_of_4m_21_can_be_written() -> None:
    page = (Path(__file__).parents[3] / "docs/4m.md").read_text()
    (text,) = re.findall(r"```yaml\n(masking:.*?)```", page, re.S)
    masking = read(**yaml.safe_load(text)).masking
    kept = [(one.keep_of("caption"), one.keep_of("palette"), one.keep_of("boxes")) for one in masking.strategies]
    assert kept == [("random", "binary", "random")] * 5 + [("all", "binary", "random")]
    assert [one.weight for one in masking.strategies] == [1, 1, 1, 1, 1, 0.5]
    assert masking.strategies[5].targets == {"caption": 0, "*": 0.5}


def test_a_configuration_is_recorded_as_it_always_was() -> None:
    params = {"adam_w_mode": False, "lr": 1}
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1, "total_num_steps": 7}}
    config = read(
        model={"depth": 2, "mlp_ratio": 3, "dim": None},
        loss_weights={"rgb": 2},
        deepspeed={
            "train_micro_batch_size_per_gpu": 3,
            "optimizer": {"type": "adam", "params": params},
            "scheduler": scheduler,
            "gradient_clipping": 0,
        },
    )
    document = json.dumps(config.document(), sort_keys=True)
    assert sha256_hex(document.encode()) == "b6ae53be242905cba19170f0f53695502f630581d2d1821845725879ddf561a0"
    assert config.notes == (
        "deepspeed.scheduler.params.warmup_num_steps is 1000, over all 7 steps: the rate stays under its peak",
    )


def test_what_has_no_effect_is_noted() -> None:
    assert engine().notes == ()
    config = engine(steps_per_print=5, zero_optimization={"stage": 0, "overlap_comm": True}, fp16={"enabled": False})
    assert [note.partition(" has no effect")[0] for note in config.notes] == [
        "deepspeed.zero_optimization.overlap_comm",
        "deepspeed.steps_per_print",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "deepspeed.zero_optimization.stage is 2; it should be 0 (one process holds the whole model)",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "nothing is offloaded here"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16 is {'enabled': True}, which cannot be had: use bf16"),
        ({"bf16": {"enabled": "yes"}}, "deepspeed.bf16.enabled is 'yes'; it should be True, False or 'auto'"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "moments are float32 here"),
        ({"scheduler": {"type": "OneCycle"}}, "should be 'WarmupLR', 'WarmupDecayLR' or 'WarmupCosineLR'"),
        ({"scheduler": {"params": {"warmup_num_steps": 3}}}, "deepspeed.scheduler.type is missing"),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
    ],
)
def test_what_one_process_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    (line,) = mistakes(tree(deepspeed=ENGINE | options))
    assert message in line


def test_engine_options_may_stand_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"train_batch_size": 4, "gradient_clipping": 0.5}')
    config = read(folder=tmp_path, deepspeed="engine.json")
    assert (config.engine.batch, config.engine.gradient_clipping) == (4, 0.5)
    (tmp_path / "engine.json").write_text('{"train_batch_size": 4, "gradient_cliping": 0.5}')
    with pytest.raises(
        ConfigError, match=r"engine.json: deepspeed.gradient_cliping is no option; did you mean 'gradient_clipping'"
    ):
        read(folder=tmp_path, deepspeed="engine.json")
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(ConfigError, match=r"deepspeed names .*engine.json, which cannot be read as JSON"):
        read(folder=tmp_path, deepspeed="engine.json")


def test_bf16_and_adam_are_read_as_deepspeed_reads_them() -> None:
    assert engine().engine.bf16 == "auto"
    assert engine(bf16={"enabled": True}).engine.bf16 is True
    assert engine(bf16={"enabled": "auto"}).engine.bf16 == "auto"
    assert engine(optimizer={"type": "adam"}).engine.optimizer.decoupled
    assert not engine(optimizer={"type": "Adam", "params": {"adam_w_mode": False}}).engine.optimizer.decoupled
