import numpy as np
import pytest

from training_framework.data.sampling import (
    BatchPlan,
    epoch_order,
    evaluation_share,
    training_batches,
)
from training_framework.errors import UserError


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(101, seed=3, epoch=5, shuffle=True)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(101))
    np.testing.assert_array_equal(order, epoch_order(101, seed=3, epoch=5, shuffle=True))
    for seed, epoch in ((3, 6), (4, 5)):
        assert (order != epoch_order(101, seed=seed, epoch=epoch, shuffle=True)).any()


def test_order_without_shuffle_is_sequential() -> None:
    np.testing.assert_array_equal(epoch_order(4, seed=1, epoch=2, shuffle=False), [0, 1, 2, 3])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_world_size_sees_the_same_global_batches(world_size: int, drop_last: bool) -> None:
    order = epoch_order(50, seed=0, epoch=0, shuffle=True)
    alone = training_batches(order, global_batch_size=12, drop_last=drop_last)
    shares = [
        training_batches(
            order, global_batch_size=12, rank=rank, world_size=world_size, drop_last=drop_last
        )
        for rank in range(world_size)
    ]
    for parts in zip(*shares, strict=True):
        assert all(len(part) for part in parts)
    joined = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    # The two samples of the ragged batch cannot serve three ranks: they are left out there.
    expected = alone[: len(joined)]
    assert len(joined) == (4 if drop_last or world_size > 2 else 5)
    for got, wanted in zip(joined, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_ragged_batch_is_dropped_unless_it_is_the_only_one() -> None:
    order = np.arange(10)
    sizes = [len(batch) for batch in training_batches(order, global_batch_size=4)]
    assert sizes == [4, 4]
    kept = training_batches(order, global_batch_size=4, drop_last=False)
    assert [len(batch) for batch in kept] == [4, 4, 2]
    assert [len(batch) for batch in training_batches(order, global_batch_size=16)] == [10]


def test_start_batch_continues_the_same_epoch() -> None:
    order = epoch_order(40, seed=0, epoch=1, shuffle=True)
    whole = training_batches(order, global_batch_size=6, rank=1, world_size=2)
    rest = training_batches(order, global_batch_size=6, rank=1, world_size=2, start_batch=4)
    assert len(rest) == 2
    np.testing.assert_array_equal(np.stack(whole[4:]), np.stack(rest))
    assert training_batches(order, global_batch_size=6, start_batch=6) == []


def test_too_few_samples_for_the_ranks_is_an_error() -> None:
    with pytest.raises(UserError, match=r"3 training images .* of 4 processes"):
        training_batches(np.arange(3), global_batch_size=8, world_size=4)


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 2), (10, 3), (2, 4), (0, 2)])
def test_evaluation_counts_every_sample_once(count: int, world_size: int) -> None:
    shares = [evaluation_share(count, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_plan_keeps_the_ragged_batch_and_the_order() -> None:
    plan = BatchPlan(sample_count=11, global_batch_size=8, train=False, rank=1, world_size=2)
    assert [batch.tolist() for batch in plan.batches(0)] == [[5, 6, 7, 8], [9, 10]]
    assert [batch.tolist() for batch in plan.batches(3, start_batch=1)] == [[9, 10]]
    assert plan.batch_count == 2


def test_training_plan_has_another_order_every_epoch() -> None:
    plan = BatchPlan(sample_count=64, global_batch_size=10, train=True, seed=1)
    first, second = plan.batches(0), plan.batches(1)
    assert plan.batch_count == len(first) == len(second) == 6
    assert (np.stack(first) != np.stack(second)).any()
