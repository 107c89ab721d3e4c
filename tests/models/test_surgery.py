import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

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


@needs_compiler
def test_a_module_that_changes_stays_the_same_object_with_the_same_tensors():
    model = UsersNetwork()
    modules, tensors = list(model.modules()), model.state_dict(keep_vars=True)
    assert use_winograd_convolutions(model, 32) == 1 and fuse_norms(model) == 2
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[name] is tensors[name] for name in after)


def parts(change_convolution=None, change_norm=None):
    """A network whose middle convolution and norm are changed by a user."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    convolution = (change_convolution or (lambda c: c))(convolution)
    norm = (change_norm or (lambda n: n))(norm)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        convolution,
        norm,
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
    )


class OwnConvolution(nn.Conv2d):
    """A user's kind of convolution."""

    def forward(self, x):
        return super().forward(x) + 1


class OwnNorm(nn.BatchNorm2d):
    """A user's kind of norm."""

    def forward(self, x):
        return super().forward(x) + 1


def with_own_forward(convolution):
    convolution.forward = lambda x: nn.Conv2d.forward(convolution, x) + 1
    return convolution


REPARAMETRIZED = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrized weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "parametrized spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "prune": lambda c: prune.l1_unstructured(c, "weight", 0.5),
    "own class": lambda c: OwnConvolution(16, 16, 3, padding=1, bias=False),
    "own forward": with_own_forward,
    "TorchScript": torch.jit.script,
}


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_a_convolution_that_is_more_than_its_class_stays_and_the_others_change(name, copied):
    model = parts(REPARAMETRIZED[name])
    images = torch.randn(2, 3, 8, 8)
    if copied:
        with torch.no_grad():  # torch copies no module that holds a weight with a gradient
            model(images)
    else:
        model(images).sum().backward()
    plain = copy.deepcopy(model) if copied else None
    kind, names = type(model[1]), list(model.state_dict())
    assert use_winograd_convolutions(model, 8) == 1 and fuse_norms(model) == 2
    assert type(model[1]) is kind and list(model.state_dict()) == names
    model(images).sum().backward()
    if plain is not None and name != "own forward":  # the copy's forward is the original's
        torch.manual_seed(1)
        plain(images)
        for mode in (False, True):
            got, expected = model.train(mode)(images), plain.train(mode)(images)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


HOOKED = {
    "forward": lambda m, note: m.register_forward_hook(note),
    "forward_pre": lambda m, note: m.register_forward_pre_hook(note),
    "full_backward": lambda m, note: m.register_full_backward_hook(note),
    "full_backward_pre": lambda m, note: m.register_full_backward_pre_hook(note),
    "state_dict": lambda m, note: m._register_state_dict_hook(note),
    "state_dict_post": lambda m, note: m.register_state_dict_post_hook(note),
    "state_dict_pre": lambda m, note: m.register_state_dict_pre_hook(note),
    "load_pre": lambda m, note: m.register_load_state_dict_pre_hook(note),
    "load_post": lambda m, note: m.register_load_state_dict_post_hook(note),
}


@needs_compiler
@pytest.mark.parametrize("name", HOOKED)
def test_modules_with_hooks_stay_and_their_hooks_run(name):
    calls = []
    model = parts()
    for module in (model[1], model[2]):
        HOOKED[name](module, lambda *_: calls.append(name))
    assert use_winograd_convolutions(model, 8) == 1 and fuse_norms(model) == 1
    assert not calls  # nor did the trial run show itself to the user's hooks
    assert type(model[1]) is nn.Conv2d and type(model[2]) is nn.BatchNorm2d
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    model(images).sum().backward()
    model.load_state_dict(model.state_dict())
    assert len(calls) == 2


@needs_compiler
@pytest.mark.parametrize("name", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_that_come_after_surgery_run_in_our_networks_too(name):
    model = changed_by_everything()
    plain = resnet10(stem="cifar")
    images = torch.randn(2, 3, 32, 32)
    calls, outputs = [], []
    for network in (model, plain):
        network.layer1[0].bn1.register_forward_hook(lambda m, i, o: outputs.append(o))
        HOOKED[name](network.layer1[0].bn1, lambda *_: calls.append(name))
        HOOKED[name](network.layer1[0].conv1, lambda *_: calls.append(name))
        network.layer1[0].recompute_activations = False
        network(images).sum().backward()
    assert len(calls) == 4
    assert outputs[1].min() < 0  # ReLU came after the hook and left it its output
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_module_in_two_places_stays():
    model = parts()
    model.append(nn.Sequential(model[1], model[2]))
    assert use_winograd_convolutions(model, 8) == 1 and fuse_norms(model) == 1
    assert type(model[1]) is nn.Conv2d and type(model[2]) is nn.BatchNorm2d


@needs_compiler
def test_lazy_modules_stay_lazy_and_the_others_change():
    model = parts(
        lambda _: nn.LazyConv2d(16, 3, padding=1, bias=False), lambda _: nn.LazyBatchNorm2d()
    )
    assert use_winograd_convolutions(model, 8) == 1 and fuse_norms(model) == 1
    assert type(model[1]) is nn.LazyConv2d and type(model[2]) is nn.LazyBatchNorm2d
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 16, 8, 8)
    assert type(model[1]) is nn.Conv2d and type(model[2]) is nn.BatchNorm2d


@needs_compiler
def test_norms_of_a_users_class_stay():
    model = parts(change_norm=lambda _: OwnNorm(16))
    assert fuse_norms(model) == 1 and type(model[2]) is OwnNorm
    assert synchronize_norms(parts(change_norm=lambda _: OwnNorm(16)), "cpu") == 1


def test_a_synchronized_norm_keeps_its_hooks():
    calls = []
    model = parts()
    model[2].register_forward_hook(lambda *_: calls.append(1))
    assert synchronize_norms(model, "cpu") == 2
    model(torch.randn(2, 3, 8, 8))
    assert len(calls) == 1


class OnItsOwnDevice(nn.Module):
    """A network that does not run on the meta device."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        if not x.any():
            raise ValueError("an image without any light")
        return self.convolution(x)


@needs_compiler
@pytest.mark.parametrize("change", [use_small_map_convolutions, use_winograd_convolutions])
def test_a_network_whose_maps_cannot_be_found_is_left_alone(change):
    with pytest.warns(UserWarning, match="nothing changed") as caught:
        assert change(OnItsOwnDevice(), 8) == 0
    assert "maps are unknown" in str(caught[0].message)
    assert all("nothing changed" in str(warning.message) for warning in caught)


@needs_compiler
def test_the_fourfold_change_survives_copy_and_pickle():
    model = changed_by_everything()
    images = torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), copy.deepcopy(model)(images))
        assert {type(m) for m in twin.modules()} == {type(m) for m in model.modules()}
