import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from training_framework.training.metrics import BATCHES_AT_ONCE, ClassificationSums


def random_batch(seed, samples=64, classes=10):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    return logits, labels


def summed(logits, labels, **kwargs):
    sums = ClassificationSums("cpu", num_classes=logits.shape[1])
    sums.update(logits, labels, torch.zeros(len(labels)), **kwargs)
    return sums.read()


@pytest.mark.parametrize("classes", [2, 5, 6, 10, 1000])
def test_accuracies_equal_torchs_topk(classes):
    logits, labels = random_batch(0, samples=200, classes=classes)
    found = logits.topk(min(5, classes)).indices == labels[:, None]

    metrics = summed(logits, labels)

    assert metrics.acc1 == 100 * found[:, 0].sum().item() / 200
    assert metrics.acc5 == 100 * found.any(dim=1).sum().item() / 200
    assert metrics.count == 200


def test_loss_is_the_mean_over_all_samples_of_unequal_batches():
    sums = ClassificationSums("cpu", num_classes=10)
    every_loss = []
    for seed, samples in enumerate([64, 64, 7]):
        logits, labels = random_batch(seed, samples)
        losses = F.cross_entropy(logits, labels, reduction="none")
        every_loss.append(losses)
        # A batch's mean and its samples' losses say the same.
        sums.update(logits, labels, losses.mean() if seed else losses)

    metrics = sums.read()

    assert metrics.loss == pytest.approx(torch.cat(every_loss).double().mean().item(), rel=1e-6)
    assert metrics.count == 135


@pytest.mark.parametrize("unequal", [False, True])
def test_batches_that_wait_to_be_counted_count_as_one_by_one(unequal):
    together = ClassificationSums("cpu", num_classes=10)
    expected = torch.zeros(4, dtype=torch.float64)
    for number in range(2 * BATCHES_AT_ONCE + 3):
        logits, labels = random_batch(number, samples=5 + number % 3 if unequal else 8)
        loss = F.cross_entropy(logits, labels)
        if unequal and number % 2:
            logits = logits.bfloat16()
        together.update(logits, labels, loss)
        alone = ClassificationSums("cpu", num_classes=10)
        alone.update(logits, labels, loss)
        expected += alone.state_dict()["sums"]
        if number == BATCHES_AT_ONCE + 1:  # looking in between changes nothing
            torch.testing.assert_close(together.state_dict()["sums"], expected)
    torch.testing.assert_close(together.state_dict()["sums"], expected, rtol=1e-12, atol=0)


def test_a_network_with_constant_output_scores_what_answering_class_0_scores():
    labels = torch.arange(10).repeat(3)
    metrics = summed(torch.full((30, 10), 0.7), labels)
    assert metrics.acc1 == 10
    assert metrics.acc5 == 50


def test_a_tie_has_one_winner_the_lowest_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
    assert summed(logits, torch.tensor([1])).acc1 == 100
    assert summed(logits, torch.tensor([2])).acc1 == 0
    # Ranks 0 to 5 of the six classes: 1, 2, 0, 3, 4, 5.
    assert summed(logits, torch.tensor([4])).acc5 == 100
    assert summed(logits, torch.tensor([5])).acc5 == 0


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_nan_logits_count_as_wrong_with_any_number_of_classes(classes):
    labels = torch.arange(classes)
    metrics = summed(torch.full((classes, classes), math.nan), labels)
    assert (metrics.acc1, metrics.acc5, metrics.count) == (0, 0, classes)


def test_a_nan_beside_the_label_takes_its_first_place():
    logits = torch.tensor([[math.nan, 9.0, 1.0, 1.0, 1.0, 1.0]])
    metrics = summed(logits, torch.tensor([1]))
    assert (metrics.acc1, metrics.acc5) == (0, 100)


@pytest.mark.parametrize("as_mean", [False, True])
def test_padding_changes_nothing(as_mean):
    logits, labels = random_batch(0)
    losses = F.cross_entropy(logits, labels, reduction="none")
    plain = ClassificationSums("cpu", num_classes=10)
    plain.update(logits, labels, losses)

    padding = torch.full((6, 10), math.nan)
    valid = torch.arange(70) < 64
    padded = ClassificationSums("cpu", num_classes=10)
    padded.update(
        torch.cat([logits, padding]),
        F.pad(labels, (0, 6)),
        losses.mean() if as_mean else F.pad(losses, (0, 6), value=math.nan),
        valid=valid,
    )

    assert padded.read().loss == pytest.approx(plain.read().loss, rel=1e-6)
    assert padded.read().acc1 == plain.read().acc1
    assert padded.read().acc5 == plain.read().acc5
    assert padded.read().count == 64


