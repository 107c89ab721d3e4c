"""What each shipped recipe says of itself, and whether it can be planned."""

import re

import pytest

from training_framework.cli.main import main
from training_framework.config import load_config
from training_framework.config.recipes_listing import NOT_RUN, recipe_opening, shipped_recipes
from training_framework.data.facts import DatasetFacts
from training_framework.machine.hardware import Accelerator, Hardware
from training_framework.plan import make_plan

GPU = Accelerator(kind="cuda", name="NVIDIA H200", memory_bytes=140 * 2**30, bf16=True)
MACHINES = {
    "cpu": Hardware(
        cpu_name="CPU", cores=2, instruction_sets=(), memory_bytes=2**34, accelerators=()
    ),
    "gpu": Hardware(
        cpu_name="CPU", cores=16, instruction_sets=(), memory_bytes=2**36, accelerators=(GPU,)
    ),
}
# Training images, validation images, classes, and side of the images that are stored.
DATA = {
    "digits": (1_437, 360, 10, 32),
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
    "imagenette": (9_469, 3_925, 10, None),
    "imagenet": (1_281_167, 50_000, 1_000, None),
}


def facts_for(name: str, config) -> DatasetFacts:
    kind = config.data if config.data != "folder" else name.partition("-")[0]
    train, val, classes, size = DATA[kind]
    return DatasetFacts(
        name=kind,
        train_images=train,
        val_images=val,
        class_names=tuple(map(str, range(classes))),
        image_size=config.img_size or size,
        storage="files" if size is None else "arrays",
        array_bytes=0 if size is None else (train + val) * 3 * size**2,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_planned_as_it_says(name, machine):
    config = load_config(name)
    plan = make_plan(config, MACHINES[machine], facts_for(name, config))
    assert plan.total_steps == pytest.approx(config.epochs * plan.steps_per_epoch, abs=1)
    if config.progressive_resolution:
        assert plan.resolutions is not None
        last = plan.resolutions.at(int(config.epochs) - 1)
        assert last == config.img_size, "the last epochs see the full size"
        shown = next(c.reason for c in plan.choices if c.name == "progressive_resolution")
        assert f"{last} px" in shown and ("warms" in shown) == (machine == "gpu")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_opens_with_claim_number_machine_time_and_command(name):
    opening = recipe_opening(shipped_recipes()[name])
    lines = dict(re.findall(r"^(Claim|n|Machine|Time|Run): +(.+)$", "\n".join(opening), re.M))
    assert lines.keys() == {"Claim", "n", "Machine", "Time", "Run"}
    assert f"--config {name}" in lines["Run"]
    assert opening[0].startswith(NOT_RUN) == (lines["n"] == "0")


def test_the_list_names_every_recipe_and_shows_its_opening(capsys):
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    for name, path in shipped_recipes().items():
        assert f"\n{name}\n" in f"\n{output}"
        assert recipe_opening(path)[0] in output
