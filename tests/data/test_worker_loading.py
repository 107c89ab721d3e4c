import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training_framework.data.batch import Batch
from training_framework.data.decoding import decode_center_crop
from training_framework.data.sampling import BatchPlan
from training_framework.data.splits import FileSplit
from training_framework.data.worker_loading import WorkerLoader
from training_framework.errors import UserError

COUNT = 12
SIZE = 16


@pytest.fixture
def split(tmp_path: Path) -> FileSplit:
    generator = np.random.default_rng(0)
    names = []
    for number in range(COUNT):
        coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        name = f"{number % 3}/bild-ü-{number}.jpg"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((42, 30)).save(tmp_path / name)
        names.append(name)
    return FileSplit(tmp_path, tuple(names), torch.arange(COUNT) % 3)


def _loader(split: FileSplit, *, num_workers: int = 0, train: bool = True) -> WorkerLoader:
    plan = BatchPlan(sample_count=COUNT, global_batch_size=3, train=train, seed=7)
    return WorkerLoader(
        split,
        plan=plan,
        device="cpu",
        image_size=SIZE,
        num_workers=num_workers,
        prefetch_factor=2,
    )


def _joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def test_crops_do_not_depend_on_workers_nor_on_where_an_epoch_resumed(split: FileSplit) -> None:
    alone = {epoch: list(_loader(split).epoch(epoch)) for epoch in (0, 1)}
    workers = _loader(split, num_workers=2)
    try:
        for epoch, start in ((0, 0), (1, 0), (1, 2), (0, 3)):
            got = _joined(list(workers.epoch(epoch, start_batch=start)))
            expected = _joined(alone[epoch][start:])
            assert torch.equal(got.indices, expected.indices)
            assert torch.equal(got.labels, expected.labels)
            assert torch.equal(got.images, expected.images)
    finally:
        workers.close()
    first, second = (_joined(alone[epoch]) for epoch in (0, 1))
    shown = [batch.images[batch.indices.argsort()] for batch in (first, second)]
    assert (shown[0] != shown[1]).flatten(1).any(1).all()


def test_an_abandoned_epoch_leaves_nothing_in_the_next(split: FileSplit) -> None:
    workers = _loader(split, num_workers=2)
    try:
        next(workers.epoch(0))
        got = _joined(list(workers.epoch(1)))
    finally:
        workers.close()
    expected = _joined(list(_loader(split).epoch(1)))
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.images, expected.images)


def test_evaluation_shows_center_crops_in_order(split: FileSplit) -> None:
    batches = _joined(list(_loader(split, train=False).epoch(0)))
    assert batches.indices.tolist() == list(range(COUNT))
    assert torch.equal(batches.labels, split.labels)
    for image, name in zip(batches.images, split.paths, strict=True):
        data = (split.root / name).read_bytes()
        expected = decode_center_crop(data, name, size=SIZE)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert batches.images.shape == (COUNT, 3, SIZE, SIZE)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_file_is_one_line_that_names_it(split: FileSplit, num_workers: int) -> None:
    broken = split.root / split.paths[5]
    broken.write_bytes(broken.read_bytes()[:400])
    loader = _loader(split, num_workers=num_workers)
    try:
        with pytest.raises(UserError) as caught:
            list(loader.epoch(0))
    finally:
        loader.close()
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_missing_file_is_an_error_that_names_it(split: FileSplit) -> None:
    (split.root / split.paths[0]).unlink()
    with pytest.raises(UserError, match=r"bild-ü-0.*No such file"):
        list(_loader(split, train=False).epoch(0))


def test_killed_worker_is_one_line_and_the_loader_goes_on(split: FileSplit) -> None:
    loader = _loader(split, num_workers=1)
    try:
        batches = loader.epoch(0)
        first = next(batches)
        assert loader._data_loader is not None
        (worker,) = loader._data_loader._iterator._workers  # type: ignore[union-attr]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        with pytest.raises(UserError, match=r"a data loading process died: .*pid.* \d+") as caught:
            list(batches)
        assert "\n" not in str(caught.value)
        rest = list(loader.epoch(0, start_batch=1))
    finally:
        loader.close()
    everything = _joined([first, *rest])
    assert torch.equal(everything.images, _joined(list(_loader(split).epoch(0))).images)


def test_loading_leaves_the_global_generator_alone(split: FileSplit) -> None:
    before = torch.get_rng_state()
    list(_loader(split).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_close_ends_the_workers(split: FileSplit) -> None:
    loader = _loader(split, num_workers=2)
    next(loader.epoch(0))
    assert loader._data_loader is not None
    workers = loader._data_loader._iterator._workers  # type: ignore[union-attr]
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
