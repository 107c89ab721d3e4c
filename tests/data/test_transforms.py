from typing import Any

import pytest
import torch

from training_framework.data.batch import Batch
from training_framework.data.transforms import EvalTransform, FlipMode, MixedLabels, TrainTransform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
COUNT = 40


def _split() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(COUNT) % 10, torch.arange(COUNT))


def _part(batch: Batch, rows: slice | torch.Tensor) -> Batch:
    return Batch(batch.images[rows], batch.labels[rows], batch.indices[rows])


def _transform(
    *,
    seed: int = 0,
    flip: FlipMode = "none",
    crop_padding: int = 0,
    cutout: int = 0,
    random_erasing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> TrainTransform:
    return TrainTransform(
        mean=MEAN,
        std=STD,
        sample_count=COUNT,
        seed=seed,
        device="cpu",
        flip=flip,
        crop_padding=crop_padding,
        cutout=cutout,
        random_erasing=random_erasing,
        mixup=mixup,
        cutmix=cutmix,
        channels_last=channels_last,
        dtype=dtype,
    )


def test_without_augmentation_training_images_are_the_evaluation_images() -> None:
    batch = _split()
    images, labels, mixed = _transform()(batch, step=3, epoch=1)
    expected, expected_labels = EvalTransform(mean=MEAN, std=STD, device="cpu")(batch)
    assert torch.equal(images, expected)
    assert labels is batch.labels
    assert expected_labels is batch.labels
    assert mixed is None


def test_augmentation_is_the_same_in_one_process_and_in_two() -> None:
    batch = _split()
    transform = _transform(flip="random", crop_padding=2, cutout=4, random_erasing=0.5)
    whole = transform(batch, step=5, epoch=2)[0]
    halves = [
        _transform(flip="random", crop_padding=2, cutout=4, random_erasing=0.5)(
            _part(batch, rows), step=5, epoch=2
        )[0]
        for rows in (slice(0, 20), slice(20, 40))
    ]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_epochs_and_seeds_augment_differently(flip: FlipMode) -> None:
    batch = _split()
    first = _transform(flip=flip)(batch, step=0, epoch=0)[0]
    assert (first != _transform(flip=flip)(batch, step=0, epoch=1)[0]).any()
    assert (first != _transform(flip=flip, seed=1)(batch, step=0, epoch=0)[0]).any()


def test_alternating_flip_shows_every_image_mirrored_in_one_of_two_epochs() -> None:
    batch = _split()
    transform = _transform(flip="alternating")
    even = transform(batch, step=0, epoch=0)[0]
    odd = transform(batch, step=1, epoch=1)[0]
    assert torch.equal(even.flip(3), odd)
    assert torch.equal(transform(batch, step=2, epoch=2)[0], even)


def test_switching_one_augmentation_leaves_the_draws_of_another() -> None:
    batch = _split()
    plain = _transform(crop_padding=3)(batch, step=0, epoch=0)[0]
    cut = _transform(crop_padding=3, cutout=6)(batch, step=0, epoch=0)[0]
    kept = cut != 0
    assert torch.equal(plain[kept], cut[kept])
    assert not kept.all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_undone_with_its_labels_and_share(kind: str) -> None:
    batch = _split()
    plain = _transform()(batch, step=0, epoch=0)[0]
    transform = _transform(mixup=0.5) if kind == "mixup" else _transform(cutmix=1.0)
    images, labels, mixed = transform(batch, step=11, epoch=0)
    assert isinstance(mixed, MixedLabels)
    assert torch.equal(labels, batch.labels)
    assert torch.equal(mixed.other_labels, batch.labels.roll(1))
    lam = float(mixed.lam)
    if kind == "mixup":
        torch.testing.assert_close(images, lam * plain + (1 - lam) * plain.roll(1, 0))
    else:
        own = (images == plain).all(dim=1)
        other = (images == plain.roll(1, 0)).all(dim=1)
        assert (own | other).all()
        assert float(own.float().mean()) == pytest.approx(lam, abs=1e-6)


def test_mixing_share_is_the_same_on_every_rank_and_differs_between_steps() -> None:
    batch = _split()
    transform = _transform(mixup=0.4, cutmix=1.0)
    shares = []
    for step in range(8):
        mixed = [
            transform(_part(batch, rows), step=step, epoch=0)[2]
            for rows in (slice(0, 20), slice(20, 40))
        ]
        assert mixed[0] is not None
        assert mixed[1] is not None
        assert torch.equal(mixed[0].lam, mixed[1].lam)
        shares.append(float(mixed[0].lam))
    assert len(set(shares)) == len(shares)


def test_floats_pass_untouched_but_for_the_layout() -> None:
    images = torch.randn(4, 3, 8, 8)
    batch = Batch(images, torch.arange(4), torch.arange(4))
    augmented = _transform(flip="random", crop_padding=2)(batch, step=0, epoch=0)[0]
    assert torch.equal(augmented, images)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    evaluated = EvalTransform(mean=MEAN, std=STD, device="cpu", channels_last=False)(batch)[0]
    assert evaluated is images


@pytest.mark.parametrize("channels_last", [True, False])
def test_result_has_the_wanted_layout(channels_last: bool) -> None:
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    transform = _transform(
        flip="random",
        crop_padding=2,
        cutout=4,
        random_erasing=0.5,
        mixup=1.0,
        channels_last=channels_last,
    )
    assert transform(_split(), step=0, epoch=0)[0].is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("channels_last", [True, False])
def test_half_precision_images_are_the_fp32_images_rounded(
    dtype: torch.dtype, cutmix: float, channels_last: bool
) -> None:
    options: dict[str, Any] = {
        "flip": "random", "crop_padding": 2, "cutout": 4, "random_erasing": 0.5, "cutmix": cutmix,
        "channels_last": channels_last,
    }  # fmt: skip
    half = _transform(**options, dtype=dtype)(_split(), step=1, epoch=1)[0]
    whole = _transform(**options)(_split(), step=1, epoch=1)[0]
    assert half.dtype == dtype
    assert half.stride() == whole.stride()
    assert torch.equal(half, whole.to(dtype))


def test_images_blended_by_mixup_stay_in_fp32() -> None:
    images = _transform(mixup=0.5, dtype=torch.bfloat16)(_split(), step=1, epoch=1)[0]
    assert images.dtype == torch.float32
