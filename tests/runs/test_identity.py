"""What makes a run this run: `auto` starts a new one where data or network are others."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training_framework.data.shards.packing import pack_folder
from training_framework.data.user_digest import user_loader_digest
from training_framework.errors import UserError
from training_framework.runs.identity import network_digest
from training_framework.runs.progress import TrainResult
from training_framework.train import EfficientResNet18Trainer, main

pytestmark = pytest.mark.usefixtures("narrow_networks")

SETTINGS: dict[str, Any] = {
    "model": "resnet10", "img_size": 8, "batch_size": 4, "epochs": 2, "lr": 0.01, "threads": 1,
    "precision": "32", "tensorboard": False, "num_workers": 0, "accelerator": "cpu",
}  # fmt: skip


def make_folder(root: Path, *, seed: int = 0, val_count: int = 6) -> Path:
    """Two classes of noise, 6 training images each."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", 6), ("val", val_count)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def train(root: Path, **settings: Any) -> TrainResult:
    return main(data="folder", data_root=root, **{**SETTINGS, "name": "pets", **settings})


def version(result: TrainResult) -> str:
    assert result.run_directory is not None
    return result.run_directory.name


def swap_classes(root: Path) -> None:
    for split in ("train", "val"):
        folder = root / split
        (folder / "cat").rename(folder / "between")
        (folder / "dog").rename(folder / "cat")
        (folder / "between").rename(folder / "dog")


def test_the_same_images_elsewhere_are_the_same_run(in_tmp_path):
    train(make_folder(Path("a")), stop_after_steps=2)
    shutil.copytree("a", "moved/a")
    assert version(train(Path("moved/a"))) == "version_0"


def other_images() -> Path:
    return make_folder(Path("b/pets"), seed=1)


def swapped() -> Path:
    swap_classes(Path("a/pets"))
    return Path("a/pets")


def less_validation() -> Path:
    for path in sorted(Path("a/pets/val").rglob("*.png"))[1:]:
        if path.parent.name != "dog" or path.stem != "0":
            path.unlink()
    return Path("a/pets")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_images, "other images, labels or loaders"),
        (swapped, "other images, labels or loaders"),
        (less_validation, "validation images 12 -> 2"),
    ],
)
def test_other_data_are_another_run(in_tmp_path, capsys, change, says):
    first = train(make_folder(Path("a/pets")), stop_after_steps=2)
    root = change()
    assert first.run_directory is not None
    checkpoint = first.run_directory / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=f"belongs to another run: {says}.*--allow-config-change"):
        train(root, resume=str(checkpoint))
    capsys.readouterr()
    assert version(train(root)) == "version_1"
    assert f"version_0 holds another run ({says}" in capsys.readouterr().err


