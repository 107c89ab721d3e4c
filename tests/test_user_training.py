"""Training on users' loaders and networks of many kinds, against a plain loop of PyTorch."""

import copy
import json
import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from training_framework.cli.main import main
from training_framework.errors import UserError
from training_framework.machine.randomness import seed_everything
from training_framework.runs import record
from training_framework.train import EfficientResNet18Trainer

pytestmark = pytest.mark.usefixtures("narrow_networks")

CLASSES, SIZE, SEED = 3, 8, 4
PLAIN = {
    "num_classes": CLASSES, "epochs": 1, "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0,
    "scheduler": "constant", "warmup_steps": 0, "precision": "32", "accelerator": "cpu",
    "threads": 1, "tensorboard": False, "seed": SEED, "channels_last": False, "compile": False,
    "label_smoothing": 0.0,
}  # fmt: skip
LONG = bool(os.environ.get("LONG_TESTS"))
BOUNDED = settings(
    max_examples=500 if LONG else 20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Pair = namedtuple("Pair", "images labels")


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch, in_tmp_path: Path) -> None:
    """The machine's speed is not the subject here, and measuring it takes most of a tiny run."""
    monkeypatch.setattr(record, "measure_peak_flops", lambda *_: (1e11, "table"))


def trainer(network: nn.Module | None, **overrides: Any) -> EfficientResNet18Trainer:
    return EfficientResNet18Trainer(network=network, **{**PLAIN, **overrides})


class Normed(nn.Module):
    """With batch norm, dropout, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        twice = self.stem(self.norm(self.stem(images)).relu())
        scores: Tensor = self.head(self.dropout(twice.flatten(1)))
        return scores


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))


def half_frozen() -> nn.Module:
    network = Normed()
    network.stem.requires_grad_(False)
    return network


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear, "normed": Normed, "half_frozen": half_frozen, "lazy": lazy,
}  # fmt: skip


class Samples(Dataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Streamed(IterableDataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.images, self.labels, strict=True))


class Once:
    """An iterator with a length, which draws what it augments with."""

    def __init__(self, batches: list[Any]) -> None:
        self.length, self.batches = len(batches), iter(batches)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> "Once":
        return self

    def __next__(self) -> Any:
        batch = next(self.batches)
        if isinstance(batch, tuple) and batch[0].is_floating_point():
            batch = (batch[0] + torch.rand(()).to(batch[0].dtype), batch[1])
        return batch


def as_dicts(loader: DataLoader[Any]) -> DataLoader[Any]:
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        images, labels = torch.utils.data.default_collate(samples)
        return {"pixel_values": images, "labels": labels}

    return DataLoader(loader.dataset, loader.batch_size, collate_fn=collate)


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[Any]:
    return list(zip(images.split(size), labels.split(size), strict=True))


LOADERS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "list": batches_of,
    "tuple": lambda *data: tuple(batches_of(*data)),
    "named tuples": lambda *data: [Pair(*batch) for batch in batches_of(*data)],
    "once": lambda *data: Once(batches_of(*data)),
    "shuffled": lambda images, labels, size: DataLoader(
        Samples(images, labels), size, shuffle=True
    ),
    "dicts": lambda images, labels, size: as_dicts(DataLoader(Samples(images, labels), size)),
    "arrays": lambda *data: [[part.numpy() for part in batch] for batch in batches_of(*data)],
    "streamed": lambda images, labels, size: DataLoader(Streamed(images, labels), size),
}  # fmt: skip


@st.composite
def data_of(draw: st.DrawFn) -> tuple[str, Callable[[], Any]]:
    """A kind of loader, and what makes one of fixed content."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = draw(st.integers(2, 5))
    count = size + draw(st.integers(2, size))  # two batches
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
    kind = draw(st.sampled_from(sorted(LOADERS)))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16", "float64", "uint8"]))
    images = pixels.byte() if dtype == "uint8" else (pixels / 255).to(getattr(torch, dtype))
    labels = labels.to(
        draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8]))
    )
    if draw(st.booleans()):
        labels = labels.unsqueeze(1)
    if kind == "arrays" and dtype == "bfloat16":  # NumPy has none
        images = images.float()
    return f"{kind} {dtype}", lambda: LOADERS[kind](images, labels, size)


def plain_loop(network: nn.Module, loader: Any) -> None:
    """What a user would write."""
    seed_everything(SEED)
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
    for batch in loader:
        images, labels = batch.values() if isinstance(batch, dict) else batch
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        images = images / 255 if images.dtype == torch.uint8 else images.float()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels.long().flatten()).backward()
        optimizer.step()


