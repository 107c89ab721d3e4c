"""The plan of a run: every derived number and every choice, with its reason."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from training_framework.switches import SWITCHES, Choice

__all__ = ["Choice", "TrainPlan"]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Every derived number and every choice of a run. Durations are in optimizer steps.

    Attributes:
        device: PyTorch's device type, `cpu`, `cuda`, `mps`, ...
        device_indices: Number of each rank's device on its machine, by local rank.
        device_name: The processor's or accelerator's own name.
        global_batch_size: Images of one forward pass over all ranks.
        device_batch_size: Images of one forward pass on one rank.
        evaluation_batch_size: Images of one forward pass of an evaluation over all ranks.
        images_per_step: Images of one optimizer step over all ranks.
        batches_per_epoch: Forward passes an epoch.
        steps_per_epoch: Optimizer steps an epoch; the last may have fewer batches.
        evaluation_interval_steps: Steps between two evaluations, not necessarily whole.
        more_switches: Values of the switches that have no field of their own, by key.
        choices: Every decision with its reason, for people.
    """

    device: str
    device_indices: tuple[int, ...]
    device_name: str
    world_size: int
    stem: Literal["cifar", "imagenet"]
    num_classes: int
    image_size: int
    global_batch_size: int
    device_batch_size: int
    evaluation_batch_size: int
    accumulate_grad_batches: int
    images_per_step: int
    batches_per_epoch: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int | None
    step_size_steps: int
    milestones_steps: tuple[int, ...]
    evaluation_interval_steps: float
    lr: float
    nesterov: bool
    precision: Literal["32", "bf16-mixed", "16-mixed"]
    channels_last: bool
    compile: bool
    compile_mode: str
    cuda_graph: bool
    fused_optimizer: bool
    small_map_convolutions: bool
    winograd_convolutions: bool
    fused_norms: bool
    keep_memory: bool
    sync_batchnorm: bool
    resident_data: bool
    num_workers: int
    pin_memory: bool
    threads: int
    flip: Literal["none", "random", "alternating"]
    crop_padding: int
    more_switches: Mapping[str, Any]
    choices: tuple[Choice, ...]

    def switch_values(self) -> dict[str, Any]:
        """The value of every switch, by key."""
        own = {field.name for field in dataclasses.fields(self)}
        return {
            switch.key: (
                getattr(self, switch.key) if switch.key in own else self.more_switches[switch.key]
            )
            for switch in SWITCHES
        }

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows `step` (counted from 1); one follows the last."""
        interval = self.evaluation_interval_steps
        # The small term keeps 0.1 of 30 steps from landing a step late through rounding.
        crossed = math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)
        return crossed or step == self.total_steps

    def torch_device(self, local_rank: int) -> torch.device:
        """The device of the process with that rank on its machine."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device(self.device, self.device_indices[local_rank])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return dataclasses.asdict(self)
