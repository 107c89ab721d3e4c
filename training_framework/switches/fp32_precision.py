"""The switch for what precision 32 multiplies on a GPU: fp32 numbers, or their leading bits."""

from typing import Any

from training_framework.machine.precision import set_fp32_precision
from training_framework.switches.switch import Card, Decision, Situation, Switch

__all__ = ["FP32_PRECISION"]


def _fp32_precision(situation: Situation) -> Decision:
    wanted = situation.config.fp32_precision
    if not (situation.on_cuda and situation.accelerators[0].tf32):
        return Decision("ieee", "only CUDA GPUs from 8.0 on have TF32" if wanted == "tf32" else "")
    if wanted != "auto":
        return Decision(wanted, "asked for")
    if situation.chosen["precision"] != "32":
        return Decision("tf32")
    return Decision("tf32", "tensor cores multiply 11 bits of each number; ieee keeps all 24")


def _set_fp32_precision(value: Any, device_type: str) -> None:
    if device_type == "cuda":
        set_fp32_precision(value)


FP32_PRECISION = Switch(
    key="fp32_precision",
    name="TF32",
    numbers="different",
    choose=_fp32_precision,
    set_up_process=_set_fp32_precision,
    card=Card(
        use="Precision 32 on NVIDIA GPUs from compute capability 8.0 on: their tensor cores "
        "multiply TF32, but not fp32.",
        price="Convolutions and matrix products keep eleven bits of their factors, as with fp16, "
        "and the range of fp32. They add up in fp32.",
        failure="Elsewhere there is no TF32, and the plan keeps ieee. In mixed precision no "
        "product is left to it.",
        source="PyTorch documentation, CUDA semantics: TensorFloat-32 on Ampere and later devices",
    ),
)
