"""Switches for how a step is computed: layout, compiler, recording, optimizer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from training_framework.config.schema import as_in_model
from training_framework.errors import UserError
from training_framework.machine.randomness import use_deterministic_algorithms
from training_framework.optimizers import has_fused_optimizer
from training_framework.switches.fp32_precision import FP32_PRECISION
from training_framework.switches.precision import PRECISION
from training_framework.switches.switch import (
    Card,
    Decision,
    Network,
    Situation,
    Switch,
    Trial,
    as_asked,
    off_and_on,
    turned,
)

__all__ = ["ARITHMETIC"]

# Estimates, until `tune` measures. Recording takes up to a second and saves 2 to 4 ms of launches
# a step. Compiling takes 30 to 60 s and saves about 4 ms a step; of a recorded step, which has no
# launches left to save, about 1 ms.
RECORD_FROM_STEPS = 500
COMPILE_FROM_STEPS = 10_000
COMPILE_RECORDED_FROM_STEPS = 40_000
# Below it Triton, which writes the kernels, raises.
TRITON_FROM_CAPABILITY = (7, 0)
COMPILE_MODES_ON_CUDA = ("default", "reduce-overhead")
# Modes of torch.compile that record CUDA graphs of their own.
RECORDING_MODES = ("reduce-overhead", "max-autotune")


def _channels_last(situation: Situation) -> Decision:
    wanted = situation.config.channels_last
    if wanted != "auto":
        return Decision(wanted, "asked for")
    if situation.on_gpu and situation.accelerators[0].channels_last_fault:
        return Decision(False, situation.accelerators[0].channels_last_fault)
    return Decision(True, "the layout convolutions prefer here")


def _to_channels_last(model: nn.Module, network: Network) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


CHANNELS_LAST = Switch(
    key="channels_last",
    name="channels_last",
    numbers="rounding",
    choose=_channels_last,
    change_network=_to_channels_last,
    ablation=off_and_on("channels_last"),
    dimension="memory format",
    trials=turned("channels_last", "channels last"),
    card=Card(
        use="Convolutions on CPUs, and on GPUs in mixed precision.",
        price="None: weights and activations only have another order in memory.",
        failure="A layer that needs the other order copies its input. There is no gain on mps.",
        source="PyTorch, Channels Last Memory Format in PyTorch (tutorial)",
    ),
)


def _cuda_graph(situation: Situation) -> Decision:
    wanted = situation.config.cuda_graph
    if wanted is False:
        return Decision(False, "asked for")
    if wanted == "auto" and not situation.on_cuda:
        return Decision(False)
    obstacle = _recording_obstacle(situation)
    if wanted == "auto":
        obstacle = obstacle or _recording_doubt(situation)
    if obstacle or wanted is True:
        return Decision(not obstacle, obstacle or "asked for")
    steps = situation.total_steps
    return Decision(True, f"recording takes about a second, which {steps:,} steps repay (estimate)")


def _recording_obstacle(situation: Situation) -> str:
    """Why the step cannot be recorded; empty if it can."""
    config = situation.config
    obstacles = {
        "only works on a CUDA GPU": not situation.on_cuda,
        "your own DataLoader may give each process batches of another size": (
            situation.world_size > 1 and situation.facts.storage == "loader"
        ),
        "on ROCm, what watches several processes spoils a recording": (
            situation.world_size > 1 and bool(situation.accelerators[0].architecture)
        ),
        "a step of several batches is not recorded": config.accumulate_grad_batches > 1,
        "progressive_resolution changes the shape of the batches": bool(
            config.progressive_resolution
        ),
        "train_on_hardest looks at the images before the step": bool(config.train_on_hardest),
        "fp16's scale is read from the device in every step": (
            situation.chosen["precision"] == "16-mixed"
        ),
        "only fused optimizers read the learning rate on the device": (
            config.fused_optimizer is False
        ),
        "muon, lookahead and rates of single weights are not recorded": (
            config.optimizer == "muon"
            or config.lookahead_steps > 0
            or config.bias_lr_factor != 1
            or (not situation.own_network and as_in_model(config, "whitening"))
        ),
    }
    return next((reason for reason, holds in obstacles.items() if holds), "")


def _recording_doubt(situation: Situation) -> str:
    """Why a step that can be recorded is not, unless that is asked for; empty if it is."""
    mode, steps = situation.config.compile_mode, situation.total_steps
    doubts = {
        "recording several processes is not proven on a real GPU; cuda_graph: true tries it": (
            situation.world_size > 1
        ),
        "recording is not proven on ROCm": situation.accelerators[0].capability is None,
        "a recording would freeze what your own network decides in Python": situation.own_network,
        f"compile_mode {mode} records parts of the step itself": mode in RECORDING_MODES,
        f"{steps:,} steps are too few to repay recording (estimate)": steps < RECORD_FROM_STEPS,
    }
    return next((reason for reason, holds in doubts.items() if holds), "")


def _cuda_graph_trials(situation: Situation) -> Iterator[Trial]:
    chosen = situation.chosen
    if _recording_obstacle(situation) or situation.world_size > 1 or not chosen["fused_optimizer"]:
        return
    plain = {"compile": False, "compile_mode": None}
    compiled = {"compile": True, "compile_mode": "default"}
    if chosen["cuda_graph"]:
        yield Trial("no CUDA graph", {**plain, "cuda_graph": False})
    if not chosen["cuda_graph"] or chosen["compile"]:
        yield Trial("CUDA graph", {**plain, "cuda_graph": True})
    if not (chosen["cuda_graph"] and chosen["compile"]):
        yield Trial("compile, CUDA graph", {**compiled, "cuda_graph": True})


CUDA_GRAPH = Switch(
    key="cuda_graph",
    name="CUDA graph",
    numbers="same",
    choose=_cuda_graph,
    ablation=off_and_on("cuda_graph"),
    ablation_needs=("gpu",),
    dimension="compile",
    trials=_cuda_graph_trials,
    card=Card(
        use="CUDA GPUs that wait for Python to launch their kernels: small networks and images. "
        "Several processes are recorded only if asked for: that is not proven on a real GPU.",
        price="Memory for the recorded step, and about a second at the start. Batches of another "
        "shape run as normal steps.",
        failure="Several batches a step, fp16 and unfused optimizers cannot be "
        "recorded; the plan then says so and leaves it off. A recording that fails is reported "
        "in one line, and the run goes on without; asked for, it is an error.",
        source="PyTorch, Accelerating PyTorch with CUDA Graphs; docs/design/0006-recorded-steps.md",
    ),
)


def _compile_mode(situation: Situation) -> Decision:
    # reduce-overhead records too, so it is left out where a recording is not proven.
    records = (
        situation.on_cuda
        and not situation.chosen["cuda_graph"]
        and not _recording_is_new_to(situation)
    )
    default = "reduce-overhead" if records else "default"
    return Decision(situation.config.compile_mode or default)


def _recording_is_new_to(situation: Situation) -> bool:
    """Whether nobody has tried recordings here: on ROCm, and beside several processes."""
    return situation.world_size > 1 or bool(situation.accelerators[0].architecture)


COMPILE_MODE = Switch(
    key="compile_mode",
    name="compile mode",
    numbers="rounding",
    choose=_compile_mode,
    card=Card(
        use="reduce-overhead records compiled parts as CUDA graphs; max-autotune also times "
        "several kernels for each operation.",
        price="max-autotune compiles for minutes.",
        failure="Without `compile` it does nothing.",
        source="PyTorch documentation of torch.compile",
    ),
)


def _compile(situation: Situation) -> Decision:
    wanted, steps = situation.config.compile, situation.total_steps
    hardware = situation.hardware
    if wanted is True and not situation.on_gpu and not hardware.cpp_compiler:
        raise UserError(
            f"compile: {hardware.cpp_compiler_fault}",
            "install a C++ compiler (g++), or set compile to false",
        )
    if wanted != "auto":
        mode = f"; mode {situation.chosen['compile_mode']}" if wanted else ""
        return Decision(wanted, f"asked for{mode}")
    if not situation.on_cuda:
        return Decision(False, "takes long and gains little off a CUDA GPU")
    capability = situation.accelerators[0].capability
    if capability is not None and capability < TRITON_FROM_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, TRITON_FROM_CAPABILITY))
        return Decision(False, f"needs compute capability {needed}, and the GPU has {found}")
    if not situation.accelerators[0].tensor_cores:
        # torch.compile always chooses channels_last for convolutions on NVIDIA's GPUs.
        return Decision(False, "computes in channels_last, slower on GPUs without tensor cores")
    if situation.hardware.triton_fault:
        return Decision(False, situation.hardware.triton_fault)
    recorded = situation.chosen["cuda_graph"]
    worth = steps >= (COMPILE_RECORDED_FROM_STEPS if recorded else COMPILE_FROM_STEPS)
    comparison = "are enough" if worth else "are too few"
    what = "compiling inside a recorded step" if recorded else "compiling"
    return Decision(worth, f"{steps:,} steps {comparison} to repay {what} (estimate)")


def _compile_trials(situation: Situation) -> Iterator[Trial]:
    chosen = situation.chosen
    if chosen["compile"] and not chosen["cuda_graph"]:  # else a trial of the recording has it
        yield Trial("no compile", {"compile": False, "compile_mode": None})
    recorded = {"cuda_graph": False} if chosen["cuda_graph"] else {}
    for mode in COMPILE_MODES_ON_CUDA if situation.on_cuda else ("default",):
        if recorded or not (chosen["compile"] and chosen["compile_mode"] == mode):
            settings = {"compile": True, "compile_mode": mode, **recorded}
            yield Trial(f"compile {mode}", settings)


COMPILE = Switch(
    key="compile",
    name="compile",
    numbers="rounding",
    choose=_compile,
    ablation=({"compile": False, "compile_mode": None}, {"compile": True}),
    dimension="compile",
    trials=_compile_trials,
    card=Card(
        use="Long runs on a CUDA GPU: norms, activations and additions become few kernels.",
        price="Seconds to minutes at the start, and again for each new shape.",
        failure="On a CPU it is often slower than the kernels compiled here, which it cannot "
        "optimize.",
        source="Ansel et al., PyTorch 2, ASPLOS 2024",
    ),
)


def _fused_optimizer(situation: Situation) -> Decision:
    wanted, optimizer = situation.config.fused_optimizer, situation.config.optimizer
    if wanted != "auto":
        return Decision(wanted, "asked for")
    if situation.chosen["precision"] == "16-mixed" and optimizer == "sgd":
        why = "steps that fp16's scaling skips can corrupt fused sgd's momentum"
        return Decision(False, why)
    # Every supported PyTorch has them for CUDA, where looking would start the device.
    if not situation.on_cuda and not has_fused_optimizer(optimizer, situation.device):
        return Decision(False, f"this PyTorch has no fused {optimizer} for {situation.device}")
    return Decision(True, "one kernel for the whole update, where there is one")


def _fused_optimizer_trials(situation: Situation) -> Iterator[Trial]:
    if situation.on_cuda or has_fused_optimizer(situation.config.optimizer, situation.device):
        yield from turned("fused_optimizer", "fused optimizer")(situation)


FUSED_OPTIMIZER = Switch(
    key="fused_optimizer",
    name="fused optimizer",
    numbers="rounding",
    choose=_fused_optimizer,
    ablation=off_and_on("fused_optimizer"),
    dimension="fused optimizer",
    trials=_fused_optimizer_trials,
    card=Card(
        use="Nearly always: the update of all weights is one pass over memory.",
        price="None.",
        failure="With fp16, steps that the gradient scaling skips can corrupt the momentum of "
        "fused sgd, so the plan leaves it out there.",
        source="PyTorch documentation of torch.optim (fused implementations)",
    ),
)


def _make_deterministic(value: Any, device_type: str) -> None:
    if value:
        use_deterministic_algorithms(device_type)


DETERMINISTIC = Switch(
    key="deterministic",
    name="deterministic algorithms",
    numbers="rounding",
    choose=as_asked("deterministic"),
    set_up_process=_make_deterministic,
    card=Card(
        use="Two runs on one GPU must give the same bits, to find a fault or to compare a change.",
        price="Slower kernels, and no choice of kernels by their speed.",
        failure="An operation without a deterministic kernel stops the run. A CPU run with a fixed "
        "number of threads is deterministic anyway.",
        source="PyTorch documentation, Reproducibility",
    ),
)

ARITHMETIC = (
    PRECISION,
    FP32_PRECISION,
    CHANNELS_LAST,
    CUDA_GRAPH,
    COMPILE_MODE,
    COMPILE,
    FUSED_OPTIMIZER,
    DETERMINISTIC,
)
