import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training_framework import inference
from training_framework.checkpoint import save_checkpoint
from training_framework.config.architectures import Variation
from training_framework.errors import UserError
from training_framework.models import save_weights
from training_framework.runs.network_card import NetworkCard, load_network

CARD = NetworkCard(
    model="resnet10",
    stem="cifar",
    share_early_weights=True,
    class_names=("ant", "bee", "ümlaut"),
    image_size=8,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    center_crop=True,
)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return CARD.build().eval()


def write(path: Path, network: torch.nn.Module, **changes: Any) -> None:
    parts = dict.fromkeys(("optimizer", "scaler", "sums", "progress", "config"))
    state = {"model": network.state_dict(), "average": None, "network": CARD.as_dict()}
    save_checkpoint(path, {**parts, **state, **changes})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_both_kinds_of_file_give_the_network_and_its_card_back(tmp_path, network, images):
    write(tmp_path / "a.ckpt", network)
    save_weights(network.state_dict(), tmp_path / "a.safetensors", CARD.as_metadata())
    for name in ("a.ckpt", "a.safetensors"):
        loaded, card = load_network(tmp_path / name)
        assert card == CARD
        assert not loaded.training
        with torch.inference_mode():
            assert torch.equal(loaded(images), network(images))


def test_a_varied_network_is_built_again_from_its_card(tmp_path, images):
    variation = Variation(activation="gelu", squeeze_excitation=True, deep_stem=True)
    card = dataclasses.replace(CARD, variation=variation, share_early_weights=False)
    network = card.build().eval()
    save_weights(network.state_dict(), tmp_path / "a.safetensors", card.as_metadata())
    loaded, found = load_network(tmp_path / "a.safetensors")
    assert found == card
    with torch.inference_mode():
        assert torch.equal(loaded(images), network(images))


def test_predicting_sets_this_process_up_as_planned(tmp_path, network, monkeypatch):
    write(tmp_path / "a.ckpt", network)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    seen = []
    monkeypatch.setattr(
        inference, "set_up_process", lambda values, device_type: seen.append((values, device_type))
    )
    overrides = {"accelerator": "cpu", "threads": 1}
    list(inference.predict_files(tmp_path / "a.ckpt", [tmp_path], top=1, overrides=overrides))
    ((values, device_type),) = seen
    assert (values["threads"], values["fp32_precision"], device_type) == (1, "ieee", "cpu")


def test_the_average_is_taken_where_there_is_one(tmp_path, network):
    average = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    write(tmp_path / "a.ckpt", network, average=average)
    loaded, _ = load_network(tmp_path / "a.ckpt")
    assert torch.equal(loaded.state_dict()["fc.bias"], average["fc.bias"])


def test_weights_of_another_network_are_refused(tmp_path, network):
    state = network.state_dict()
    del state["fc.bias"]
    write(tmp_path / "a.ckpt", network, model=state)
    with pytest.raises(UserError, match=r"a\.ckpt: its weights do not fit its resnet10 .*fc\.bias"):
        load_network(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "values",
    [
        None,
        [1],
        {},
        {**CARD.as_dict(), "mean": None},
        {**CARD.as_dict(), "surplus": 1},
        {**CARD.as_dict(), "variation": {"activation": "sigmoid"}},
        {**CARD.as_dict(), "variation": {"deep_stem": "a lot"}},
        {key: value for key, value in CARD.as_dict().items() if key != "stem"},
    ],
)
def test_a_card_that_is_not_whole_is_refused(tmp_path, values):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"network": json.dumps(values)})
    with pytest.raises(UserError, match=r"a\.safetensors: does not say which network"):
        load_network(path)


def test_a_card_of_no_known_network_names_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    values = {**CARD.as_dict(), "stem": "flower"}
    save_file({"w": torch.zeros(1)}, path, metadata={"network": json.dumps(values)})
    with pytest.raises(UserError, match=r"a\.safetensors: unknown stem 'flower'"):
        load_network(path)
