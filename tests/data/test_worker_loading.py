import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from forks import Forks
from PIL import Image

from training_framework.data import FileSplit
from training_framework.data.bad_images import BadImages
from training_framework.data.batch import Batch
from training_framework.data.decoding import decode_center_crop
from training_framework.data.host_batches import FileBatches
from training_framework.data.sampling import BatchPlan
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


def _loader(
    split: FileSplit,
    *,
    num_workers: int = 0,
    train: bool = True,
    bad_images: BadImages | None = None,
) -> WorkerLoader:
    plan = BatchPlan(sample_count=COUNT, global_batch_size=3, train=train, seed=7)
    return WorkerLoader(
        split,
        plan=plan,
        device="cpu",
        image_size=SIZE,
        num_workers=num_workers,
        prefetch_factor=2,
        bad_images=bad_images,
    )


def _joined(batches: list[Batch]) -> Batch:
    parts = zip(*(batch[:3] for batch in batches), strict=True)
    return Batch(*(torch.cat(tensors) for tensors in parts))


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


def _break(split: FileSplit, *samples: int) -> set[str]:
    """Truncate the files of samples: their names."""
    for sample in samples:
        path = split.root / split.paths[sample]
        path.write_bytes(path.read_bytes()[:400])
    return {str(split.root / split.paths[sample]) for sample in samples}


def _skipping(split: FileSplit, num_workers: int, *, train: bool) -> tuple[WorkerLoader, BadImages]:
    bad = BadImages(train=COUNT, val=COUNT, report=lambda line: None)
    return _loader(split, num_workers=num_workers, train=train, bad_images=bad), bad


def test_the_next_whole_picture_stands_in_for_a_bad_one_with_other_crops(
    split: FileSplit,
) -> None:
    whole = _joined(list(_loader(split).epoch(0)))
    names = _break(split, 4, 5, COUNT - 1)
    results = []
    for num_workers in (0, 2):
        loader, bad = _skipping(split, num_workers, train=True)
        try:
            results.append(_joined([*islice(loader.epoch(0), 1), *loader.epoch(0, 1)]))
        finally:
            loader.close()
        assert bad.by_split()["train"].keys() == names
        reasons = bad.by_split()["train"].values()
        assert all(reason.startswith(("cannot be decoded", "not an image")) for reason in reasons)
    got, with_workers = results
    for ours, theirs in zip(got[:3], with_workers[:3], strict=True):
        assert torch.equal(ours, theirs)
    expected = {4: 6, 5: 6, COUNT - 1: 0}
    wanted = [expected.get(sample, sample) for sample in whole.indices.tolist()]
    assert got.indices.tolist() == wanted
    assert torch.equal(got.labels, split.labels[torch.tensor(wanted)])
    same = [torch.equal(a, b) for a, b in zip(got.images, whole.images, strict=True)]
    assert same == [sample not in expected for sample in whole.indices.tolist()]
    sixes = got.images[got.indices == 6]
    assert len(sixes) == 3
    assert all(not torch.equal(*sixes[list(pair)]) for pair in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_not_valid_in_evaluation(split: FileSplit, num_workers: int) -> None:
    whole = list(_loader(split, train=False).epoch(0))
    names = _break(split, 4, 5)
    loader, bad = _skipping(split, num_workers, train=False)
    try:
        batches = list(loader.epoch(0))
    finally:
        loader.close()
    assert bad.by_split()["val"].keys() == names
    for batch, before in zip(batches, whole, strict=True):
        assert torch.equal(batch.indices, before.indices)
        broken = (batch.indices == 4) | (batch.indices == 5)
        assert (batch.valid is None) == (not broken.any())
        assert batch.valid is None or torch.equal(batch.valid, ~broken)
        assert torch.equal(batch.images[~broken], before.images[~broken])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_bad_pictures_than_allowed_end_the_epoch_and_are_named(
    split: FileSplit, num_workers: int
) -> None:
    _break(split, *range(6))
    loader, bad = _skipping(split, num_workers, train=True)
    with pytest.raises(UserError, match=r"6 images of the train split .* 5 of 12 .*bild-ü-\d"):
        list(loader.epoch(0))
    loader.close()
    assert len(bad) == 6


def test_a_file_that_cannot_be_read_is_no_bad_picture(split: FileSplit) -> None:
    path = split.root / split.paths[3]
    for vandalize, says in ((path.unlink, "No such file"), (lambda: os.mkfifo(path), "not a file")):
        vandalize()
        loader, bad = _skipping(split, 0, train=True)
        with pytest.raises(UserError, match=f"bild-ü-3.*{says}"):
            list(loader.epoch(0))
        assert not len(bad)


def test_a_file_too_large_for_a_picture_is_not_read(split: FileSplit) -> None:
    with (split.root / split.paths[3]).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"bild-ü-3.*1,099,511,627,776 bytes are more than"):
        list(_loader(split).epoch(0))