def initialized(network: nn.Module) -> nn.Module:
    """Lazy modules draw from the run's seed."""
    seed_everything(SEED)
    with torch.no_grad():
        network.eval()(torch.zeros(2, 3, SIZE, SIZE))
    return network


@BOUNDED
@given(data=data_of(), kind=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 9))
def test_a_users_loader_and_network_train_as_in_a_plain_loop(
    data: tuple[str, Callable[[], Any]], kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    network = NETWORKS[kind]()
    torch.manual_seed(seed)
    theirs = initialized(NETWORKS[kind]())
    ours = trainer(network)
    assert ours.train(data[1]()).steps == 2
    assert ours.model is network
    plain_loop(theirs, data[1]())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)


def broken(number: int, batch: Any) -> list[Any]:
    """Three batches of which one is `batch`."""
    good = (torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 2]))
    return [batch if position == number else good for position in range(3)]


BAD_BATCHES: dict[str, Any] = {
    "empty": (torch.rand(0, 3, SIZE, SIZE), torch.zeros(0).long()),
    "gray": (torch.rand(2, 1, SIZE, SIZE), torch.tensor([0, 1])),
    "one image": (torch.rand(3, SIZE, SIZE), torch.tensor([0, 1, 2])),
    "too few labels": (torch.rand(2, 3, SIZE, SIZE), torch.tensor([0])),
    "label too large": (torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, CLASSES])),
    "no label": (torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, -100])),
    "one-hot": (torch.rand(2, 3, SIZE, SIZE), torch.eye(3)[:2]),
    "float labels": (torch.rand(2, 3, SIZE, SIZE), torch.tensor([0.0, 1.0])),
    "strings": (torch.rand(2, 3, SIZE, SIZE), ["ant", "bee"]),
    "int images": (torch.ones(2, 3, SIZE, SIZE).long(), torch.tensor([0, 1])),
    "other keys": {"picture": torch.rand(2, 3, SIZE, SIZE), "label": torch.tensor([0, 1])},
    "no tuple": torch.rand(2, 3, SIZE, SIZE),
    "nothing": None,
}


@BOUNDED
@given(
    number=st.integers(0, 2),
    kind=st.sampled_from(sorted(BAD_BATCHES)),
    wrap=st.sampled_from([list, tuple, Once]),
)
def test_a_bad_batch_is_one_line_that_names_it(number: int, kind: str, wrap: Any) -> None:
    before = len(list(Path().rglob("*")))
    loader = wrap(broken(number, BAD_BATCHES[kind]))
    with pytest.raises(UserError, match=f"batch {number} of the training ") as caught:
        trainer(linear()).train(loader)
    assert "\n" not in str(caught.value)
    if number == 0:
        assert len(list(Path().rglob("*"))) == before, "nothing is written"


