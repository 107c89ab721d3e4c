"""What MFU is a share of: peaks that are measured, cited for exactly that device, or unknown."""

import pytest

from training_framework.machine.peak_flops import CITED_PEAKS, measure_peak_flops


def teraflops(name, factors="bf16"):
    flops, source = measure_peak_flops("cuda", name, factors)
    assert source == ("cited" if flops else "n/a")
    return flops / 1e12


def test_a_cpu_is_measured_and_an_unknown_device_has_no_peak():
    flops, source = measure_peak_flops("cpu", "any", "fp32")
    assert source == "measured"
    assert 1e8 < flops < 1e14
    assert measure_peak_flops("cuda", "Unheard-of 9000", "bf16") == (0.0, "n/a")
    assert measure_peak_flops("mps", "arm mps", "fp32") == (0.0, "n/a")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A30", 165),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        # Other chips, parts of one, special editions, and devices without a data sheet.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA GeForce RTX 4090 D", 0),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA T400 4GB", 0),
        ("NVIDIA A100-SXM-64GB", 0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 0),
        ("NVIDIA H20", 0),
        ("NVIDIA A10G", 0),
        ("NVIDIA H800", 0),
    ],
)
def test_a_peak_is_cited_for_exactly_that_device(name, expected):
    assert teraflops(name) == expected


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("NVIDIA H200", 989, 989, 494, 67),
        ("NVIDIA A100-SXM4-40GB", 312, 312, 156, 19.5),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6, 35.6),
        ("Tesla T4", 0, 65, 0, 8.1),
        ("Tesla V100-SXM2-16GB", 0, 125, 0, 15.7),
        ("Tesla V100-PCIE-32GB", 0, 112, 0, 14),
    ],
)
def test_each_format_has_a_peak_of_its_own(name, bf16, fp16, tf32, fp32):
    found = [teraflops(name, factors) for factors in ("bf16", "fp16", "tf32", "fp32")]
    assert found == [bf16, fp16, tf32, fp32]


@pytest.mark.parametrize("name", CITED_PEAKS)
def test_peaks_are_dense_and_in_the_ratios_of_tensor_cores(name):
    peaks = CITED_PEAKS[name]
    assert peaks.source
    assert peaks.bf16 in (0, peaks.fp16)  # Volta and Turing have neither bf16 nor TF32
    assert (peaks.bf16 == 0) == (peaks.tf32 == 0)
    if peaks.tf32:
        assert peaks.fp16 / peaks.tf32 == pytest.approx(2, rel=0.03)
    assert 0 < peaks.fp32 <= (peaks.tf32 or peaks.fp16)
