import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training_framework.data import ArraySplit, EvalTransform, build_loader
from training_framework.errors import UserError
from training_framework.training.evaluation import evaluate

COUNT = 53  # a multiple of no batch size below


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ArraySplit(images, torch.randint(0, 7, (COUNT,), generator=generator))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 7))


def evaluated(network, split, batch_size):
    loader = build_loader(
        split,
        device="cpu",
        global_batch_size=batch_size,
        train=False,
        image_size=8,
        resident=True,
    )
    return evaluate(
        network,
        loader,
        EvalTransform(mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu"),
        device=torch.device("cpu"),
        num_classes=7,
        precision="32",
    )


@pytest.mark.parametrize("batch_size", [1, 10, 53, 100])
def test_every_sample_counts_once_whatever_the_batch(network, split, batch_size):
    found = evaluated(network, split, batch_size)
    with torch.no_grad():
        images = (split.images.double() / 255 - 0.5) / 0.25
        logits = network.double().eval()(images)
    hits = (logits.topk(5).indices == split.labels[:, None]).double()
    assert found.metrics.count == COUNT
    assert found.metrics.loss == pytest.approx(
        F.cross_entropy(logits, split.labels).item(), abs=1e-5
    )
    assert found.metrics.acc1 == pytest.approx(100 * hits[:, 0].mean().item())
    assert found.metrics.acc5 == pytest.approx(100 * hits.sum(1).mean().item())


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_network_as_it_was(network, split, training):
    network.train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluated(network, split, 10)
    assert network.training is training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_evaluation_without_an_image_is_one_line(network, split):
    with pytest.raises(UserError, match="the validation data has no image to evaluate"):
        evaluated(network, ArraySplit(split.images[:0], split.labels[:0]), 10)