def test_missing_file_is_an_error_that_names_it(split: FileSplit) -> None:
    (split.root / split.paths[0]).unlink()
    with pytest.raises(UserError, match=r"bild-ü-0.*No such file"):
        list(_loader(split, train=False).epoch(0))


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch look after its workers more often than every 5 seconds."""
    interval = 0.2
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", interval)
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (interval,))


def _workers(loader: WorkerLoader) -> list[Any]:
    assert loader._data_loader is not None
    return list(loader._data_loader._iterator._workers)  # type: ignore[union-attr]


def _kill_all(loader: WorkerLoader) -> None:
    for worker in _workers(loader):
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()


@pytest.mark.usefixtures("quick_checks")
def test_batches_of_killed_workers_are_made_by_new_ones(split: FileSplit) -> None:
    loader = _loader(split, num_workers=2)
    notes: list[str] = []
    loader.report = notes.append
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        batches = loader.epoch(0)
        got = [next(batches)]
        _kill_all(loader)
        got += batches
        # Those that wait between two epochs may be killed as well.
        _kill_all(loader)
        following = list(loader.epoch(1))
    finally:
        loader.close()
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert [note.startswith("note: DataLoader worker (pid") for note in notes] == [True, True]
    for epoch, batches_of in ((0, got), (1, following)):
        expected = _joined(list(_loader(split).epoch(epoch)))
        assert torch.equal(_joined(batches_of).indices, expected.indices)
        assert torch.equal(_joined(batches_of).images, expected.images)


@pytest.mark.usefixtures("quick_checks")
def test_workers_that_die_again_and_again_are_one_line_and_the_loader_goes_on(
    split: FileSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    loader = _loader(split, num_workers=1)
    loader.report = lambda line: None
    try:
        with monkeypatch.context() as patched:
            patched.setattr(FileBatches, "__getitem__", die)
            with pytest.raises(UserError, match=r"processes died 3 times in one epoch: .*pid"):
                list(loader.epoch(0))
        everything = _joined(list(loader.epoch(0)))
    finally:
        loader.close()
    assert torch.equal(everything.images, _joined(list(_loader(split).epoch(0))).images)


def test_a_full_shared_memory_is_an_error_and_no_endless_wait(
    split: FileSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = _loader(split, num_workers=1)
    try:
        with pytest.raises(
            UserError, match=r"No space left.*enlarge the shared memory.*--num-workers 0"
        ):
            list(loader.epoch(0))
    finally:
        loader.close()


KILLED_PARENT = """
import os, signal, sys
from pathlib import Path
import torch
from training_framework.data.sampling import BatchPlan
from training_framework.data import FileSplit
from training_framework.data.worker_loading import WorkerLoader

root = Path(sys.argv[1])
paths = tuple(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
plan = BatchPlan(sample_count=len(paths), global_batch_size=2, train=True)
split = FileSplit(root, paths, torch.zeros(len(paths), dtype=torch.int64))
loader = WorkerLoader(split, plan=plan, device="cpu", image_size=16, num_workers=2)
next(loader.epoch(0))
print(*(worker.pid for worker in loader._data_loader._iterator._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_is_killed(split: FileSplit, forks: Forks) -> None:
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    done = forks.run("-c", KILLED_PARENT, split.root)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, pids))
    left = {path.name for path in Path("/dev/shm").iterdir()} - shared
    assert not [name for name in left for pid in pids if f"_{pid}_" in name]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_loading_leaves_the_global_generator_alone(split: FileSplit) -> None:
    before = torch.get_rng_state()
    list(_loader(split).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_indices_that_are_kept_hold_no_file_open(split: FileSplit) -> None:
    """They are kept for naming samples, and an epoch has more batches than a process may files."""
    workers = _loader(split, num_workers=1)
    try:
        open_files, kept = [], []
        for batch in workers.epoch(0):
            kept.append(batch.indices)
            del batch
            open_files.append(psutil.Process().num_fds())
        list(workers.epoch(1))
        assert len(kept) == 4
        assert psutil.Process().num_fds() <= open_files[0]
    finally:
        workers.close()


def test_close_ends_the_workers(split: FileSplit) -> None:
    loader = _loader(split, num_workers=2)
    next(loader.epoch(0))
    workers = _workers(loader)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
