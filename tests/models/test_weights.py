import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from training_framework.checkpoint import save_checkpoint
from training_framework.errors import UserError
from training_framework.models.resnet import ResNet, build_model
from training_framework.models.weights import load_weights, read_metadata, save_weights


def resnet10(seed: int, *, num_classes: int = 10, **options) -> ResNet:
    torch.manual_seed(seed)
    return build_model("resnet10", num_classes=num_classes, **{"stem": "imagenet", **options})


def assert_same_state(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_weights_come_back_bit_for_bit(tmp_path, suffix):
    source, target = resnet10(0), resnet10(1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_weights(source.state_dict(), path, {})
    else:
        torch.save(source.state_dict(), path)
    lines = load_weights(target, path)
    assert_same_state(target.state_dict(), source.state_dict())
    assert str(path) in lines[0] and len(lines) == 1


@pytest.mark.parametrize("averaged", [False, True])
def test_of_a_checkpoint_of_ours_the_average_is_taken_where_there_is_one(tmp_path, averaged):
    source, average, target = resnet10(0), resnet10(2), resnet10(1)
    state = {"model": source.state_dict(), "average": average.state_dict() if averaged else None}
    save_checkpoint(tmp_path / "last.ckpt", state)
    load_weights(target, tmp_path / "last.ckpt")
    assert_same_state(target.state_dict(), (average if averaged else source).state_dict())


def test_old_pickles_without_zip_and_without_batch_counters_load(tmp_path):
    source, target = resnet10(0), resnet10(1)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_weights(target, path)
    assert_same_state(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrapper, prefix):
    source, target = resnet10(0), resnet10(1)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    path = tmp_path / "wrapped.pth"
    torch.save({wrapper: state, "epoch": 3}, path)
    load_weights(target, path)
    assert_same_state(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("headless", [False, True])
def test_another_head_is_left_as_initialized_and_said(tmp_path, headless):
    source, target = resnet10(0, num_classes=1000), resnet10(1, num_classes=5)
    state = source.state_dict()
    head = target.fc.weight.clone()
    path = tmp_path / "weights.pth"
    torch.save(without_head(state) if headless else state, path)
    lines = load_weights(target, path)
    assert torch.equal(target.fc.weight, head)
    assert_same_state(without_head(target.state_dict()), without_head(state))
    assert "5-class head starts untrained" in lines[1]
    assert ("has none" if headless else "1000 classes") in lines[1]


def test_shared_weights_load_from_files_with_one_name_or_both(tmp_path):
    source = resnet10(0, share_early_weights=True)
    both, one = tmp_path / "both.safetensors", tmp_path / "one.safetensors"
    save_weights(source.state_dict(), both, {})
    save_model(source, str(one))
    assert len(load_file(both)) == len(load_file(one)) + 1
    for path in (both, one):
        target = resnet10(1, share_early_weights=True)
        load_weights(target, path)
        assert_same_state(target.state_dict(), source.state_dict())
        assert target.layer1[0].conv2.weight is target.layer1[0].conv1.weight
    load_weights(resnet10(1), both)


def test_differing_weights_do_not_load_into_shared_ones(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(resnet10(0).state_dict(), path, {})
    target = resnet10(1, share_early_weights=True)
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight and .*without share_early"):
        load_weights(target, path)
    assert_same_state(target.state_dict(), resnet10(1, share_early_weights=True).state_dict())


def test_a_mismatch_names_tensor_shapes_and_the_model_the_file_holds(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(resnet10(0, stem="cifar").state_dict(), path)
    with pytest.raises(UserError) as error:
        load_weights(resnet10(1), path)
    text = str(error.value)
    assert "weights.pth: conv1.weight is 64x3x3x3 in the file and 64x3x7x7 in the model" in text
    assert "for resnet10 with the cifar stem" in text


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    state = resnet10(0).state_dict()
    torch.save({**state, "extra.weight": torch.ones(2, 3)}, path)
    with pytest.raises(UserError, match=r"extra\.weight \(2x3\) is not in the model"):
        load_weights(resnet10(1), path)
    del state["layer3.0.bn2.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"layer3\.0\.bn2\.bias \(256 in the model\) is missing"):
        load_weights(resnet10(1), path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_holds_code_is_refused_and_nothing_runs(tmp_path, zipped):
    path, target = tmp_path / "evil.pth", tmp_path / "pwned"
    content = {"state_dict": resnet10(0).state_dict(), "hook": Payload(str(target))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pth: contains more than tensors .*mkdir"):
        load_weights(resnet10(1), path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(resnet10(0).state_dict(), path)
    else:
        save_weights(resnet10(0).state_dict(), path, {})
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:9000], "text": b"not weights", "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"weights\{suffix}: not a readable weight file"):
        load_weights(resnet10(1), path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains a list"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({}, "contains a dict"),
    ],
)
def test_a_file_without_tensors_by_name_is_refused(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_weights(resnet10(1), path)


def test_paths_that_are_no_weight_files_are_refused(tmp_path):
    (tmp_path / "weights.onnx").write_bytes(b"x")
    for path, words in [
        (tmp_path / "absent.pth", "no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "weights.onnx", "unknown kind of weight file '.onnx'"),
    ]:
        with pytest.raises(UserError, match=words):
            load_weights(resnet10(1), path)


def test_pickles_are_refused_by_a_torch_that_cannot_read_them_safely(tmp_path, monkeypatch):
    model = resnet10(0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    save_weights(model.state_dict(), tmp_path / "weights.safetensors", {})
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"torch 2\.9\.1.*safetensors"):
        load_weights(model, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.safetensors")


def test_metadata_is_read_back_without_the_tensors(tmp_path):
    path = tmp_path / "runs" / "weights.safetensors"
    metadata = {"model": "resnet10", "stem": "cifar", "classes": '["cat", "dog"]'}
    save_weights({"w": torch.ones(2)}, path, metadata)
    assert read_metadata(path) == metadata
    path.write_bytes(pickle.dumps("no"))
    with pytest.raises(UserError, match="not a readable weight file"):
        read_metadata(path)


def test_channels_last_weights_are_written_in_their_logical_order(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    save_weights({"w": weight}, tmp_path / "w.safetensors", {})
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], weight)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights({"w": torch.ones(2)}, path, {})
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        save_file(tensors, filename, metadata)
        raise OSError("No space left on device")

    monkeypatch.setattr("training_framework.models.weights.save_file", full_disk)
    with pytest.raises(UserError, match=r"weights\.safetensors.*No space left"):
        save_weights({"w": torch.zeros(2)}, path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight * float("nan"), "contains NaN or infinity"),
        (lambda weight: weight.to_sparse(), "is not a plain tensor"),
        (lambda weight: weight.to("meta"), "is not a plain tensor"),
        (lambda weight: torch.zeros(()).expand(10**6, 10**6), "larger than its stored data"),
    ],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, change, words):
    state = resnet10(0).state_dict()
    state["fc.weight"] = change(state["fc.weight"])
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"weights\.pth: '?fc\.weight'? .*{words}"):
        load_weights(resnet10(1), tmp_path / "weights.pth")


def test_a_file_that_would_take_all_memory_is_not_loaded(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(
        UserError, match=r"weights\.pth: was not loaded, since it could use up the memory"
    ):
        load_weights(resnet10(1), path)