class Wide(nn.Module):
    """Scores for more classes than there are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, 10)

    def forward(self, images: Tensor) -> Any:
        return self.head(images.flatten(1))


class Labelled(Wide):
    def forward(self, images: Tensor) -> Any:
        return {"logits": super().forward(images)}


class Auxiliary(Wide):
    def forward(self, images: Tensor) -> Any:
        scores = super().forward(images)
        return Pair(scores, scores) if self.training else scores


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wide, "returns 10 scores an image, but there are 3 classes"),
        (Labelled, "returns a dict with the keys"),
        (Auxiliary, "returns a Pair of 2 in training mode"),
        (lambda: linear().double(), "is torch.float64"),
        (lambda: linear().to("meta"), "is on the meta device"),
        (lambda: linear().requires_grad_(False), "no trainable parameter"),
        (lambda: linear, "network is a function"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, CLASSES)), "fails in training mode"),
    ],
)
@pytest.mark.parametrize("on_loader", [True, False])
def test_a_network_that_cannot_be_trained_is_one_line_before_anything_is_written(
    make: Any, message: str, on_loader: bool
) -> None:
    images = torch.rand(2, 3, SIZE, SIZE)
    loader = [(images, torch.tensor([0, 2]))] if on_loader else None
    with pytest.raises(UserError, match=message):
        trainer(make(), data="synthetic", img_size=SIZE).train(loader)
    assert not list(Path().iterdir())


def test_weights_for_a_network_of_ones_own_are_refused(in_tmp_path: Path) -> None:
    Path("weights.pth").touch()
    with pytest.raises(UserError, match=r"weights is weights.pth, but network is your own"):
        trainer(linear(), weights="weights.pth")


def some_batches(count: int = 2) -> list[Any]:
    draws = torch.Generator().manual_seed(0)
    return [
        (torch.rand(4, 3, SIZE, SIZE, generator=draws), torch.arange(4) % CLASSES)
        for _ in range(count)
    ]


@pytest.mark.parametrize("ema_decay", [0, 0.9])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_trained(ema_decay: float) -> None:
    network = torch.jit.script(linear())
    before = copy.deepcopy(network.state_dict())
    ours = trainer(network, ema_decay=ema_decay)
    result = ours.train(some_batches(), some_batches(1))
    assert result.val_loss is not None
    assert not torch.equal(before["1.weight"], network.state_dict()["1.weight"])
    card = json.loads((result.run_directory / "run.json").read_text())["network"]
    assert (card["model"], card["is_own"]) == ("Sequential", True)


@pytest.mark.parametrize("loader", [[], [(torch.rand(0, 3, SIZE, SIZE), torch.zeros(0).long())]])
def test_an_empty_validation_loader_is_refused_before_training(loader: Any) -> None:
    with pytest.raises(UserError, match=r"validation list.* is empty"):
        trainer(linear()).train(some_batches(), loader)
    assert not list(Path().iterdir())


def test_one_pass_is_not_enough_for_two_epochs_or_evaluations() -> None:
    with pytest.raises(UserError, match="training Once can be iterated only once"):
        trainer(linear(), epochs=2).train(Once(some_batches()))
    with pytest.raises(UserError, match="validation Once can be iterated only once"):
        trainer(linear(), val_check_interval=1).train(some_batches(), Once(some_batches()))
    result = trainer(linear()).train(Once(some_batches()), Once(some_batches()))
    assert result.last_acc1 is not None


class Overflows(Wide):
    """Its validation loss is infinite, its training loss is not."""

    def forward(self, images: Tensor) -> Any:
        scores = super().forward(images)[:, :CLASSES]
        return scores if self.training else scores + torch.tensor([torch.inf, 0, 0])


def test_run_json_is_valid_whatever_the_validation_loss_is() -> None:
    result = trainer(Overflows()).train(some_batches(), some_batches())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (result.run_directory / "run.json").read_text()
    assert json.loads(text, parse_constant=refuse)["results"]["val_loss"] is None


def test_the_card_of_a_users_network_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    result = trainer(linear()).train(some_batches())
    directory = result.run_directory
    assert directory == Path("logs/Sequential-loader/version_0")
    for file in ("checkpoints/last.ckpt", "weights.safetensors"):
        for command in (["predict", "x.png"], ["evaluate"]):
            Path("x.png").touch()
            assert main([command[0], str(directory / file), *command[1:]]) == 2
            said = capsys.readouterr().err
            assert "holds the weights of a user's own network (Sequential)" in said
            assert "build Sequential and load" in said


def test_a_configured_model_is_trained_anew_each_time() -> None:
    ours = trainer(None, model="resnet10", lr=0.01)
    weights = []
    for _ in range(2):
        ours.train(some_batches())
        weights.append({name: t.clone() for name, t in ours.model.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("ema_decay", [0, 0.5])
def test_a_users_network_is_trained_further(ema_decay: float) -> None:
    network = linear()
    theirs = copy.deepcopy(network)
    ours = trainer(network, ema_decay=ema_decay)
    for _ in range(2):
        ours.train(some_batches())
        plain_loop(theirs, some_batches())
        torch.testing.assert_close(network[1].weight, theirs[1].weight)


KERNELS = dict.fromkeys(
    ("channels_last", "winograd_convolutions", "fused_norms", "small_map_convolutions"), True
)


@pytest.mark.parametrize("ema_decay", [0, 0.9])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_training_returns_can_be_exported_and_traced(ema_decay: float) -> None:
    batches = [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    ours = trainer(None, model="resnet18", lr=0.01, ema_decay=ema_decay, **{**KERNELS})
    ours.train(batches)
    images = batches[0][0]
    probabilities = ours.predict(images)
    modules = {type(module).__module__.partition(".")[0] for module in ours.model.modules()}
    kinds = {type(module) for module in ours.model.modules()}
    assert modules == {"torch", "training_framework"}
    assert {nn.Conv2d, nn.BatchNorm2d} <= kinds
    exported = torch.export.export(ours.model, (images,))
    assert "training_framework" not in str(exported.graph)
    traced = torch.jit.trace(ours.model, images)
    for network in (exported.module(), traced):
        torch.testing.assert_close(network(images).softmax(1).detach(), probabilities)
