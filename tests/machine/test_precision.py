"""How fp32 numbers are multiplied on CUDA."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from training_framework.machine.precision import product_format, set_fp32_precision
from training_framework.switches.fp32_precision import FP32_PRECISION


@pytest.fixture(autouse=True)
def _pytorchs_own_setting_afterwards() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True


def settings():
    """Both sets of PyTorch's switches; reading one raises if only the other was set."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        cuda.fp32_precision == "tf32",
        cudnn.conv.fp32_precision == "tf32",
        cuda.allow_tf32,
        cudnn.allow_tf32,
        torch.get_float32_matmul_precision() != "highest",
    )


def test_convolutions_and_matrix_products_are_set_alike_for_both_sets_of_switches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in ("tf32", "ieee", "tf32"):
            set_fp32_precision(value)
            assert settings() == (value == "tf32",) * 5


def test_a_cpu_run_leaves_pytorchs_setting_alone():
    before = settings()
    FP32_PRECISION.set_up_process("ieee", "cpu")
    assert settings() == before == (False, True, False, True, False)
    FP32_PRECISION.set_up_process("ieee", "cuda")
    assert settings() == (False,) * 5


@pytest.mark.parametrize(
    ("precision", "fp32_precision", "multiplied"),
    [
        ("32", "ieee", "fp32"),
        ("32", "tf32", "tf32"),
        ("bf16-mixed", "tf32", "bf16"),
        ("16-mixed", "ieee", "fp16"),
    ],
)
def test_what_is_multiplied_follows_both_settings(precision, fp32_precision, multiplied):
    assert product_format(precision, fp32_precision) == multiplied
