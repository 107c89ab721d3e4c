"""The scripts that turn result files into tables: what they conclude from made-up results."""

import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def load(name):
    return importlib.import_module(name)


def ratio(variant, median, low, high, against="all off"):
    return {
        "variant": variant, "against": against, "median": median, "low": low, "high": high,
        "pairs": 6, "control": False,
    }  # fmt: skip


def row(name, *, memory=100, start=1.0, unavailable="", compiled=False, own=False, marks=()):
    facts = {"plan": {"compile": compiled, "choices": [name]}}
    return {
        "facts": None if unavailable else facts, "config": {"compile": name, "own": own},
        "name": name, "measurements": [] if unavailable else [1], "unavailable": unavailable,
        "peak_memory_bytes": None if unavailable else memory, "mfu": 0.5,
        "startup_seconds": None if unavailable else start, "marks": list(marks),
    }  # fmt: skip


ABLATION = {
    "variants": [
        row("all off"), row("all on", marks=["busy machine"]),
        row("only compile", memory=150, start=9.0, marks=["wide spread"]),
        row("only mixed precision", unavailable="no bf16 here"),
        row("only layout"), row("with compile", compiled=True),
        row("without layout", own=True, marks=["busy machine", "warm-up"]),
        row("with layout"),
    ],
    "ratios": [
        ratio("only compile", 0.9, 0.85, 0.95), ratio("only layout", 1.2, 1.1, 1.3),
        ratio("with layout", 0.99, 0.98, 1.0, "all on"),  # changes nothing in this plan
        ratio("with compile", 1.05, 1.0, 1.1, "all on"),
        ratio("without layout", 0.5, 0.4, 0.8, "all on"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 1.3, "confirmed"), (1.0, 1.05, "refuted"), (1.05, 1.2, "open")],
)
def test_an_interval_decides_a_claim(low, high, verdict):
    assert load("claims").judge(low, high, 1.1) == verdict


def test_every_claim_without_a_result_says_so_and_with_one_reads_it():
    claims = load("claims")
    empty = claims.claims_table(lambda experiment: None)
    assert len(empty.splitlines()) == 2 + len(claims.CLAIMS)
    assert "confirmed" not in empty and "refuted" not in empty
    results = {"ablation": ABLATION}
    (compiled,) = [
        line for line in claims.claims_table(results.get).splitlines() if "compile" in line
    ]
    assert "0.90x [0.85, 0.95] | refuted |" in compiled


def test_a_switch_is_worth_what_it_gains_alone_and_what_is_lost_without_it():
    switches = load("switches")
    worths = {worth.switch: worth for worth in switches.switch_worths(ABLATION)}
    assert worths["compile"].alone == (0.9, 0.85, 0.95)
    assert worths["compile"].among == (1.05, 1.0, 1.1)
    assert worths["compile"].memory == 1.5
    assert worths["compile"].startup_seconds == 8.0
    assert worths["layout"].among == pytest.approx((2.0, 1.25, 2.5))
    assert worths["mixed precision"].alone is None
    assert worths["compile"].marks == ("wide spread", "busy machine")
    table = switches.switch_table(list(worths.values()))
    assert "| mixed precision | not measured: no bf16 here |" in table
    assert "| layout | 1.20x [1.10, 1.30] | 2.00x [1.25, 2.50] | 1.00x | +0.0 s |" in table
    assert "| - | busy machine, warm-up |" in table


def test_the_chart_is_well_formed_and_shows_what_was_measured():
    switches = load("switches")
    svg = switches.switch_chart(switches.switch_worths(ABLATION), "a <machine>")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"compile", "layout", "0.90x", "2.00x", "a <machine>"} <= set(texts)
    assert "mixed precision" not in texts


def gpu_row(name, speed, *, device="NVIDIA A100", memory=2**30, mfu=0.4):
    return {
        "name": name, "measurements": [1], "images_per_second": speed, "mfu": mfu,
        "peak_memory_bytes": memory, "facts": {"device": "cuda", "device_name": device},
    }  # fmt: skip


LADDER = {
    "variants": [
        gpu_row("CPU, 1 thread", 200), gpu_row("GPU, fp32", 5000, mfu=0.1),
        gpu_row("GPU, fp16", 7000, memory=2**30 * 3 // 4), gpu_row("GPU, bf16", 8000),
        gpu_row("GPU, as planned", 9000, mfu=0.35),
    ],
    "ratios": [
        ratio("GPU, fp16", 1.4, 1.35, 1.5, "GPU, fp32"),
        ratio("GPU, bf16", 40, 38, 42, "CPU, 1 thread"),
    ],
}  # fmt: skip


def test_what_only_a_gpu_decides_stays_open_until_there_is_a_result_of_one():
    claims = load("claims")
    on_gpu = [claim for claim in claims.CLAIMS if claim.on_gpu]
    assert len(on_gpu) == 5
    on_cpu = {
        **LADDER, "variants": [{**row, "facts": {"device": "cpu"}} for row in LADDER["variants"]]
    }  # fmt: skip
    for results in ({}, {"gpu-ladder": on_cpu, "step-speed-gpu-resnet50": on_cpu}):
        for claim in on_gpu:
            finding = claim.find(results.get)
            assert (finding.measured, finding.verdict) == ("no GPU was at hand", claims.NOT_HERE)


def test_results_of_a_gpu_decide_the_claims_about_one():
    claims = load("claims")
    resnet50 = {"variants": [gpu_row("as planned", 1000)], "ratios": []}
    results = {"gpu-ladder": LADDER, "step-speed-gpu-resnet50": resnet50}
    found = {
        (claim.what, claim.theirs): claim.find(results.get)
        for claim in claims.CLAIMS if claim.on_gpu
    }  # fmt: skip
    assert [finding.verdict for finding in found.values()] == [
        "refuted", "confirmed", "confirmed", "confirmed", "confirmed",
    ]  # fmt: skip
    texts = "; ".join(finding.measured for finding in found.values())
    for part in (
        "25% less (768 against 1,024 MB)", "10% in plain fp32, 35% as planned", "40x [38, 42]",
        "5,000 to 7,000 images/s", "1,000 images/s", "32 hours",
    ):  # fmt: skip
        assert part in texts
    elsewhere = {"variants": [gpu_row("as planned", 4000, device="NVIDIA H200")], "ratios": []}
    (last,) = [c for c in claims.CLAIMS if c.what.startswith("ResNet-50")]
    assert last.find({"step-speed-gpu-resnet50": elsewhere}.get).verdict == claims.NOT_HERE


def test_a_gpu_result_without_a_row_that_is_needed_decides_nothing():
    claims = load("claims")
    result = {"variants": [gpu_row("GPU, fp32", 5000)], "ratios": []}
    for claim in claims.CLAIMS:
        if claim.on_gpu:
            finding = claim.find(lambda experiment: result)
            assert finding.verdict == claims.OPEN
