"""Choices that follow from the machine: device, precision, layout, compiler, processes."""

from typing import Literal

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.machine.precision import Precision
from training_framework.plan.train_plan import Choices

__all__ = ["MachineChoices"]

# The set must leave most of the memory to weights, activations and everything else.
RESIDENT_SHARE_OF_MEMORY = 0.25
# A compiled step has to run often enough to earn back the time that compiling takes.
COMPILE_FROM_STEPS = 2000
MOST_LOADER_WORKERS = 16
# As models.winograd has it: on smaller ones the border is much of the map.
SMALLEST_WINOGRAD_MAP = 3


class MachineChoices:
    """What the machine decides, for one configuration; each method notes its choice and reason."""

    def __init__(
        self,
        config: TrainConfig,
        hardware: Hardware,
        facts: DatasetFacts,
        *,
        world_size: int,
        local_world_size: int,
        choices: Choices,
    ) -> None:
        self.config = config
        self.hardware = hardware
        self.facts = facts
        self.world_size = world_size
        self.local_world_size = local_world_size
        self.note = choices.note
        self.accelerators = self._accelerators()
        self._check_processes()

    @property
    def on_gpu(self) -> bool:
        """Whether the run is not on the CPU."""
        return bool(self.accelerators)

    @property
    def on_cuda(self) -> bool:
        """Whether the run is on a CUDA (or ROCm) device."""
        return self.on_gpu and self.accelerators[0].kind == "cuda"

    def _accelerators(self) -> tuple[Accelerator, ...]:
        wanted = self.config.accelerator
        usable = self.hardware.usable
        faults = [f"{gpu.name} {gpu.fault}" for gpu in self.hardware.accelerators if gpu.fault]
        name = self.hardware.cpu_name
        if wanted == "cpu":
            self.note("device", "cpu", f"asked for; {name}")
            return ()
        if usable:
            chosen = usable[: self.local_world_size]
            self.note("device", chosen[0].kind, f"{chosen[0].name}, usable by this PyTorch")
            return chosen
        if wanted == "gpu":
            fault = faults[0] if faults else "this PyTorch finds no GPU"
            raise UserError(
                f"accelerator: gpu: {fault}", "use accelerator: auto to go on on the CPU"
            )
        why = f"goes on on the CPU, since {faults[0]}" if faults else f"no GPU found; {name}"
        self.note("device", "cpu", why)
        return ()

    def _check_processes(self) -> None:
        devices = self.config.devices
        if devices not in ("auto", self.world_size):
            if self.world_size == 1:
                raise UserError(
                    f"devices: {devices} needs one process a device",
                    f"start it with torchrun --nproc-per-node={devices} "
                    "-m training_framework train ...",
                )
            raise UserError(
                f"devices is {devices} but torchrun started {self.world_size} processes",
                f"use devices: auto, or --nproc-per-node={devices}",
            )
        if self.on_gpu and len(self.accelerators) < self.local_world_size:
            raise UserError(
                f"torchrun started {self.local_world_size} processes on this machine, which has "
                f"{len(self.accelerators)} usable GPU(s)",
                f"use --nproc-per-node={len(self.accelerators)}, or accelerator: cpu",
            )
        if self.config.auto_micro_batch and self.world_size > 1:
            raise UserError(
                f"auto_micro_batch is for one process, and {self.world_size} train together: one "
                "that is short of memory cannot change what the others are computing",
                "drop it, and lower batch_size if memory is short",
            )
        if self.config.batch_size % self.world_size:
            raise UserError(
                f"batch_size {self.config.batch_size} cannot be shared equally by "
                f"{self.world_size} processes",
                f"use a multiple of {self.world_size}",
            )
        if self.world_size > 1:
            backend = "NCCL" if self.on_cuda else "gloo"
            self.note("strategy", "ddp", f"{self.world_size} processes of torchrun, {backend}")

    def precision(self) -> Precision:
        """What the forward pass computes in."""
        wanted = self.config.precision
        if wanted != "auto" and wanted != "mixed":  # noqa: PLR1714 (mypy narrows this form)
            self.note("precision", wanted, "asked for" + self._emulation_note(wanted))
            return wanted
        if self.on_gpu:
            gpu = self.accelerators[0]
            if gpu.kind not in ("cuda", "xpu") and wanted == "auto":
                self.note("precision", "32", f"mixed precision is not proven on {gpu.kind}")
                return "32"
            half: Literal["bf16-mixed", "16-mixed"] = "bf16-mixed" if gpu.bf16 else "16-mixed"
            why = "computes bf16" if gpu.bf16 else "has no bf16; fp16 with gradient scaling"
            self.note("precision", half, f"{gpu.name} {why}")
            return half
        if wanted == "mixed":
            self.note("precision", "bf16-mixed", "asked for" + self._emulation_note(wanted))
            return "bf16-mixed"
        if not self.hardware.cpu_bf16:
            why = "the CPU has neither avx512_bf16 nor amx, and would emulate bf16"
            self.note("precision", "32", why)
            return "32"
        sets, speed = ", ".join(self.hardware.bf16_instructions), self.hardware.bf16_speed
        measured = "" if speed is None else f": {speed:.2g}x the speed of fp32, measured"
        self.note(
            "precision",
            "bf16-mixed" if self.hardware.cpu_bf16_pays else "32",
            f"the CPU computes bf16 itself ({sets}){measured}",
        )
        return "bf16-mixed" if self.hardware.cpu_bf16_pays else "32"

    def _emulation_note(self, wanted: str) -> str:
        if self.on_gpu or wanted == "32":
            return ""
        if wanted == "16-mixed" or not self.hardware.cpu_bf16:
            kind = "fp16" if wanted == "16-mixed" else "bf16"
            return f"; this CPU emulates {kind}, which is slower than precision 32"
        if not self.hardware.cpu_bf16_pays:
            return f"; bf16 has {self.hardware.bf16_speed:.2g}x the speed of fp32 here, measured"
        return ""

    def channels_last(self) -> bool:
        """Whether the channels lie last in memory."""
        if self.config.channels_last != "auto":
            self.note("channels_last", self.config.channels_last, "asked for")
            return self.config.channels_last
        on = not (self.on_gpu and self.accelerators[0].kind == "mps")
        why = "the layout convolutions prefer here" if on else "no gain on mps"
        self.note("channels_last", on, why)
        return on

    def cuda_graph(self, precision: Precision) -> bool:
        """Whether whole steps are recorded as CUDA graphs."""
        if not self.config.cuda_graph:
            return False
        obstacles = {
            "without effect but on a CUDA GPU": not self.on_cuda,
            "several processes train together": self.world_size > 1,
            "a step of several batches is not recorded": self.config.accumulate_grad_batches > 1,
            "fp16's scale is read from the device in every step": precision == "16-mixed",
            "only fused optimizers read the learning rate on the device": (
                self.config.fused_optimizer is False
            ),
        }
        why = next((reason for reason, holds in obstacles.items() if holds), "asked for")
        self.note("cuda_graph", why == "asked for", why)
        return why == "asked for"

    def compile(self, total_steps: int, *, cuda_graph: bool) -> tuple[bool, str]:
        """Whether torch.compile is used, and its mode."""
        mode = self.config.compile_mode
        mode = mode or ("reduce-overhead" if self.on_cuda and not cuda_graph else "default")
        if self.config.compile != "auto":
            self.note("compile", self.config.compile, f"asked for; mode {mode}")
            return self.config.compile, mode
        if not self.on_cuda:
            self.note("compile", False, "takes long and gains little off a CUDA GPU")
            return False, mode
        worth = total_steps >= COMPILE_FROM_STEPS
        comparison = "are enough" if worth else "are too few"
        self.note("compile", worth, f"{total_steps:,} steps {comparison} to repay compiling")
        return worth, mode

    def fused_optimizer(self, precision: Precision) -> bool:
        """Whether torch's fused optimizer is used."""
        if self.config.fused_optimizer != "auto":
            self.note("fused_optimizer", self.config.fused_optimizer, "asked for")
            return self.config.fused_optimizer
        if precision == "16-mixed" and self.config.optimizer == "sgd":
            why = "steps that fp16's scaling skips can corrupt fused sgd's momentum"
            self.note("fused_optimizer", False, why)
            return False
        self.note("fused_optimizer", True, "one kernel for the whole update, where there is one")
        return True

    def small_map_convolutions(self, stem: str, image_size: int, precision: str) -> bool:
        """Whether convolutions on maps of a few pixels become matrix products."""
        if self.config.small_map_convolutions != "auto":
            self.note("small_map_convolutions", self.config.small_map_convolutions, "asked for")
            return self.config.small_map_convolutions
        last_map = image_size // (32 if stem == "imagenet" else 8)
        on = not self.on_gpu and precision == "32" and last_map <= 2
        if on:
            self.note(
                "small_map_convolutions", True, f"the last maps are {last_map} px: mostly padding"
            )
        return on

    def winograd_convolutions(
        self, stem: str, image_size: int, precision: str, *, channels_last: bool
    ) -> bool:
        """Whether 3x3 convolutions run by Winograd's algorithm."""
        first_map = image_size // (4 if stem == "imagenet" else 1)
        if self.config.winograd_convolutions == "auto" and first_map < SMALLEST_WINOGRAD_MAP:
            return False
        gain = "2.25 to 4 times fewer multiplications"
        return self._native_kernels("winograd_convolutions", gain, precision, channels_last)

    def fused_norms(self, precision: str, channels_last: bool) -> bool:
        """Whether batch norm, shortcut and ReLU are one pass over memory."""
        if self.config.sync_batchnorm and self.world_size > 1:
            if self.config.fused_norms is True:
                self.note("fused_norms", False, "batch norm is synchronized between processes")
            return False
        gain = "fewer passes over memory"
        return self._native_kernels("fused_norms", gain, precision, channels_last)

    def keep_memory(self) -> bool:
        """Whether freed host memory stays with the process."""
        wanted = self.config.keep_memory
        if wanted != "auto":
            self.note("keep_memory", wanted, "asked for")
            return wanted
        on = not self.on_gpu and self.hardware.glibc
        if on:
            self.note("keep_memory", True, "no new pages for each step's activations")
        return on

    def _native_kernels(self, key: str, gain: str, precision: str, channels_last: bool) -> bool:
        """Whether kernels that are compiled here take over a part of the work.

        Args:
            key: The setting that asks for them.
            gain: What they are good for.
            precision: As planned.
            channels_last: As planned.
        """
        wanted = getattr(self.config, key)
        if wanted != "auto":
            useless = wanted and (self.on_gpu or precision != "32")
            why = "asked for; without effect but on a CPU in fp32" if useless else "asked for"
            self.note(key, wanted, why)
            return bool(wanted)
        if self.on_gpu or precision != "32" or not channels_last or self.config.compile is True:
            return False
        if "avx512" not in self.hardware.instruction_sets:
            self.note(key, False, "measured to pay on CPUs with AVX-512 alone")
            return False
        if not self.hardware.cpp_compiler:
            self.note(key, False, f"{gain}, but no C++ compiler is installed for its kernels")
            return False
        self.note(key, True, f"{gain}; kernels for this CPU, compiled once")
        return True

    def synchronize_norms(self) -> bool:
        """Whether batch norm sees the batches of all processes."""
        if self.config.sync_batchnorm and self.world_size == 1:
            self.note("sync_batchnorm", False, "one process: nothing to synchronize")
            return False
        return self.config.sync_batchnorm

    def resident_data(self) -> bool:
        """Whether the data set lies whole in the device's memory."""
        wanted, facts = self.config.resident_data, self.facts
        if facts.storage == "loader":
            return False
        if facts.storage == "files":
            if wanted is True:
                raise UserError(
                    "resident_data: true needs images held as arrays, and these are files",
                    "use resident_data: auto",
                )
            self.note("resident_data", False, "image files are decoded by loader processes")
            return False
        size = f"{facts.array_bytes / 2**20:,.0f} MB of images"
        if wanted != "auto":
            self.note("resident_data", wanted, f"asked for; {size}")
            return wanted
        gpu_bytes = self.accelerators[0].memory_bytes if self.on_gpu else 0
        memory = gpu_bytes or self.hardware.memory_bytes // self.local_world_size
        fits = facts.array_bytes <= RESIDENT_SHARE_OF_MEMORY * memory
        where = f"{memory / 2**30:,.0f} GB of memory"
        self.note("resident_data", fits, f"{size} {'fit' if fits else 'do not fit'} {where}")
        return fits

    def num_workers(self, resident: bool) -> int:
        """Loader processes."""
        wanted = self.config.num_workers
        if self.facts.storage == "loader":
            return 0
        if resident:
            if wanted not in ("auto", 0):
                self.note("num_workers", 0, "the data is resident: nothing is left to load")
            return 0
        if wanted != "auto":
            self.note("num_workers", wanted, "asked for")
            return wanted
        cores = max(1, self.hardware.cores // self.local_world_size)
        if self.on_gpu:
            workers = min(cores, MOST_LOADER_WORKERS)
            self.note("num_workers", workers, f"{cores} cores for each process")
        else:
            workers = 1
            self.note("num_workers", workers, "the step needs the cores and is slower")
        return workers

    def pin_memory(self, resident: bool) -> bool:
        """Whether host batches lie in page-locked memory."""
        if self.config.pin_memory == "auto":
            return self.on_cuda and not resident
        if self.config.pin_memory and not self.on_cuda:
            self.note("pin_memory", False, "no CUDA device to copy to")
            return False
        return self.config.pin_memory

    def threads(self) -> int:
        """CPU threads of this process."""
        limit = self.hardware.thread_limit
        if self.config.threads != "auto":
            threads, why = self.config.threads, "asked for"
        else:
            threads = max(1, self.hardware.cores // self.local_world_size)
            why = f"{self.hardware.cores} cores, {self.local_world_size} process(es)"
        if limit is not None and threads > limit:
            threads, why = limit, f"OMP_THREAD_LIMIT allows no more ({threads}: {why})"
        self.note("threads", threads, why)
        return threads
