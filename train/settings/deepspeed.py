"""The trainer's engine options: DeepSpeed's JSON, its keys and their meaning (deepspeed.ai/docs/config-json).

Every key is read, known and without effect here (a note says so), refused because one process cannot do what it asks for, or
unknown. Nothing is passed over in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from train.distributed.zero import stage_problem
from train.optim.adam import OptimizerOptions
from train.optim.schedule import Schedule
from train.settings.section import Section, shown

_AUTO = "auto"
_TOTAL = "total_num_steps"
# Known, and without effect on what is trained: why.
_MOOT = {
    "steps_per_print": "`log_every` of the trainer file decides",
    "wall_clock_breakdown": "metrics.jsonl has rates and waits",
    "dump_state": "the run's config.json has all of it",
    "flops_profiler": "nothing is profiled",
    "comms_logger": "one process has no communication",
    "communication_data_type": "one process has no communication",
    "data_types": "gradients are float32",
    "prescale_gradients": "one process has no reduction",
    "gradient_predivide_factor": "one process has no reduction",
    "gradient_allreduce_op": "one process has no reduction",
    "sparse_gradients": "gradients are dense",
    "tensorboard": "metrics are always written, to TensorBoard too where it is installed",
    "wandb": "metrics are written to the run folder",
    "csv_monitor": "metrics are written to the run folder",
    "comet": "metrics are written to the run folder",
    "checkpoint": "`checkpoint` of the trainer file decides",
    "activation_checkpointing": "activations are kept",
    "compile": "the model runs uncompiled",
    "zero_allow_untested_optimizer": "there is no sharding",
    "zero_force_ds_cpu_optimizer": "there is no offload",
    "seed": "`seed` of the trainer file decides",
}
_MOOT_ZERO = (
    *("overlap_comm", "reduce_scatter", "allgather_partitions", "reduce_bucket_size", "allgather_bucket_size"),
    *("contiguous_gradients", "round_robin_gradients", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *(
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "sub_group_size",
        "ignore_unused_parameters",
    ),
    *("stage3_gather_16bit_weights_on_model_save", "elastic_checkpoint", "load_from_fp32_weights"),
)
# What would change the training, and cannot be had: what to do.
_REFUSED = {
    "fp16": "use bf16, which needs no loss scale",
    "amp": "use bf16",
    "torch_autocast": "use bf16",
    "elasticity": "state the batch sizes",
    "tensor_parallel": "one process holds the whole model",
    "pipeline": "one process holds the whole model",
    "compression_training": "train without it",
    "data_efficiency": "the mixture and the masks decide what is seen",
    "curriculum_learning": "the mixture and the masks decide what is seen",
    "progressive_layer_drop": "train without it",
    "sparse_attention": "attention is dense",
}
_REFUSED_ZERO = {
    "zero_quantized_weights": "one process has no communication",
    "zero_quantized_gradients": "one process has no communication",
}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the file says of a step.

    batch, micro_batch, accumulation  rows of a step = rows of a forward pass x passes a step
    gradient_clipping  the most of the gradient's L2 norm; 0 clips nothing
    bf16               autocast to bfloat16; auto is where there is a GPU
    """

    batch: int
    micro_batch: int
    accumulation: int
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: Schedule = field(default_factory=lambda: Schedule(peak=1e-3))
    gradient_clipping: float = 1.0
    bf16: bool | Literal["auto"] = "auto"
    stage: int = 0


def read(section: Section, *, steps: int) -> tuple[EngineOptions, list[str]]:
    """The options, and a note for each key that is known and has no effect. Mistakes go to the section's list.

    `steps` are the run's: where `total_num_steps` is missing or "auto", the decay ends with them.
    """
    notes: list[str] = []
    batch, micro_batch, accumulation = _batches(section)
    optimizer = _optimizer(section.section("optimizer"), notes)
    options = EngineOptions(
        batch=batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        optimizer=optimizer,
        schedule=_schedule(section.section("scheduler"), optimizer.lr, steps, notes),
        gradient_clipping=section.number("gradient_clipping", 1.0, least=0.0),
        bf16=_bf16(section.section("bf16")),
        stage=_stage(section.section("zero_optimization"), notes),
    )
    _rest(section, notes)
    return options, notes


