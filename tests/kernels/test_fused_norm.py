import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training_framework.kernels.fused_norm import FusedBatchNorm2d, activated, can_fuse_norm
from training_framework.kernels.norm import activated_norm
from training_framework.models import build_model, checkpoint_activations, fuse_norms

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the kernels need a C++ compiler"
)

# batch, channels, height, width
SHAPES = [(2, 16, 1, 1), (3, 64, 7, 5), (1, 80, 9, 3), (4, 512, 2, 2), (8, 32, 16, 16)]


def turned(module, kind):
    """The same module of another class, which shares its tensors."""
    twin = copy.copy(module)
    twin.__class__ = kind
    return twin


def rectified(norm, images, shortcut=None):
    return activated(norm, images, shortcut, "relu", torch.relu)


def case(*shape, mean=0.5):
    torch.manual_seed(0)
    images, shortcut, upstream = (torch.randn(shape) for _ in range(3))
    images += mean
    norm = nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return images, shortcut, upstream, norm


def gradients(norm, images, shortcut, upstream, activation="relu"):
    """Output and all gradients, with an activation and a shortcut."""
    images, shortcut = (t.detach().requires_grad_() for t in (images, shortcut))
    output = activated(norm, images, shortcut, activation, getattr(F, activation))
    inputs = (images, shortcut, norm.weight, norm.bias)
    return output, *torch.autograd.grad(output, inputs, upstream)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_gradients_and_statistics_equal_those_in_float64(shape, layout, activation):
    images, shortcut, upstream, norm = case(*shape)
    fused, exact = turned(copy.deepcopy(norm), FusedBatchNorm2d), norm.double()
    operands = (images.contiguous(memory_format=layout), shortcut, upstream, activation)
    ours = gradients(fused, *operands)
    theirs = gradients(exact, images.double(), shortcut.double(), upstream.double(), activation)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
    for name, buffer in fused.named_buffers():
        expected = exact.get_buffer(name)
        torch.testing.assert_close(buffer.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_a_large_mean_costs_no_more_digits_than_torchs():
    images, shortcut, upstream, norm = case(4, 32, 8, 8, mean=100.0)
    fused, plain = (copy.deepcopy(norm) for _ in range(2))
    fused, exact = turned(fused, FusedBatchNorm2d), norm.double()
    ours, torchs = (gradients(n, images, shortcut, upstream) for n in (fused, plain))
    theirs = gradients(exact, images.double(), shortcut.double(), upstream.double())
    for got, other, expected in zip(ours, torchs, theirs, strict=True):
        error, allowed = ((t - expected).abs().max() for t in (got, other))
        assert error <= 4 * allowed + 1e-6  # torch's varies twofold with the number of threads


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_without_a_shortcut_and_without_an_activation(activation):
    images, _, upstream, norm = case(3, 48, 5, 5)
    images.requires_grad_()
    fused = turned(copy.deepcopy(norm), FusedBatchNorm2d)
    function = getattr(F, activation, torch.clone)
    if activation == "none":
        output = fused(images)
    else:
        output = activated(fused, images, None, activation, function)
    expected = function(norm(images))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(t, images, upstream)[0] for t in (output, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_operators_keep_the_rules_of_torch():
    images, shortcut, _, norm = case(2, 16, 4, 4)
    layout = torch.channels_last
    images, shortcut = (t.contiguous(memory_format=layout) for t in (images, shortcut))
    weight, bias = norm.weight, norm.bias
    for tensor in (images, shortcut):
        tensor.requires_grad_()
    torch.library.opcheck(activated_norm, (images, weight, bias, shortcut, 1e-5, "relu"))
    torch.library.opcheck(activated_norm, (images, weight, bias, shortcut, 1e-5, "gelu"))
    torch.library.opcheck(activated_norm, (images, weight, bias, None, 1e-5, "none"))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_smooth_activations_are_as_exact_as_torchs_far_from_zero(activation):
    function = getattr(F, activation)
    points = torch.linspace(-30, 30, 16 * 2000).view(1, 16, 20, 100)
    norm = nn.BatchNorm2d(16)
    with torch.no_grad():  # the norm gives the points themselves
        norm.weight.copy_(points.std((0, 2, 3), unbiased=False))
        norm.bias.copy_(points.mean((0, 2, 3)))
    images = points.clone().requires_grad_()
    fused = turned(norm, FusedBatchNorm2d)
    shortcut = torch.zeros_like(points, requires_grad=True)
    output = activated(fused, images, shortcut, activation, function)
    exact = fused(images).detach().double().requires_grad_()
    expected = function(exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=5e-7)
    (slopes,) = torch.autograd.grad(output.sum(), shortcut)
    (right,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slopes.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_go_through(bad, activation):
    images, shortcut, upstream, norm = case(2, 16, 4, 4)
    images[0, 3, 1, 1] = bad
    fused = turned(norm, FusedBatchNorm2d)
    output, grad_images, *_ = gradients(fused, images, shortcut, upstream, activation)
    assert output[:, 3].isnan().any() and grad_images[:, 3].isnan().any()
    assert output[:, :3].isfinite().all() and grad_images[:, :3].isfinite().all()
    assert not fused.running_var[3].isfinite()


def test_evaluation_other_precisions_and_single_values_are_torchs():
    images, shortcut, _, norm = case(2, 16, 4, 4)
    fused = turned(copy.deepcopy(norm), FusedBatchNorm2d)
    half = images.bfloat16()
    assert torch.equal(rectified(fused, half), rectified(norm, half))
    fused.eval(), norm.eval()
    assert torch.equal(rectified(fused, images, shortcut), rectified(norm, images, shortcut))
    fused.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(images[:1, :, :1, :1])
    with pytest.raises(RuntimeError):
        fused(images[:, :8])


@pytest.mark.parametrize(
    ("norm", "can"),
    [
        (nn.BatchNorm2d(64), True),
        (nn.BatchNorm2d(8), False),
        (nn.BatchNorm2d(64, affine=False), False),
        (nn.BatchNorm2d(64, track_running_stats=False), False),
        (nn.BatchNorm2d(64, momentum=None), False),
        (nn.BatchNorm2d(64).double(), False),
        (nn.Identity(), False),
    ],
)
def test_it_stands_in_for_norms_that_it_computes(norm, can):
    assert can_fuse_norm(norm) is can


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_network_keeps_its_names_gradients_and_statistics(name):
    torch.manual_seed(0)
    plain = build_model(name, num_classes=10, stem="cifar", zero_init_last_norm=True)
    plain = plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert fuse_norms(fused) == norms
    assert fused.state_dict().keys() == plain.state_dict().keys()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    losses = [F.cross_entropy(model(images), labels) for model in (plain, fused)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (key, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        # A ReLU near its kink may go the other way, which changes single numbers by more.
        assert (one.grad - other.grad).norm() <= 1e-2 * one.grad.norm() + 1e-6, key
    for one, other in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_update_the_statistics_once():
    torch.manual_seed(0)
    straight = build_model("resnet10", num_classes=10, stem="cifar")
    fuse_norms(straight)
    recomputed = copy.deepcopy(straight)
    checkpoint_activations(recomputed)
    images = torch.randn(2, 3, 8, 8)
    for model in (straight, recomputed):
        model(images).sum().backward()
    for one, other in zip(straight.buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(straight.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_network_without_such_norms_is_warned_of():
    with pytest.warns(UserWarning, match="no BatchNorm2d that can be fused"):
        assert fuse_norms(nn.Sequential(nn.BatchNorm2d(8))) == 0


def test_a_compiled_network_runs_it_too():
    torch.manual_seed(0)
    norm = FusedBatchNorm2d(16)
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(rectified(norm, images).square().sum(), norm.weight)
    compiled = torch.compile(rectified, backend="aot_eager", fullgraph=True)
    gradient = torch.autograd.grad(compiled(norm, images).square().sum(), norm.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("huge", [1e2, 1e4, 1e18, 2e37])
def test_huge_sums_have_the_slopes_of_zero_and_one(activation, huge):
    """Where e^x leaves fp32, what is left of it times a huge number is no longer small."""
    images, _, upstream, norm = case(2, 16, 4, 4)
    shortcut = torch.full_like(images, huge) * torch.randn(images.shape).sign()
    ours = gradients(turned(norm, FusedBatchNorm2d), images, shortcut, upstream, activation)
    theirs = gradients(norm, images, shortcut, upstream, activation)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert torch.allclose(ours[2], theirs[2], rtol=1e-6)
    slope = (shortcut > 0).float()
    assert torch.allclose(ours[2], upstream * slope, atol=1e-6)
