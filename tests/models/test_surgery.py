import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training_framework.kernels.small_maps import SmallMapConv2d
from training_framework.kernels.synchronized_norm import SynchronizedBatchNorm2d
from training_framework.models.blocks import BasicBlock
from training_framework.models.resnet import build_model
from training_framework.models.surgery import (
    checkpoint_activations,
    synchronize_norms,
    use_small_map_convolutions,
)


def resnet10(**options):
    torch.manual_seed(0)
    return build_model("resnet10", num_classes=5, **{"stem": "imagenet", **options})


def train_two_steps(model, image_size=32):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        images = torch.randn(4, 3, image_size, image_size, generator=generator)
        loss = F.cross_entropy(model(images.to(model.fc.weight.dtype)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def assert_same_training(changed, plain, **tolerance):
    torch.testing.assert_close(train_two_steps(changed), train_two_steps(plain), **tolerance)
    names = list(plain.state_dict())
    assert list(changed.state_dict()) == names
    for name in names:
        torch.testing.assert_close(
            changed.state_dict()[name], plain.state_dict()[name], msg=name, **tolerance
        )


def test_checkpointing_trains_bit_for_bit_and_updates_running_statistics_once():
    plain, changed = resnet10(), resnet10()
    assert checkpoint_activations(changed) == 4
    assert_same_training(changed, plain, rtol=0, atol=0)
    assert changed.layer1[0].bn1.num_batches_tracked == 2


def saved_bytes(model):
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(4, 3, 64, 64))
    return sum(saved.values())


def test_checkpointing_keeps_less_in_memory():
    plain, changed = resnet10(stem="cifar"), resnet10(stem="cifar")
    parameter_bytes = sum(parameter.nbytes for parameter in plain.parameters())
    checkpoint_activations(changed)
    assert saved_bytes(changed) < 0.6 * (saved_bytes(plain) - parameter_bytes)


def test_checkpointing_follows_a_copy_and_leaves_evaluation_alone():
    plain, model = resnet10(), resnet10()
    checkpoint_activations(model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    duplicate = copy.deepcopy(model.train())
    duplicate(images).sum().backward()
    assert model.conv1.weight.grad is None and duplicate.conv1.weight.grad is not None
    assert model.bn1.num_batches_tracked == 0


def test_checkpointing_compiles_and_updates_running_statistics_once():
    torch.manual_seed(0)
    plain = BasicBlock(4, 4)
    changed = copy.deepcopy(plain)
    checkpoint_activations(changed)
    compiled = torch.compile(changed, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 6, 6)
    for block in (compiled, plain):
        block(x).square().sum().backward()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(changed.get_buffer(name), buffer)
    torch.testing.assert_close(changed.conv1.weight.grad, plain.conv1.weight.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_small_map_convolutions_train_the_same_to_rounding(layout):
    plain, changed = resnet10().double(), resnet10().double()
    assert use_small_map_convolutions(changed, 32) == 7
    assert_same_training(changed.to(memory_format=layout), plain)


def test_small_map_convolutions_replace_only_what_sees_small_maps():
    model = resnet10()
    use_small_map_convolutions(model, 32)
    replaced = [name for name, m in model.named_modules() if isinstance(m, SmallMapConv2d)]
    assert replaced == [
        "layer2.0.downsample.0",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "layer3.0.downsample.0",
        "layer4.0.conv1",
        "layer4.0.conv2",
        "layer4.0.downsample.0",
    ]


def test_synchronize_norms_replaces_every_norm_by_the_kind_for_the_device():
    on_cpu, on_cuda = resnet10(), resnet10()
    parameters = list(on_cpu.parameters())
    assert synchronize_norms(on_cpu, "cpu") == synchronize_norms(on_cuda, "cuda") == 12
    norms = [m for m in on_cpu.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 12 and all(type(m) is SynchronizedBatchNorm2d for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in on_cuda.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in on_cuda.modules()) == 12
    assert all(a is b for a, b in zip(on_cpu.parameters(), parameters, strict=True))
    assert list(on_cpu.state_dict()) == list(on_cuda.state_dict()) == list(resnet10().state_dict())


def test_all_surgeries_together_train_the_same():
    plain, changed = resnet10().double(), resnet10().double()
    synchronize_norms(changed, "cpu")
    use_small_map_convolutions(changed, 32)
    checkpoint_activations(changed)
    assert_same_training(changed, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: synchronize_norms(model, "cpu"),
        checkpoint_activations,
        lambda model: use_small_map_convolutions(model, 32),
    ],
)
def test_a_change_that_changes_nothing_warns(change):
    with pytest.warns(UserWarning, match="nothing changed"):
        assert change(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) == 0
