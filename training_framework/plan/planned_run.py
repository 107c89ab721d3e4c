"""From a configuration to its plan on this machine: the start of every command and of the API."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict, settings_to_yaml
from training_framework.data import Dataset, detect_dataset, open_dataset
from training_framework.data.facts import DatasetFacts
from training_framework.data.user_facts import user_loader_facts
from training_framework.data.user_look import LookedAtLoader
from training_framework.kernels import NativeKernelsError
from training_framework.kernels.norm import load_norm_kernels
from training_framework.kernels.winograd import load_winograd_kernels
from training_framework.machine.distributed import Processes, value_of_first_process
from training_framework.machine.hardware import Hardware, detect_hardware
from training_framework.plan.machine import check_own_device
from training_framework.plan.planner import make_plan
from training_framework.plan.train_plan import TrainPlan

__all__ = ["PlannedRun", "UserLoaders", "open_configured_dataset", "plan_run"]

_plans_made = itertools.count()


class UserLoaders(NamedTuple):
    """The user's own loaders instead of a data set of ours."""

    train: LookedAtLoader
    val: LookedAtLoader | None


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A plan, and what it is based on.

    Attributes:
        plan: Everything that is decided; the same in all processes.
        settings: Plain values of the configuration, for people and for a resumption to compare.
        hardware: This machine.
        facts: Facts about the data.
        source: The data set, or the user's own loaders.
        processes: This process's rank, and the number of processes that train together.
    """

    plan: TrainPlan
    settings: Mapping[str, Any]
    hardware: Hardware
    facts: DatasetFacts
    source: Dataset | UserLoaders
    processes: Processes

    def config_yaml(self) -> str:
        """The configuration as text, with `resume: auto`, so that a new run can use it."""
        return settings_to_yaml({**self.settings, "resume": "auto"})


def plan_run(
    config: TrainConfig,
    *,
    train_loader: LookedAtLoader | None = None,
    val_loader: LookedAtLoader | None = None,
    own_network: str | None = None,
) -> PlannedRun:
    """Plan what `config` runs here. Under torchrun, all processes use the first one's plan.

    Args:
        config: What is asked for.
        train_loader: The user's own loader; None opens the configured data.
        val_loader: Likewise, for evaluation.
        own_network: The class of a given network that is used instead of a new `config.model`.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    key = f"plan/{next(_plans_made)}"
    processes = Processes.from_environment()
    hardware = detect_hardware()
    check_own_device(config, hardware, processes, key=key)
    source: Dataset | UserLoaders
    if train_loader is None:
        source = open_configured_dataset(config)
        facts, batches = source.facts, None
    else:
        source, batches = UserLoaders(train_loader, val_loader), train_loader.batch_count
        facts = user_loader_facts(train_loader, val_loader, config.num_classes)
    decisive = _with_batches_of(train_loader, config, processes)

    def planned(machine: Hardware) -> TrainPlan:
        return make_plan(
            decisive,
            machine,
            facts,
            world_size=processes.world_size,
            local_world_size=processes.local_world_size,
            batches_per_epoch=batches,
            own_network=own_network,
        )

    plan = planned(hardware)
    fault = _kernels_fault(plan)
    if fault:
        hardware = dataclasses.replace(hardware, cpp_compiler=None, cpp_compiler_fault=fault)
        plan = planned(hardware)
    said = value_of_first_process(key, json.dumps(plan.as_dict()), processes)
    return PlannedRun(
        plan=TrainPlan.from_dict(json.loads(said)),
        settings=config_to_dict(config),
        hardware=hardware,
        facts=facts,
        source=source,
        processes=processes,
    )


def _with_batches_of(
    loader: LookedAtLoader | None, config: TrainConfig, processes: Processes
) -> TrainConfig:
    """The configuration with the batch size of the user's own loader, where there is one.

    Each process has a loader of its own, and trains on what that yields.
    """
    if loader is None:
        return config
    return config.model_copy(update={"batch_size": loader.batch_size * processes.world_size})


def _kernels_fault(plan: TrainPlan) -> str:
    """Why kernels that the plan chose by itself cannot be compiled; empty if they can."""
    loaders = {"winograd_convolutions": load_winograd_kernels, "fused_norms": load_norm_kernels}
    try:
        for key, load in loaders.items():
            if getattr(plan, key) and key not in plan.asked_for:
                load()
    except NativeKernelsError as error:
        return str(error)
    return ""


def open_configured_dataset(config: TrainConfig) -> Dataset:
    """The data set that a configuration names, or that its data_root holds."""
    name: str | None = config.data
    if name is None:
        name = "digits" if config.data_root is None else detect_dataset(config.data_root)
    return open_dataset(
        name,
        root=config.data_root,
        image_size=config.img_size,
        num_classes=config.num_classes,
        synthetic_train_images=config.synthetic_train_images,
        synthetic_val_images=config.synthetic_val_images,
        limit_train_images=config.limit_train_images,
        seed=config.seed,
    )
