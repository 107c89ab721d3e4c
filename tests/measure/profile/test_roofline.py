import pytest
import torch

from training_framework.measure.profile.roofline import (
    MachineLimits,
    layer_names,
    layer_points,
    measure_limits,
    plot_roofline,
)
from training_framework.measure.profile.trace import OperatorCall
from training_framework.models.resnet import build_model

LIMITS = MachineLimits(flops_per_second=1e12, flops_source="measured", bytes_per_second=1e10)
FORWARD = OperatorCall(
    name="aten::convolution",
    shapes=((2, 64, 8, 8), (128, 64, 3, 3)),
    values=(None, None, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
    seconds=2e-6,
    in_backward=False,
)
BACKWARD = OperatorCall(
    name="aten::convolution_backward",
    shapes=((2, 128, 4, 4), (2, 64, 8, 8), (128, 64, 3, 3)),
    values=(None, None, None, [0], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
    seconds=8e-6,
    in_backward=True,
)
PRODUCT = OperatorCall(
    name="aten::addmm", shapes=((10,), (2, 512), (512, 10)), values=(), seconds=1e-6,
    in_backward=False,
)  # fmt: skip


def points_of(*calls, names=None, element_bytes=2):
    return layer_points(
        calls, steps=2, element_bytes=element_bytes, limits=LIMITS, names=names or {}
    )


def test_points_have_the_intensity_and_speed_of_a_hand_count():
    backward, forward = points_of(FORWARD, FORWARD, BACKWARD, BACKWARD)
    flops = 2 * 2 * 128 * 4 * 4 * 64 * 9
    moved = 2 * (2 * 64 * 8 * 8 + 128 * 64 * 9 + 2 * 128 * 4 * 4)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert (forward.flops, backward.flops) == (flops, 2 * flops)
    assert (forward.bytes, backward.bytes) == (moved, 2 * moved)
    assert forward.intensity == backward.intensity == pytest.approx(flops / moved)
    assert forward.flops_per_second == pytest.approx(flops / 2e-6)
    assert (forward.calls, forward.seconds) == (1, pytest.approx(2e-6))


def test_the_roof_is_the_lower_of_memory_and_arithmetic():
    (low,) = points_of(PRODUCT)
    assert low.attainable == pytest.approx(low.intensity * 1e10)
    (high,) = points_of(FORWARD, element_bytes=1)
    assert high.intensity * 1e10 < 1e12
    tall = MachineLimits(flops_per_second=1e9, flops_source="cited", bytes_per_second=1e10)
    (capped,) = layer_points([FORWARD], steps=1, element_bytes=2, limits=tall, names={})
    assert capped.attainable == 1e9


def test_layers_are_found_by_their_shapes():
    names = layer_names(build_model("resnet18", num_classes=10, stem="cifar"), 16)
    assert names["64-128 3x3/2 16 px"] == ("layer2.0.conv1",)
    assert len(names["64-64 3x3 16 px"]) == 4
    assert sum(map(len, names.values())) == 20
    (point,) = points_of(FORWARD, names={"64-128 3x3/2 8 px": ("layer2.0.conv1",)})
    assert point.layers == ("layer2.0.conv1",)
    assert points_of(PRODUCT)[0].label == "2x512 @ 512x10"


def test_this_machine_has_limits():
    limits = measure_limits(torch.device("cpu"), "any", torch.float32, "fp32", seconds=0.02)
    assert limits.flops_source == "measured"
    # Slower than any machine that runs PyTorch, and faster than any CPU.
    assert 1e8 < limits.flops_per_second < 1e15
    assert 1e8 < limits.bytes_per_second < 1e13


@pytest.mark.parametrize("calls", [(), (FORWARD, BACKWARD, PRODUCT)], ids=["empty", "full"])
def test_the_plot_is_a_picture_on_an_opaque_ground(tmp_path, calls):
    from PIL import Image

    path = tmp_path / "roofline.png"
    plot_roofline(points_of(*calls), LIMITS, title="resnet10", path=path)
    with Image.open(path) as picture:
        assert min(picture.size) > 500
        # Dark ink on a transparent ground would be lost on a dark page.
        assert picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
        assert picture.convert("L").getextrema()[0] < 60
