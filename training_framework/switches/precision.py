"""The switch for what a step computes in: fp32, or bf16 or fp16 beside it."""

from collections.abc import Iterator

from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.switches.cpu_kernels import bf16_products_pay
from training_framework.switches.switch import Card, Decision, Situation, Switch, Trial

__all__ = ["PRECISION"]


def _precision(situation: Situation) -> Decision:
    wanted = situation.config.precision
    if wanted not in ("auto", "mixed"):
        return Decision(wanted, "asked for" + _slowness_note(situation))
    if situation.on_gpu:
        return _gpu_precision(situation.accelerators[0], wanted)
    if wanted == "mixed":
        return Decision("bf16-mixed", "asked for" + _slowness_note(situation))
    decision = _cpu_precision(situation.hardware)
    if decision.value != "32" and bf16_products_pay(situation):
        return Decision(
            "32", "bf16 is fast here, and fastest as the products of Winograd's convolutions"
        )
    if decision.value != "32" and _strides_over_single_pixels(situation):
        return Decision(
            "32", "bf16 gradients of strided convolutions over one pixel are wrong here"
        )
    return decision


def _strides_over_single_pixels(situation: Situation) -> bool:
    """Whether the last stage, which strides, starts from maps of one pixel.

    PyTorch 2.13 gives weight gradients of 1e14 for such a 3x3 convolution in bf16 on a CPU with
    avx512_bf16: (16, 128, 1, 1) to 256 channels, stride 2, padding 1, channels_last.
    """
    sizes = [size for _, size in situation.config.progressive_resolution]
    return situation.stem == "imagenet" and min([situation.facts.image_size, *sizes]) <= 16


def _gpu_precision(gpu: Accelerator, wanted: str) -> Decision:
    if gpu.kind not in ("cuda", "xpu") and wanted == "auto":
        return Decision("32", f"mixed precision is not proven on {gpu.kind}")
    if gpu.bf16:
        return Decision("bf16-mixed", f"{gpu.name} computes bf16")
    if not gpu.tensor_cores:
        slow = f"{gpu.name} has no tensor cores, so half precision is no faster"
        return Decision("16-mixed" if wanted == "mixed" else "32", slow)
    return Decision("16-mixed", f"{gpu.name} has no bf16; fp16 with gradient scaling")


def _cpu_precision(hardware: Hardware) -> Decision:
    if not hardware.cpu_bf16:
        return Decision("32", "the CPU has neither avx512_bf16 nor amx, and would emulate bf16")
    sets, speed = ", ".join(hardware.bf16_instructions), hardware.bf16_speed
    measured = "" if speed is None else f": {speed:.2g}x the speed of fp32, measured"
    value = "bf16-mixed" if hardware.cpu_bf16_pays else "32"
    return Decision(value, f"the CPU computes bf16 itself ({sets}){measured}")


def _slowness_note(situation: Situation) -> str:
    wanted, hardware = situation.config.precision, situation.hardware
    if situation.on_gpu:
        return _gpu_slowness_note(situation.accelerators[0], wanted)
    if wanted == "32":
        return ""
    if wanted == "16-mixed" or not hardware.cpu_bf16:
        kind = "fp16" if wanted == "16-mixed" else "bf16"
        return f"; this CPU emulates {kind}, which is slower than precision 32"
    if not hardware.cpu_bf16_pays:
        return f"; bf16 has {hardware.bf16_speed:.2g}x the speed of fp32 here, measured"
    return ""


def _gpu_slowness_note(gpu: Accelerator, wanted: str) -> str:
    if gpu.capability is None or wanted == "32":
        return ""
    if wanted == "bf16-mixed" and not gpu.bf16:
        faster = "16-mixed" if gpu.tensor_cores else "32"
        return f"; {gpu.name} does not compute bf16 itself, and precision {faster} is faster"
    if not gpu.tensor_cores:
        return f"; {gpu.name} has no tensor cores, and precision 32 is as fast or faster"
    return ""


def _precision_trials(situation: Situation) -> Iterator[Trial]:
    """The precisions that the device has instructions for; an emulated one needs no trial."""
    known = ["32"]
    if not situation.on_gpu:
        known += ["bf16-mixed"] if situation.hardware.cpu_bf16_pays else []
    else:
        known += ["bf16-mixed"] if situation.accelerators[0].bf16 else []
        known += ["16-mixed"] if situation.on_cuda else []
    for precision in known:
        if precision != situation.chosen["precision"]:
            yield Trial(f"precision {precision}", {"precision": precision})


PRECISION = Switch(
    key="precision",
    name="mixed precision",
    numbers="different",
    choose=_precision,
    ablation=({"precision": "32"}, {"precision": "mixed"}),
    ablation_needs=("bf16",),
    dimension="precision",
    trials=_precision_trials,
    card=Card(
        use="Devices with units for bf16 or fp16: GPUs since Volta, CPUs with avx512_bf16 or AMX.",
        price="Convolutions and matrix products keep eight (bf16) or eleven (fp16) bits. "
        "Weights, norms and the loss stay in fp32.",
        failure="A CPU without the instructions emulates bf16 and becomes slower. fp16 can "
        "overflow: its gradients are scaled, and steps that overflow are skipped.",
        source="Micikevicius et al., Mixed Precision Training, arXiv 1710.03740",
    ),
)
