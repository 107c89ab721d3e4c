"""Trains a user's own network with DataLoaders; part of same_bits.py."""

import json
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training_framework.config.config import Config
from training_framework.train import EfficientResNet18Trainer

CLASSES, SIZE, BATCH_SIZE = 5, 16, 16
OF_THE_DATA = ("data", "limit_train_images", "model", "batch_size", "num_workers")


class OwnNetwork(nn.Module):
    """Two convolutions with dropout, which draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float to (N, classes)."""
        pooled: Tensor = self.features(images).mean(dim=(2, 3))
        scores: Tensor = self.head(self.dropout(pooled))
        return scores


def loader(images: int, *, seed: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=draws)
    pixels = torch.randn(images, 3, SIZE, SIZE, generator=draws) + labels.view(-1, 1, 1, 1) / 4
    return DataLoader(
        TensorDataset(pixels, labels), batch_size=BATCH_SIZE, shuffle=shuffle, generator=draws
    )


class OwnConfig(Config):
    """Settings by upper-case name."""

    BATCH_SIZE = BATCH_SIZE


if __name__ == "__main__":
    torch.manual_seed(3)
    for key, value in json.loads(sys.argv[1]).items():
        if key not in OF_THE_DATA:
            setattr(OwnConfig, key.upper(), value)
    trainer = EfficientResNet18Trainer(OwnConfig, network=OwnNetwork())
    trainer.train(loader(160, seed=1, shuffle=True), loader(48, seed=2, shuffle=False))
