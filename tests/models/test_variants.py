"""Variants of ResNet: timm's names and numbers of parameters, and what each part computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from training_framework.config.architectures import MODELS, Variation
from training_framework.errors import UserError
from training_framework.kernels.winograd_convolution import winograd_applies
from training_framework.models.activations import ACTIVATIONS
from training_framework.models.blocks import BasicBlock, Bottleneck
from training_framework.models.blur_pool import BlurPool
from training_framework.models.flops import forward_flops_per_image
from training_framework.models.preactivated import PreactivatedBlock
from training_framework.models.resnet import build_model
from training_framework.models.squeeze_excitation import SqueezeExcitation

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Multiply-adds of airbench94's convolutions, from its maps (31, 15, 7 and 3 px) and channels.
AIRBENCH94 = (
    31 * 31 * (4 * 3 * 24 + 9 * 24 * 64)
    + 15 * 15 * 9 * (64 * 64 + 64 * 256)
    + 7 * 7 * 9 * 2 * 256 * 256
    + 3 * 3 * 9 * 256 * 256
)


def on_meta(name, **options):
    with torch.device("meta"):
        return build_model(name, **{"num_classes": 1000, "stem": "imagenet", **options})


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("resnet18d", 1000, 11_708_744),
        ("resnet50c", 1000, 25_576_264),
        ("resnet50d", 1000, 25_576_264),
        ("seresnet50", 1000, 28_088_024),
        ("resnetblur50", 1000, 25_557_032),
        # Of the authors' networks for CIFAR-10.
        ("wrn_16_4", 10, 2_748_890),
        ("wrn_28_10", 10, 36_479_194),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, expected):
    stem = "cifar" if num_classes == 10 else "imagenet"
    model = on_meta(name, num_classes=num_classes, stem=stem)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def timm_names(*, convolutions, blocks_per_stage, expansion=1, deep=False, pooled=False, se=False):
    norm = lambda prefix: [f"{prefix}.{part}" for part in NORM]  # noqa: E731
    names = ["conv1.weight"]
    if deep:
        names = ["conv1.0.weight", *norm("conv1.1"), "conv1.3.weight", *norm("conv1.4"),
                 "conv1.6.weight"]  # fmt: skip
    names += norm("bn1")
    for stage, blocks in enumerate(blocks_per_stage, start=1):
        for prefix in (f"layer{stage}.{block}" for block in range(blocks)):
            for index in range(1, convolutions + 1):
                names += [f"{prefix}.conv{index}.weight", *norm(f"{prefix}.bn{index}")]
            if se:
                names += [f"{prefix}.se.fc{n}.{part}" for n in (1, 2) for part in NORM[:2]]
            if prefix.endswith(".0") and (stage > 1 or expansion > 1):
                names.append(f"{prefix}.downsample.{int(pooled)}.weight")
                names += norm(f"{prefix}.downsample.{int(pooled) + 1}")
    return [*names, "fc.weight", "fc.bias"]


def test_names_and_their_order_are_timms():
    basic = {"convolutions": 2, "blocks_per_stage": (2, 2, 2, 2)}
    deeper = {"convolutions": 3, "blocks_per_stage": (3, 4, 6, 3), "expansion": 4}
    for name, parts in {
        "resnet18d": {**basic, "deep": True, "pooled": True},
        "resnet50c": {**deeper, "deep": True},
        "resnet50d": {**deeper, "deep": True, "pooled": True},
        "seresnet18": {**basic, "se": True},
        "seresnet50": {**deeper, "se": True},
        "resnetblur50": deeper,
    }.items():
        assert list(on_meta(name).state_dict()) == timm_names(**parts), name


def test_sizes_inside_are_timms():
    assert on_meta("seresnet18").layer1[0].se.fc1.weight.shape == (8, 64, 1, 1)
    assert on_meta("seresnet50").layer4[0].se.fc1.weight.shape == (128, 2048, 1, 1)
    stem = on_meta("resnet50d").conv1
    assert [(conv.out_channels, conv.stride[0]) for conv in (stem[0], stem[2], stem[4])] == [
        (32, 2), (32, 1), (64, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18d", "resnetblur50", "wrn_16_4", "resnet8_fast"])
def test_images_of_any_size_give_logits(name):
    for stem, size in (("cifar", 8), ("imagenet", 37)):
        model = on_meta(name, num_classes=7, stem=stem).eval()
        assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_blur_is_the_binomial_filter_at_every_second_pixel(size):
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    line = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    weight = torch.outer(line, line).expand(3, 1, 3, 3)
    padded = functional.pad(images, (1,) * 4, "reflect" if size > 1 else "replicate")
    expected = functional.conv2d(padded, weight, stride=2, groups=3)
    torch.testing.assert_close(BlurPool()(images), expected)


def test_a_blur_takes_the_stride_of_the_convolution_before_it():
    block = Bottleneck(64, 32, 2, variation=Variation(blur_pool=True)).double().eval()
    images = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    x = block.bn1(block.conv1(images)).relu()
    assert block.conv2.stride == (1, 1)
    x = block.bn3(block.conv3(BlurPool()(block.bn2(block.conv2(x)).relu())))
    torch.testing.assert_close(block(images), (x + block.downsample(images)).relu())


def test_squeeze_and_excitation_weighs_channels_by_their_averages():
    module = SqueezeExcitation(32).double()
    images = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    inner = images.mean((2, 3)) @ module.fc1.weight.flatten(1).T + module.fc1.bias
    weights = (inner.relu() @ module.fc2.weight.flatten(1).T + module.fc2.bias).sigmoid()
    torch.testing.assert_close(module(images), images * weights[:, :, None, None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_uses_its_activation_everywhere(activation):
    function = getattr(functional, activation)
    variation = Variation(activation=activation, squeeze_excitation=activation == "silu")
    block = BasicBlock(16, 16, variation=variation).double().eval()
    images = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    branch = block.bn2(block.conv2(function(block.bn1(block.conv1(images)))))
    if block.se is not None:
        branch = block.se(branch)
    torch.testing.assert_close(block(images), function(branch + images))


def test_a_pooled_shortcut_averages_what_a_stride_would_skip():
    block = BasicBlock(16, 32, 2, variation=Variation(pooled_shortcut=True)).double().eval()
    images = torch.randn(1, 16, 5, 5, dtype=torch.float64)
    pool, convolution, norm = block.downsample
    averages = pool(images)
    torch.testing.assert_close(averages[..., 0, 0], images[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(averages[..., 2, 2], images[..., 4, 4])
    branch = block.bn2(block.conv2(block.bn1(block.conv1(images)).relu()))
    torch.testing.assert_close(block(images), (branch + norm(convolution(averages))).relu())


def test_a_preactivated_block_leaves_its_sum_alone():
    block = PreactivatedBlock(8, 16, 2, variation=Variation()).double().eval()
    images = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    x = block.bn1(images).relu()
    expected = block.conv2(block.bn2(block.conv1(x)).relu()) + block.downsample(x)
    torch.testing.assert_close(block(images), expected)
    same = PreactivatedBlock(8, 8, variation=Variation())
    assert same.downsample is None


def test_a_wide_network_ends_with_norm_and_activation():
    model = on_meta("wrn_16_4", stem="cifar")
    assert model.bn1.num_features == 256 and model.conv1.out_channels == 16
    assert model.fc.in_features == 256 and len(model.layer4) == 0


def test_the_fast_network_is_no_dearer_than_airbench94_and_fits_the_kernels():
    model = on_meta("resnet8_fast", num_classes=10)
    assert forward_flops_per_image(model, 32) <= 2 * AIRBENCH94
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 8
    assert all(winograd_applies(layer, 4, 4) for layer in layers[1:-1])


def test_the_fast_network_written_out_in_functions():
    torch.manual_seed(0)
    model = build_model("resnet8_fast", num_classes=3, stem="cifar").double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = functional.gelu(model.conv1(images))
    for stage in (model.layer1, model.layer2, model.layer3):
        block = stage[0]
        pooled = functional.max_pool2d(block.conv1(x), 2)
        x = functional.gelu(block.bn1(pooled))
        x = functional.gelu(block.bn2(block.conv2(x)) + x)
    torch.testing.assert_close(model(images), x.amax((2, 3)) @ model.fc.weight.T / 9)


@pytest.mark.parametrize("name", ["wrn_16_4", "resnet8_fast"])
def test_other_blocks_refuse_what_they_lack(name):
    with pytest.raises(UserError, match=f"{name} has no blur_pool, deep_stem; turn it off"):
        on_meta(name, variation=Variation(blur_pool=True, deep_stem=True))
    with pytest.raises(UserError, match="share_early_weights needs"):
        on_meta(name, share_early_weights=True)


def test_a_variation_replaces_the_models_own():
    model = on_meta("resnet18", variation=Variation(activation="gelu", deep_stem=True))
    assert list(model.state_dict())[:2] == ["conv1.0.weight", "conv1.1.weight"]
    assert model.layer1[0].variation.activation == "gelu"
    assert MODELS["resnet18"].variation == Variation()


def test_identity_convolutions_pass_their_input_on():
    torch.manual_seed(0)
    model = build_model("wrn_16_4", num_classes=2, stem="cifar", dirac_init=True)
    torch.manual_seed(0)
    plain = build_model("wrn_16_4", num_classes=2, stem="cifar")
    images = torch.randn(1, 16, 4, 4)
    block, usual = model.layer1[0], plain.layer1[0]
    torch.testing.assert_close(block.conv1(images)[:, :16], images)
    assert torch.equal(block.conv1.weight[16:], usual.conv1.weight[16:])
    assert torch.equal(model.conv1.weight, plain.conv1.weight), "it reads colours"
    assert torch.equal(block.downsample.weight, usual.downsample.weight), "it is 1x1"
