import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training_framework.kernels import winograd
from training_framework.kernels.winograd import winograd_convolution
from training_framework.kernels.winograd_convolution import WinogradConv2d, winograd_applies
from training_framework.models import build_model, use_winograd_convolutions

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the kernels need a C++ compiler"
)

# batch, channels in, channels out, height, width
SHAPES = [
    (2, 16, 16, 8, 8),
    (3, 32, 64, 7, 5),
    (1, 64, 32, 3, 3),
    (5, 48, 80, 4, 9),
    (2, 64, 64, 33, 32),
    (2, 256, 272, 6, 6),
    (2, 528, 512, 4, 4),
    (33, 352, 64, 4, 4),  # more tiles than one block that the threads share
]


def turned(module, kind):
    """The same module of another class, which shares its tensors."""
    twin = copy.copy(module)
    twin.__class__ = kind
    return twin


def case(*shape, stride=1):
    batch, channels, out_channels, height, width = shape
    torch.manual_seed(0)
    images = torch.randn(batch, channels, height, width)
    weight = torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    size = [(side - 1) // stride + 1 for side in (height, width)]
    upstream = torch.randn(batch, out_channels, *size)
    return images.requires_grad_(), weight.requires_grad_(), upstream


def exact(images, weight, upstream, stride):
    """Output and gradients in float64."""
    images, weight = (t.detach().double().requires_grad_() for t in (images, weight))
    output = F.conv2d(images, weight, padding=1, stride=stride)
    return output, *torch.autograd.grad(output, (images, weight), upstream.double())


@pytest.fixture(params=[2, 4])
def side(request, monkeypatch):
    """Tiles of 2x2 or of 4x4 outputs, whichever would be faster."""
    monkeypatch.setattr(winograd, "tile_side", lambda *_, **__: request.param)
    return request.param


# Largest error over largest value, by the side of a tile; torch's own is up to 3e-6.
LARGEST_ERROR = {2: 3e-6, 4: 5e-6}


@pytest.mark.parametrize(
    ("layout", "threads"),
    [(torch.contiguous_format, 1), (torch.channels_last, 2), (torch.channels_last, 3)],
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_the_exact_ones_to_rounding(shape, stride, layout, threads, side):
    images, weight, upstream = case(*shape, stride=stride)
    images = images.detach().contiguous(memory_format=layout).requires_grad_()
    weight = weight.detach().contiguous(memory_format=layout).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = winograd_convolution(images, weight, stride)
        ours = (output, *torch.autograd.grad(output, (images, weight), upstream))
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(ours, exact(images, weight, upstream, stride), strict=True):
        assert got.dtype == torch.float32
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < LARGEST_ERROR[side]
    assert ours[2].stride() == weight.stride()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "threads"), list(zip(SHAPES, [1, 2, 3, 1, 2, 3, 1, 2], strict=True))
)
def test_bf16_products_of_numbers_that_bf16_holds_are_exact(shape, stride, threads, monkeypatch):
    """With tiles of 2x2, small integers stay small multiples of a quarter."""
    monkeypatch.setattr(winograd, "tile_side", lambda *_, **__: 2)
    small = [tensor.detach().mul(2).round().clamp(-2, 2) for tensor in case(*shape, stride=stride)]
    small[1] = torch.randint(-2, 3, small[1].shape).float()
    images, weight, upstream = small[0].requires_grad_(), small[1].requires_grad_(), small[2]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = winograd_convolution(images, weight, stride, True)
        ours = (output, *torch.autograd.grad(output, (images, weight), upstream))
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(ours, exact(images, weight, upstream, stride), strict=True):
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_bf16_products_have_the_error_of_rounded_tiles(shape, stride, side):
    images, weight, upstream = case(*shape, stride=stride)
    output = winograd_convolution(images, weight, stride, True)
    ours = (output, *torch.autograd.grad(output, (images, weight), upstream))
    for got, expected in zip(ours, exact(images, weight, upstream, stride), strict=True):
        error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 1e-3 < error < (1.6e-2 if side == 4 and stride == 1 else 6e-3)


def test_the_operators_keep_the_rules_of_torch():
    images, weight, _ = case(2, 16, 32, 4, 4)
    layout = torch.channels_last
    images = images.detach().contiguous(memory_format=layout).requires_grad_()
    for options in ((1,), (2,), (1, True)):
        torch.library.opcheck(winograd_convolution, (images, weight, *options))


def test_only_wanted_gradients_are_computed():
    images, weight, upstream = case(2, 16, 16, 4, 4)
    (alone,) = torch.autograd.grad(
        winograd_convolution(images.detach(), weight, 1), weight, upstream
    )
    output = winograd_convolution(images, weight, 1)
    both = torch.autograd.grad(output, (images, weight), upstream)
    assert torch.equal(alone, both[1])
    (alone,) = torch.autograd.grad(
        winograd_convolution(images, weight.detach(), 1), images, upstream
    )
    assert torch.equal(alone, both[0])


