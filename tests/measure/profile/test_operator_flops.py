import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from training_framework.measure.profile.operator_flops import (
    WINOGRAD,
    WINOGRAD_BACKWARD,
    Cost,
    convolution_output_size,
    operator_cost,
)
from training_framework.measure.profile.trace import read_calls
from training_framework.models.flops import training_flops_per_image
from training_framework.models.resnet import build_model

# 2 images of 3x8x8, 5 kernels of 3x3x3, stride 2, padding 1: an output of 2x5x4x4.
IMAGES, WEIGHT, OUTPUT = (2, 3, 8, 8), (5, 3, 3, 3), (2, 5, 4, 4)
PRODUCTS = 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)
ELEMENTS = 2 * 3 * 8 * 8 + 5 * 27 + 2 * 5 * 4 * 4


def convolution_values(*, transposed=False):
    return (None, None, None, [2, 2], [1, 1], [1, 1], transposed, [0, 0], 1)


def backward_values(*wanted):
    return (None, None, None, [0], [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False])


def test_a_convolution_costs_its_products_and_each_number_once():
    cost = operator_cost("aten::convolution", (IMAGES, WEIGHT), convolution_values())
    assert cost == Cost(PRODUCTS, ELEMENTS)


def test_each_gradient_of_a_convolution_costs_as_much_as_its_forward_pass():
    shapes = (OUTPUT, IMAGES, WEIGHT)
    both = operator_cost("aten::convolution_backward", shapes, backward_values(True, True))
    weight_alone = operator_cost("aten::convolution_backward", shapes, backward_values(False, True))
    assert both == Cost(2 * PRODUCTS, 2 * ELEMENTS)
    assert weight_alone == Cost(PRODUCTS, ELEMENTS)


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 4)])
def test_winograds_algorithm_counts_as_the_convolution_that_it_stands_for(stride, size):
    images, weight, output = (2, 16, 8, 8), (32, 16, 3, 3), (2, 32, size, size)
    values = (None, None, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)
    ordinary = operator_cost("aten::convolution", (images, weight), values)
    assert operator_cost(WINOGRAD, (images, weight), (None, None, stride)) == ordinary
    backward = (None, None, None, [0], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)
    for wanted in ([True, True], [False, True]):
        ordinary = operator_cost(
            "aten::convolution_backward", (output, images, weight), (*backward, [*wanted, False])
        )
        values = (None, None, None, stride, wanted)
        shapes = (output, images, weight, (), ())
        assert operator_cost(WINOGRAD_BACKWARD, shapes, values) == ordinary


def test_groups_divide_the_products():
    # 4 of 8 input channels for each of 6 outputs: the weight says so.
    values = (None, None, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2)
    cost = operator_cost("aten::convolution", ((1, 8, 5, 5), (6, 4, 1, 1)), values)
    assert cost is not None
    assert cost.flops == 2 * 6 * 5 * 5 * 4


def test_matrix_products_with_and_without_a_bias_and_in_batches():
    product = Cost(2 * 4 * 5 * 6, 4 * 5 + 5 * 6 + 4 * 6)
    assert operator_cost("aten::mm", ((4, 5), (5, 6)), ()) == product
    assert operator_cost("aten::addmm", ((6,), (4, 5), (5, 6)), ()) == product
    batched = operator_cost("aten::bmm", ((3, 4, 5), (3, 5, 6)), ())
    assert batched == Cost(3 * product.flops, 3 * product.elements)


def test_what_is_not_counted_has_no_cost():
    assert operator_cost("aten::relu", ((1, 2),), ()) is None
    values = convolution_values(transposed=True)
    assert operator_cost("aten::convolution", (IMAGES, WEIGHT), values) is None
    # The profiler can be told to record no values; without them the output's size is unknown.
    assert operator_cost("aten::convolution", (IMAGES, WEIGHT), ()) is None


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_sizes_are_those_of_torch(kernel, stride, padding, dilation):
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    output = torch.nn.functional.conv1d(torch.zeros(1, 1, 11), torch.zeros(1, 1, kernel), **options)
    assert convolution_output_size(11, kernel, **options) == output.shape[-1]


def test_costs_of_a_profiled_training_step_add_up_to_the_models_flops():
    model = build_model("resnet10", num_classes=10, stem="cifar")
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    calls = read_calls(profiler.events(), on_device=False)
    costs = [operator_cost(call.name, call.shapes, call.values) for call in calls]
    assert sum(cost.flops for cost in costs if cost) == 2 * training_flops_per_image(model, 8)