@pytest.mark.parametrize("loss", [torch.tensor(math.nan), torch.full((4,), math.nan)])
def test_a_batch_of_padding_alone_counts_nothing(loss):
    sums = ClassificationSums("cpu", num_classes=10)
    logits, labels = random_batch(0, samples=4)
    sums.update(logits, labels, loss, valid=torch.zeros(4, dtype=torch.bool))
    assert sums.state_dict()["sums"].tolist() == [0, 0, 0, 0]


def test_nothing_counted_reads_as_nan_not_as_zero():
    metrics = ClassificationSums("cpu", num_classes=10).read()
    assert metrics.count == 0
    assert all(math.isnan(value) for value in (metrics.loss, metrics.acc1, metrics.acc5))


def test_a_loss_that_diverged_reads_as_nan():
    sums = ClassificationSums("cpu", num_classes=10)
    sums.update(*random_batch(0), torch.tensor(math.nan))
    assert math.isnan(sums.read().loss)
    assert not math.isnan(sums.read().acc1)


def test_sums_over_a_million_samples_stay_exact():
    sums = ClassificationSums("cpu", num_classes=2)
    samples, batches = 4096, 256
    labels = torch.zeros(samples, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0]]).repeat(samples, 1)
    logits[0] = torch.tensor([0.0, 1.0])
    loss = torch.tensor(0.1)
    for _ in range(batches):
        sums.update(logits, labels, loss)

    metrics = sums.read()

    assert metrics.count == samples * batches
    assert metrics.acc1 == float(100 * Fraction(samples - 1, samples))
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-14)


def test_updating_keeps_no_graph_and_leaves_the_batch_alone():
    logits, labels = random_batch(0)
    logits.requires_grad_()
    before = logits.detach().clone(), labels.clone()
    loss = F.cross_entropy(logits, labels)
    sums = ClassificationSums("cpu", num_classes=10)
    sums.update(logits, labels, loss)
    assert not sums.state_dict()["sums"].requires_grad
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_reset_starts_again():
    sums = ClassificationSums("cpu", num_classes=10)
    sums.update(*random_batch(0), torch.tensor(2.0))
    sums.reset()
    sums.update(*random_batch(1, samples=8), torch.tensor(1.0))
    assert (sums.read().loss, sums.read().count) == (1.0, 8)


def test_sums_saved_in_mid_interval_go_on_bit_for_bit():
    whole = ClassificationSums("cpu", num_classes=10)
    whole.update(*random_batch(0), torch.tensor(0.3))
    state = whole.state_dict()
    whole.update(*random_batch(1), torch.tensor(0.7))

    resumed = ClassificationSums("cpu", num_classes=10)
    resumed.load_state_dict(state)
    resumed.update(*random_batch(1), torch.tensor(0.7))

    assert resumed.read() == whole.read()


def test_all_reduce_without_torch_distributed_changes_nothing():
    sums = ClassificationSums("cpu", num_classes=10)
    sums.update(*random_batch(0), torch.tensor(0.3))
    before = sums.read()
    sums.all_reduce()
    assert sums.read() == before


RANK = """
import sys, torch
import torch.distributed as dist
from training_framework.training.metrics import ClassificationSums
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sums = ClassificationSums("cpu", num_classes=3)
samples = 3 if rank == 0 else 5
sums.update(torch.eye(3)[[0] * samples], torch.full((samples,), rank), torch.tensor(1.0 + rank))
sums.all_reduce()
metrics = sums.read()
dist.destroy_process_group()
assert metrics.count == 8, metrics
assert metrics.acc1 == 100 * 3 / 8, metrics
assert metrics.loss == (3 * 1 + 5 * 2) / 8, metrics
"""


def test_all_reduce_counts_the_samples_of_every_rank_once(tmp_path, forks):
    ranks = [forks.start("-c", RANK, rank, tmp_path / "store") for rank in range(2)]
    for rank in ranks:
        done = rank.wait()
        assert done.returncode == 0, done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_never_waits_for_the_device():
    sums = ClassificationSums("cuda", num_classes=10)
    logits, labels = (tensor.cuda() for tensor in random_batch(0))
    valid = torch.ones(64, dtype=torch.bool, device="cuda")
    losses = F.cross_entropy(logits, labels, reduction="none")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in (losses, losses.mean()):
            sums.update(logits, labels, loss, valid=valid)
            for _ in range(BATCHES_AT_ONCE):  # so that they are counted here
                sums.update(logits, labels, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.read().count == 2 * (1 + BATCHES_AT_ONCE) * 64
