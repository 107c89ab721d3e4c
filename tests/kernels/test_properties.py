"""Kernels against torch over shapes, layouts, dtypes and settings that nobody listed.

Some seconds of it run in the suite. `pytest --long` tries a hundred times as many; what it finds is
kept here as an example.
"""

import copy
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from training_framework.kernels.fused_norm import FusedBatchNorm2d, activated, can_fuse_norm
from training_framework.kernels.norm import activated_norm, activated_norm_backward
from training_framework.kernels.small_maps import SmallMapConv2d
from training_framework.kernels.winograd import winograd_convolution, winograd_convolution_backward
from training_framework.kernels.winograd_convolution import WinogradConv2d

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the kernels need a C++ compiler"
)


def tried(count):
    """Settings for so many examples in the suite, and a hundred times as many in a long run."""
    return settings(
        max_examples=count * 100 if os.environ.get("LONG_TESTS") else count,
        deadline=None,
        derandomize=not os.environ.get("LONG_TESTS"),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


LAYOUTS = (
    "contiguous", "channels_last", "transposed", "sliced", "expanded", "offset", "negated",
)  # fmt: skip
layouts = st.sampled_from(LAYOUTS)
channels = st.sampled_from([1, 3, 8, 16, 17, 32, 48, 80])
sides = st.integers(1, 11)


def laid_out(values, layout):
    """The same numbers (or for `expanded` one image of them, again and again) in other strides."""
    changed = values
    if layout == "channels_last" and values.dim() == 4:
        changed = values.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        changed = values.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        wide = torch.randn(*values.shape[:-1], 2 * values.shape[-1]).to(values.dtype)
        wide[..., ::2] = values
        changed = wide[..., ::2]
    elif layout == "expanded" and len(values):
        changed = values[:1].expand(values.shape)
    elif layout == "offset":
        changed = torch.cat([values.new_zeros(3), values.flatten()])[3:].view(values.shape)
    elif layout == "negated" and values.dtype in (torch.float32, torch.float64):
        changed = torch.complex(torch.zeros_like(values), -values).conj().imag
    return changed


def close(got, expected, tolerance):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if not expected.numel():
        return
    if tolerance == float("inf"):
        assert got.isfinite().all() == expected.isfinite().all()
        return
    scale = expected.abs().max().double()
    error = (got.double() - expected.double()).abs().max()
    assert error <= tolerance * scale + 1e-6, f"{error / scale:.2g} of the largest value"


TOLERANCES = {
    torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2,
}  # fmt: skip


def outcome(work):
    """What a computation gives, or the kind of error that it ends with."""
    try:
        return work()
    except (RuntimeError, ValueError) as error:
        return type(error)


def compare(ours, theirs, tolerance):
    if isinstance(theirs, type) or isinstance(ours, type):
        assert ours is theirs
        return
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            close(got, expected, tolerance)


def with_gradients(module, images, upstream_layout):
    """Output and gradients of a module's call, with a gradient of a certain layout coming back."""
    inputs = [tensor for tensor in (images, *module.parameters()) if tensor.requires_grad]
    output = module(images)
    if not inputs or not output.requires_grad:
        return [output.detach()]
    torch.manual_seed(7)
    upstream = laid_out(torch.randn(output.shape).to(output.dtype), upstream_layout)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@st.composite
def convolutions(draw):
    """Settings of a convolution and of what goes in, many of which the kernels do not compute."""
    kernel = draw(st.sampled_from([3, 3, 3, 1, 2, 5]))
    groups = draw(st.sampled_from([1, 1, 1, 1, 2]))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    sixteen = st.sampled_from([16, 32, 48, 80])
    return {
        "options": {
            "in_channels": draw(st.one_of(sixteen, channels)) * groups,
            "out_channels": draw(st.one_of(sixteen, channels)) * groups,
            "kernel_size": kernel,
            "stride": draw(st.sampled_from([1, 1, 2, 2, 3, (1, 2)])),
            "padding": draw(st.sampled_from([1, kernel // 2, kernel // 2, 0, 2])),
            "dilation": dilation,
            "groups": groups,
            "bias": draw(st.sampled_from([False, False, True])),
            "padding_mode": draw(
                st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular"])
            ),
        },
        "shape": (draw(st.sampled_from([0, 1, 2, 5, 64])), draw(sides), draw(sides)),
        "dtypes": draw(
            st.one_of(
                st.just((torch.float32, torch.float32)),
                st.tuples(*[st.sampled_from([*TOLERANCES, torch.float32])] * 2),
            )
        ),
        "layouts": draw(st.tuples(layouts, layouts, layouts)),
        "wanted": draw(st.tuples(st.booleans(), st.booleans())),
        "threads": draw(st.sampled_from([1, 1, 2, 3])),
        "mode": draw(st.sampled_from(["train", "train", "inference", "no_grad", "autocast"])),
        "copied": draw(st.sampled_from([None, None, "deepcopy", "pickle"])),
    }


def a_convolution(**changed):
    options = {
        "in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 1, "padding": 1,
        "dilation": 1, "groups": 1, "bias": False, "padding_mode": "zeros",
    }  # fmt: skip
    return {
        "options": {**options, **changed.pop("options", {})},
        "shape": (2, 8, 8), "dtypes": (torch.float32,) * 2, "layouts": ("contiguous",) * 3,
        "wanted": (True, True), "threads": 1, "mode": "train", "copied": None, **changed,
    }  # fmt: skip


def run_convolution(kind, case):
    torch.manual_seed(0)
    layer = nn.Conv2d(**case["options"]).to(case["dtypes"][1])
    weight = laid_out(layer.weight.detach(), case["layouts"][1])
    layer.weight = nn.Parameter(weight, requires_grad=case["wanted"][1])
    layer.__class__ = kind
    if case["copied"] == "deepcopy":
        layer = copy.deepcopy(layer)
    elif case["copied"] == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    batch, height, width = case["shape"]
    images = torch.randn(batch, case["options"]["in_channels"], height, width)
    images = laid_out(images.to(case["dtypes"][0]), case["layouts"][0])
    images = images.detach().requires_grad_(case["wanted"][0])
    modes = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "train": torch.enable_grad,
    }
    with modes[case["mode"]]():
        return with_gradients(layer, images, case["layouts"][2])


@pytest.mark.parametrize("kind", [WinogradConv2d, SmallMapConv2d])
@tried(60)
@given(convolutions())
@example(a_convolution(dtypes=(torch.float32, torch.float16)))
@example(a_convolution(dtypes=(torch.float32, torch.bfloat16)))
@example(a_convolution(dtypes=(torch.float32, torch.float64)))
@example(a_convolution(dtypes=(torch.float16, torch.float32)))
@example(a_convolution(dtypes=(torch.float64, torch.float32), mode="autocast", shape=(2, 1, 1)))
@example(a_convolution(layouts=("expanded", "expanded", "expanded")))
@example(a_convolution(layouts=("negated", "negated", "negated")))
@example(
    a_convolution(
        options={"kernel_size": 1, "padding": 0}, layouts=("contiguous", "transposed", "contiguous")
    )
)
@example(
    a_convolution(
        options={"kernel_size": 1, "padding": 0}, layouts=("contiguous", "sliced", "contiguous")
    )
)
@example(a_convolution(shape=(0, 8, 8)))
@example(a_convolution(mode="inference", threads=2))
def test_a_convolution_gives_what_torchs_gives_or_its_error(kind, case):
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        ours, theirs = (outcome(lambda k=k: run_convolution(k, case)) for k in (kind, nn.Conv2d))
    finally:
        torch.set_num_threads(before)
    dtypes = [*case["dtypes"], *([torch.bfloat16] if case["mode"] == "autocast" else [])]
    compare(ours, theirs, max(TOLERANCES[dtype] for dtype in dtypes))


@st.composite
def norms(draw):
    """Settings of a norm and of what goes in, many of which the kernels do not compute."""
    any_dtype = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16])
    return {
        "channels": draw(st.one_of(st.sampled_from([16, 48, 80]), channels)),
        "shape": (draw(st.sampled_from([0, 1, 2, 5])), draw(sides), draw(sides)),
        "dtypes": draw(st.tuples(any_dtype, any_dtype, any_dtype)),
        "layouts": draw(st.tuples(layouts, layouts, layouts, layouts)),
        "shortcut": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "wanted": draw(st.tuples(st.booleans(), st.booleans())),
        "threads": draw(st.sampled_from([1, 1, 2, 3])),
        "training": draw(st.sampled_from([True, True, True, False])),
        "momentum": draw(st.sampled_from([0.1, 0.1, 1.0, None])),
        "hooked": draw(st.booleans()),
    }


def a_norm(**changed):
    return {
        "channels": 16, "shape": (2, 4, 4), "dtypes": (torch.float32,) * 3,
        "layouts": ("contiguous",) * 4, "shortcut": False, "relu": True, "wanted": (True, True),
        "threads": 1, "training": True, "momentum": 0.1, "hooked": False, **changed,
    }  # fmt: skip


def run_norm(kind, case):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(case["channels"], momentum=case["momentum"]).train(case["training"])
    for name in ("weight", "bias"):
        values = laid_out(torch.randn(case["channels"]).to(case["dtypes"][1]), case["layouts"][1])
        setattr(norm, name, nn.Parameter(values, requires_grad=case["wanted"][1]))
    norm.running_mean = norm.running_mean.to(case["dtypes"][2])
    norm.running_var = norm.running_var.to(case["dtypes"][2])
    if case["hooked"]:
        norm.register_forward_hook(lambda *_: None)
    norm.__class__ = kind
    batch, height, width = case["shape"]
    shape = (batch, case["channels"], height, width)
    images, shortcut = (
        laid_out(torch.randn(shape).to(case["dtypes"][0]), layout)
        .detach()
        .requires_grad_(case["wanted"][0])
        for layout in case["layouts"][2:]
    )

    def forward(images):
        if case["relu"]:
            return activated(
                norm, images, shortcut if case["shortcut"] else None, "relu", torch.relu
            )
        return norm(images)

    inputs = [t for t in (images, shortcut, *norm.parameters()) if t.requires_grad]
    output = forward(images)
    results = [output.detach()]
    if inputs and output.requires_grad:
        torch.manual_seed(7)
        upstream = laid_out(torch.randn(shape).to(output.dtype), case["layouts"][0])
        results += torch.autograd.grad(output, inputs, upstream, allow_unused=True)
    return [*results, *norm.buffers()]


@tried(80)
@given(norms())
@example(a_norm(layouts=("contiguous", "sliced", "contiguous", "contiguous")))
@example(a_norm(layouts=("expanded", "expanded", "expanded", "expanded"), shortcut=True))
@example(a_norm(dtypes=(torch.float32, torch.float64, torch.float32)))
@example(a_norm(dtypes=(torch.float32, torch.float32, torch.float64)))
@example(a_norm(dtypes=(torch.float32, torch.bfloat16, torch.bfloat16)))
@example(a_norm(momentum=None))
@example(a_norm(channels=1))
@example(a_norm(channels=17))
@example(a_norm(shape=(0, 4, 4)))
@example(a_norm(shortcut=True, hooked=True))
def test_a_norm_gives_what_torchs_gives_or_its_error(case):
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        ours, theirs = (
            outcome(lambda k=k: run_norm(k, case)) for k in (FusedBatchNorm2d, nn.BatchNorm2d)
        )
    finally:
        torch.set_num_threads(before)
    tolerance = max(TOLERANCES[dtype] for dtype in case["dtypes"])
    if case["training"]:
        batch, height, width = case["shape"]
        distinct = height * width * (1 if "expanded" in case["layouts"] else batch)
        # Of few values their differences are rounding, and everybody's rounding is another.
        tolerance = 10 * tolerance if distinct >= 8 else float("inf")
    compare(ours, theirs, tolerance)


GOOD = {
    "images": lambda: torch.randn(2, 16, 4, 4),
    "weight": lambda: torch.randn(32, 16, 3, 3),
    "grad_output": lambda: torch.randn(2, 32, 4, 4),
}
BAD = {
    "half": lambda t: t.half(),
    "bf16": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.cfloat(),
    "sparse": lambda t: t.to_sparse(),
    "fewer dimensions": lambda t: t[0],
    "more dimensions": lambda t: t[None],
    "fewer channels": lambda t: t[:, :8],
    "more channels": lambda t: torch.cat([t, t], 1),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", GOOD)
def test_the_convolution_operators_refuse_what_they_cannot_read(name, bad):
    tensors = {key: make() for key, make in GOOD.items()}
    tensors[name] = BAD[bad](tensors[name])
    images, weight, upstream = tensors["images"], tensors["weight"], tensors["grad_output"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        winograd_convolution_backward(upstream, images, weight, 1, [True, True])
    if name != "grad_output":
        with pytest.raises((RuntimeError, NotImplementedError)):
            winograd_convolution(images, weight, 1)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["images", "weight", "bias", "shortcut", "output", "statistics"])
def test_the_norm_operators_refuse_what_they_cannot_read(name, bad):
    images, shortcut = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    weight, bias = torch.randn(16), torch.randn(16)
    output, statistics = activated_norm(images, weight, bias, shortcut, 1e-5, "relu")
    given = {
        "images": images, "weight": weight, "bias": bias, "shortcut": shortcut,
        "output": output, "statistics": statistics,
    }  # fmt: skip
    if "channels" in bad and given[name].dim() == 1:
        given[name] = given[name][:8]
    else:
        given[name] = BAD[bad](given[name])
    images, weight, bias, shortcut, output, statistics = given.values()
    with pytest.raises((RuntimeError, NotImplementedError)):
        if name in ("output", "statistics"):
            upstream = torch.ones(2, 16, 4, 4)
            wanted = [True, True]
            activated_norm_backward(upstream, images, output, weight, statistics, "relu", wanted)
        else:
            activated_norm(images, weight, bias, shortcut, 1e-5, "relu")


@pytest.mark.parametrize(
    ("images", "weight", "stride"),
    [
        ((2, 16, 4, 4), (32, 16, 3, 3), 3),
        ((2, 16, 4, 4), (32, 16, 3, 3), 0),
        ((2, 16, 4, 4), (32, 16, 5, 5), 1),
        ((2, 16, 4, 4), (8, 16, 3, 3), 1),
        ((2, 8, 4, 4), (16, 8, 3, 3), 1),
        ((2, 0, 4, 4), (16, 0, 3, 3), 1),
        ((2, 16, 0, 4), (16, 16, 3, 3), 1),
    ],
)
def test_the_convolution_operator_refuses_shapes_that_it_cannot_compute(images, weight, stride):
    with pytest.raises(RuntimeError, match="winograd_convolution: "):
        winograd_convolution(torch.randn(images), torch.randn(weight), stride)


def test_defaults_for_new_tensors_do_not_reach_the_kernels():
    torch.manual_seed(0)
    images, weight = torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3)
    norm = nn.BatchNorm2d(16)
    fused = copy.deepcopy(norm)
    fused.__class__ = FusedBatchNorm2d
    expected = F.conv2d(images, weight, padding=1), norm(images)
    for change in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(change)
        try:
            ours = winograd_convolution(images, weight, 1), fused(images)
        finally:
            torch.set_default_dtype(torch.float32)
        for got, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        got = winograd_convolution(images, weight, 1)
    torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused_not_wrong():
    images, weight = (make().requires_grad_() for make in (GOOD["images"], GOOD["weight"]))
    (gradient,) = torch.autograd.grad(
        winograd_convolution(images, weight, 1).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), images)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: setattr(n, "momentum", None),
        lambda n: n.register_buffer("running_mean", None),
        lambda n: setattr(n, "weight", None),
        lambda n: n.double(),
    ],
)
def test_a_fused_norm_that_its_user_changed_is_torchs(change):
    norm = nn.BatchNorm2d(16)
    assert can_fuse_norm(norm)
    fused = copy.deepcopy(norm)
    fused.__class__ = FusedBatchNorm2d
    for one in (norm, fused):
        change(one)
    images = torch.randn(2, 16, 4, 4)
    ours, theirs = (outcome(lambda n=n: [n(images)]) for n in (fused, norm))
    compare(ours, theirs, 1e-5)
