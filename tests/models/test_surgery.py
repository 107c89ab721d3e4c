import copy
import shutil

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
    fuse_norms,
    plain_network,
    synchronize_norms,
    use_small_map_convolutions,
    use_winograd_convolutions,
)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the kernels need a C++ compiler"
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


def changed_by_everything(image_size=32):
    model = resnet10(stem="cifar")
    use_small_map_convolutions(model, image_size // 8)
    use_winograd_convolutions(model, image_size)
    fuse_norms(model)
    checkpoint_activations(model)
    return model


class UsersNetwork(nn.Module):
    """A network of a user's, whose parts surgery may take."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((2, 2)),
            nn.Conv2d(32, 16, 3, padding=1, bias=False),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def users_changed_by_everything():
    torch.manual_seed(0)
    model = UsersNetwork()
    assert use_small_map_convolutions(model, 32) == use_winograd_convolutions(model, 32) == 1
    assert fuse_norms(model) == 2
    return model


def assert_plain(model):
    stock = {module.__class__.__module__.partition(".")[0] for module in model.modules()}
    assert stock <= {"torch", "training_framework", __name__.partition(".")[0]}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm):
            assert type(module) in (nn.Conv2d, nn.BatchNorm2d)


@needs_compiler
@pytest.mark.parametrize("build", [changed_by_everything, users_changed_by_everything])
def test_a_plain_network_is_the_same_network_of_torchs_own_modules(build):
    model = build()
    train_two_steps(model)
    images = torch.randn(4, 3, 32, 32)
    before = model.state_dict(keep_vars=True)
    expected = {mode: copy.deepcopy(model).train(mode)(images) for mode in (True, False)}
    plain = plain_network(model)
    assert plain is model
    assert_plain(plain)
    after = plain.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    for mode in (True, False):
        got = copy.deepcopy(plain).train(mode)(images)
        torch.testing.assert_close(got, expected[mode], rtol=1e-5, atol=1e-5)
    train_two_steps(plain)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("build", [changed_by_everything, users_changed_by_everything])
def test_a_plain_network_can_be_exported_and_traced(build, mode):
    model = build().train(mode)
    images = torch.randn(4, 3, 32, 32)
    expected = copy.deepcopy(model)(images)
    plain_network(model)
    exported = torch.export.export(copy.deepcopy(model), (images,))
    operators = {str(node.target) for node in exported.graph.nodes}
    assert not any("efficient_resnet" in operator for operator in operators)
    torch.testing.assert_close(exported.module()(images), expected, rtol=1e-5, atol=1e-5)
    if not mode:
        traced = torch.jit.trace(model, images)
        torch.testing.assert_close(traced(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_plain_network_has_no_synchronized_norms_but_the_users_own(device_type):
    model = resnet10()
    model.own = nn.SyncBatchNorm(4)
    synchronize_norms(model, device_type)
    plain_network(model)
    assert type(model.own) is nn.SyncBatchNorm
    assert sum(type(module) is nn.BatchNorm2d for module in model.modules()) == 12
    assert type(model.bn1) is nn.BatchNorm2d


def test_a_plain_network_has_no_wrappers():
    model = resnet10()
    assert plain_network(torch.compile(model, backend="eager")) is model
