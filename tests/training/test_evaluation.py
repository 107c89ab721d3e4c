import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training_framework.data import ArraySplit, EvalTransform, build_loader
from training_framework.errors import UserError
from training_framework.training import batch_counting
from training_framework.training.batch_counting import BatchCounter
from training_framework.training.evaluation import evaluate

CPU = torch.device("cpu")
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
    return evaluate(counter_of(network), loader, device=CPU)


def counter_of(network, record=None):
    return BatchCounter(
        network, EvalTransform(mean=(0.5,) * 3, std=(0.25,) * 3, device="cpu"), device=CPU,
        num_classes=7, precision="32", record=record,
    )  # fmt: skip


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


def counted(counter, split, batch_size):
    loader = build_loader(
        split, device="cpu", global_batch_size=batch_size, train=False, image_size=8, resident=True
    )
    return evaluate(counter, loader, device=CPU).metrics


class ShortOfMemory(nn.Module):
    """Has memory for so many images at once."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.sizes = network, most, []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.network(images)


def test_an_evaluation_short_of_memory_goes_on_in_smaller_parts(network, split):
    expected = counted(counter_of(network), split, 20)
    short, lines = ShortOfMemory(network, 6), []
    counter = counter_of(short)
    counter.report = lines.append
    found = counted(counter, split, 20)
    assert short.sizes[:5] == [20, 10, 5, 5, 5]
    assert (found.count, found.acc1, found.acc5) == (COUNT, expected.acc1, expected.acc5)
    assert found.loss == pytest.approx(expected.loss)
    assert len(lines) == 2
    assert "with 20 images at once; from now on it computes at most 10" in lines[0]
    counted(counter, split, 20)
    assert max(short.sizes[5:]) <= 5, "it tries again what does not fit"
    with pytest.raises(UserError, match="memory is full in an evaluation with one image"):
        counter = counter_of(ShortOfMemory(network, 0))
        counter.report = lines.append
        counted(counter, split, 20)


def test_an_evaluation_computes_no_more_at_once_than_training(network, split):
    measured = ShortOfMemory(network, COUNT)
    counter = counter_of(measured)
    counter.limit(8)
    counter.limit(None)
    assert counted(counter, split, 20).count == COUNT
    assert max(measured.sizes) == 8


def test_a_recorded_evaluation_gives_what_a_plain_one_gives(network, split, monkeypatch):
    """Recorded is the second batch alike; the last batch, which is smaller, never is."""
    monkeypatch.setattr(batch_counting, "RECORD_AFTER_BATCHES", 1)
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    counter, reference = counter_of(network, record), counter_of(network)
    for _ in range(2):
        assert counted(counter, split, 10) == counted(reference, split, 10)
        with torch.no_grad():  # as training does, in the same memory
            network[0].weight.mul_(-1)
    assert len(recorded) == 1
    assert len(counter._recorded.labels) == 10


def test_an_evaluation_that_cannot_be_recorded_runs_as_it_is(network, split, monkeypatch):
    monkeypatch.setattr(batch_counting, "RECORD_AFTER_BATCHES", 1)

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    counter, lines = counter_of(network, refuse), []
    counter.report = lines.append
    assert counted(counter, split, 10) == counted(counter_of(network), split, 10)
    (line,) = lines
    assert "cannot be recorded: operation not permitted" in line