def test_the_side_of_a_tile_follows_from_border_and_number_of_tiles():
    for shape, forward, weights in (
        ((64, 32, 32), 4, 4),
        ((64, 4, 4), 4, 4),
        ((32, 4, 4), 2, 4),  # one tile an image: too few to share the weights
        ((8, 7, 7), 2, 4),
        ((128, 5, 5), 2, 2),  # much of a second tile would be border
        ((1, 8, 8), 2, 2),
    ):
        assert winograd.tile_side(1, *shape, weight_gradient=False) == forward
        assert winograd.tile_side(1, *shape, weight_gradient=True) == weights
        assert winograd.tile_side(2, *shape, weight_gradient=True) == 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_go_through(bad, side, bf16):
    images, weight, _ = case(1, 16, 16, 4, 4)
    with torch.no_grad():
        images[0, 3, 1, 2] = bad
    output = winograd_convolution(images, weight, 1, bf16)
    assert not output[0, :, 0:3, 1:4].isfinite().any()
    assert not torch.autograd.grad(output.sum(), weight)[0].isfinite().all()


def test_an_empty_batch_has_an_empty_output_and_no_gradient():
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    for stride, size in ((1, 4), (2, 2)):
        output = winograd_convolution(torch.empty(0, 16, 4, 4), weight, stride)
        assert output.shape == (0, 16, size, size)
        (gradient,) = torch.autograd.grad(output.sum(), weight)
        assert not gradient.any()


def test_the_same_input_gives_the_same_bits():
    images, weight, upstream = case(4, 64, 64, 8, 8)
    runs = []
    for _ in range(2):
        output = winograd_convolution(images, weight, 1)
        runs.append((output, *torch.autograd.grad(output, (images, weight), upstream)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("convolution", "side", "applies"),
    [
        (nn.Conv2d(16, 32, 3, padding=1, bias=False), 8, True),
        (nn.Conv2d(16, 32, 3, padding=1, bias=False), 2, False),
        (nn.Conv2d(16, 32, 3, padding=1), 8, False),
        (nn.Conv2d(3, 32, 3, padding=1, bias=False), 8, False),
        (nn.Conv2d(16, 32, 3, bias=False), 8, False),
        (nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), 8, True),
        (nn.Conv2d(16, 32, 3, stride=3, padding=1, bias=False), 8, False),
        (nn.Conv2d(16, 32, 3, stride=(1, 2), padding=1, bias=False), 8, False),
        (nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False), 8, False),
        (nn.Conv2d(16, 32, 3, padding=2, dilation=2, bias=False), 8, False),
        (nn.Conv2d(16, 32, 1, bias=False), 8, False),
    ],
)
def test_it_stands_in_for_convolutions_that_it_computes(convolution, side, applies):
    assert winograd_applies(convolution, side, side) is applies


def test_where_it_does_not_apply_torchs_convolution_runs():
    ordinary = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    replaced = turned(ordinary, WinogradConv2d)
    images = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(replaced(images), ordinary(images))
    assert torch.equal(replaced(images[:, :, :2]), ordinary(images[:, :, :2]))
    with pytest.raises(RuntimeError, match="expected input"):
        replaced(images[:, :8])
    replaced, ordinary = copy.deepcopy(replaced).double(), ordinary.double()
    assert torch.equal(replaced(images.double()), ordinary(images.double()))


def test_a_network_keeps_its_names_and_its_gradients():
    torch.manual_seed(0)
    plain = build_model("resnet18", num_classes=10, stem="cifar", zero_init_last_norm=True)
    layout = torch.channels_last
    plain = plain.to(memory_format=layout)
    replaced = copy.deepcopy(plain)
    assert use_winograd_convolutions(replaced, 16) == 13  # from 2 px to 2 px is left alone
    assert replaced.state_dict().keys() == plain.state_dict().keys()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    losses = [F.cross_entropy(model(images), labels) for model in (plain, replaced)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, replaced)]
    for one, other in zip(*gradients, strict=True):
        # A ReLU near its kink may go the other way, which changes single numbers by more.
        assert (one - other).norm() <= 1e-2 * one.norm() + 1e-6


def test_a_network_with_bf16_products_stays_near_the_one_without():
    torch.manual_seed(0)
    plain = build_model("resnet10", num_classes=10, stem="cifar", zero_init_last_norm=False)
    plain = plain.to(memory_format=torch.channels_last)
    rounded = copy.deepcopy(plain)
    assert use_winograd_convolutions(rounded, 16, bf16_products=True)
    images = torch.randn(8, 3, 16, 16)
    one, other = plain(images), rounded(images)
    assert 0 < (one - other).norm() < 0.05 * one.norm()


def test_a_network_without_such_convolutions_is_warned_of():
    with pytest.warns(UserWarning, match="no suitable convolution at 8 px"):
        assert use_winograd_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3)), 8) == 0


def test_a_compiled_network_runs_it_too():
    torch.manual_seed(0)
    network = nn.Sequential(
        WinogradConv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    ).to(memory_format=torch.channels_last)
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(network(images).square().sum(), network.parameters())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(compiled(images).square().sum(), network.parameters())
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