def _batches(section: Section) -> tuple[int, int, int]:
    """DeepSpeed's identity: train_batch_size = micro batch x accumulation x processes, of which there is one."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    batch, micro, passes = (section.optional_integer(name, least=1) for name in names)
    if batch is None and micro is None:
        section.wrong("train_batch_size", f"is missing; give two of {', '.join(names)}, or the first alone")
        return 1, 1, 1
    if batch is None:
        micro, passes = micro or 1, passes or 1
        return micro * passes, micro, passes
    if micro is None:
        passes = passes or 1
        micro = batch // passes
    elif passes is None:
        passes = batch // micro
    if micro * passes != batch:
        section.wrong(
            "train_batch_size",
            f"is {batch}, but train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes is "
            f"{micro} x {passes} x 1 = {micro * passes}; give two of the three that agree",
        )
    return batch, micro, passes


def _optimizer(section: Section, notes: list[str]) -> OptimizerOptions:
    kind = section.text("type", "AdamW", choices=("AdamW", "Adam"), any_case=True)
    params = section.section("params")
    options = OptimizerOptions(
        lr=params.number("lr", 1e-3, over=0.0),
        betas=_betas(params),
        eps=params.number("eps", 1e-8, over=0.0),
        weight_decay=params.number("weight_decay", 0.0, least=0.0),
        # DeepSpeed's Adam decays as AdamW does unless told otherwise.
        decoupled=params.flag("adam_w_mode", True) or kind == "AdamW",
    )
    for name in ("torch_adam", "bias_correction", "fused"):
        _moot(params, name, "torch's Adam is used, fused where it can be", notes)
    params.end()
    section.end()
    return options


def _betas(params: Section) -> tuple[float, float]:
    value = params.raw("betas")
    if value is None:
        return 0.9, 0.999
    numbers = isinstance(value, list) and all(isinstance(one, int | float) and 0 <= one < 1 for one in value)
    if not numbers or len(value) != 2:
        params.wrong("betas", f"is {shown(value)}, expected two numbers from 0 to under 1")
        return 0.9, 0.999
    return float(value[0]), float(value[1])


def _schedule(section: Section, lr: float, steps: int, notes: list[str]) -> Schedule:
    """The schedule; without a scheduler the rate is `lr` throughout."""
    kind = section.text("type", "", choices=("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"))
    params = section.section("params")
    if not kind:
        if params.left() and "type" not in section:
            section.wrong("type", "is missing; expected WarmupLR, WarmupDecayLR or WarmupCosineLR")
        elif "type" not in section:
            section.end()
        return Schedule(peak=lr)
    warmup_steps = params.integer("warmup_num_steps", 1000)
    warmup = params.text("warmup_type", "log", choices=("log", "linear"))
    if kind == "WarmupCosineLR":
        start = lr * params.number("warmup_min_ratio", 0.0, least=0.0, most=1.0)
        end, peak, decay = lr * params.number("cos_min_ratio", 1e-4, least=0.0, most=1.0), lr, "cosine"
    else:
        start, end = params.number("warmup_min_lr", 0.0, least=0.0), 0.0
        peak = params.number("warmup_max_lr", 1e-3, over=0.0)
        decay = "constant" if kind == "WarmupLR" else "linear"
    total_steps = None
    if kind != "WarmupLR":
        total_steps = None if params.raw(_TOTAL) == _AUTO else params.optional_integer(_TOTAL, least=1)
        if (total_steps or steps) < warmup_steps:
            name = ".".join((*params.path, "warmup_num_steps"))
            notes.append(
                f"{name} is {warmup_steps}, over all {total_steps or steps} steps: the rate stays under its peak"
            )
    _moot(params, "last_batch_iteration", "the checkpoint's step decides", notes)
    params.end()
    section.end()
    return Schedule(
        peak=peak,
        start=start,
        end=end,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        warmup="log" if warmup == "log" else "linear",
        decay=decay,
    )


def _bf16(section: Section) -> bool | Literal["auto"]:
    enabled: bool | Literal["auto"] = "auto"
    if section.raw("enabled") != _AUTO:
        enabled = section.flag("enabled", False) if "enabled" in section else "auto"
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if section.flag(name, False):
            section.wrong(name, "is true; weights, gradients and moments are float32 here: set it to false")
    section.end()
    return enabled


def _stage(section: Section, notes: list[str]) -> int:
    stage = section.integer("stage", 0)
    problem = stage_problem(stage)
    if problem is not None:
        section.wrong("stage", problem)
    for name in ("offload_optimizer", "offload_param"):
        value = section.raw(name)
        if value is not None and not (isinstance(value, Mapping) and value.get("device", "none") == "none"):
            section.wrong(name, f"is {shown(value)}; nothing is offloaded here: leave it out")
    for name in _MOOT_ZERO:
        _moot(section, name, "there is no sharding", notes)
    for name, remedy in _REFUSED_ZERO.items():
        if section.flag(name, False):
            section.wrong(name, f"is true, which cannot be had: {remedy}")
    section.end()
    return stage


def _rest(section: Section, notes: list[str]) -> None:
    for name, reason in _MOOT.items():
        _moot(section, name, reason, notes)
    for name, remedy in _REFUSED.items():
        value = section.raw(name)
        if value is not None and not _is_off(value):
            section.wrong(name, f"is {shown(value)}, which cannot be had: {remedy}")
    section.end()


def _moot(section: Section, name: str, reason: str, notes: list[str]) -> None:
    value = section.raw(name)
    if value is not None and not _is_off(value):
        notes.append(f"{'.'.join((*section.path, name))} has no effect: {reason}")


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, Mapping) and value.get("enabled") is False)
