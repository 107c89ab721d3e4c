import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from training_framework.kernels.synchronized_norm import SynchronizedBatchNorm2d

BATCH_SIZES = (3, 5)
OPTIONS = {
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "plain": {"affine": False, "track_running_stats": False},
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, sum(BATCH_SIZES), 4, 3, 2)
    # A mean far from zero, where sums of squares would cancel.
    return list(100 + torch.randn(shape, generator=generator, dtype=torch.float64))


def targets() -> torch.Tensor:
    return torch.randn(batches()[0].shape, generator=torch.Generator().manual_seed(1)).double()


def prepare(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 4))
            norm.bias.copy_(torch.linspace(-1, 1, 4))
    return norm


def two_steps(norm, inputs, wanted) -> dict[str, torch.Tensor]:
    """Outputs, gradients of a summed squared error, and state after two training batches."""
    found = {}
    for step, batch in enumerate(inputs):
        x = batch.detach().requires_grad_()
        norm.zero_grad()
        output = norm(x)
        (output - wanted).square().sum().backward()
        found |= {f"output{step}": output.detach(), f"grad{step}": x.grad}
        found |= {f"{n}{step}": p.grad.clone() for n, p in norm.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    start = sum(BATCH_SIZES[:rank])
    mine = slice(start, start + BATCH_SIZES[rank])
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name, options in OPTIONS.items():
            parameter_dtype = torch.promote_types(dtype, torch.float32)
            norm = prepare(SynchronizedBatchNorm2d(4, **options)).to(parameter_dtype)
            inputs = [x[mine].to(dtype) for x in batches()]
            results[name, dtype] = two_steps(norm, inputs, targets()[mine].to(dtype))
    evaluated = SynchronizedBatchNorm2d(4).double().eval()
    results["evaluation"] = evaluated(batches()[0][mine]).detach()
    lonely = SynchronizedBatchNorm2d(4).double()
    results["empty"] = lonely(batches()[0][: (0, 8)[rank]]).detach()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(str(directory),), nprocs=2)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


def reference(name: str, round_to: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    norm = prepare(nn.BatchNorm2d(4, **OPTIONS[name])).double()
    inputs = [x.to(round_to).double() for x in batches()]
    return two_steps(norm, inputs, targets().to(round_to).double())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 2e-4), (torch.bfloat16, 0.05)],
)
def test_two_processes_equal_batch_norm_over_the_joined_batch(ranks, name, dtype, tolerance):
    expected = reference(name, round_to=dtype)
    first, second = (rank[name, dtype] for rank in ranks)
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith(("output", "grad")):
            got = torch.cat([first[key], second[key]])
            assert got.dtype == dtype
        elif key.startswith(("weight", "bias")):
            got = first[key] + second[key]
        else:
            assert torch.equal(first[key], second[key])
            got = first[key]
        torch.testing.assert_close(got.to(value.dtype), value, rtol=tolerance, atol=tolerance)


def test_evaluation_uses_the_running_statistics(ranks):
    got = torch.cat([rank["evaluation"] for rank in ranks])
    torch.testing.assert_close(got, nn.BatchNorm2d(4).double().eval()(batches()[0]))


def test_a_process_without_images_takes_part(ranks):
    assert ranks[0]["empty"].shape == (0, 4, 3, 2)
    torch.testing.assert_close(ranks[1]["empty"], nn.BatchNorm2d(4).double()(batches()[0]))


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_process_group_it_is_batch_norm(name):
    norm = prepare(SynchronizedBatchNorm2d(4, **OPTIONS[name])).double()
    expected = reference(name)
    for key, value in two_steps(norm, batches(), targets()).items():
        assert torch.equal(value, expected[key]), key
