"""What is wrong with a run on a GPU, from what was observed of it."""

import collections
from types import SimpleNamespace

from training_framework.training.cuda_graph import DDP_WARM_UP_STEPS

# Once an epoch the host puts its order and its draws on the device.
AT_EPOCH_START = {"data/loading.py", "data/draws.py"}
# GradScaler asks whether a step overflowed, where the optimizer is not a fused one.
SCALER = ("item", "training/step.py", "update")


def findings(report: SimpleNamespace) -> list[str]:
    """Everything that is wrong, a line each; nothing for a sound run."""
    first_steps = {"step 1", f"step {report.resumed_at + 1}"} | {
        f"step {epoch * report.steps_per_epoch + 1}" for epoch in range(report.epochs)
    }
    found = [f"the run ends: {report.error.strip().splitlines()[-1]}"] if report.error else []
    found += [
        f"the host waits in {when}: {what} at {where}"
        for what, where, when in report.waits
        if when.startswith("step") and not _is_known_wait(report, what, where, when, first_steps)
    ]
    found += [f"{what}, in {when} at {where}" for what, where, when in report.unordered]
    found += [
        f"{what} in {when} at {where} reads memory that may be reused: record_stream is missing"
        for what, where, when in report.unrecorded
    ]
    found += [
        f"{what} in {when} at {where} is given a tensor in host memory"
        for what, where, when in report.host_operands
        if when != "start"
    ]
    found += [
        f"{name} is recorded with a rate that is a number"
        for name, recorded, tensor_rate in report.fused
        if recorded and not tensor_rate
    ]
    found += [f"the optimizer's state has another layout than the weights in {when}"
              for when in report.layouts]  # fmt: skip
    if report.world_size > 1:
        found += _wrong_collectives(report)
    return list(dict.fromkeys(found))


def _wrong_collectives(report: SimpleNamespace) -> list[str]:
    """What is wrong with what the processes do together."""
    broadcasts = collections.Counter[str]()
    added_up = collections.Counter[str]()
    for name, elements, when in (*report.collectives, *report.replayed_collectives):
        (broadcasts if name == "broadcast_" else added_up)[when] += elements
    steps = [f"step {number + 1}" for number in range(report.steps)]
    found = [f"buffers travel in {step}" for step in steps if broadcasts[step]]
    found += [f"gradients are not added up in {step}" for step in steps if not added_up[step]]
    # At the start, all parameters and buffers travel once.
    found += [
        f"more than the gradients is added up in {step}"
        for step in steps
        if added_up[step] > broadcasts["start"]
    ]
    if added_up["evaluation"] and not broadcasts["between steps"]:
        found.append("an evaluation is not of the buffers of rank 0")
    return found


def _is_known_wait(
    report: SimpleNamespace, what: str, where: str, when: str, first_steps: set[str]
) -> bool:
    file, _, function = where.partition(":")
    if file in AT_EPOCH_START and what == "copy cpu to cuda":
        return when in first_steps
    if report.world_size > 1 and report.plan["cuda_graph"] and where.endswith(" largest"):
        return when == f"step {DDP_WARM_UP_STEPS + 1}"  # all agree on whether it is recorded
    scaled = report.plan["precision"] == "16-mixed" and not report.plan["fused_optimizer"]
    return scaled and (what, file, function.split()[-1]) == SCALER
