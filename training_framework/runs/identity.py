"""The identity of a run: its data and its network, as a checkpoint records them.

`runs.start` compares settings. This module covers what settings do not say: which images are in
`data_root`, and what a user's own loaders and network are.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from training_framework.data import Dataset, FileSplit
from training_framework.data.image_files import read_image
from training_framework.data.user_digest import user_loader_digest
from training_framework.errors import UserError, shown
from training_framework.plan import PlannedRun

__all__ = ["identity_differences", "network_digest", "run_identity"]

SAMPLED_FILES = 64
DATA, NETWORK = "data", "network"
# If one of these differs, it says more than the digest.
_COUNTS = ("training images", "validation images", "class_names")


def run_identity(planned: PlannedRun, network: nn.Module | None) -> dict[str, Any]:
    """Plain values that are equal for two runs on the same data and network.

    Costs a `stat` for every image file and reading 64 files of each split, or one reading of
    arrays in memory: about 3 s for the 1.3 million files of ImageNet, 0.1 s for CIFAR-10.

    Args:
        planned: The planned run, with its data.
        network: The user's own, before anything changes it; None for a network of the framework,
            which the settings describe.

    Raises:
        UserError: An image file is missing.
    """
    facts, source = planned.facts, planned.source
    if isinstance(source, Dataset):
        data = f"{source.digest()} {_sampled_contents(source)}"
    else:
        val = "" if source.val is None else user_loader_digest(source.val.loader)
        data = f"{user_loader_digest(source.train.loader)} {val}"
    return {
        "training images": facts.train_images,
        "validation images": facts.val_images,
        "batches an epoch": planned.plan.batches_per_epoch,
        "class_names": list(facts.class_names),
        DATA: data,
        NETWORK: "configured" if network is None else network_digest(network),
    }


def _sampled_contents(dataset: Dataset) -> str:
    """SHA-256 of the contents of some files, spread evenly over each split.

    It distinguishes sets whose files have equal names and sizes, such as uncompressed images.
    """
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.val):
        if not isinstance(split, FileSplit):
            continue
        for number in range(min(SAMPLED_FILES, len(split))):
            path = split.root / split.paths[number * len(split) // min(SAMPLED_FILES, len(split))]
            with suppress(UserError):  # loading the file will report it
                digest.update(read_image(path))
    return digest.hexdigest()


def network_digest(network: nn.Module) -> str:
    """SHA-256 of a network's structure, as hexadecimal text.

    It covers the names, types and printed options of all modules, the plain attributes (numbers,
    text, names of functions) of those whose class is the user's own, and the names, shapes and
    types of all weights and whether they are trained, but not their values, nor the code of a
    `forward`.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        # Without its Python module, which is __main__ in a script.
        kind = type(module).__qualname__
        options = f"{module.extra_repr()} {_plain_attributes(module)}"
        digest.update(f"{name} {kind} {options};".encode(errors="replace"))
    for name, tensor in network.state_dict(keep_vars=True).items():
        shape = tuple(getattr(tensor, "shape", ()))
        trained = getattr(tensor, "requires_grad", False)
        digest.update(f"{name} {shape} {getattr(tensor, 'dtype', '')} {trained};".encode())
    return digest.hexdigest()


def _plain_attributes(module: nn.Module) -> list[tuple[str, str]]:
    """What a module of the user's own keeps beside weights and modules, as its `forward` may read.

    Those of PyTorch's print what they were made with, and may keep other things in each version.
    """
    if type(module).__module__.partition(".")[0] == "torch":
        return []
    own = {key: value for key, value in vars(module).items() if key != "training"}
    texts = {key: _plain_text(value) for key, value in own.items() if not key.startswith("_")}
    return sorted((key, text) for key, text in texts.items() if text is not None)


def _plain_text(value: object) -> str | None:
    """Text that is the same in every process; None for what has none."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return str([_plain_text(item) for item in value])
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value.__qualname__
    return None


def identity_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that a checkpoint holds; for an older one, as much as it holds."""
    identity = state.get("identity")
    if isinstance(identity, dict):
        return identity
    older = state.get("data")
    names = (state.get("network") or {}).get("class_names")
    return {**(older if isinstance(older, dict) else {}), "class_names": names}


def _equal(then: object, now: object) -> bool:
    """Whether plain values are equal; a checkpoint may hold anything instead."""
    try:
        return type(then) is type(now) and bool(then == now)
    except (RuntimeError, ValueError):  # tensors in a list
        return False


def identity_differences(state: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's run differs from this one, one text for each difference."""
    then = identity_of(state)
    differing = [key for key in now if key in then and not _equal(then[key], now[key])]
    lines = [
        f"{key} {shown(then[key])} -> {shown(now[key])}"
        for key in differing
        if key not in (DATA, NETWORK)
    ]
    if DATA in differing and not any(key in differing for key in _COUNTS):
        lines.append("other images, labels or loaders than those it trained on")
    if NETWORK in differing:
        lines.append("another network")
    return lines
