"""Recognize the network of a weight file, to suggest a cure in errors."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from training_framework.models.resnet import MODELS, Stem, build_model

__all__ = ["HEAD", "cure_of_mismatch"]

HEAD: Final = "fc."


def cure_of_mismatch(tensors: Mapping[str, Tensor]) -> str:
    """The cure for a weight file of another network: name the model that the file is for."""
    found = _recognize(tensors)
    if found is None:
        return f"give a file for this model; this one fits none of {', '.join(MODELS)}"
    return f"the file is for {found[0]} with the {found[1]} stem: choose that model and stem"


def _recognize(tensors: Mapping[str, Tensor]) -> tuple[str, Stem] | None:
    def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {
            name: tensor.shape
            for name, tensor in state.items()
            if not name.startswith(HEAD) and not name.endswith("num_batches_tracked")
        }

    stems: tuple[Stem, ...] = ("cifar", "imagenet")
    shapes = shapes_of(tensors)
    blocks = {tuple(name.split(".")[:2]) for name in shapes if name.startswith("layer")}
    for name, variant in MODELS.items():
        if len(blocks) != sum(variant.blocks_per_stage):
            continue
        for stem in stems:
            with torch.device("meta"):
                candidate = build_model(name, num_classes=1, stem=stem)
            if shapes == shapes_of(candidate.state_dict()):
                return name, stem
    return None
