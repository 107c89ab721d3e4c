import pytest
import torch
from torch import nn

from training_framework.optimizers import TrainedFor, build_optimizer, set_rates


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def rates(optimizer):
    return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_norms_and_biases_have_a_rate_of_their_own(decay_norm_and_bias):
    model = network()
    optimizer = build_optimizer(
        model, name="sgd", lr=0.1, weight_decay=0.5, bias_lr_factor=64.0,
        decay_norm_and_bias=decay_norm_and_bias,
    )  # fmt: skip
    set_rates(optimizer, 0.1, 0)
    found = rates(optimizer)
    for parameter in model.parameters():
        is_bias = parameter is not model[0].weight and parameter is not model[3].weight
        assert found[parameter] == (0.1 * 64 if is_bias else 0.1)
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[model[1].bias] == (0.5 if decay_norm_and_bias else 0)
    assert decays[model[0].weight] == 0.5


@pytest.mark.parametrize("then_freezes", [False, True])
def test_a_parameter_that_is_not_trained_to_the_end_stays_as_it_is_from_then_on(then_freezes):
    model = network()
    bias = model[0].bias
    optimizer = build_optimizer(
        model, name="sgd", lr=0.1, momentum=0.9, trained_for={bias: TrainedFor(2, then_freezes)}
    )
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 1, 1)).square().mean().backward()
        set_rates(optimizer, 0.1, step)
        seen.append(rates(optimizer)[bias])
        optimizer.step()
        if step == 1:
            trained = bias.detach().clone()
    assert seen == [0.1, 0.05, 0, 0]
    assert torch.equal(bias, trained) and bias.any()
    assert bias.requires_grad != then_freezes


def test_groups_without_keys_of_their_own_take_the_rate_unchanged():
    optimizer = build_optimizer(network(), name="sgd", lr=0.1)
    assert all({"lr_factor", "trained_steps"}.isdisjoint(g) for g in optimizer.param_groups)
    set_rates(optimizer, 0.3, 7)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
