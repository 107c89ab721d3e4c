from pathlib import Path

import pytest
import torch

from training_framework.data import ArraySplit, FileSplit
from training_framework.data.loading import ResidentLoader, build_loader
from training_framework.data.sources.synthetic import SyntheticSplit
from training_framework.data.worker_loading import WorkerLoader
from training_framework.errors import UserError


def _split(count: int = 50, size: int = 6) -> ArraySplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArraySplit(images, torch.randint(0, 10, (count,), generator=generator))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batches_hold_the_samples_that_their_indices_name(resident: bool, train: bool) -> None:
    split = _split()
    loader = build_loader(
        split,
        device="cpu",
        global_batch_size=8,
        train=train,
        image_size=6,
        resident=resident,
    )
    batches = list(loader.epoch(0))
    assert len(batches) == loader.batch_count == (6 if train else 7)
    for batch in batches:
        assert batch.indices.dtype == batch.labels.dtype == torch.int64
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.images, split.images[batch.indices])
        assert torch.equal(batch.labels, split.labels[batch.indices])
    seen = torch.cat([batch.indices for batch in batches])
    assert len(seen.unique()) == len(seen)
    if not train:
        assert torch.equal(seen, torch.arange(50))


@pytest.mark.parametrize("resident", [True, False])
def test_resume_in_mid_epoch_repeats_no_sample(resident: bool) -> None:
    def open_loader() -> ResidentLoader | WorkerLoader:
        loader = build_loader(
            _split(),
            device="cpu",
            global_batch_size=8,
            train=True,
            image_size=6,
            seed=5,
            resident=resident,
        )
        assert isinstance(loader, ResidentLoader | WorkerLoader)
        return loader

    whole = [batch.indices for batch in open_loader().epoch(3)]
    rest = [batch.indices for batch in open_loader().epoch(3, start_batch=4)]
    assert torch.equal(torch.cat(whole[4:]), torch.cat(rest))
    assert list(open_loader().epoch(3, start_batch=6)) == []


def test_ranks_share_the_batches_of_one_process() -> None:
    def batches(rank: int, world_size: int) -> list[torch.Tensor]:
        loader = build_loader(
            _split(),
            device="cpu",
            global_batch_size=8,
            train=True,
            image_size=6,
            rank=rank,
            world_size=world_size,
            resident=True,
        )
        return [batch.indices for batch in loader.epoch(1)]

    for alone, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(alone, torch.cat((first, second)))


def test_synthetic_split_is_learnable_and_always_resident() -> None:
    split = SyntheticSplit(count=400, num_classes=5, image_size=16, seed=3)
    loader = build_loader(split, device="cpu", global_batch_size=400, train=False, image_size=16)
    assert isinstance(loader, ResidentLoader)
    (batch,) = loader.epoch(0)
    assert torch.bincount(batch.labels).tolist() == [80] * 5
    held_out = SyntheticSplit(400, 5, 16, seed=3, stream=1).array("cpu")
    assert (held_out.images != batch.images).any()
    # Nearest class mean: the classes of one stream are those of the other.
    means = torch.stack([batch.images[batch.labels == k].float().mean(0) for k in range(5)])
    distances = torch.cdist(held_out.images.float().flatten(1), means.flatten(1))
    assert (distances.argmin(1) == held_out.labels).float().mean() > 0.95


def test_synthetic_split_is_deterministic() -> None:
    split = SyntheticSplit(count=30, num_classes=3, image_size=8, seed=1)
    assert torch.equal(split.array("cpu").images, split.array("cpu").images)
    other = SyntheticSplit(count=30, num_classes=3, image_size=8, seed=2)
    assert (split.array("cpu").images != other.array("cpu").images).any()


def test_resizing_a_split_equals_torchs_float_interpolation() -> None:
    split = _split(size=8)
    resized = split.resized(20)
    exact = torch.nn.functional.interpolate(split.images.double(), (20, 20), mode="bilinear")
    assert (resized.images.double() - exact).abs().max() < 1.01
    assert split.resized(8) is split


def test_arrays_of_another_size_are_an_error() -> None:
    with pytest.raises(UserError, match="6x6 px, not 8x8"):
        build_loader(_split(), device="cpu", global_batch_size=8, train=True, image_size=8)


def test_too_few_images_for_the_ranks_is_an_error_at_once() -> None:
    with pytest.raises(UserError, match="3 training images"):
        build_loader(
            _split(3),
            device="cpu",
            global_batch_size=8,
            train=True,
            image_size=6,
            world_size=4,
            resident=True,
        )


def test_files_cannot_be_resident(tmp_path: Path) -> None:
    split = FileSplit(tmp_path, ("a.png",), torch.tensor([0]))
    with pytest.raises(UserError, match="resident_data is on"):
        build_loader(
            split, device="cpu", global_batch_size=1, train=True, image_size=6, resident=True
        )
