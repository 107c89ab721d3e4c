import copy

import pytest
import torch
from torch import nn

from training_framework.errors import UserError
from training_framework.optimizers import MuonOptions, build_optimizer, set_rates
from training_framework.optimizers.muon import A, B, C, in_half_precision, orthogonalized

OPTIONS = MuonOptions(rest_lr=0.05, momentum=0.7, iterations=3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 3),
    ).double()  # fmt: skip


def made(model, *, lr=0.1, options=OPTIONS, **more):
    settings = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01, **more}
    if options.rest != "sgd":
        settings |= {"momentum": 0.0, "nesterov": False}
    return build_optimizer(model, name="muon", lr=lr, muon=options, **settings)


def train(model, optimizer, first, last, lr=0.1):
    for step in range(first, last):
        images = torch.randn(
            4, 2, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        optimizer.zero_grad()
        model(images).square().mean().backward()
        set_rates(optimizer, lr / (1 + step), step)
        optimizer.step()


def newton_schulz(matrix, iterations):
    """One matrix, as the method is written down."""
    x = matrix / matrix.norm()
    for _ in range(iterations):
        square = x @ x.T
        x = A * x + B * square @ x + C * square @ square @ x
    return x


@pytest.mark.parametrize("shape", [(6, 40), (12, 12), (40, 6)])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_iterations_on_products_equal_those_on_the_matrix(shape, iterations):
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    wide = matrices if shape[0] <= shape[1] else matrices.mT
    expected = torch.stack([newton_schulz(matrix, iterations) for matrix in wide])
    expected = expected if shape[0] <= shape[1] else expected.mT
    found = orthogonalized(matrices, iterations=iterations)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    single = orthogonalized(matrices.float(), iterations=iterations)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


def test_half_precision_gives_the_same_directions():
    torch.manual_seed(0)
    matrix = torch.randn(16, 144, dtype=torch.float64)
    found = in_half_precision((matrix / matrix.norm())[None].float(), 3)
    assert found.dtype == torch.bfloat16
    expected = newton_schulz(matrix, 3)
    assert (found[0].double() - expected).norm() <= 0.03 * expected.norm()


def test_steps_whose_scaled_gradients_overflow_are_skipped():
    model = network().float()
    optimizer = made(model, fused=True)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scaler.scale(1e6 * model.eval()(torch.ones(1, 2, 8, 8)).square().mean()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not optimizer.state


def test_five_iterations_bring_the_singular_values_near_one():
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(32, 32))
    right, _ = torch.linalg.qr(torch.randn(288, 32))
    matrix = left @ torch.logspace(-2, 0, 32).diag() @ right.T
    values = torch.linalg.svdvals(orthogonalized(matrix[None], iterations=5)[0])
    assert values.min() > 0.6 and values.max() < 1.25
    assert not orthogonalized(torch.zeros(1, 4, 8), iterations=3).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalize", [True, False])
def test_convolutions_move_as_the_method_is_written_down(layout, normalize):
    model = network().to(memory_format=layout)
    plain = copy.deepcopy(model)
    options = OPTIONS._replace(normalize=normalize)
    train(model, made(model, options=options), 0, 3)
    convolutions = [plain[0].weight, plain[2].weight, plain[4].weight]
    rest = torch.optim.SGD(
        [
            {"params": [plain[6].weight], "weight_decay": 0.01},
            {"params": [*plain[1].parameters(), plain[2].bias, plain[4].bias, plain[6].bias]},
        ],
        lr=0.05, momentum=0.8, nesterov=True,
    )  # fmt: skip
    momenta = [torch.zeros_like(weight) for weight in convolutions]
    for step in range(3):
        rate = 1 / (1 + step)
        for group in rest.param_groups:
            group["lr"] = 0.05 * rate
        images = torch.randn(
            4, 2, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        plain.zero_grad()
        plain(images).square().mean().backward()
        rest.step()
        with torch.no_grad():
            for weight, momentum in zip(convolutions, momenta, strict=True):
                momentum.mul_(0.7).add_(weight.grad)
                direction = (weight.grad + 0.7 * momentum).flatten(1)
                if normalize:
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                else:
                    weight.mul_(1 - 0.1 * rate * 0.01)
                weight.sub_(0.1 * rate * newton_schulz(direction, 3).view_as(weight))
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_its_state_resumes_bit_for_bit(rest, fused):
    options = OPTIONS._replace(rest=rest)
    model = network()
    optimizer = made(model, options=options, fused=fused)
    train(model, optimizer, 0, 3)
    resumed_model = copy.deepcopy(model)
    resumed = made(resumed_model, options=options, fused=fused)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 6)
    train(resumed_model, resumed, 3, 6)
    for parameter, expected in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    states = [optimizer.state_dict()["state"], resumed.state_dict()["state"]]
    assert len(states[0]) == len(list(model.parameters()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_step_leaves_weights_without_a_gradient_alone():
    model = network()
    optimizer = made(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(UserError, match="muon is for convolutions"):
        made(nn.Linear(2, 2))
    with pytest.raises(UserError, match="nesterov is for sgd but optimizer is adamw"):
        build_optimizer(
            network(), name="muon", lr=0.1, nesterov=True, muon=OPTIONS._replace(rest="adamw")
        )


def test_a_network_of_convolutions_alone_needs_no_other_optimizer():
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Flatten()).double()
    train(model, made(model), 0, 2)
