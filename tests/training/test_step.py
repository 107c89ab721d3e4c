import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training_framework.errors import UserError
from training_framework.models.resnet import build_model
from training_framework.optimizers import WeightAverage, build_optimizer
from training_framework.training.metrics import ClassificationSums
from training_framework.training.step import TrainStep


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (8,), generator=generator)


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1800, 10),
    )


def sgd(model, **options):
    return build_optimizer(model, name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, **options)


def test_loss_and_every_gradient_of_a_resnet18_step_equal_a_plain_torch_loop(batch):
    images, labels = batch
    torch.manual_seed(0)
    ours = build_model("resnet18", num_classes=10, stem="imagenet")
    plain = copy.deepcopy(ours)

    sums = ClassificationSums("cpu", num_classes=10)
    step = TrainStep(ours, sgd(ours), device_type="cpu", label_smoothing=0.1, sums=sums)
    step.accumulate(images, labels)

    loss = F.cross_entropy(plain(images), labels, label_smoothing=0.1)
    loss.backward()

    assert sums.read().loss == pytest.approx(loss.item(), abs=1e-6)
    reference = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=0, atol=1e-6)


def test_weights_after_steps_equal_those_of_torch_sgd(batch):
    images, labels = batch
    ours, plain = small_network(), small_network()
    step = TrainStep(ours, sgd(ours), device_type="cpu")
    decayed = [p for n, p in plain.named_parameters() if n in ("0.weight", "4.weight")]
    rest = [p for n, p in plain.named_parameters() if n not in ("0.weight", "4.weight")]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0}],
        lr=1.0,
        momentum=0.9,
    )
    for number, lr in enumerate((0.1, 0.05, 0.2)):
        step.accumulate(images, labels)
        step.update(lr, step=number)
        F.cross_entropy(plain(images), labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


def test_a_group_of_batches_gives_the_gradient_of_its_mean(batch):
    images, labels = batch
    together, apart = small_network().eval(), small_network().eval()  # norms: fixed statistics
    one = TrainStep(together, sgd(together), device_type="cpu")
    one.accumulate(images, labels)
    several = TrainStep(apart, sgd(apart), device_type="cpu")
    for start in (0, 2, 4, 6):
        several.accumulate(
            images[start : start + 2],
            labels[start : start + 2],
            group_size=4,
            last_of_group=start == 6,
        )
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("mixed", [False, True])
def test_parts_of_a_batch_give_the_loss_and_gradient_of_the_whole(batch, mixed):
    images, labels = batch
    partner = (labels.roll(1), torch.tensor(0.3)) if mixed else None
    losses, hits, gradients = [], [], []
    for micro_batch_size in (None, 3):  # 8 images in parts of 3, 3 and 2
        network = small_network().eval()  # norms: fixed statistics
        sums = ClassificationSums("cpu", num_classes=10)
        step = TrainStep(network, sgd(network), device_type="cpu", label_smoothing=0.1, sums=sums)
        step.micro_batch_size = micro_batch_size
        losses.append(step.accumulate(images, labels, partner, group_size=2))
        hits.append((sums.read().acc5, sums.read().count))
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert hits[1] == hits[0]


def test_clipping_scales_the_gradient_to_the_norm_and_keeps_what_it_was(batch):
    network, reference = small_network(), small_network()
    F.cross_entropy(reference(batch[0]), batch[1]).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters()]))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = [p.detach().clone() for p in network.parameters()]
    step = TrainStep(network, optimizer, device_type="cpu", grad_clip_val=norm.item() / 4)
    step.accumulate(*batch)
    step.update(1.0, step=0)
    torch.testing.assert_close(step.grad_norm, norm)
    for old, new, plain in zip(before, network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(old - new, plain.grad / 4, rtol=1e-4, atol=1e-6)


def test_the_norm_is_measured_only_when_asked(batch):
    network = small_network()
    step = TrainStep(network, sgd(network), device_type="cpu")
    step.accumulate(*batch)
    step.update(0.1, step=0)
    assert step.grad_norm is None
    step.accumulate(*batch)
    step.update(0.1, step=1, measure_grad_norm=True)
    assert step.grad_norm > 0


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_unscales_before_clipping_and_stepping(batch, fused):
    """The scaled run must move the weights as the unscaled one does, within fp16's rounding."""
    scaled, plain = small_network(), small_network()
    half = TrainStep(
        scaled, sgd(scaled, fused=fused), device_type="cpu", precision="16-mixed", grad_clip_val=0.5
    )
    full = TrainStep(plain, sgd(plain, fused=fused), device_type="cpu", grad_clip_val=0.5)
    for number in range(3):
        for step in (half, full):
            step.accumulate(*batch)
            step.update(0.1, step=number)
        torch.testing.assert_close(half.grad_norm, full.grad_norm, rtol=2e-2, atol=0)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_overflow_skips_the_step_and_lowers_the_scale(batch, fused):
    network = small_network()
    step = TrainStep(network, sgd(network, fused=fused), device_type="cpu", precision="16-mixed")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in network.parameters()]
    step.accumulate(*batch)
    step.update(0.1, step=0, measure_grad_norm=True)
    for old, new in zip(before, network.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach())
    assert step.scaler.get_scale() == 2.0**39


