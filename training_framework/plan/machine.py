"""The devices of a run, and whether its processes fit them."""

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.switches import Choices

__all__ = ["check_processes", "choose_accelerators"]


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
        chosen = usable[:local_world_size]
        choices.note("device", chosen[0].kind, f"{chosen[0].name}, usable by this PyTorch")
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
    if accelerators and len(accelerators) < local_world_size:
        raise UserError(
            f"torchrun started {local_world_size} processes on this machine, which has "
            f"{len(accelerators)} usable GPU(s)",
            f"use --nproc-per-node={len(accelerators)}, or accelerator: cpu",
        )
    if config.auto_micro_batch and world_size > 1:
        raise UserError(
            f"auto_micro_batch is for one process, and {world_size} train together: one "
            "that is short of memory cannot change what the others compute",
            "drop it, and lower batch_size if memory is short",
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
        on_cuda = bool(accelerators) and accelerators[0].kind == "cuda"
        backend = "NCCL" if on_cuda else "gloo"
        choices.note("strategy", "ddp", f"{world_size} processes of torchrun, {backend}")


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
