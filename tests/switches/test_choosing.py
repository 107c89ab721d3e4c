import dataclasses
import warnings

import pytest
import torch
from torch import nn

from training_framework.config import TrainConfig
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.kernels import NativeKernelsError
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.switches import (
    SWITCHES,
    Situation,
    change_network,
    choose_all,
    choosing,
    set_up_process,
)

FACTS = DatasetFacts(
    name="cifar10", train_images=50_000, val_images=10_000, class_names=("a", "b"), image_size=32,
    storage="arrays", array_bytes=60_000 * 3072, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    crop_padding=4,
)  # fmt: skip
CPU = Hardware(
    cpu_name="CPU", cores=8, instruction_sets=("avx512",), memory_bytes=16 * 2**30,
    accelerators=(), cpp_compiler="g++", glibc=True,
)  # fmt: skip
MPS = Accelerator(kind="mps", name="M3")
KERNELS = ("small_map_convolutions", "winograd_convolutions", "fused_norms")


def situation(*, hardware=CPU, own_network=False, accelerators=(), stem="cifar", **settings):
    return Situation(
        config=TrainConfig(**settings),
        hardware=hardware,
        facts=FACTS,
        accelerators=accelerators,
        world_size=1,
        local_world_size=1,
        total_steps=100,
        stem=stem,
        own_network=own_network,
    )


def chosen(**arguments):
    return choose_all(situation(**arguments))


def test_every_switch_gets_a_value_in_the_order_of_the_entries():
    made = chosen()
    assert list(made.values) == [switch.key for switch in SWITCHES]
    assert made.values["winograd_convolutions"] and made.values["fused_norms"]
    named = [choice.name for choice in made.choices]
    assert named == [key for key in made.values if key in named]


def test_a_users_own_network_gets_kernels_only_where_they_are_asked_for():
    ours = chosen(stem="imagenet", own_network=False).values
    theirs = chosen(stem="imagenet", own_network=True).values
    assert [ours[key] for key in KERNELS] == [True] * 3
    assert [theirs[key] for key in KERNELS] == [False] * 3
    asked = chosen(own_network=True, fused_norms=True).values
    assert asked["fused_norms"] and not asked["winograd_convolutions"]


def test_the_fused_optimizer_is_decided_once_for_the_device(monkeypatch):
    from training_framework.switches import arithmetic

    asked = []
    monkeypatch.setattr(arithmetic, "has_fused_optimizer", lambda *of: asked.append(of))
    made = chosen(accelerators=(MPS,))
    assert asked == [("sgd", "mps")]
    assert not made.values["fused_optimizer"]
    (why,) = [choice.reason for choice in made.choices if choice.name == "fused_optimizer"]
    assert why == "this PyTorch has no fused sgd for mps"


def change(model, asked_for=(), **values):
    settings = dict.fromkeys((switch.key for switch in SWITCHES), False) | values
    change_network(model, settings, image_size=16, device_type="cpu", asked_for=asked_for)


def test_a_change_that_finds_nothing_warns_where_somebody_asked_for_it():
    without_blocks = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(match="no residual blocks"):
        change(without_blocks, activation_checkpointing=True)
    with pytest.warns(match="no convolution has a small map"):
        change(nn.Conv2d(3, 3, 3), ("small_map_convolutions",), small_map_convolutions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(nn.Conv2d(3, 3, 3), small_map_convolutions=True)


def test_channels_last_is_applied_to_a_network():
    model = nn.Conv2d(3, 4, 3)
    change(model, channels_last=True)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_kernels_that_cannot_be_compiled_are_one_line_with_the_cure(monkeypatch):
    def fail(model, network):
        raise NativeKernelsError("g++ is broken")

    broken = [
        dataclasses.replace(switch, change_network=fail) if switch.key == "fused_norms" else switch
        for switch in SWITCHES
    ]
    monkeypatch.setattr(choosing, "SWITCHES", tuple(broken))
    with pytest.raises(UserError, match=r"fused_norms: g\+\+ is broken; install .* to false"):
        change(nn.BatchNorm2d(3), fused_norms=True)


def test_a_process_is_set_up_with_the_threads_that_were_chosen():
    set_up_process(chosen(threads=3, keep_memory=False).values, "cpu")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    "settings",
    [{"activation": "gelu"}, {"dirac_init": True}, {"deep_stem": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_parts_of_a_model_are_refused_for_a_users_own_network(settings):
    (key,) = settings
    with pytest.raises(UserError, match=f"{key} is .*, but network is your own.*remove {key}"):
        chosen(own_network=True, **settings)


def test_a_users_own_network_has_no_part_of_the_configured_model():
    made = chosen(own_network=True, model="seresnet18")
    assert made.values["squeeze_excitation"] is False
    assert not any("seresnet18" in choice.reason for choice in made.choices)
    assert chosen(own_network=True, norm_momentum=0.3).values["norm_momentum"] == 0.3


@pytest.mark.parametrize(
    "settings",
    [{"cutout": 4}, {"random_erasing": 0.5}, {"color_jitter": 0.2}, {"auto_augment": "rand"}],
    ids=lambda settings: next(iter(settings)),
)
def test_pixels_of_a_users_own_loader_are_not_augmented(settings):
    (key,) = settings
    asked = situation(**settings)
    assert choose_all(asked).values[key] == settings[key]
    loaded = dataclasses.replace(asked.facts, storage="loader")
    with pytest.raises(UserError, match=f"{key} is for data sets.*augment in your loader"):
        choose_all(dataclasses.replace(asked, facts=loaded))


def test_the_plan_says_which_image_sizes_no_epoch_has():
    made = chosen(epochs=2, progressive_resolution=((0.0, 16), (0.3, 20), (0.4, 24), (0.8, 32)))
    (why,) = [choice.reason for choice in made.choices if choice.name == "progressive_resolution"]
    never = "px in no epoch (a size starts with a whole one)"
    assert why.startswith(f"16 px from epoch 1 on, 20 {never}, 24 px from epoch 2 on, 32 {never}: ")