def test_mixed_labels_equal_soft_targets(batch):
    images, labels = batch
    other, lam = labels.roll(1), torch.tensor(0.3)
    ours, plain = small_network(), small_network()
    step = TrainStep(ours, sgd(ours), device_type="cpu", label_smoothing=0.1)
    step.accumulate(images, labels, (other, lam))
    targets = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(other, 10)
    F.cross_entropy(plain(images), targets, label_smoothing=0.1).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_average_follows_every_update(batch):
    network = small_network()
    average = WeightAverage(network, decay=0.5)
    start = network[0].weight.detach().clone()
    step = TrainStep(network, sgd(network), device_type="cpu", average=average)
    step.accumulate(*batch)
    step.update(0.1, step=0)
    expected = 0.1 * start + 0.9 * network[0].weight.detach()  # decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(average.model[0].weight, expected)


def test_bf16_computes_the_forward_pass_and_keeps_weights_in_fp32(batch):
    network = small_network()
    seen = []
    network[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = TrainStep(network, sgd(network), device_type="cpu", precision="bf16-mixed")
    step.accumulate(*batch)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}


def test_a_step_that_takes_over_a_state_goes_on_as_the_other_does(batch):
    def step_of(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10)
        )
        network(batch[0])
        return TrainStep(
            network,
            sgd(network),
            device_type="cpu",
            precision="16-mixed",
            sums=ClassificationSums("cpu", num_classes=10),
            average=WeightAverage(network, decay=0.5),
        )

    first, second = step_of(1), step_of(2)
    first.accumulate(*batch)
    first.update(0.1, step=0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (first, second):
        step.accumulate(*batch)
        step.update(0.05, step=1)
    ours, theirs = first.state_dict(), second.state_dict()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    third = step_of(3)
    third.load_state_dict(ours, with_sums=False)
    assert third.sums.read().count == 0


def test_a_clock_is_told_of_each_phase_of_each_part(batch):
    entered = []

    @contextmanager
    def phase(name):
        entered.append(name)
        yield
        entered.append(f"end of {name}")

    network = small_network()
    step = TrainStep(
        network, sgd(network), device_type="cpu", sums=ClassificationSums("cpu", num_classes=10)
    )
    step.phase, step.micro_batch_size = phase, 4
    network.register_forward_hook(lambda *_: entered.append("network"))
    network[1].register_full_backward_hook(lambda *_: entered.append("gradient"))
    step.accumulate(*batch)
    part = [
        "forward", "network", "end of forward", "backward", "gradient", "end of backward",
    ]  # fmt: skip
    assert entered == [*part, *part, "logging", "end of logging"]


def after_one_step(model, optimizer, batch, **parts):
    step = TrainStep(model, optimizer, device_type="cpu", **parts)
    step.accumulate(*batch)
    step.update(0.1, step=0)
    return step


def test_a_step_that_takes_over_a_state_keeps_its_own_options(batch):
    model = small_network()
    state = after_one_step(model, sgd(model), batch).state_dict()
    other = small_network()
    optimizer = build_optimizer(other, name="sgd", lr=0.1, momentum=0.5, weight_decay=0.25)
    TrainStep(other, optimizer, device_type="cpu").load_state_dict(state)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    moments = [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]
    assert moments and all(moment.any() for moment in moments)


def adamw(model):
    return build_optimizer(model, name="adamw", lr=0.1)


@pytest.mark.parametrize("kinds", [(sgd, adamw), (adamw, sgd)])
def test_the_state_of_another_optimizer_is_refused(batch, kinds):
    then, now = ((model := small_network(), build(model)) for build in kinds)
    state = after_one_step(*then, batch).state_dict()
    with pytest.raises(ValueError, match="another optimizer"):
        TrainStep(*now, device_type="cpu").load_state_dict(state)


def test_a_moment_of_another_shape_than_its_weight_is_refused(batch):
    model = small_network()
    state = copy.deepcopy(after_one_step(model, sgd(model), batch).state_dict())
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1)
    other = small_network()
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(1,\)"):
        TrainStep(other, sgd(other), device_type="cpu").load_state_dict(state)


def test_an_average_that_the_state_lacks_begins_at_its_weights(batch):
    model = small_network()
    state = after_one_step(model, sgd(model), batch).state_dict()
    other = small_network()
    average = WeightAverage(other, decay=0.9)
    TrainStep(other, sgd(other), device_type="cpu", average=average).load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(average.state_dict()[name], tensor), name


@pytest.fixture
def _broken_compiler(monkeypatch):
    compile_with = torch.compile

    def broken(graph, inputs):
        raise RuntimeError("Triton finds no compiler\nand so on")

    monkeypatch.setattr(torch, "compile", lambda f, mode: compile_with(f, backend=broken))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own imports
@pytest.mark.usefixtures("_broken_compiler")
def test_a_step_that_cannot_be_compiled_runs_without_and_says_so_once(batch):
    models = small_network(), small_network()
    compiled = TrainStep(
        models[0], sgd(models[0]), device_type="cpu", compile_mode="reduce-overhead",
        needs_compile=False,
    )  # fmt: skip
    plain = TrainStep(models[1], sgd(models[1]), device_type="cpu")
    said = []
    compiled.compiled.report = said.append
    for number in range(2):
        for step in (compiled, plain):
            step.accumulate(*batch)
            step.update(0.1, step=number)
    assert len(said) == 1
    assert "cannot be compiled" in said[0] and "runs without torch.compile" in said[0]
    assert "Triton finds no compiler" in said[0]
    assert "\n" not in said[0]
    states = [model.state_dict() for model in models]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own imports
@pytest.mark.usefixtures("_broken_compiler")
def test_a_step_that_is_to_be_compiled_and_cannot_is_one_line_with_a_cure(batch):
    model = small_network()
    step = TrainStep(model, sgd(model), device_type="cpu", compile_mode="default")
    with pytest.raises(UserError, match=r"^compile: .*Triton finds no compiler.*set compile to fa"):
        step.accumulate(*batch)
