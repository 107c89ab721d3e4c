"""What the dry run is for: faults that a GPU alone would show are planted, and each is found."""

import pytest
from findings import findings

PACKAGE = "training_framework."
RECORDED = {"cuda_graph": True, "batch_size": 256}  # the fourth of five steps is recorded
FROM_HOST = {"resident_data": False, "num_workers": 0}
CUTOUT = {"cutout": 4}

EIGHT = {"processes": 8}

# What is wrong; where; the text there, and the one planted; settings that reach it; what is said.
FAULTS = [
    (
        "the copy of a batch is not waited for",
        "data.batch:prefetch_to_device", "        compute.wait_stream(copies)\n", "",
        FROM_HOST, "too early",
    ),
    (
        "a batch's memory is not kept for the step",
        "data.batch:prefetch_to_device", "tensor.record_stream(compute)", "pass",
        FROM_HOST, "record_stream is missing",
    ),
    (
        "batches are copied from pageable memory",
        "data.worker_loading:WorkerLoader._start", "pin_memory=self._pins,", "pin_memory=False,",
        FROM_HOST, "pageable memory at data/batch.py",
    ),
    (
        "the indices leave pinned memory",
        "data.worker_loading:WorkerLoader._items", "if not self._pins:", "if True:",
        FROM_HOST, "pageable memory at data/batch.py",
    ),
    (
        "the loss is read in every step",
        "training.finiteness:WatchedBatch.of", "sums = None", "sums = loss.item() and None",
        {}, "the host waits in step 2: item at training/finiteness.py",
    ),
    (
        "the images to cut are made in host memory",
        "data.augmentation:_erase",
        "rows = torch.arange(images.shape[2], device=images.device)",
        "rows = torch.arange(images.shape[2])",
        CUTOUT, "the run ends",
    ),
    (
        "the share of a mixed image is copied from the host",
        "data.transforms:_on_device", "there = there.pin_memory()", "pass",
        {"mixup": 0.2}, "copy cpu to cuda of pageable memory at data/transforms.py",
    ),
    (
        "the share of a mixed image stays in host memory",
        "data.transforms:_on_device", "return there.to(device, non_blocking=True)", "return there",
        {"mixup": 0.2, **RECORDED}, "is given a tensor in host memory",
    ),
    (
        "the warm-up of a recording does not wait for the batch",
        "training.recording:on_stream", "    stream.wait_stream(current)\n", "",
        RECORDED, "too early",
    ),
    (
        "what follows the warm-up does not wait for it",
        "training.recording:on_stream", "    current.wait_stream(stream)\n", "",
        RECORDED, "too early",
    ),
    (
        "a recorded step reads the device",
        "training.cuda_graph:CudaGraphStep._record_backward",
        "            loss.backward()\n", "            loss.backward(); loss.item()\n",
        RECORDED, "cannot be recorded",
    ),
    (
        "the recorded update has the rate as a number",
        "training.cuda_graph:CudaGraphStep._record_update",
        'group["lr"] = self._lr', 'group["lr"] = 0.1',
        RECORDED, "recorded with a rate that is a number",
    ),
    (
        "the recorded backward pass is not replayed",
        "training.cuda_graph:CudaGraphStep.accumulate",
        "            self._replay_backward()\n", "            pass\n",
        RECORDED, "recorded and never replayed",
    ),
    (
        "the weight average counts on the host",
        "optimizers.averaging:WeightAverage.set_decay",
        "fill_(self._decay_at(step))", "fill_(float(self._averaged[0].sum()))",
        {"ema_decay": 0.9}, "item at optimizers/averaging.py",
    ),
    (
        "images of one kind are chosen by a mask",
        "data.augmentation:normalize", "    result = torch.empty(\n",
        "    images[images[:, 0, 0, 0] > 0]\n    result = torch.empty(\n",
        {}, "nonzero at data/augmentation.py",
    ),
    (
        "every forward pass copies the buffers of rank 0",
        "training.data_parallel:in_data_parallel", "broadcast_buffers = False", "dim = 0",
        EIGHT, "buffers travel in step 1",
    ),
    (
        "the gradients of every batch of a group are added up",
        "training.step:TrainStep.accumulate",
        "with self.synchronization(last_of_group):", "with self.synchronization(True):",
        {**EIGHT, "accumulate_grad_batches": 2, "batch_size": 256}, "more than the gradients is",
    ),
    (
        "the gradients are not added up",
        "training.step:TrainStep.accumulate",
        "with self.synchronization(last_of_group):", "with self.synchronization(False):",
        EIGHT, "gradients are not added up in step 1",
    ),
    (
        "a process evaluates with its own norms' statistics",
        "machine.distributed:share_buffers",
        "    if not dist.is_initialized():\n        return\n    by", "    return\n    by",
        EIGHT, "not of the buffers of rank 0",
    ),
]  # fmt: skip


# Much like others, and so found only with --long.
LIKE_OTHERS = {
    "the gradients are not added up",
    "the indices leave pinned memory",
    "the share of a mixed image is copied from the host",
    "what follows the warm-up does not wait for it",
    "the recorded backward pass is not replayed",
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_a_planted_fault_is_found(dry_run, long, fault):
    if fault[0] in LIKE_OTHERS and not long:
        pytest.skip("with --long")
    _, place, old, new, settings, said = fault
    processes = settings.get("processes", 1)
    settings = {key: value for key, value in settings.items() if key != "processes"}
    plants = ((PACKAGE + place, old, new),)
    report = dry_run(settings, processes=processes, plants=plants, may_fail=True)
    found = findings(report)
    assert any(said in line for line in found), found
