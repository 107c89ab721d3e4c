import hashlib
import struct

import torch

from training_framework.data.sample_digest import SampleDigest, digest_of_batches

BATCHES = [torch.tensor(batch) for batch in ([5, 2, 7], [0, 1, 3], [6, 4])]


def digest(batches) -> str:
    grown = SampleDigest()
    for batch in batches:
        grown.add(batch)
    return grown.read()


def test_it_is_the_chained_hash_that_it_says():
    first = hashlib.blake2b(struct.pack("<3q", 5, 2, 7), digest_size=8).digest()
    second = hashlib.blake2b(first + struct.pack("<3q", 0, 1, 3), digest_size=8).hexdigest()
    assert digest(BATCHES[:2]) == second == digest_of_batches(BATCHES[:2])
    assert digest([]) == ""


def test_order_cut_repetition_and_omission_all_show():
    whole = digest(BATCHES)
    others = [
        [BATCHES[1], BATCHES[0], BATCHES[2]],
        [BATCHES[0].flip(0), *BATCHES[1:]],
        [torch.cat(BATCHES[:2]), BATCHES[2]],
        [BATCHES[0], *BATCHES],
        BATCHES[:2],
    ]
    assert len({whole, *(digest(batches) for batches in others)}) == len(others) + 1


def test_where_it_is_read_and_carried_over_changes_nothing():
    whole = digest(BATCHES)
    read_often = SampleDigest()
    for batch in BATCHES:
        read_often.add(batch)
        read_often.read()
    assert read_often.read() == whole
    carried = SampleDigest(digest(BATCHES[:1]))
    for batch in BATCHES[1:]:
        carried.add(batch)
    assert carried.read() == whole
