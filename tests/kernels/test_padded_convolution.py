import copy

import pytest
import torch
from torch import nn

from training_framework.models import build_model, pad_stem, plain_network
from training_framework.models.flops import training_flops_per_image


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_padded_stem_gives_the_maps_and_gradients_of_the_plain_one(stem, channels_last):
    torch.manual_seed(0)
    plain = build_model("resnet10", num_classes=4, stem=stem).conv1
    if channels_last:
        plain.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    padded = nn.Sequential(copy.deepcopy(plain))
    assert pad_stem(padded) == 1
    expected, found = plain(images), padded(images)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)
    for maps in (expected, found):
        maps.square().sum().backward()
    torch.testing.assert_close(padded[0].weight.grad, plain.weight.grad)
    assert padded[0].weight.shape[1] == 3


def test_padding_is_undone_and_counts_no_flops():
    model = build_model("resnet10", num_classes=4, stem="cifar")
    flops = training_flops_per_image(model, 16)
    assert pad_stem(model) == 1
    assert type(model.conv1) is not nn.Conv2d
    assert training_flops_per_image(model, 16) == flops
    assert type(plain_network(model).conv1) is nn.Conv2d


def test_a_network_without_a_convolution_over_three_channels_is_left_alone():
    with pytest.warns(UserWarning, match="pad_stem: the model has no convolution over three"):
        assert pad_stem(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(6, 4, 3, groups=2))) == 0
