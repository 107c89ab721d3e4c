import collections
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training_framework.errors import UserError
from training_framework.training.user_network import check_is_network, try_user_network

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = 3
WithAuxiliary = collections.namedtuple("WithAuxiliary", "logits aux_logits")
Named = collections.namedtuple("Named", "logits")


def attempt(network: nn.Module, *, will_be_copied: bool = False) -> None:
    try_user_network(network, IMAGES, num_classes=CLASSES, seed=0, will_be_copied=will_be_copied)


class Network(nn.Module):
    """Batch norm, dropout and a buffer that every forward pass counts in."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Any:
        self.calls = self.calls + 1
        return self.fc(self.dropout(self.norm(self.conv(images)).mean((2, 3))))


class Changed(Network):
    """What it returns goes through a function, in training alone or always."""

    def __init__(self, change: Any, *, in_evaluation: bool = True) -> None:
        super().__init__()
        self.change, self.in_evaluation = change, in_evaluation

    def forward(self, images: Tensor) -> Any:
        scores = super().forward(images)
        return self.change(scores) if self.training or self.in_evaluation else scores


def test_nothing_of_the_network_or_the_generators_changes() -> None:
    network = Network()
    network.norm.eval()
    before = copy.deepcopy(network.state_dict())
    calls = network.calls
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    attempt(network, will_be_copied=True)
    drawn = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    assert drawn == (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002
    assert network.calls is calls
    assert network.training
    assert not network.norm.training
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_lazy_modules_get_their_parameters_from_the_seed() -> None:
    networks = []
    for _ in range(2):
        network = nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(CLASSES)
        )
        attempt(network)
        networks.append(network)
    assert type(network[3]) is nn.Linear
    assert torch.equal(networks[0][3].weight, networks[1][3].weight)
    assert torch.equal(network[1].running_mean, torch.zeros(4))
    assert network[1].num_batches_tracked == 0


def weight_normed() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    nn.utils.parametrizations.weight_norm(network[1])
    return network


def shared() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(layer, layer, nn.Flatten(), nn.Linear(192, CLASSES))


def half_frozen() -> nn.Module:
    network = Network()
    network.conv.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.trace(Network().eval(), IMAGES, check_trace=False),
        lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))),
        weight_normed,
        shared,
        half_frozen,
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_unusual_networks_that_can_be_trained_pass(make: Any) -> None:
    attempt(make(), will_be_copied=True)


class NotCopied(Network):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network(5), "returns 5 scores an image, but there are 3 classes; give its last"),
        (lambda: Network().double(), r"conv.weight is torch.float64; call network.float\(\)"),
        (lambda: Network().bfloat16(), "conv.weight is torch.bfloat16"),
        (lambda: Network().requires_grad_(False), "has no trainable parameter"),
        (nn.Flatten, "has no trainable parameter"),
        (lambda: Network().to("meta"), "conv.weight is on the meta device.*to_empty"),
        (
            lambda: Changed(lambda scores: WithAuxiliary(scores, scores), in_evaluation=False),
            "WithAuxiliary with logits in training mode.*auxiliary",
        ),
        (
            lambda: Changed(lambda scores: {"logits": scores}),
            r"a dict with the keys \['logits'\] in training mode.*network\(images\)\['logits'\]",
        ),
        (lambda: Changed(lambda scores: (scores, scores)), r"tuple of 2.*network\(images\)\[0\]"),
        (lambda: Changed(Named), r"network\(images\).logits"),
        (lambda: Changed(lambda scores: None), "returns a NoneType"),
        (lambda: Changed(lambda scores: scores.argmax(1)), r"torch.int64 of shape \(2,\)"),
        (lambda: Changed(lambda scores: scores.mean(0)), r"of shape \(3,\) for 2 images"),
        (lambda: Changed(lambda scores: scores[:, :, None, None]), r"shape \(2, 3, 1, 1\)"),
        (lambda: Changed(Tensor.detach), "without a gradient"),
        (lambda: nn.Linear(4, 3), r"fails in training mode on .*\(2, 3, 8, 8\): RuntimeError"),
        (NotCopied, "cannot be copied: RuntimeError: holds a file; fix that, or"),
    ],
)
def test_what_cannot_be_trained_is_one_line(make: Any, message: str) -> None:
    network = make()
    with pytest.raises(UserError, match=rf"^the network \({type(network).__name__}\).*{message}"):
        attempt(network, will_be_copied=True)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network, "network is a class; give an instance"),
        (torch.relu, "network is a builtin_function"),
        (nn.DataParallel(Network()), "wrapped in DataParallel; give network.module"),
    ],
)
def test_what_is_no_network_is_one_line(network: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_is_network(network)
