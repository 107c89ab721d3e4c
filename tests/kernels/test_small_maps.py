import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training_framework.kernels.small_maps import (
    SmallMapConv2d,
    is_small_map,
    keep_small_maps_from_compiler,
)

# kernel, stride, height, width, batch: all small enough to run as matrix products
SMALL = [
    (3, 1, 1, 1, 5),
    (3, 2, 1, 1, 5),
    (3, 1, 2, 2, 5),
    (3, 2, 2, 2, 5),
    (3, 1, 1, 2, 5),
    (3, 2, 4, 4, 64),
    (3, 2, 3, 4, 64),
    (5, 1, 2, 2, 64),
    (1, 1, 2, 2, 5),
    (1, 2, 2, 2, 5),
    (1, 2, 5, 4, 5),
]


def turned(module, kind):
    """The same module of another class, which shares its tensors."""
    twin = copy.copy(module)
    twin.__class__ = kind
    return twin


def case(*shape, dtype=torch.float64):
    kernel, stride, height, width, batch = shape
    torch.manual_seed(0)
    ordinary = nn.Conv2d(3, 4, kernel, stride, kernel // 2, bias=False).to(dtype)
    small = turned(ordinary, SmallMapConv2d)
    x = torch.randn(batch, 3, height, width, dtype=dtype)
    assert is_small_map(small, height, width, batch_size=batch)
    return ordinary, small, x


@pytest.fixture
def products_only(monkeypatch):
    """No convolution of torch's may run: what follows is computed by matrix products."""

    def refuse(*_):
        raise AssertionError("the ordinary convolution ran")

    monkeypatch.setattr(nn.Conv2d, "forward", refuse)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SMALL)
def test_output_and_gradients_equal_torchs_convolution(shape, layout, products_only):
    ordinary, small, x = case(*shape)
    small.to(memory_format=layout)
    x = x.contiguous(memory_format=layout).requires_grad_()
    output = small(x)
    weight, stride, padding = ordinary.weight, ordinary.stride, ordinary.padding
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=layout)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, [x, small.weight], upstream),
        torch.autograd.grad(expected, [x, weight], upstream),
    )


@pytest.mark.parametrize("shape", [s for s in SMALL if s[4] < 64])
def test_gradients_pass_gradcheck(shape, products_only):
    _, small, x = case(*shape)
    weight = small.weight.detach().requires_grad_()

    def convolve(x, weight):
        return torch.func.functional_call(small, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(convolve, (x[:2].requires_grad_(), weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SMALL)
def test_weight_gradients_have_the_strides_of_the_weight(shape, layout, products_only):
    _, small, x = case(*shape)
    small.to(memory_format=layout)
    (gradient,) = torch.autograd.grad(small(x).sum(), small.weight)
    assert gradient.stride() == small.weight.stride()


@pytest.mark.parametrize("wanted", ["input", "weight"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_only_the_wanted_gradient_is_given(kernel, wanted, products_only):
    _, small, x = case(kernel, 1, 2, 2, 5)
    x.requires_grad_(wanted == "input")
    small.weight.requires_grad_(wanted == "weight")
    small(x).sum().backward()
    assert (x.grad is not None) == (wanted == "input")
    assert (small.weight.grad is not None) == (wanted == "weight")


@pytest.mark.parametrize("shape", [(3, 1, 1, 1, 5), (3, 1, 2, 2, 5), (1, 2, 2, 2, 5)])
def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(shape, products_only):
    ordinary, small, x = case(*shape, dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = small(x)
        expected = F.conv2d(x, ordinary.weight, None, ordinary.stride, ordinary.padding)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [x, small.weight], upstream)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(
        gradients,
        torch.autograd.grad(expected, [x, ordinary.weight], upstream),
        rtol=0.02,
        atol=0.05,
    )


def test_a_second_derivative_is_refused_not_wrong():
    _, small, x = case(3, 1, 2, 2, 5)
    (gradient,) = torch.autograd.grad(small(x).square().sum(), small.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# torch's compiler looks at what it goes on with, and mutes this where warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_compiler_leaves_it_alone(kernel):
    keep_small_maps_from_compiler()
    ordinary, small, x = case(kernel, 1, 2, 2, 5)
    graphs = []

    def note(graph, _example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda images: small(images.sin()).cos().sum(), backend=note)
    compiled(x).backward()
    called = {getattr(n.target, "__name__", n.target) for g in graphs for n in g.graph.nodes}
    assert {"sin", "cos"} <= called
    assert not {"autograd_function_apply", "conv2d", "matmul"} & called
    got = small.weight.grad
    ordinary.weight.grad = None
    ordinary(x.sin()).cos().sum().backward()
    torch.testing.assert_close(got, ordinary.weight.grad)


@pytest.mark.parametrize(
    ("options", "size", "batch"),
    [
        ({}, 8, 64),
        ({}, 4, 64),
        ({"stride": 2}, 4, 8),
        ({"bias": True}, 1, 8),
        ({"groups": 3}, 1, 8),
        ({"padding_mode": "circular"}, 2, 8),
        ({"padding": "same"}, 1, 8),
        ({"padding": 2, "dilation": 2}, 1, 8),
    ],
)
def test_every_other_convolution_is_torchs(options, size, batch):
    torch.manual_seed(0)
    settings = {"padding": 1, "bias": False, **options}
    ordinary = nn.Conv2d(3, 6, 3, **settings)
    small = turned(ordinary, SmallMapConv2d)
    x = torch.randn(batch, 3, size, size)
    assert not is_small_map(small, size, size, batch_size=batch)
    assert torch.equal(small(x), ordinary(x))


def test_unbatched_and_empty_inputs_work_as_in_torch():
    ordinary, small, _ = case(3, 1, 2, 2, 5)
    for shape in [(3, 2, 2), (0, 3, 2, 2)]:
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(small(x), ordinary(x))


def test_an_input_of_another_dtype_is_refused_as_in_torch():
    _, small, x = case(3, 1, 2, 2, 5)
    with pytest.raises(RuntimeError, match="type"):
        small(x.float())
