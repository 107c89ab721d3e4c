"""Recorded steps. Where there is no CUDA GPU, what was recorded is run again by Python instead,
which shows everything but the recording: the inputs, gradients and rates that a replay sees."""

import importlib
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from training_framework.data import Batch, TrainTransform
from training_framework.errors import UserError
from training_framework.optimizers import WeightAverage, build_optimizer
from training_framework.training import cuda_graph
from training_framework.training.cuda_graph import (
    DDP_WARM_UP_STEPS,
    WARM_UP_STEPS,
    CudaGraphStep,
)
from training_framework.training.data_parallel import in_data_parallel
from training_framework.training.metrics import ClassificationSums
from training_framework.training.micro_batching import StepStart
from training_framework.training.step import TrainStep

ON_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", *([ON_CUDA] if torch.cuda.is_available() else [])]


def network(device):
    torch.manual_seed(1)
    # No bias before a norm: its gradient is rounding alone, of which Adam makes whole steps.
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(288, 4)).to(device)


def batch(number, size=6):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (size,), generator=generator)


def steps_of(device, kind, optimizer="sgd", **options):
    model = network(device)
    made = build_optimizer(
        model, name=optimizer, lr=0.1, momentum=0.9 if optimizer == "sgd" else 0.0,
        weight_decay=1e-3, fused=True,
    )  # fmt: skip
    if kind is CudaGraphStep and device == "cpu":
        options["record"] = lambda work: work
    return kind(
        model, made, device_type=device, sums=ClassificationSums(device, num_classes=4),
        average=WeightAverage(model, decay=0.9, decay_on_device=True), **options,
    )  # fmt: skip


def train(step, device, batches, *, mixed=False, norms=()):
    losses = []
    for number, parts in enumerate(batches):
        images, labels = (part.to(device) for part in parts)
        other = (labels.flip(0), torch.tensor(0.3 + number / 100, device=device))
        losses.append(step.accumulate(images, labels, other if mixed else None))
        norm = step.update(0.1 / (1 + number), step=number, measure_grad_norm=number in norms)
        losses += [norm] * (norm is not None)
    return torch.stack(losses)


def check_equal(ours, reference):
    for name, tensors in reference.state_dict()["model"].items():
        torch.testing.assert_close(ours.state_dict()["model"][name], tensors)
    averages = [list(step.average.model.parameters()) for step in (ours, reference)]
    torch.testing.assert_close(*averages)
    read, expected = ours.sums.read(), reference.sums.read()
    assert (read.count, read.acc1) == (expected.count, expected.acc1)
    assert read.loss == pytest.approx(expected.loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mixed", [False, True])
def test_replayed_steps_give_the_losses_norms_and_weights_of_plain_ones(
    device, optimizer, clip, mixed
):
    batches = [batch(number) for number in range(10)]
    ours = steps_of(device, CudaGraphStep, optimizer, grad_clip_val=clip)
    reference = steps_of(device, TrainStep, optimizer, grad_clip_val=clip)
    seen = [
        train(step, device, batches, mixed=mixed, norms=(0, 5, 9)) for step in (ours, reference)
    ]
    torch.testing.assert_close(*seen)
    check_equal(ours, reference)
    assert ours._replay_update is not None, "nothing was recorded"


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_other_shapes_groups_and_parts_run_in_between(device):
    ours, reference = steps_of(device, CudaGraphStep), steps_of(device, TrainStep)
    whole = [batch(number) for number in range(WARM_UP_STEPS + 2)]
    for step in (ours, reference):
        train(step, device, whole)
        train(step, device, [batch(7, size=3), batch(8)])
        for position in (0, 1):
            images, labels = (part.to(device) for part in batch(9 + position))
            step.accumulate(images, labels, group_size=2, last_of_group=position == 1)
        step.update(0.05, step=20)
        train(step, device, [batch(11)])
        step.micro_batch_size = 2
        train(step, device, [batch(12)])
        step.micro_batch_size = None
        train(step, device, [batch(13), batch(14)])
    check_equal(ours, reference)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_begun_again_gives_what_it_would_have_given(device):
    ours, reference = steps_of(device, CudaGraphStep), steps_of(device, TrainStep)
    whole = [batch(number) for number in range(WARM_UP_STEPS + 2)]
    for step in (ours, reference):
        train(step, device, whole)
    start = StepStart(ours, torch.device(device))
    start.keep()
    ours.accumulate(*(part.to(device) for part in batch(30)))
    start.restore()
    for step in (ours, reference):
        train(step, device, [batch(31), batch(32)])
    check_equal(ours, reference)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_holds_the_rate_as_a_number_and_can_be_gone_on_with(device):
    ours, reference = steps_of(device, CudaGraphStep), steps_of(device, TrainStep)
    for step in (ours, reference):
        train(step, device, [batch(number) for number in range(8)])
    state = ours.state_dict()
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["param_groups"])
    resumed = steps_of(device, CudaGraphStep)
    resumed.load_state_dict(state)
    for step in (resumed, reference):
        train(step, device, [batch(number) for number in range(8, 16)])
    check_equal(resumed, reference)