def test_other_shards_of_the_same_name_are_another_run(in_tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        pack_folder(make_folder(Path(name) / "source", seed=seed), Path(name) / "pets")
    settings = {**SETTINGS, "data": "shards", "name": "pets"}
    main(**settings, data_root="a/pets", stop_after_steps=2)
    assert version(main(**settings, data_root="b/pets", stop_after_steps=2)) == "version_1"
    assert version(main(**settings, data_root="b/pets")) == "version_1"


def loader_of(*, seed: int = 0, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=8, shuffle=shuffle)


class Twice(nn.Linear):
    """A linear layer of the same shapes that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def train_own(loader: Any, layer: type[nn.Linear] = nn.Linear, **settings: Any) -> TrainResult:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), layer(48, 4))
    fixed = {"epochs": 2, "lr": 0.05, "tensorboard": False, "threads": 1, "name": "own"}
    return EfficientResNet18Trainer(network=network, **{**fixed, **settings}).train(loader)


@pytest.mark.parametrize(
    ("loader", "layer", "says"),
    [
        (lambda: loader_of(seed=1), nn.Linear, "other images, labels or loaders"),
        (lambda: loader_of(shuffle=True), nn.Linear, "other images, labels or loaders"),
        (loader_of, Twice, "another network"),
    ],
)
def test_another_loader_or_network_of_equal_shapes_is_another_run(
    in_tmp_path, capsys, loader, layer, says
):
    train_own(loader_of(), stop_after_steps=2)
    capsys.readouterr()
    assert version(train_own(loader(), layer, stop_after_steps=2)) == "version_1"
    assert says in capsys.readouterr().err
    assert version(train_own(loader(), layer)) == "version_1", "the same again goes on"


def test_what_is_not_the_network_does_not_count():
    def network(width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Dropout(0.5))

    assert network_digest(network()) == network_digest(network()), "weights are no structure"
    others = [network(5), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))]
    assert len({network_digest(other) for other in [network(), *others]}) == 3


class Settings(nn.Module):
    """A module that keeps plain values, which `forward` reads."""

    def __init__(self, scale: float = 1.0, activation: Any = torch.relu, trained: bool = True):
        super().__init__()
        self.scale, self.activation = scale, activation
        self.layer = nn.Linear(4, 4).requires_grad_(trained)


def test_what_a_forward_reads_and_what_is_trained_are_the_network():
    others = [Settings(), Settings(2.0), Settings(activation=torch.tanh), Settings(trained=False)]
    assert len({network_digest(other) for other in others}) == 4
    assert network_digest(Settings()) == network_digest(Settings())


class OwnSamples:
    """A data set of the user's own, which keeps its samples under names of its own."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(4, 2)}, {"x": torch.ones(4, 2)}),
        ({"_y": [0, 1, 0, 1]}, {"_y": [1, 0, 1, 0]}),
        ({"files": [Path("/a/cat.png")]}, {"files": [Path("/a/dog.png")]}),
        ({"files": np.array(["/a/cat.png"])}, {"files": np.array(["/a/dog.png"])}),
        ({"files": np.array(["cat"], object)}, {"files": np.array(["dog"], object)}),
        ({"seed": 1}, {"seed": 2}),
        ({"rows": [{"x": 1.0}]}, {"rows": [{"x": 2.0}]}),
        ({"inner": TensorDataset(torch.zeros(2))}, {"inner": TensorDataset(torch.ones(2))}),
        ({"transform": OwnSamples(mean=0.5)}, {"transform": OwnSamples(mean=0.25)}),
        ({"augment": torch.relu}, {"augment": torch.tanh}),
        ({"labels": [0] * 5000}, {"labels": [0] * 2501 + [1] + [0] * 2498}),
    ],
)
def test_a_data_set_of_the_users_own_is_known_by_what_it_holds(one, other):
    def digest(attributes: dict[str, Any]) -> str:
        return user_loader_digest(DataLoader(OwnSamples(**attributes)))

    assert digest(one) == digest(copy.deepcopy(one))
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"files": [Path("/a/cat.png")]}, {"files": [Path("/b/cat.png")]}),
        ({"files": np.array(["/a/cat.png"])}, {"files": np.array(["/there/cat.png"])}),
        ({"root": "/a"}, {"root": "/b"}),
        ({"epoch": 0}, {"epoch": 3}),
        ({"_reads": 0, "cache": {}}, {"_reads": 9, "cache": {3: torch.zeros(1)}}),
    ],
)
def test_where_a_data_set_lies_and_what_it_went_through_are_no_part_of_it(one, other):
    digests = [user_loader_digest(DataLoader(OwnSamples(**values))) for values in (one, other)]
    assert digests[0] == digests[1]


def test_batches_that_are_dicts_and_a_collate_fn_are_seen():
    def batch(value: float) -> list[dict[str, Tensor]]:
        return [{"images": torch.full((2, 3, 4, 4), value), "labels": torch.zeros(2)}]

    assert user_loader_digest(batch(1)) != user_loader_digest(batch(2))

    def doubled(samples: list[Any]) -> Any:
        return samples

    data = TensorDataset(torch.zeros(2))
    plain, collated = DataLoader(data), DataLoader(data, collate_fn=doubled)
    assert user_loader_digest(plain) != user_loader_digest(collated)


def test_a_loader_is_known_by_its_samples_labels_and_order_but_not_by_its_folder():
    def batches(value: float) -> list[tuple[Tensor, Tensor]]:
        return [(torch.full((2, 3, 4, 4), value), torch.zeros(2, dtype=torch.int64))] * 3

    assert user_loader_digest(batches(1)) == user_loader_digest(batches(1))
    assert user_loader_digest(batches(1)) != user_loader_digest(batches(2))

    class Files:
        def __init__(self, folder: str, label: int = 0) -> None:
            self.samples = [(f"{folder}/cat.png", label)]

        def __len__(self) -> int:
            return 1

    def of(data: Any) -> str:
        return user_loader_digest(DataLoader(data))

    assert of(Files("/a")) == of(Files("/elsewhere"))
    assert of(Files("/a")) != of(Files("/a", label=1))
