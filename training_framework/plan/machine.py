"""The devices of a run, and whether its processes fit them."""

import platform

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine.distributed import BACKENDS, Processes, is_first_to_report
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.switches import Choices

__all__ = ["check_own_device", "check_processes", "choose_accelerators"]


def check_own_device(
    config: TrainConfig, hardware: Hardware, processes: Processes, *, key: str
) -> None:
    """Whether the only device that this process sees is its own, as far as torchrun can tell.

    Args:
        config: What is asked for.
        hardware: The machine as this process sees it.
        processes: This process, and those that train with it.
        key: The same in all processes, and new for each call.

    Raises:
        UserError: Another process has the same device.
    """
    if config.accelerator == "cpu" or not _each_its_own(hardware, processes.local_world_size):
        return
    (gpu,) = hardware.usable
    if gpu.uuid and not is_first_to_report(f"{key}/{platform.node()}/{gpu.uuid}"):
        raise UserError(
            f"several of the {processes.local_world_size} processes on this machine see the same "
            f"single GPU, {gpu.name}",
            "unset CUDA_VISIBLE_DEVICES for torchrun, or use --nproc-per-node=1",
        )


def _each_its_own(hardware: Hardware, local_world_size: int) -> bool:
    """Whether each process on this machine sees one device, meant for it alone."""
    return hardware.one_device_each and local_world_size > 1 and len(hardware.usable) == 1


def choose_accelerators(
    config: TrainConfig, hardware: Hardware, *, local_world_size: int, choices: Choices
) -> tuple[Accelerator, ...]:
    """The accelerators of this machine to train on, by local rank; none: train on the CPU.

    Raises:
        UserError: The configuration asks for a GPU, but this PyTorch cannot use any.
    """
    wanted, usable, name = config.accelerator, hardware.usable, hardware.cpu_name
    faults = [f"{gpu.name} {gpu.fault}" for gpu in hardware.accelerators if gpu.fault]
    if wanted == "cpu":
        choices.note("device", "cpu", f"asked for; {name}")
        return ()
    if usable:
        each_its_own = _each_its_own(hardware, local_world_size)
        chosen = usable * local_world_size if each_its_own else usable[:local_world_size]
        seen = "; each process sees its own" if each_its_own else ""
        choices.note("device", chosen[0].kind, f"{chosen[0].name}, usable by this PyTorch{seen}")
        return chosen
    if wanted == "gpu":
        fault = faults[0] if faults else "this PyTorch finds no GPU"
        raise UserError(f"accelerator: gpu: {fault}", "use accelerator: auto to train on the CPU")
    why = f"trains on the CPU, since {faults[0]}" if faults else f"no GPU found; {name}"
    choices.note("device", "cpu", why)
    return ()


def check_processes(
    config: TrainConfig,
    accelerators: tuple[Accelerator, ...],
    *,
    world_size: int,
    local_world_size: int,
    choices: Choices,
) -> None:
    """Whether the processes fit the devices and the batch.

    Raises:
        UserError: They do not.
    """
    if config.devices not in ("auto", world_size):
        raise _wrong_devices(config.devices, world_size)
    device = accelerators[0].kind if accelerators else "cpu"
    if world_size > 1 and device not in BACKENDS:
        raise UserError(
            f"{world_size} processes were started, but PyTorch cannot connect them on {device}",
            "start one process, without torchrun, or set accelerator to cpu",
        )
    if accelerators and len(accelerators) < local_world_size:
        raise UserError(
            f"torchrun started {local_world_size} processes on this machine, which has "
            f"{len(accelerators)} usable GPU(s)",
            f"use --nproc-per-node={len(accelerators)}, or accelerator: cpu; if each process has "
            "its own GPU, set its CUDA_VISIBLE_DEVICES to that GPU alone",
        )
    if config.auto_micro_batch is True and world_size > 1:
        raise UserError(
            f"auto_micro_batch works in one process only, and {world_size} train together",
            "set it to auto or false; if memory runs out, lower batch_size",
        )
    if config.batch_size % world_size:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared equally by {world_size} processes",
            f"use a multiple of {world_size}",
        )
    if config.strategy == "ddp" and world_size == 1:
        raise UserError(
            "strategy: ddp is for several processes, and one is started",
            "start it with torchrun --nproc-per-node=N -m training_framework train ..., or use "
            "strategy: auto",
        )
    if world_size > 1:
        choices.note("strategy", "ddp", f"{world_size} processes, connected by {BACKENDS[device]}")


def _wrong_devices(devices: int | str, world_size: int) -> UserError:
    if world_size == 1:
        return UserError(
            f"devices: {devices} needs one process a device",
            f"start it with torchrun --nproc-per-node={devices} -m training_framework train ...",
        )
    return UserError(
        f"devices is {devices} but torchrun started {world_size} processes",
        f"use devices: auto, or --nproc-per-node={devices}",
    )
