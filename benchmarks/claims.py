"""What other projects claimed, compared with our result files: see docs/claims.md.

Each claim names the result file that can decide it, and reads a figure with its interval from it.
A claimed range is confirmed if the whole interval lies at or above its lower end, and refuted if
the whole interval lies below it. Otherwise it is open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CLAIMS", "OPEN", "Claim", "Finding", "claims_table"]

CONFIRMED, REFUTED, OPEN, NOT_HERE = "confirmed", "refuted", "open", "not testable here"
NEEDS_GPU = "no GPU was at hand"
IMAGENET_IMAGES = 1_281_167

Results = Callable[[str], "dict[str, Any] | None"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a result file says of a claim."""

    measured: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    Attributes:
        what: What it is about.
        theirs: What was claimed.
        find: Looks the finding up in the newest result files, by experiment; None if the file that
            can decide it is missing.
        on_gpu: Whether only a GPU can decide it.
    """

    what: str
    theirs: str
    find: Callable[[Results], "Finding | None"]
    on_gpu: bool = False


def judge(low: float, high: float, at_least: float) -> str:
    """The verdict on a claim of `at_least`, from an interval."""
    if low >= at_least:
        return CONFIRMED
    return REFUTED if high < at_least else OPEN


def _ratio(result: Mapping[str, Any], variant: str) -> dict[str, Any] | None:
    found = [ratio for ratio in result["ratios"] if ratio["variant"] == variant]
    return found[0] if found and found[0]["low"] is not None else None


def _row(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in result["variants"]}
    return rows[name]


def _speed(experiment: str, variant: str, at_least: float, what: str) -> Callable[..., Any]:
    """A claim on the speed of one variant against what it is compared with."""

    def find(results: Results) -> Finding | None:
        result = results(experiment)
        ratio = None if result is None else _ratio(result, variant)
        if ratio is None:
            return None
        text = f"{what}: {ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        return Finding(measured=text, verdict=judge(ratio["low"], ratio["high"], at_least))

    return find


def _needs_gpu(
    judged: Callable[[dict[str, Any]], Finding],
    experiment: str,
    without: Callable[[Results], Finding | None] = lambda results: None,
) -> Callable[..., Any]:
    """A claim that is judged from an experiment on a GPU, where its result has rows of one.

    Args:
        judged: Judges it from the experiment's result.
        experiment: The experiment.
        without: What there is to say without a GPU, if there is anything.
    """

    def find(results: Results) -> Finding:
        result = results(experiment)
        rows = [] if result is None else [row for row in result["variants"] if row["measurements"]]
        if result is None or not any(row["facts"]["device"] == "cuda" for row in rows):
            return without(results) or Finding(measured=NEEDS_GPU, verdict=NOT_HERE)
        try:
            return judged(result)
        except LookupError:  # a row that it needs is missing, or has no samples
            return Finding(measured="a row of the result is missing", verdict=OPEN)

    return find


def _gpu_memory(result: dict[str, Any]) -> Finding:
    whole, half = (_row(result, f"GPU, {kind}") for kind in ("fp32", "fp16"))
    full, mixed = whole["peak_memory_bytes"], half["peak_memory_bytes"]
    return Finding(
        measured=f"ResNet-18 at 32 px on {_device(whole)}: {1 - mixed / full:.0%} less "
        f"({mixed / 2**20:,.0f} against {full / 2**20:,.0f} MB)",
        verdict=CONFIRMED if mixed <= 0.5 * full else REFUTED,
    )


def _gpu_amp(result: dict[str, Any]) -> Finding:
    ratio = _ratio(result, "GPU, fp16")
    whole, half = (_row(result, f"GPU, {kind}") for kind in ("fp32", "fp16"))
    speeds = " to ".join(f"{row['images_per_second']:,.0f}" for row in (whole, half))
    memory = " to ".join(f"{row['peak_memory_bytes'] / 2**20:,.0f}" for row in (whole, half))
    if ratio is None:
        raise LookupError("GPU, fp16")
    return Finding(
        measured=f"{speeds} images/s, {ratio['median']:.2f}x [{ratio['low']:.2f}, "
        f"{ratio['high']:.2f}]; {memory} MB ({_device(whole)})",
        verdict=judge(ratio["low"], ratio["high"], 6800 / 5200),
    )


def _thread_to_gpu(result: dict[str, Any]) -> Finding:
    ratio = _ratio(result, "GPU, bf16")
    if ratio is None:
        raise LookupError("GPU, bf16")
    return Finding(
        measured=f"bf16 on {_device(_row(result, 'GPU, bf16'))} against one CPU thread: "
        f"{ratio['median']:.0f}x [{ratio['low']:.0f}, {ratio['high']:.0f}]",
        verdict=judge(ratio["low"], ratio["high"], 35),
    )


def _resnet50(result: dict[str, Any]) -> Finding:
    row = _row(result, "as planned")
    speed, device = row["images_per_second"], _device(row)
    hours = 90 * IMAGENET_IMAGES / speed / 3600
    return Finding(
        measured=f"{speed:,.0f} images/s of steps on {device}, so 90 epochs of steps take "
        f"{hours:.0f} hours",
        verdict=(CONFIRMED if speed >= 800 else REFUTED) if "A100" in device else NOT_HERE,
    )


def _device(row: Mapping[str, Any]) -> str:
    return str(row["facts"]["device_name"])


def _mixed_precision(results: Results) -> Finding | None:
    result = results("ablation")
    if result is None:
        return None
    row = _row(result, "only mixed precision")
    if row["unavailable"]:
        return Finding(measured=row["unavailable"], verdict=NOT_HERE)
    return _speed("ablation", row["name"], 1.30, "ResNet-18 at 32 px")(results)


def _loading(results: Results) -> Finding | None:
    result = results("data-loading")
    if result is None:
        return None
    ratio = max(
        (r for r in result["ratios"] if not r["control"]), key=lambda ratio: ratio["median"]
    )
    text = (
        f"{ratio['variant']} against {ratio['against']}: {ratio['median']:.2f}x "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )
    return Finding(measured=text, verdict=judge(ratio["low"], ratio["high"], 1.10))


def _batches(results: Results) -> Finding | None:
    result = results("batch-sweep")
    ratio = None if result is None else _ratio(result, "batch 256")
    if ratio is None:
        return None
    text = (
        f"batch 256 against batch 16: {ratio['median']:.2f}x "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )
    return Finding(measured=text, verdict=judge(ratio["low"], ratio["high"], 1.20))


def _memory(results: Results) -> Finding | None:
    result = results("ablation")
    if result is None:
        return None
    off, on = (_row(result, name)["peak_memory_bytes"] for name in ("all off", "all on"))
    saved = 1 - on / off
    return Finding(
        measured=f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} memory of the process "
        f"({on / 2**20:,.0f} against {off / 2**20:,.0f} MB)",
        verdict=CONFIRMED if saved >= 0.30 else REFUTED,
    )


def _mfu(result: dict[str, Any]) -> Finding:
    plain, planned = (_row(result, name) for name in ("GPU, fp32", "GPU, as planned"))
    shares = (plain["mfu"], planned["mfu"])
    if None in shares:
        raise LookupError("mfu")
    return Finding(
        measured=f"{shares[0]:.0%} in plain fp32, {shares[1]:.0%} as planned ({_device(plain)}, "
        "ResNet-18 at 32 px)",
        verdict=CONFIRMED if shares[1] >= 0.30 else REFUTED,
    )


def _mfu_of_a_cpu(results: Results) -> Finding | None:
    result = results("ablation")
    if result is None:
        return None
    off, on = (_row(result, name)["mfu"] for name in ("all off", "all on"))
    return Finding(
        measured=f"{off:.0%} with all switches off, {on:.0%} with all on: a CPU's units are fed "
        "more easily than a GPU's",
        verdict=NOT_HERE,
    )


def _threads(results: Results) -> Finding | None:
    result = results("hardware-ladder")
    ratio = None if result is None else _ratio(result, "CPU, all threads")
    if result is None or ratio is None:
        return None
    rows = [_row(result, name) for name in ("CPU, 1 thread", "CPU, all threads")]
    speeds = " to ".join(f"{row['images_per_second']:,.0f}" for row in rows)
    threads = rows[1]["facts"]["plan"]["threads"]
    return Finding(
        measured=f"{threads} threads: {speeds} images/s, {ratio['median']:.2f}x "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}]; theirs is for 6",
        verdict=NOT_HERE,
    )


def _sweet_spot(results: Results) -> Finding | None:
    result = results("batch-sweep")
    if result is None:
        return None
    speeds = {
        row["overrides"]["batch_size"]: row["median"]
        for row in result["variants"]
        if not row["control"] and row["median"]
    }
    spot = min(size for size, speed in speeds.items() if speed >= 0.97 * max(speeds.values()))
    return Finding(
        measured=f"batch {spot} is the smallest within 3% of the best speed on this CPU",
        verdict=CONFIRMED if spot == 256 else REFUTED,
    )


def _bottleneck(results: Results) -> Finding | None:
    names = ("profile-imagenet-stem", "profile-cifar-stem", "profile-224px")
    profiles = [profile for name in names if (profile := results(name)) is not None]
    if not profiles:
        return None
    firsts = [profile["operators"][0] for profile in profiles]
    parts = [
        f"{profile['config']['model']} {profile['plan']['image_size']} px: "
        f"{first['name'].removeprefix('aten::')} {first['share']:.0%}"
        for profile, first in zip(profiles, firsts, strict=True)
    ]
    everywhere = all("convolution_backward" in first["name"] for first in firsts)
    return Finding(measured="; ".join(parts), verdict=CONFIRMED if everywhere else REFUTED)


def _ten_times(results: Results) -> Finding | None:
    result = results("baseline-vs-optimized")
    if result is None:
        return None
    rows = [_row(result, name) for name in ("baseline", "optimized")]
    times = [[sum(m["epoch_seconds"]) for m in row["measurements"]] for row in rows]
    factors = sorted(slow / fast for slow, fast in zip(*times, strict=True))
    accuracies = [row["acc1"] for row in rows]
    measured = (
        f"the same 5 epochs {factors[len(factors) // 2]:.1f}x as fast "
        f"({factors[0]:.1f} to {factors[-1]:.1f}), {accuracies[0]:.1f}% to {accuracies[1]:.1f}%"
    )
    fast_enough = factors[0] >= 9 and accuracies[1] >= accuracies[0]
    return Finding(measured=measured, verdict=CONFIRMED if fast_enough else REFUTED)


CLAIMS: tuple[Claim, ...] = (
    Claim(what="mixed precision", theirs="30-70% faster", find=_mixed_precision),
    Claim(
        what="mixed precision",
        theirs="50% less memory (GPU)",
        find=_needs_gpu(_gpu_memory, "gpu-ladder"),
        on_gpu=True,
    ),
    Claim(
        what="torch.compile",
        theirs="10-30% faster on longer runs",
        find=_speed("ablation", "only compile", 1.10, "settled steps"),
    ),
    Claim(what="optimized data loading", theirs="10-20% more throughput", find=_loading),
    Claim(what="larger batches", theirs="20-40% better use", find=_batches),
    Claim(
        what="all together",
        theirs="2-3x faster",
        find=_speed("tune-against-plain", "as planned", 2.0, "as planned here, against plain"),
    ),
    Claim(what="all together", theirs="30-50% less memory", find=_memory),
    Claim(
        what="all together",
        theirs="MFU from about 15% to 30-40%",
        find=_needs_gpu(_mfu, "gpu-ladder", without=_mfu_of_a_cpu),
        on_gpu=True,
    ),
    Claim(
        what="one CPU thread to six",
        theirs="180 to 380 images/s; epoch 19 s to 7.6 s",
        find=_threads,
    ),
    Claim(
        what="one CPU thread to GPU AMP",
        theirs="35x",
        find=_needs_gpu(_thread_to_gpu, "gpu-ladder"),
        on_gpu=True,
    ),
    Claim(
        what="AMP over fp32 on a GPU",
        theirs="5,200 to 6,800 images/s; 950 to 925 MB",
        find=_needs_gpu(_gpu_amp, "gpu-ladder"),
        on_gpu=True,
    ),
    Claim(what="sweet spot", theirs="batch 256", find=_sweet_spot),
    Claim(what="bottleneck", theirs="convolution_backward in every setting", find=_bottleneck),
    Claim(
        what="unoptimized to optimized ResNet-10",
        theirs="about 10x faster at equal or better accuracy",
        find=_ten_times,
    ),
    Claim(
        what="ResNet-50, ImageNet, A100",
        theirs="800-1,200 images/s; 90 epochs in 30-45 hours",
        find=_needs_gpu(_resnet50, "step-speed-gpu-resnet50"),
        on_gpu=True,
    ),
)


def claims_table(results: Results) -> str:
    """The claims as a Markdown table."""
    rows = ["| claim | theirs | measured | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        finding = claim.find(results) or Finding(measured="not yet measured", verdict=OPEN)
        rows.append(f"| {claim.what} | {claim.theirs} | {finding.measured} | {finding.verdict} |")
    return "\n".join(rows) + "\n"
