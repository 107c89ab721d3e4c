"""ResNets: build them, load and save their weights, and change them for speed."""

from training_framework.kernels.small_maps import keep_small_maps_from_compiler
from training_framework.models.resnet import MODELS, ResNet, Stem, build_model
from training_framework.models.surgery import (
    checkpoint_activations,
    fuse_norms,
    pad_stem,
    plain_network,
    synchronize_norms,
    use_small_map_convolutions,
    use_winograd_convolutions,
)
from training_framework.models.weights import load_weights, read_metadata, save_weights

__all__ = [
    "MODELS",
    "ResNet",
    "Stem",
    "build_model",
    "checkpoint_activations",
    "fuse_norms",
    "keep_small_maps_from_compiler",
    "load_weights",
    "pad_stem",
    "plain_network",
    "read_metadata",
    "save_weights",
    "synchronize_norms",
    "use_small_map_convolutions",
    "use_winograd_convolutions",
]
