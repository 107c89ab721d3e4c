import copy

import pytest
import torch
from torch import nn

from training_framework.optimizers import EvenAverage, WeightAverage


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))


def change(model, seed):
    """Stands for a training step: other weights, other statistics, one batch counted more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


def test_average_equals_the_closed_form_in_float64(model):
    average = WeightAverage(model, decay=0.9)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(200):
        change(model, step)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()

    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_running_statistics_are_averaged_and_batch_counts_copied(model):
    average = WeightAverage(model, decay=0.9)
    start = model[1].running_mean.clone()
    change(model, 0)
    average.update(model, 0)
    torch.testing.assert_close(
        average.model[1].running_mean, 0.1 * start + 0.9 * model[1].running_mean
    )
    assert average.model[1].num_batches_tracked == model[1].num_batches_tracked == 1


def test_decay_zero_follows_the_model(model):
    average = WeightAverage(model, decay=0.0)
    change(model, 0)
    average.update(model, 100)
    for name, tensor in model.state_dict().items():
        assert torch.equal(average.state_dict()[name], tensor)


def test_the_model_itself_is_left_alone(model):
    model.train()
    change(model, 0)
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, decay=0.9)
    average.update(model, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_averaged_model_evaluates_and_holds_no_gradients(model):
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    average = WeightAverage(model, decay=0.9)
    assert not any(module.training for module in average.model.modules())
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in average.model.parameters()
    )
    assert model[0].weight.grad is not None


def test_shared_parameters_stay_shared_and_move_once_a_step(model):
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared[1].weight = shared[0].weight
    average = WeightAverage(shared, decay=0.5)
    with torch.no_grad():
        shared[0].weight.add_(1)
    expected = torch.lerp(average.model[0].weight, shared[0].weight, 0.5)
    average.update(shared, 1000)
    assert average.model[0].weight is average.model[1].weight
    torch.testing.assert_close(average.model[0].weight, expected)


def test_channels_last_weights_stay_channels_last(model):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    average = WeightAverage(model, decay=0.9)
    average.update(model, 0)
    assert average.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_wrapped_model_updates_alike(model):
    average, reference = WeightAverage(model, decay=0.9), WeightAverage(model, decay=0.9)
    change(model, 0)
    reference.update(model, 3)
    average.update(nn.ModuleDict({"module": model}), 3)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(average.state_dict()[name], tensor)


def test_a_saved_average_goes_on_bit_for_bit(model):
    whole = WeightAverage(model, decay=0.9)
    change(model, 0)
    whole.update(model, 0)
    resumed = WeightAverage(model, decay=0.9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    change(model, 1)
    whole.update(model, 1)
    resumed.update(model, 1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_never_waits_for_the_device(model):
    model = model.cuda()
    average = WeightAverage(model, decay=0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update(model, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(average.model[0].weight, model[0].weight)


def test_an_even_average_is_the_mean_of_the_weights_from_its_first_step_on():
    model = nn.Linear(1, 1, bias=False)
    average = EvenAverage(model, first_step=2)
    values = [5.0, -3.0, 1.0, 2.0, 6.0]
    means = [5.0, -3.0, 1.0, 1.5, 3.0]
    for step, (value, mean) in enumerate(zip(values, means, strict=True)):
        nn.init.constant_(model.weight, value)
        average.update(model, step)
        assert average.model.weight.item() == pytest.approx(mean)
