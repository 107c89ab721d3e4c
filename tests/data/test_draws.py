import numpy as np
import torch

from training_framework.data.draws import (
    BatchDraws,
    Purpose,
    SampleGenerators,
    keyed_generator,
)


def _draws(seed: int = 0, draws_per_sample: int = 3) -> BatchDraws:
    return BatchDraws(seed=seed, sample_count=1000, draws_per_sample=draws_per_sample, device="cpu")


def test_generators_of_different_keys_differ_and_of_equal_keys_agree() -> None:
    keys = [(0, Purpose.ORDER, 1), (0, Purpose.ORDER, 2), (1, Purpose.ORDER, 1)]
    keys.append((0, Purpose.MIXING, 1))
    firsts = [keyed_generator(*key).random() for key in keys]
    assert len(set(firsts)) == len(keys)
    assert firsts == [keyed_generator(*key).random() for key in keys]


def test_a_samples_draws_do_not_depend_on_its_batch_or_on_history() -> None:
    indices = torch.randperm(1000)[:64]
    fresh = _draws().uniforms(indices, epoch=4)
    used = _draws()
    used.uniforms(indices[:5], epoch=9)
    parts = [used.uniforms(part, epoch=4) for part in indices.split(17)]
    torch.testing.assert_close(torch.cat(parts, dim=1), fresh, rtol=0, atol=0)
    assert (fresh != used.uniforms(indices, epoch=5)).any()
    assert (fresh != _draws(seed=1).uniforms(indices, epoch=4)).any()


def test_more_draws_leave_the_first_ones_alike() -> None:
    indices = torch.arange(50)
    few = _draws(draws_per_sample=2).uniforms(indices, epoch=0)
    many = _draws(draws_per_sample=7).uniforms(indices, epoch=0)
    torch.testing.assert_close(many[:2], few, rtol=0, atol=0)


def test_draws_are_uniform() -> None:
    draws = _draws(draws_per_sample=4).uniforms(torch.arange(1000), epoch=0).numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    # The largest gap between the sorted draws and the uniform distribution (Kolmogorov, 0.1%).
    gaps = np.abs(np.sort(draws.ravel()) - np.linspace(0, 1, draws.size))
    assert gaps.max() < 1.95 / np.sqrt(draws.size)


def test_first_sides_are_half_true_and_stay() -> None:
    draws = _draws()
    sides = draws.first_sides(torch.arange(1000))
    assert sides.dtype == torch.bool
    assert 430 < int(sides.sum()) < 570
    assert torch.equal(sides[10:20], _draws().first_sides(torch.arange(10, 20)))


def test_steps_draw_the_same_on_every_instance() -> None:
    assert _draws().for_step(7).beta(0.2, 0.2) == _draws().for_step(7).beta(0.2, 0.2)
    assert _draws().for_step(7).random() != _draws().for_step(8).random()


def test_a_samples_stream_depends_on_its_key_alone() -> None:
    keys = [(0, Purpose.DECODING, 0, 0), (1, Purpose.DECODING, 0, 0), (0, Purpose.ORDER, 0, 0),
            (0, Purpose.DECODING, 1, 0), (0, Purpose.DECODING, 0, 1)]  # fmt: skip
    firsts = [SampleGenerators(*key[:2]).of(*key[2:]).random(9).tolist() for key in keys]
    assert len({tuple(draws) for draws in firsts}) == len(keys)
    generators = SampleGenerators(0, Purpose.DECODING)
    for epoch, sample in [(1, 5), (0, 1), (0, 0), (1, 0), (0, 0)]:
        generators.of(epoch, sample).random(7)  # leaves half a block of the counter
    generators.of(0, 1).integers(5, dtype=np.uint32)  # leaves half a word
    for key, expected in zip(keys, firsts, strict=True):
        if key[:2] == keys[0][:2]:
            assert generators.of(*key[2:]).random(9).tolist() == expected


def test_streams_of_neighbouring_samples_are_uniform_and_unrelated() -> None:
    generators = SampleGenerators(3, Purpose.DECODING)
    draws = np.array([generators.of(0, sample).random(4) for sample in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / 12) < 0.005
    columns = np.corrcoef(draws.T) - np.eye(4)
    neighbours = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    assert max(np.abs(columns).max(), abs(neighbours)) < 0.06