def recorded_by(step):
    """As a graph does it: a replay sets no attribute, and writes into what the first run made."""

    def record(work):
        memory = {}

        def replay():
            before = dict(vars(step))
            work()
            after = {name: value for name, value in vars(step).items() if before[name] is not value}
            if not memory:
                memory.update(after)
                return
            vars(step).update(before)
            for name, value in after.items():
                for old, new in zip(tensors_of(memory[name]), tensors_of(value), strict=True):
                    old.copy_(new)

        return replay

    return record


def tensors_of(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("device", DEVICES)
def test_norms_of_clipped_steps_are_right_after_a_batch_of_another_shape(device):
    ours, reference = (
        steps_of(device, kind, grad_clip_val=0.5) for kind in (CudaGraphStep, TrainStep)
    )
    if device == "cpu":
        ours._record = recorded_by(ours)
    batches = [batch(number) for number in range(WARM_UP_STEPS + 2)]
    batches += [batch(7, size=3), batch(8), batch(9)]
    seen = [train(step, device, batches, norms=range(20)) for step in (ours, reference)]
    torch.testing.assert_close(*seen)
    torch.testing.assert_close(ours.grad_norm, reference.grad_norm)


@pytest.mark.parametrize("device", DEVICES)
def test_a_small_batch_after_the_warm_up_is_not_what_is_recorded(device):
    ours, reference = steps_of(device, CudaGraphStep), steps_of(device, TrainStep)
    batches = [batch(number) for number in range(WARM_UP_STEPS)]
    batches += [batch(7, size=3), batch(8), batch(9)]
    for step in (ours, reference):
        train(step, device, batches)
    check_equal(ours, reference)
    assert len(ours._inputs[0]) == len(batches[0][0])


@pytest.mark.parametrize("device", DEVICES)
def test_only_a_shape_that_has_run_before_is_recorded(device):
    """cuDNN times its kernels for a new shape, which a recording does not allow."""
    step = steps_of(device, CudaGraphStep)
    train(step, device, [batch(number, size=3) for number in range(WARM_UP_STEPS)])
    train(step, device, [batch(number) for number in range(WARM_UP_STEPS)])
    assert not step._replays
    train(step, device, [batch(9)])
    assert step._replays


def test_a_step_that_does_not_fit_gives_back_the_memory_of_its_recording():
    step = steps_of("cpu", CudaGraphStep)
    graphs = []

    class Graph:
        def __init__(self, work):
            self.replay = work
            graphs.append(weakref.ref(self))

        def __call__(self):
            self.replay()

    step._record = Graph
    train(step, "cpu", [batch(number) for number in range(WARM_UP_STEPS + 1)])
    assert len(graphs) == 2 and all(graph() for graph in graphs)
    start = StepStart(step, torch.device("cpu"))
    start.keep()
    step.accumulate(*batch(30))
    start.restore()
    assert not any(graph() for graph in graphs)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_a_recording_is_made_anew_for_the_tensors_of_a_loaded_state():
    step = steps_of("cpu", CudaGraphStep)
    recorded = []
    step._record = lambda work: recorded.append(work) or work
    train(step, "cpu", [batch(number) for number in range(WARM_UP_STEPS + 1)])
    step.load_state_dict(step.state_dict())
    train(step, "cpu", [batch(9)])
    assert len(recorded) == 4


EVERY_AUGMENTATION = {
    "crop_padding": 1, "cutout": 2, "random_erasing": 0.5, "mixup": 0.3, "cutmix": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_recorded_augmentation_average_and_counts_have_the_bits_of_plain_steps(device, flip):
    ours, reference = steps_of(device, CudaGraphStep), steps_of(device, TrainStep)
    if device == "cpu":
        ours._record = recorded_by(ours)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator)
    for step in (ours, reference):
        transform = TrainTransform(
            mean=(0.5,) * 3, std=(0.25,) * 3, sample_count=12, seed=1, device=device, flip=flip,
            **EVERY_AUGMENTATION,
        )  # fmt: skip
        step.losses = []
        for number in range(WARM_UP_STEPS + 5):
            epoch, half = divmod(number, 2)
            rows = torch.arange(6) + 6 * half
            loaded = Batch(pixels[rows].to(device), (rows % 4).to(device), rows.to(device))
            inputs = step.transformed(transform, loaded, step=number, epoch=epoch)
            step.losses.append(step.accumulate(*inputs))
            step.update(2.0 ** -(4 + number), step=number)  # as fp32 the same number
    assert ours._replay_update is not None and ours._transform is not None
    assert torch.equal(torch.stack(ours.losses), torch.stack(reference.losses))
    for one, other in ((ours, reference), (ours.average, reference.average)):
        for ours_now, now in zip(
            one.model.state_dict().values(), other.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours_now, now)
    found, expected = ours.sums.read(), reference.sums.read()
    assert (found.acc1, found.acc5, found.count) == (expected.acc1, expected.acc5, expected.count)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_recording_that_fails_leaves_plain_steps_and_a_line(failing):
    """Whichever of the two graphs fails, neither is used."""
    calls = []

    def refuse(work):
        calls.append(work)
        if len(calls) == failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return work

    lines: list[str] = []
    ours = steps_of("cpu", CudaGraphStep, is_required=False)
    reference = steps_of("cpu", TrainStep)
    ours._record = refuse
    ours.report_to(lines.append)
    for step in (ours, reference):
        train(step, "cpu", [batch(number) for number in range(WARM_UP_STEPS + 3)])
    check_equal(ours, reference)
    assert len(calls) == failing
    assert lines == [
        "note: the training step cannot be recorded as a CUDA graph: operation not permitted when "
        "stream is capturing; it runs without"
    ]


def test_full_memory_at_a_required_recording_is_the_shortage_itself():
    def refuse(work):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    step = steps_of("cpu", CudaGraphStep)
    step._record = refuse
    with pytest.raises(torch.OutOfMemoryError):
        train(step, "cpu", [batch(number) for number in range(WARM_UP_STEPS + 1)])


def test_what_cannot_be_recorded_is_one_line_with_a_cure():
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = steps_of("cpu", CudaGraphStep)
    step._record = refuse
    with pytest.raises(UserError, match=r"cannot be recorded.*operation not permitted") as caught:
        train(step, "cpu", [batch(number) for number in range(WARM_UP_STEPS + 1)])
    assert "set cuda_graph to false" in str(caught.value)


@pytest.fixture
def ddp_steps(tmp_path):
    """Makes steps in DistributedDataParallel, in a gloo group of this process alone."""
    importlib.import_module("torch.distributed.nn.functional")  # see process_group
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def make(kind, **options):
        model = in_data_parallel(network("cpu"), torch.device("cpu"))
        made = build_optimizer(
            model, name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True
        )
        return kind(model, made, device_type="cpu", **options)

    yield make
    dist.destroy_process_group()


def test_steps_of_several_processes_are_recorded_after_eleven_and_then_replayed(ddp_steps):
    recorded = []
    ours = ddp_steps(CudaGraphStep, record=lambda work: recorded.append(work) or work)
    reference = ddp_steps(TrainStep)
    for step in (ours, reference):
        step.losses = train(step, "cpu", [batch(number) for number in range(DDP_WARM_UP_STEPS)])
    assert DDP_WARM_UP_STEPS == 11 and not recorded
    more = [batch(number) for number in range(20, 23)]
    torch.testing.assert_close(train(ours, "cpu", more), train(reference, "cpu", more))
    assert len(recorded) == 2 and ours._replays
    for one, other in zip(ours._parameters, reference._parameters, strict=True):
        torch.testing.assert_close(one, other)
    ours.forget_recording()
    assert ours._replay_backward is None and ours._replay_update is None


def never_recorded(work):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize("fails_here", [True, False])
def test_all_processes_end_with_one_line_where_one_cannot_record(
    ddp_steps, monkeypatch, fails_here
):
    """Here, or in the second of two processes, whose part in the agreement is played."""
    agreed = []

    def largest(values, device):
        agreed.append((values, device.type))
        return [1.0]

    reason = "operation not permitted when stream is capturing"
    monkeypatch.setattr(cuda_graph, "largest", largest)
    monkeypatch.setattr(cuda_graph, "gathered", lambda own: [own, "" if fails_here else reason])
    record = never_recorded if fails_here else lambda work: work
    step = ddp_steps(CudaGraphStep, record=record)
    with pytest.raises(UserError) as caught:
        train(step, "cpu", [batch(number) for number in range(DDP_WARM_UP_STEPS + 1)])
    assert caught.value.fault == f"the training step cannot be recorded as a CUDA graph: {reason}"
    assert agreed == [([float(fails_here)], "cpu")]
