import pytest
import torch
import torch.nn.functional as F

from training_framework.training.loss import classification_loss, per_sample_losses


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 7, generator=generator) * 3
    labels = torch.randint(7, (12,), generator=generator)
    other_labels = torch.randint(7, (12,), generator=generator)
    return logits, labels, other_labels


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_plain_loss_is_bit_for_bit_torchs_cross_entropy(batch, label_smoothing):
    logits, labels, _ = batch
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    assert torch.equal(
        classification_loss(logits, labels, label_smoothing=label_smoothing), expected
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixed_loss_and_gradient_equal_torchs_soft_label_form(batch, label_smoothing, lam):
    logits, labels, other_labels = batch
    ours = logits.double().requires_grad_()
    theirs = logits.double().requires_grad_()
    soft_labels = lam * F.one_hot(labels, 7).double()
    soft_labels += (1 - lam) * F.one_hot(other_labels, 7).double()

    loss = classification_loss(
        ours, labels, label_smoothing=label_smoothing, mixed=(other_labels, lam)
    )
    expected = F.cross_entropy(theirs, soft_labels, label_smoothing=label_smoothing)
    loss.backward()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lam", [None, 0.4])
def test_low_precision_logits_lose_nothing_in_the_loss(batch, dtype, lam):
    logits, labels, other_labels = batch
    mixed = None if lam is None else (other_labels, lam)
    low = logits.to(dtype)

    loss = classification_loss(low, labels, label_smoothing=0.1, mixed=mixed)
    reference = classification_loss(low.double(), labels, label_smoothing=0.1, mixed=mixed)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)


def test_gradient_comes_back_in_the_precision_of_the_logits(batch):
    logits, labels, _ = batch
    low = logits.bfloat16().requires_grad_()
    classification_loss(low, labels).backward()
    assert low.grad.dtype == torch.bfloat16


def test_loss_stays_fp32_inside_autocast(batch):
    logits, labels, other_labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = classification_loss(logits.bfloat16(), labels, mixed=(other_labels, 0.5))
        losses = per_sample_losses(logits.bfloat16(), labels)
    assert loss.dtype == losses.dtype == torch.float32


def test_per_sample_losses_are_the_negative_log_probabilities(batch):
    logits, labels, _ = batch
    probabilities = logits.double().softmax(dim=1)
    expected = -probabilities[torch.arange(12), labels].log()
    torch.testing.assert_close(per_sample_losses(logits, labels).double(), expected)
    assert per_sample_losses(logits.bfloat16(), labels).dtype == torch.float32
