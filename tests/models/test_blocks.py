import torch

from training_framework.models.blocks import BasicBlock, Bottleneck


def test_basic_block_halves_the_map_and_projects_its_shortcut():
    block = BasicBlock(4, 8, stride=2)
    assert block(torch.randn(2, 4, 9, 9)).shape == (2, 8, 5, 5)
    assert block.downsample is not None


def test_bottleneck_has_four_times_its_channels():
    block = Bottleneck(8, 4)
    assert block(torch.randn(2, 8, 6, 6)).shape == (2, 16, 6, 6)
    assert Bottleneck(16, 4).downsample is None


def test_block_adds_its_input_before_the_last_relu():
    block = BasicBlock(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    branch = block.last_norm(block.residual(x))
    assert torch.equal(block(x), (branch + x).relu())


def test_block_leaves_its_input_alone():
    block = BasicBlock(4, 4)
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)
