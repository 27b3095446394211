"""Reads the trainer's engine options: DeepSpeed's JSON, its keys and their meaning (deepspeed.ai/docs/config-json).

Every key is either read, or known and without effect here (a note says so), or refused because one process cannot do what
it asks for, or unknown. No key is ignored silently.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from manifests.mistakes import KeyPath, shown
from train.optim.adam import OptimizerOptions
from train.optim.schedule import Schedule

Ratio = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# A key without effect on what is trained, and one that would change the training and cannot be had. The field's
# description says why, or what to do.
Moot = Annotated[Any, "moot"]
Refused = Annotated[Any, "refused"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Holds what the file says about a step.

    batch, micro_batch, accumulation  rows of a step = rows of a forward pass x passes per step
    gradient_clipping  the largest L2 norm of the gradient; 0 clips nothing
    bf16               autocast to bfloat16; auto is on if there is a GPU
    stage              of ZeRO, always 0; part of a run's identity
    """

    batch: int
    micro_batch: int
    accumulation: int
    optimizer: OptimizerOptions
    schedule: Schedule
    gradient_clipping: float
    bf16: bool | Literal["auto"]
    stage: int


class Options(BaseModel):
    """Holds a section of the file. Types are strict, so that `steps: "3"` and `threads: true` are mistakes, not guesses."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_had(cls, value: Any, info: ValidationInfo) -> Any:
        about = cls.model_fields[str(info.field_name)]
        if "refused" in about.metadata and _is_on(value):
            raise ValueError(f"is {shown(value)}, which cannot be had: {about.description}")
        return value

    def without_effect(self, path: str) -> Iterator[str]:
        """Yields a note for each key that has no effect; `path` is the dotted name of this section, with a dot after it."""
        for name, value in self:
            if isinstance(value, Options):
                yield from value.without_effect(f"{path}{name}.")
        for name, about in type(self).model_fields.items():
            if "moot" in about.metadata and _is_on(getattr(self, name)):
                yield f"{path}{name} has no effect: {about.description}"


def _keys(*, moot: Mapping[str, str] = {}, refused: Mapping[str, str] = {}) -> type[Options]:
    """Returns a section with such keys: names, divided by spaces, beside what is said of them."""
    kinds = ((Moot, moot), (Refused, refused))
    fields: dict[str, Any] = {
        name: (kind, Field(default=None, description=text))
        for kind, table in kinds
        for names, text in table.items()
        for name in names.split()
    }
    return create_model("Keys", __base__=Options, **fields)


_Bf16Keys = _keys(
    refused={
        "bf16_master_weights_and_grads bf16_optimizer_states": "weights, gradients and moments are float32 here",
    },
)
_ZeroKeys = _keys(
    moot={
        "overlap_comm reduce_scatter allgather_partitions reduce_bucket_size allgather_bucket_size contiguous_gradients "
        "round_robin_gradients stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold sub_group_size ignore_unused_parameters elastic_checkpoint "
        "stage3_gather_16bit_weights_on_model_save load_from_fp32_weights": "there is no sharding"
    },
    refused={
        "offload_optimizer offload_param": "nothing is offloaded here",
        "zero_quantized_weights zero_quantized_gradients": "one process has no communication",
    },
)
_EngineKeys = _keys(
    moot={
        "steps_per_print": "`log_every` of the trainer file decides",
        "wall_clock_breakdown": "metrics.jsonl has rates and waits",
        "dump_state": "the run's config.json has all of it",
        "flops_profiler": "nothing is profiled",
        "comms_logger communication_data_type": "one process has no communication",
        "data_types": "gradients are float32",
        "prescale_gradients gradient_predivide_factor gradient_allreduce_op": "one process has no reduction",
        "sparse_gradients": "gradients are dense",
        "tensorboard": "metrics are always written, to TensorBoard too if it is installed",
        "wandb csv_monitor comet": "metrics are written to the run folder",
        "checkpoint": "`checkpoint` of the trainer file decides",
        "activation_checkpointing": "activations are kept",
        "compile": "the model runs uncompiled",
        "zero_allow_untested_optimizer": "there is no sharding",
        "zero_force_ds_cpu_optimizer": "there is no offload",
        "seed": "`seed` of the trainer file decides",
    },
    refused={
        "fp16": "use bf16, which needs no loss scale",
        "amp torch_autocast": "use bf16",
        "elasticity": "state the batch sizes",
        "tensor_parallel pipeline": "one process holds the whole model",
        "compression_training progressive_layer_drop": "train without it",
        "data_efficiency curriculum_learning": "the mixture and the masks decide what is seen",
        "sparse_attention": "attention is dense",
    },
)


def _is_on(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is not False and value.get("device") != "none"
    return value is not None and value is not False


class OptimizerParams(_keys(moot={"torch_adam bias_correction fused": "torch's Adam is used, fused where it can be"})):
    """Holds `optimizer.params`."""

    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="two numbers from 0 to under 1")
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    adam_w_mode: bool = True


class Optimizer(Options):
    """Holds `optimizer`."""

    type: Annotated[
        Literal["AdamW", "Adam"],
        BeforeValidator(lambda kind: {"adamw": "AdamW", "adam": "Adam"}.get(str(kind).lower(), kind)),
    ] = "AdamW"
    params: OptimizerParams = OptimizerParams()

    def options(self) -> OptimizerOptions:
        """Returns the optimizer's own options."""
        return OptimizerOptions(
            **self.params.model_dump(include={"lr", "betas", "eps", "weight_decay"}),
            # DeepSpeed's Adam decays as AdamW does unless told otherwise.
            decoupled=self.params.adam_w_mode or self.type == "AdamW",
        )


