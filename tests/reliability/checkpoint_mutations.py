"""Ways to spoil a checkpoint's file: by accident, by mixing files up, and by intent."""

import hashlib
import io
import json
import pickle
import random
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["ACCIDENTS", "FORGERIES", "files_of_other_kinds"]

_DIGEST_FIELD = b'"sha256":"'
_NO_DIGEST = b"0" * 64


def _position(content: bytes, draws: random.Random) -> int:
    """Any byte, but the header's as often as the tensors'."""
    end = _header_end(content) if draws.random() < 0.5 else len(content)
    return draws.randrange(end)


def _header_end(content: bytes) -> int:
    return min(8 + int.from_bytes(content[:8], "little"), len(content))


def _range(content: bytes, draws: random.Random) -> tuple[int, int]:
    start = _position(content, draws)
    return start, min(len(content), start + draws.choice((1, 8, 64, 512, 4096, 65536)))


def truncated(content: bytes, other: bytes, draws: random.Random) -> bytes:
    near_an_end = draws.choice((draws.randrange(64), len(content) - 1 - draws.randrange(64)))
    return content[: draws.choice((_position(content, draws), near_an_end))]


def lengthened(content: bytes, other: bytes, draws: random.Random) -> bytes:
    return content + draws.choice((b"\0", draws.randbytes(512), content, other))


def bits_flipped(content: bytes, other: bytes, draws: random.Random) -> bytes:
    changed = bytearray(content)
    for position in {_position(content, draws) for _ in range(draws.choice((1, 1, 2, 8)))}:
        changed[position] ^= 1 << draws.randrange(8)
    return bytes(changed)


def range_filled(content: bytes, other: bytes, draws: random.Random) -> bytes:
    start, end = _range(content, draws)
    filling = draws.choice((b"\0", b"\xff")) * (end - start)
    return content[:start] + filling + content[end:]


def range_scrambled(content: bytes, other: bytes, draws: random.Random) -> bytes:
    start, end = _range(content, draws)
    return content[:start] + draws.randbytes(end - start) + content[end:]


def range_removed(content: bytes, other: bytes, draws: random.Random) -> bytes:
    start, end = _range(content, draws)
    return content[:start] + content[end:]


def range_doubled(content: bytes, other: bytes, draws: random.Random) -> bytes:
    start, end = _range(content, draws)
    return content[:end] + content[start:]


