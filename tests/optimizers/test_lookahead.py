import copy

import pytest
import torch
from torch import nn

from training_framework.optimizers import Lookahead, build_optimizer


def trained(steps, *, lookahead=None, resume_at=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, name="sgd", lr=0.1, momentum=0.9)
    slow = Lookahead(optimizer, **lookahead) if lookahead else None
    for step in range(steps):
        if step == resume_at:
            states = copy.deepcopy((optimizer.state_dict(), slow.state_dict()))
            model = copy.deepcopy(model)
            optimizer = build_optimizer(model, name="sgd", lr=0.1, momentum=0.9)
            slow = Lookahead(optimizer, **lookahead)
            optimizer.load_state_dict(states[0])
            slow.load_state_dict(states[1])
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    return model


def test_weights_go_back_towards_the_slow_ones():
    start, two = trained(0).weight, trained(2).weight
    expected = start + 0.25 * (two - start)
    torch.testing.assert_close(trained(2, lookahead={"every": 2, "share": 0.25}).weight, expected)
    torch.testing.assert_close(
        trained(1, lookahead={"every": 2, "share": 0.25}).weight, trained(1).weight
    )


@pytest.mark.parametrize("resume_at", [3, 4])
def test_it_resumes_bit_for_bit(resume_at):
    options = {"every": 3, "share": 0.5}
    resumed = trained(8, lookahead=options, resume_at=resume_at)
    assert torch.equal(resumed.weight, trained(8, lookahead=options).weight)


def test_without_a_state_it_begins_at_the_weights_as_they_are():
    model = nn.Linear(3, 2)
    slow = Lookahead(build_optimizer(model, name="sgd", lr=0.1), every=2, share=0.5)
    with torch.no_grad():
        model.weight.fill_(3)
    slow.load_state_dict(None)
    assert torch.equal(slow.state_dict()["slow"][0], model.weight)
    with pytest.raises(ValueError, match="another network"):
        slow.load_state_dict({"slow": [torch.zeros(2)], "steps": 1})