class SchedulerParams(_keys(moot={"last_batch_iteration": "the checkpoint's step decides"})):
    """Holds `scheduler.params` of all three types."""

    warmup_num_steps: NonNegativeInt = 1000
    warmup_type: Literal["log", "linear"] = "log"
    warmup_min_ratio: Ratio = 0.0
    cos_min_ratio: Ratio = 1e-4
    warmup_min_lr: NonNegativeFloat = 0.0
    warmup_max_lr: PositiveFloat = 1e-3
    total_num_steps: Annotated[PositiveInt | None, BeforeValidator(lambda n: None if n == "auto" else n)] = None


class Scheduler(Options):
    """Holds `scheduler`. Without a type the rate is the optimizer's throughout."""

    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"] | None = None
    params: SchedulerParams = SchedulerParams()

    @model_validator(mode="after")
    def _params_are_of_the_type(self) -> Self:
        given = self.params.model_fields_set
        if self.type is None and given:
            raise ValueError("type is missing; expected WarmupLR, WarmupDecayLR or WarmupCosineLR")
        foreign = {"warmup_min_lr", "warmup_max_lr"}
        if self.type != "WarmupCosineLR":
            foreign = {"warmup_min_ratio", "cos_min_ratio"} | (
                {"total_num_steps"} if self.type == "WarmupLR" else set()
            )
        if given & foreign:
            raise ValueError(
                "\n".join(f"params.{name} is no option of {self.type}" for name in sorted(given & foreign))
            )
        return self

    def schedule(self, lr: float) -> Schedule:
        """Returns the schedule of an optimizer whose rate is `lr`."""
        if self.type is None:
            return Schedule(peak=lr)
        params, is_cosine = self.params, self.type == "WarmupCosineLR"
        return Schedule(
            peak=lr if is_cosine else params.warmup_max_lr,
            start=lr * params.warmup_min_ratio if is_cosine else params.warmup_min_lr,
            end=lr * params.cos_min_ratio if is_cosine else 0.0,
            warmup_steps=params.warmup_num_steps,
            total_steps=params.total_num_steps,
            warmup=params.warmup_type,
            decay="cosine" if is_cosine else "constant" if self.type == "WarmupLR" else "linear",
        )


class Bf16(_Bf16Keys):
    """Holds `bf16`."""

    enabled: Literal[True, False, "auto"] = "auto"


class Zero(_ZeroKeys):
    """Holds `zero_optimization`: how states would be divided among processes, if there were several."""

    stage: Literal[0] = Field(default=0, description="one process holds the whole model")


class DeepSpeed(_EngineKeys):
    """Holds DeepSpeed's JSON."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    gradient_clipping: NonNegativeFloat = 1.0
    bf16: Bf16 = Bf16()
    zero_optimization: Zero = Zero()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        if self.train_batch_size is None and self.train_micro_batch_size_per_gpu is None:
            raise ValueError(f"train_batch_size is missing; give two of {', '.join(names)}, or the first alone")
        batch, micro, passes = self._sizes()
        if micro * passes != batch:
            raise ValueError(
                f"train_batch_size is {batch}, but train_micro_batch_size_per_gpu x gradient_accumulation_steps x "
                f"processes is {micro} x {passes} x 1 = {micro * passes}; give two of the three that agree"
            )
        return self

    def _sizes(self) -> tuple[int, int, int]:
        """Returns batch, micro batch and passes, by DeepSpeed's rule: batch = micro batch x passes x processes (one)."""
        micro, passes = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        batch = self.train_batch_size or (micro or 1) * (passes or 1)
        micro = micro or batch // (passes or 1)
        return batch, micro, passes or batch // micro

    def options(self) -> EngineOptions:
        """Returns what a run does with it."""
        batch, micro_batch, accumulation = self._sizes()
        optimizer = self.optimizer.options()
        return EngineOptions(
            batch=batch,
            micro_batch=micro_batch,
            accumulation=accumulation,
            optimizer=optimizer,
            schedule=self.scheduler.schedule(optimizer.lr),
            gradient_clipping=self.gradient_clipping,
            bf16=self.bf16.enabled,
            stage=self.zero_optimization.stage,
        )


SECTIONS: Mapping[KeyPath, type[Options]] = {
    (): DeepSpeed,
    ("optimizer",): Optimizer,
    ("optimizer", "params"): OptimizerParams,
    ("scheduler",): Scheduler,
    ("scheduler", "params"): SchedulerParams,
    ("bf16",): Bf16,
    ("zero_optimization",): Zero,
}