def pieces_swapped(content: bytes, other: bytes, draws: random.Random) -> bytes:
    size = draws.choice((8, 64, 512, 4096))
    first, second = sorted(draws.randrange(max(1, len(content) // size)) * size for _ in range(2))
    if second < first + size:
        return content
    pieces = content[:first], content[first : first + size], content[first + size : second]
    return pieces[0] + content[second : second + size] + pieces[2] + pieces[1] + content[
        second + size :
    ]  # fmt: skip


def pages_shuffled(content: bytes, other: bytes, draws: random.Random) -> bytes:
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    draws.shuffle(pages)
    return b"".join(pages)


def header_of_another(content: bytes, other: bytes, draws: random.Random) -> bytes:
    return other[: _header_end(other)] + content[_header_end(content) :]


def end_of_another(content: bytes, other: bytes, draws: random.Random) -> bytes:
    position = _position(content, draws)
    return content[:position] + other[position:]


Mutation = Callable[[bytes, bytes, random.Random], bytes]
ACCIDENTS: dict[str, Mutation] = {
    "truncated": truncated,
    "lengthened": lengthened,
    "bits flipped": bits_flipped,
    "range filled": range_filled,
    "range scrambled": range_scrambled,
    "range removed": range_removed,
    "range doubled": range_doubled,
    "pieces swapped": pieces_swapped,
    "pages shuffled": pages_shuffled,
    "header of another": header_of_another,
    "end of another": end_of_another,
}
"""From a checkpoint, another one of the same run, and a generator, to what a disk or a person may
make of them."""


def state_forged(content: bytes, other: bytes, draws: random.Random) -> bytes:
    """Some value of the state replaced by one of another kind."""
    header, tensors = _taken_apart(content)
    state = json.loads(header["__metadata__"]["state"])
    _forge_somewhere(state, draws)
    header["__metadata__"]["state"] = json.dumps(state)
    return _put_together(header, tensors)


def entries_forged(content: bytes, other: bytes, draws: random.Random) -> bytes:
    """Names, types, shapes and places of the tensors, or the fields beside them."""
    header, tensors = _taken_apart(content)
    _forge_somewhere(header, draws)
    return _put_together(header, tensors)


def tensors_forged(content: bytes, other: bytes, draws: random.Random) -> bytes:
    """Wrong numbers under right sums: NaN, infinity and noise."""
    header, tensors = _taken_apart(content)
    changed = bytearray(tensors)
    for _ in range(draws.choice((1, 16))):
        start = 4 * draws.randrange(len(changed) // 4)
        changed[start : start + 4] = draws.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", draws.randbytes(4))
        )
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    sums = [
        f"{zlib.crc32(changed[slice(*entry['data_offsets'])]):08x}" for entry in entries.values()
    ]
    header["__metadata__"]["crc32"] = " ".join(sums)
    return _put_together(header, bytes(changed))


FORGERIES: dict[str, Mutation] = {
    "state forged": state_forged,
    "entries forged": entries_forged,
    "tensors forged": tensors_forged,
}
"""Likewise, with digests that fit: what somebody makes who knows the format. Such a file may be a
good checkpoint of something else, so it may load; it must not do more."""


def _taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = _header_end(content)
    return json.loads(content[8:end]), content[end:]


def _put_together(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = text.find(_DIGEST_FIELD) + len(_DIGEST_FIELD)
    whole = bytearray(len(text).to_bytes(8, "little") + text)
    digest = slice(8 + start, 8 + start + 64)
    whole[digest] = _NO_DIGEST
    whole[digest] = hashlib.sha256(whole).hexdigest().encode()
    return bytes(whole) + tensors


def _forge_somewhere(tree: Any, draws: random.Random) -> None:
    """Replace, remove or add something at a random place of a JSON value."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        inner = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
        if not inner or draws.random() < 0.3:
            break
        node = node[draws.choice(inner)]
    key = draws.choice(keys)
    deed = draws.random()
    if deed < 0.15:
        del node[key]
    elif deed < 0.25 and isinstance(node, dict):
        node[draws.choice(("$tensor", "$items", "$tuple", "__class__", "extra"))] = node[key]
    else:
        node[key] = draws.choice(
            (
                None, True, -1, 2**63, 1e308, float("nan"), "", "x" * 1000, "../../etc/passwd", [],
                {}, [[]], {"$tensor": "nowhere"}, {"$items": [[1]]}, {"$tuple": 3},
                {"__reduce__": ["os.system", "true"]}, _nested(500), _nested(50_000),
                "!!python/object/apply:os.system ['true']", [2**40, 2**40], [0, 2**62],
            )
        )  # fmt: skip


def _nested(depth: int) -> Any:
    # As deep as JSON's writer goes at most; a string that only looks like JSON is data too.
    value: Any = 0
    for _ in range(min(depth, 900)):
        value = [value]
    return value if depth < 900 else "[" * depth


class _Touch:
    """Unpickled, it makes a file: the canary."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._canary), "w"))


def files_of_other_kinds(canary: Path, run_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that are no checkpoints, by what they are; some make the canary if their code runs.

    Args:
        canary: The file that must not appear.
        run_files: Other files of a run by name, which may be put in the place of a checkpoint.
    """
    saved = io.BytesIO()
    torch.save({"model": _Touch(canary), "format_version": 1}, saved)
    legacy = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(3)}}, legacy, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(_Touch(canary)))
    return {
        "empty": b"",
        "zeros": bytes(100_000),
        "text": b"last.ckpt\n" * 1000,
        "pickle with code": pickle.dumps({"model": _Touch(canary)}),
        "protocol 0 pickle with code": pickle.dumps({"model": _Touch(canary)}, protocol=0),
        "torch.save with code": saved.getvalue(),
        "torch.save of old": legacy.getvalue(),
        "zip with code": archive.getvalue(),
        "length of 2^63": (2**63).to_bytes(8, "little") + b'{"__metadata__":{"sha256":"' * 50,
        "header that never ends": (2**25).to_bytes(8, "little") + b'{"__metadata__":{"sha256":"',
        **run_files,
    }
