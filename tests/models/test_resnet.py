import pytest
import torch
from torch import Tensor, nn

from training_framework.config.architectures import Architecture
from training_framework.errors import UserError
from training_framework.kernels.small_maps import is_small_map
from training_framework.kernels.winograd_convolution import winograd_applies
from training_framework.models.blocks import Bottleneck
from training_framework.models.resnet import MODELS, ResNet, build_model


def parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, stem="imagenet")
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("resnet50", 5, 23_518_277),
        ("resnet101", 1000, 44_549_160),
        ("resnext50_32x4d", 1000, 25_028_904),
        ("resnext101_32x8d", 1000, 88_791_336),
        ("wide_resnet50_2", 1000, 68_883_240),
        ("wide_resnet101_2", 1000, 126_886_696),
    ],
)
def test_parameter_counts_are_torchvisions(name, num_classes, expected):
    assert parameters(name, num_classes) == expected


def torchvision_names(convolutions: int, blocks_per_stage: list[int], expansion: int) -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{part}" for part in norm)]
    for stage, blocks in enumerate(blocks_per_stage, start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            for index in range(1, convolutions + 1):
                names.append(f"{prefix}.conv{index}.weight")
                names.extend(f"{prefix}.bn{index}.{part}" for part in norm)
            if block == 0 and (stage > 1 or expansion > 1):
                names.append(f"{prefix}.downsample.0.weight")
                names.extend(f"{prefix}.downsample.1.{part}" for part in norm)
    return [*names, "fc.weight", "fc.bias"]


def test_names_and_their_order_are_torchvisions():
    with torch.device("meta"):
        resnet18 = build_model("resnet18", num_classes=10, stem="imagenet")
        resnet50 = build_model("resnet50", num_classes=10, stem="imagenet")
    assert list(resnet18.state_dict()) == torchvision_names(2, [2, 2, 2, 2], 1)
    assert list(resnet50.state_dict()) == torchvision_names(3, [3, 4, 6, 3], 4)


@pytest.mark.parametrize(
    ("name", "stem"), [*((name, "imagenet") for name in MODELS), ("resnet10", "cifar")]
)
def test_every_variant_gives_one_row_of_logits_an_image(name, stem):
    with torch.device("meta"):
        model = build_model(name, num_classes=7, stem=stem)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def plain_resnet10(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-10 with the ImageNet stem in training mode, from functions alone."""
    functional = nn.functional

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.batch_norm(x, None, None, weight, bias, training=True)

    x = functional.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = functional.max_pool2d(norm("bn1", x).relu(), 3, stride=2, padding=1)
    for stage in range(1, 5):
        block, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        out = functional.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = norm(f"{block}.bn1", out).relu()
        out = norm(
            f"{block}.bn2", functional.conv2d(out, state[f"{block}.conv2.weight"], padding=1)
        )
        if stage > 1:
            x = functional.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride)
            x = norm(f"{block}.downsample.1", x)
        x = (out + x).relu()
    return functional.linear(x.mean(dim=(2, 3)), state["fc.weight"], state["fc.bias"])


def test_a_bottleneck_in_groups_equals_one_convolution_a_group():
    torch.manual_seed(0)
    block = Bottleneck(32, 64, stride=2, groups=4, base_width=8).double().eval()
    images = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    x = block.bn1(block.conv1(images)).relu()
    assert x.shape[1] == 32
    by_group = [
        nn.functional.conv2d(part, weight, stride=2, padding=1)
        for part, weight in zip(x.chunk(4, 1), block.conv2.weight.chunk(4), strict=True)
    ]
    x = block.bn3(block.conv3(block.bn2(torch.cat(by_group, 1)).relu()))
    assert block.downsample is not None
    torch.testing.assert_close(block(images), (x + block.downsample(images)).relu())


def test_a_basic_block_has_no_groups():
    with pytest.raises(UserError, match="use bottleneck blocks"):
        ResNet(Architecture("basic", (1, 1, 1, 1), cardinality=2), num_classes=2)


def test_kernels_leave_convolutions_in_groups_alone():
    with torch.device("meta"):
        block = Bottleneck(64, 64, groups=4, base_width=16)
    assert block.conv2.groups == 4
    assert not winograd_applies(block.conv2, 16, 16)
    assert not is_small_map(block.conv2, 1, 1)


def test_logits_equal_the_network_written_out_in_functions():
    torch.manual_seed(0)
    model = build_model("resnet10", num_classes=3, stem="imagenet").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(images), plain_resnet10(model.state_dict(), images))


def test_bottleneck_strides_on_its_3x3_convolution():
    with torch.device("meta"):
        block = build_model("resnet50", num_classes=10, stem="imagenet").layer2[0]
    strides = [block.conv1.stride, block.conv2.stride, block.conv3.stride]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_one_seed_gives_one_model():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model("resnet10", num_classes=10, stem="cifar"))
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_convolutions_start_with_kaiming_deviation_over_their_outputs():
    torch.manual_seed(0)
    model = build_model("resnet10", num_classes=10, stem="cifar")
    weight = model.layer4[0].conv1.weight
    expected = (2 / (9 * weight.shape[0])) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.01)


def test_zero_init_last_norm_starts_every_block_as_its_shortcut():
    model = build_model("resnet10", num_classes=10, stem="cifar", zero_init_last_norm=True)
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(model.layer1(x), x)
    with torch.device("meta"):
        bottleneck = build_model("resnet50", num_classes=10, stem="cifar").layer1[0]
    assert bottleneck.last_norm is bottleneck.bn3


def test_shared_early_weights_are_one_parameter_under_two_names():
    plain = build_model("resnet18", num_classes=10, stem="cifar")
    shared = build_model("resnet18", num_classes=10, stem="cifar", share_early_weights=True)
    for block in shared.layer1:
        assert block.conv2.weight is block.conv1.weight
    assert shared.layer2[1].conv2.weight is not shared.layer2[1].conv1.weight
    assert list(shared.state_dict()) == list(plain.state_dict())
    saved = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in shared.parameters())
    assert saved == 2 * 64 * 64 * 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet81"}, ["'resnet81'", "did you mean 'resnet1"]),
        ({"name": "vgg"}, ["'vgg'", "resnet10, resnet18"]),
        ({"stem": "imagnet"}, ["'imagnet'", "cifar or imagenet"]),
        ({"num_classes": 0}, ["num_classes is 0", "1 or more"]),
        (
            {"name": "resnet50", "share_early_weights": True},
            ["share_early_weights", "resnet10, resnet18, resnet34"],
        ),
    ],
)
def test_a_model_that_does_not_exist_is_refused_with_the_cure(options, words):
    arguments = {"name": "resnet18", "num_classes": 10, "stem": "cifar", **options}
    with pytest.raises(UserError) as error, torch.device("meta"):
        build_model(**arguments)
    for word in words:
        assert word in str(error.value)
