"""Markdown tables for the result files that are not comparisons; each script has its own form."""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from step_overhead import median_with_interval

from training_framework.measure.profile.step_clock import PHASES

__all__ = [
    "decoding_accuracy",
    "guarantees_price",
    "input_speed",
    "startup_time",
    "step_overhead",
    "step_phases",
]

Result = Mapping[str, Any]


def _ratio(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def input_speed(result: Result) -> str:
    """How fast images become batches, measured by `decode_speed.py`."""
    speeds = result["images_per_second_of_one_core"]
    rows = ["| one core | images/s | against Pillow [95%] |", "|---|---|---|"]
    for name, turns in speeds.items():
        ratio = result["ratios"].get(f"{name} / pillow")
        cell = "1" if ratio is None and name == "pillow" else "" if ratio is None else _ratio(ratio)
        rows.append(f"| {name} | {statistics.median(turns):.0f} | {cell} |")
    loaded, errors = result["all_cores"], result["mean_absolute_error_of_255"]
    share = loaded["share_of_the_limit"]
    rows += [
        "",
        f"Random-resized crops of {result['image_size']} px from {result['photographs']} "
        f"photographs of {result['mean_pixels'] / 1e6:.2f} megapixels; packed with the shorter "
        f"side at {result['packed_shorter_side']} px. With {loaded['processes']} processes the "
        f"loader gives {statistics.median(loaded['images_per_second']['loader']):.0f} images/s, "
        f"{share['median']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of what they decode "
        f"if they hand nothing over. Pixels differ from Pillow's by {errors['mean']:.2f} of 255 "
        f"on average, and by {errors['worst_picture']:.2f} in the worst image.",
        "",
        f"({result['environment']['cpu_name']}, {result['date']})",
    ]
    return "\n".join(rows) + "\n"


def decoding_accuracy(result: Result) -> str:
    """How decoding a part of each image affects accuracy, measured by `decoding_accuracy.py`."""
    rows = ["| seed | framework's pixels | Pillow's pixels |", "|---|---|---|"]
    rows += [
        f"| {seed} | {row['framework']:.2f}% | {row['pillow']:.2f}% |"
        for seed, row in enumerate(result["accuracies"])
    ]
    mean, low, high = result["difference"]
    rows += [
        "",
        f"Top-1 at {result['config']['img_size']} px; the mean difference is {mean:+.2f} points "
        f"[{low:+.2f}, {high:+.2f}]. Seeds differ by {result['spread_over_seeds']:.2f} (one "
        f"standard deviation). `{result['command']}`",
    ]
    return "\n".join(rows) + "\n"


def step_phases(*profiles: Result) -> str:
    """Where the time of a step goes, measured by `efficient-resnet profile`."""
    titles = [
        f"{profile['config']['model']}, {profile['plan']['stem']} stem, "
        f"batch {profile['config']['batch_size']}"
        for profile in profiles
    ]
    rows = [f"| phase of a step | {' | '.join(titles)} |", "|---|" + "---|" * len(profiles)]
    for phase, label in PHASES.items():
        cells = (
            f"{1000 * profile['phases']['seconds'][phase]:.2f} ms, "
            f"{profile['phases']['shares'][phase]:.2%}"
            for profile in profiles
        )
        rows.append(f"| {label} | {' | '.join(cells)} |")
    dates = ", ".join(dict.fromkeys(profile["date"][:10] for profile in profiles))
    name = profiles[0]["hardware"]["cpu_name"]
    return "\n".join([*rows, "", f"({profiles[0]['data']['name']}, {name}, {dates})"]) + "\n"


def startup_time(result: Result) -> str:
    """From the command to the first step, measured by `startup_time.py`."""
    median, low, high = result["beyond_importing_torch_seconds"]
    imported = statistics.median(result["samples"]["importing torch"])
    return (
        f"From the command to the end of the first step (digits, eager): {median:.2f} s "
        f"[{low:.2f}, {high:.2f}] beyond the {imported:.2f} s that importing torch takes "
        f"({result['device_name']}, {result['date']}).\n"
    )


def step_overhead(result: Result) -> str:
    """What the framework adds to a step's time, measured by `step_overhead.py`."""
    median, low, high = result["overhead_microseconds_per_step"]
    control, control_low, control_high = result["control_microseconds_per_step"]
    return (
        f"Trainer.fit() adds {median:.0f} microseconds [{low:.0f}, {high:.0f}] a step to a bare "
        f"loop of the same operators. With a tiny network, a step of that loop takes "
        f"{result['bare_microseconds_per_step']:.0f} microseconds. Against itself, the loop "
        f"differs by {control:.0f} [{control_low:.0f}, {control_high:.0f}] "
        f"({result['device_name']}, one thread, {result['date']}).\n"
    )


def guarantees_price(result: Result, whole_epoch: Result) -> str:
    """What the guarantees cost an epoch in seconds, by `reliability_price.py --short`.

    Args:
        result: The result for short epochs.
        whole_epoch: The result for epochs as long as CIFAR-10's.
    """
    bare, guarded, control = (
        np.array([measurement["seconds"] for measurement in variant["measurements"]])
        for variant in result["variants"]
    )
    epochs = result["variants"][0]["config"]["epochs"]
    whole = statistics.median(m["seconds"] for m in whole_epoch["variants"][0]["measurements"])
    added, low, high = median_with_interval(list((guarded - bare) / epochs))
    other, other_low, other_high = median_with_interval(list((control - bare) / epochs))
    return (
        f"An epoch with its checkpoint takes {added:.2f} s [{low:.2f}, {high:.2f}] more than bare "
        f"steps; the A/A control differs by {other:.2f} s [{other_low:.2f}, {other_high:.2f}] "
        f"(runs of {epochs} epochs of {np.median(bare) / epochs:.1f} s). An epoch as long as "
        f"CIFAR-10's takes {whole:.0f} s, so that is {added / whole:.2%} of it "
        f"[{low / whole:.2%}, {high / whole:.2%}]. `{result['command']}`\n"
    )
