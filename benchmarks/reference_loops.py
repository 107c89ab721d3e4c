"""The loops that the framework is measured against. They share no code with it.

B0 is what a tutorial teaches: fp32, NCHW, torch.optim.SGD, a DataLoader that crops, flips and
normalizes image by image. B1 is what a good engineer writes by hand: data on the device, augmented
there a batch at a time, channels_last, autocast to bf16, eager; on a GPU also PyTorch's fused SGD.
There is also B1 in fp32, since on a CPU without bf16 instructions that engineer would leave
autocast out. On a GPU, all of them let cuDNN choose its kernels by their speed, as the framework
does.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

__all__ = ["B0", "B1", "choose_kernels_by_speed", "fast_sgd", "plain_resnet"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING_SHARE = 8
BLOCKS = {
    "resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}  # fmt: skip


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., Deep Residual Learning, 2015)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, and a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
    )


def plain_resnet(name: str, stem: str, num_classes: int) -> nn.Sequential:
    """A ResNet as one sequence of modules."""
    block = Bottleneck if name == "resnet50" else Basic
    if stem == "cifar":
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)]
    else:
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False)]
    layers += [nn.BatchNorm2d(64), nn.ReLU()]
    if stem == "imagenet":
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, count in enumerate(BLOCKS[name]):
        width = 64 * 2**stage
        for index in range(count):
            layers.append(block(channels, width, 2 if stage and not index else 1))
            channels = width * block.expansion
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers)


def fast_sgd(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.SGD:
    """SGD as B1 uses it: on a GPU with PyTorch's fused kernel."""
    return torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4,
        fused=device.type == "cuda",
    )  # fmt: skip


def choose_kernels_by_speed(device: torch.device) -> None:
    """Let cuDNN time its kernels for each shape; a setting of the whole process."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Crops, flips and normalizes each image by itself, as transforms usually do."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.padding = images.shape[-1] // PADDING_SHARE
        self.mean = torch.tensor(MEAN).view(3, 1, 1)
        self.std = torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float().div(255)
        side, padding = image.shape[-1], self.padding
        image = functional.pad(image, (padding,) * 4)
        top, left = torch.randint(2 * padding + 1, (2,)).tolist()
        image = image[:, top : top + side, left : left + side]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - self.mean) / self.std, int(self.labels[index])


class B0:
    """The tutorial's loop.

    Args:
        name, stem, num_classes: Of the network.
        images: (N, 3, S, S) uint8 on the CPU.
        labels: (N,) int64.
        batch_size: Images of a step.
        device: Where it computes.
        num_workers: Of the DataLoader.
    """

    def __init__(
        self,
        name: str,
        stem: str,
        num_classes: int,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        num_workers: int = 0,
    ) -> None:
        self.device = device
        choose_kernels_by_speed(device)
        self.model = plain_resnet(name, stem, num_classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.loader = DataLoader(
            AugmentedImages(images, labels),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
        )
        self.batches: Iterator[list[Tensor]] = iter(())

    def step(self) -> int:
        """Train one batch; returns its images."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        images, labels = (part.to(self.device) for part in batch)
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        return len(labels)


class B1:
    """The engineer's loop; arguments as for `B0`.

    Args:
        bf16: Autocast to bf16.
    """

    def __init__(
        self,
        name: str,
        stem: str,
        num_classes: int,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        bf16: bool = True,
    ) -> None:
        self.device, self.batch_size, self.bf16 = device, batch_size, bf16
        choose_kernels_by_speed(device)
        layout = torch.channels_last
        model = plain_resnet(name, stem, num_classes).to(device)
        self.model = model.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = fast_sgd(self.model.parameters(), device)
        padding = images.shape[-1] // PADDING_SHARE
        self.side, self.offsets = images.shape[-1], 2 * padding + 1
        self.images = functional.pad(images, (padding,) * 4).to(device, memory_format=layout)
        self.labels = labels.to(device)
        self.mean = 255 * torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(1, 3, 1, 1)
        self.order = torch.empty(0, dtype=torch.int64, device=device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch's augmented images and its labels, on the device."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.labels), device=self.device)
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        # One offset and one flip for a whole batch: the cheap augmentation of a hand-written loop.
        top, left, flips = torch.randint(self.offsets, (3,)).tolist()
        images = self.images[chosen, :, top : top + self.side, left : left + self.side]
        if flips % 2:
            images = images.flip(-1)
        images = (images.float() - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]

    def step(self) -> int:
        """Train one batch; returns its images."""
        images, labels = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return self.batch_size
