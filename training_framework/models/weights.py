"""Weight files: read the files of any program safely, and write safetensors."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_framework.checkpoint.file import begins_like_checkpoint, read_state
from training_framework.errors import UserError
from training_framework.models.pickle_guard import Oversized, check_pickles
from training_framework.models.weight_recognition import HEAD, cure_of_mismatch

__all__ = ["load_weights", "read_metadata", "save_weights"]

WRAPPERS: Final = ("state_dict", "model")
NAME_PREFIXES: Final = ("module.", "_orig_mod.", "model.")
PICKLE_SUFFIXES: Final = (".pth", ".pt", ".ckpt")
# Before 2.10 a crafted file could get past weights_only=True: GHSA-63cw-57p8-fm3p.
FIRST_TORCH_WITH_SAFE_PICKLE: Final = (2, 10)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a weight file into a model, in place; if it raises, the model is unchanged.

    Reads `.safetensors`, a `.ckpt` of this framework (its weight average if it has one), and
    `.pth`, `.pt` and `.ckpt` of other programs without running any code in them. Finds a state dict
    inside {"model": ...} or {"state_dict": ...}, and removes the name prefixes of DDP,
    torch.compile and Lightning. If the head (`fc`) is missing or has another size, the model keeps
    its own.

    Args:
        model: A `ResNet`, or any module with a state dict of the same names.
        path: The weight file.

    Returns:
        Lines to show the user.

    Raises:
        UserError: The file is missing, damaged, of another kind or contains code; or a tensor is
            missing, unexpected, of another shape, not finite, or differs from one that it shares
            a weight with.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    expected = model.state_dict()
    lines = _drop_other_head(tensors, expected, path)
    _fill_in_aliases(tensors, expected, path)
    for name in expected:
        # Files from before torch 0.4.1 lack this counter, which only a momentum of None reads.
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, expected[name])
    _check(tensors, expected, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} contains NaN or infinity", "use an earlier checkpoint")
    model.load_state_dict({**expected, **tensors})
    return [f"weights: {len(tensors)} tensors from {path}", *lines]


def save_weights(
    model_state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a state dict as safetensors; `path` is either the old file or the complete new one.

    Args:
        model_state: Tensors by name, on any device, in any memory format. A tensor under two
            names is written twice, so that every reader finds both.
        path: The file to write; a missing directory is created.
        metadata: Strings by name, for example model, stem, num_classes and classes.

    Raises:
        UserError: The file cannot be written (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model_state.items():
        copied = tensor.detach().cpu().contiguous()
        if copied.untyped_storage().data_ptr() in storages:
            copied = copied.clone()
        storages.add(copied.untyped_storage().data_ptr())
        tensors[name] = copied
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=dict(metadata))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes it readable by the owner alone
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the weights cannot be written ({error})",
            "free some space or write to another directory",
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata strings of a safetensors file, without reading its tensors.

    Raises:
        UserError: The file is missing or not a safetensors file.
    """
    path = Path(path)
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}", "give the path of a weight file")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = re.split(r"\.\s|\n", str(error) or type(error).__name__)[0]
    return UserError(
        f"{path}: not a readable weight file ({reason})",
        "it may be truncated or of another kind: download or save it again",
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            content: object = load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error) from error
    elif suffix == ".ckpt" and begins_like_checkpoint(path):
        state = read_state(path)
        content = state.get("average") or state.get("model") if isinstance(state, dict) else state
    elif suffix in PICKLE_SUFFIXES:
        content = _read_pickle(path)
    else:
        raise UserError(
            f"{path}: unknown kind of weight file '{suffix}'",
            f"give one that ends in .safetensors, {', '.join(PICKLE_SUFFIXES)}",
        )
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{path}: contains a {type(content).__name__}, not tensors by name",
            "save model.state_dict()",
        )
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: '{name}' is a {type(value).__name__}, not a tensor",
                "save model.state_dict(), or a dictionary with it under 'state_dict'",
            )
        fault = _fault_of(value)
        if fault:
            raise UserError(f"{path}: '{name}' {fault}", "use another weight file")
        tensors[_without_prefixes(name)] = value
    return tensors


def _fault_of(tensor: Tensor) -> str:
    """Why a tensor cannot be a weight; empty if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "is not a plain tensor"
    if (
        tensor.nbytes > tensor.untyped_storage().nbytes()
    ):  # strides of 0 can give one number any shape
        return "is larger than its stored data"
    return ""


def _without_prefixes(name: str) -> str:
    while (prefix := next((p for p in NAME_PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


def _read_pickle(path: Path) -> object:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < FIRST_TORCH_WITH_SAFE_PICKLE:
        raise UserError(
            f"{path}: torch {torch.__version__} cannot read pickled weights safely "
            "(GHSA-63cw-57p8-fm3p)",
            "install torch 2.10 or newer, or give the weights as .safetensors",
        )
    try:
        check_pickles(path)
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
        )
    except Oversized as error:
        raise UserError(
            f"{path}: was not loaded, since it could use up the memory ({error})",
            "save model.state_dict() alone, or give the weights as .safetensors",
        ) from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise _damaged(path, error) from error
        raise UserError(
            f"{path}: contains more than tensors ({found[1]}) and was not loaded, "
            "since loading it would run code",
            "save model.state_dict() alone, or give the weights as .safetensors",
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception
        raise _damaged(path, error) from error


def _drop_other_head(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> list[str]:
    """Replace a head of another size in `tensors` by the model's own head."""
    head = [name for name in expected if name.startswith(HEAD)]
    if all(name in tensors and tensors[name].shape == expected[name].shape for name in head):
        return []
    weight = tensors.get(f"{HEAD}weight")
    mine = expected[f"{HEAD}weight"]
    if weight is not None and weight.shape[1:] != mine.shape[1:]:
        return []
    for name in head:
        tensors.pop(name, None)
    tensors.update({name: expected[name] for name in head})
    classes = "has none" if weight is None else f"is for {len(weight)} classes"
    return [f"head: the file's {classes}, the model's {len(mine)}-class head starts untrained"]


def _fill_in_aliases(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Complete shared weights: the file may have one of their names or both."""
    names_by_storage: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        if tensor.numel():
            names_by_storage.setdefault(tensor.data_ptr(), []).append(name)
    for names in names_by_storage.values():
        present = [name for name in names if name in tensors]
        if len(names) == 1 or not present:
            continue
        first = tensors[present[0]]
        for name in names:
            if not torch.equal(tensors.setdefault(name, first), first):
                raise UserError(
                    f"{path}: {present[0]} and {name} differ, but the model shares one weight "
                    "between them",
                    "build the model without share_early_weights",
                )


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    def shape_of(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "a scalar"

    for name, tensor in expected.items():
        if name not in tensors:
            fault = f"{path}: {name} ({shape_of(tensor)} in the model) is missing"
        elif tensors[name].shape != tensor.shape:
            fault = (
                f"{path}: {name} is {shape_of(tensors[name])} in the file "
                f"and {shape_of(tensor)} in the model"
            )
        else:
            continue
        raise UserError(fault, cure_of_mismatch(tensors))
    for name in tensors:
        if name not in expected:
            fault = f"{path}: {name} ({shape_of(tensors[name])}) is not in the model"
            raise UserError(fault, cure_of_mismatch(tensors))
