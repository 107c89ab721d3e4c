import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from training_framework import optimizers
from training_framework.errors import UserError
from training_framework.optimizers import OPTIMIZERS, build_optimizer, has_fused_optimizer

OPTIONS = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.01},
    "adamw": {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.01},
}
TORCH_OPTIONS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam": {"betas": (0.8, 0.95), "eps": 1e-6},
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6},
}


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)]
        # In fp32 the gradient of the bias before the norm is rounding noise, which Adam's division
        # makes as large as any other.
        return nn.Sequential(*layers).double()


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_torchs_plain_optimizer_without_decay_on_norms_and_biases(
    model, name, fused, layout
):
    plain_model = copy.deepcopy(model)
    model = model.to(memory_format=layout)
    plain = OPTIMIZERS[name](
        [
            {"params": [plain_model[0].weight, plain_model[3].weight], "weight_decay": 0.01},
            {
                "params": [plain_model[0].bias, *plain_model[1].parameters(), plain_model[3].bias],
                "weight_decay": 0,
            },
        ],
        lr=0.05,
        foreach=False,
        **TORCH_OPTIONS[name],
    )
    ours = build_optimizer(model, name=name, lr=0.05, fused=fused, **OPTIONS[name])
    train(plain_model, plain)
    train(model, ours)
    for parameter, expected in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_implementation_asked_for_is_the_one_that_runs(model, name):
    for fused in (False, True):
        optimizer = build_optimizer(model, name=name, lr=0.1, fused=fused)
        for group in optimizer.param_groups:
            assert (bool(group["fused"]), bool(group["foreach"])) == (fused, not fused)


class FusedCalls(TorchDispatchMode):
    """Notes the tensors that torch's fused kernels are given."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_fused_" in func.__name__:
            self.tensors += [tensor for argument in args for tensor in argument]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_kernels_on_the_cpu_are_given_nothing_that_they_would_copy(model, name):
    model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, name=name, lr=0.05, fused=True, **OPTIONS[name])
    train(model, optimizer, steps=1)
    assert not model[0].weight.is_contiguous()
    with FusedCalls() as calls:
        optimizer.step()
    assert len(calls.tensors) >= 3 * len(list(model.parameters()))
    assert all(tensor.is_contiguous() for tensor in calls.tensors)
    assert set(optimizer.state) == set(model.parameters())
    states = optimizer.state[model[0].weight].values()
    assert {tuple(state.shape) for state in states} <= {(3, 2, 3, 3), ()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_optimizers_state_resumes_in_a_new_one_bit_for_bit(model, name, layout):
    model = model.to(memory_format=layout)
    options = {"name": name, "lr": 0.05, "fused": True, **OPTIONS[name]}
    optimizer = build_optimizer(model, **options)
    train(model, optimizer)
    resumed_model = copy.deepcopy(model)
    resumed = build_optimizer(resumed_model, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)
    train(resumed_model, resumed)
    for parameter, expected in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_fused_where_the_device_has_none_is_an_error(model, monkeypatch):
    monkeypatch.setattr(optimizers, "has_fused_optimizer", lambda name, device_type: False)
    with pytest.raises(UserError, match="no fused sgd for cpu; set fused_optimizer to auto"):
        build_optimizer(model, name="sgd", lr=0.1, fused=True)


def test_fused_is_found_on_the_cpu_and_not_on_a_device_that_is_not_there():
    assert has_fused_optimizer("sgd", "cpu")
    assert not has_fused_optimizer("sgd", "xpu")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"name": "sdg"}, "unknown optimizer 'sdg'; choose one of sgd, adam, adamw"),
        ({"name": "adam", "nesterov": True}, "nesterov is for sgd but optimizer is adam"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs momentum above 0"),
    ],
)
def test_options_that_do_not_fit_are_an_error(model, options, fault):
    with pytest.raises(UserError, match=fault):
        build_optimizer(model, lr=0.1, **options)


def test_a_frozen_model_is_an_error(model):
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), name="sgd", lr=0.1)


def test_fused_sgd_keeps_no_uninitialized_momentum_where_scaling_skips_the_first_step():
    model = nn.Linear(1000, 4)
    optimizer = build_optimizer(model, name="sgd", lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaler.scale((model(torch.ones(2, 1000)) * 1e30).sum()).backward()
    scaler.step(optimizer)
    for parameter in model.parameters():
        assert not optimizer.state[parameter]["momentum_buffer"].any()


def test_fused_sgd_with_momentum_starts_as_torch_does():
    ours, theirs = nn.Linear(10, 4), nn.Linear(10, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(
        ours, name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0, fused=True
    )
    reference = torch.optim.SGD(
        theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True
    )
    for seed in range(3):
        images = torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))
        for model, made in ((ours, optimizer), (theirs, reference)):
            made.zero_grad()
            model(images).square().sum().backward()
            made.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
