"""Inputs made to run code, to write elsewhere or to take all memory: each is one clear line."""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training_framework.cli.main import main
from training_framework.data.sources.cifar import CIFAR10, CIFAR100, cifar_source

pytestmark = pytest.mark.usefixtures("narrow_networks")

SMALL = "--model resnet10 --batch-size 4 --epochs 1 --threads 1 --tensorboard false"
TINY = f"{SMALL} --data synthetic --img-size 8 --num-classes 4 --synthetic-train-images 36"
PICTURES = f"{SMALL} --data-root pictures --img-size 16 --num-workers 0"
CANARY = "touch canary"


@dataclass(frozen=True)
class Attack:
    """An attack: what it is, the command that meets it, what is said, and what prepares it.

    Attributes:
        memory: It is after memory, so it is met in a process whose memory is limited.
    """

    name: str
    command: str
    says: str
    prepare: Callable[[], Any] = lambda: None
    memory: bool = False


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class State:
    """Unpickled, it is given a state by a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object, (), CANARY, None, None, os.system


def text(path: str, content: str | bytes) -> Callable[[], None]:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def sparse(path: str, size: int = 1 << 40) -> Callable[[], None]:
    def write() -> None:
        Path(path).touch()
        os.truncate(path, size)

    return write


def saved(path: str, content: Any, **options: Any) -> Callable[[], None]:
    return lambda: torch.save(content, path, **options)


def cifar(first_batch: bytes | Callable[[], bytes]) -> Callable[[], None]:
    """A CIFAR-10 whose first file is hostile."""

    def make() -> None:
        folder = Path(CIFAR10.folder)
        folder.mkdir()
        meta = {b"label_names": [f"class {number}".encode() for number in range(10)]}
        (folder / CIFAR10.meta_file).write_bytes(pickle.dumps(meta, protocol=2))
        whole = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
        for name in (*CIFAR10.train_files[1:], CIFAR10.val_file):
            (folder / name).write_bytes(pickle.dumps(whole, protocol=2))
        content = first_batch() if callable(first_batch) else first_batch
        (folder / CIFAR10.train_files[0]).write_bytes(content)

    return make


def pictures(*changes: Callable[[], Any]) -> Callable[[], None]:
    def make() -> None:
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                folder = Path("pictures", split, name)
                folder.mkdir(parents=True)
                for number in range(3):
                    Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
        for change in changes:
            change()

    return make


HOSTILE_PICTURE = "pictures/train/ant/0.png"


def hostile_picture(content: bytes | Callable[[], bytes]) -> Callable[[], None]:
    def write() -> None:
        Path(HOSTILE_PICTURE).write_bytes(content() if callable(content) else content)

    return pictures(write)


def link(path: str, target: str) -> Callable[[], None]:
    def make() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(target)

    return make


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def picture_bytes(form: str, image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def tiff(**tags: int) -> bytes:
    """A little TIFF with tags of one's own."""
    values = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: 256}
    values.update({int(name.removeprefix("tag")): value for name, value in tags.items()})
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items())
    )
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return (struct.pack("<2sHI", b"II", 42, 8) + directory).ljust(200, b"\0") + bytes(256)


def safetensors_file(path: str, header: Any, body: bytes = b"", length: int | None = None) -> Any:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(encoded) if length is None else length)
    return text(path, size + encoded + body)


def tensor_of(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"fc.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


CARD = {
    "model": "resnet10", "stem": "cifar", "share_early_weights": False, "class_names": ["a", "b"],
    "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "center_crop": True,
}  # fmt: skip


def card(**changes: Any) -> Callable[[], None]:
    network = json.dumps({**CARD, **changes})
    return lambda: save_file({"a": torch.zeros(1)}, "w.safetensors", metadata={"network": network})


def bomb_archive(path: Path, *members: tuple[str, dict[str, Any]]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, fields in members:
            member = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member)


def nested_lists(depth: int) -> list[Any]:
    nested: list[Any] = [0] * 10
    for _ in range(depth):
        nested = [nested] * 10
    return nested


LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 15))
EXPERIMENT = "variants:\n- name: plain\n- name: hostile\n  environment: {{{}}}\n"
COMPARE = "compare hostile.yaml --model resnet10 --data synthetic"
NOT_CIFAR = (
    r"cifar-10-batches-py/data_batch_1: not a CIFAR file \({}\); replace it with the original"
)
FROM_CIFAR = "plan --data cifar10 --data-root ."
FROM_WEIGHTS = f"train {TINY} --weights"
HOSTILE_TEXT = 200_000 * b"a"

PICKLES = [
    Attack(
        f"a CIFAR file that calls {name}",
        FROM_CIFAR,
        NOT_CIFAR.format(rf".*\b{name} is not allowed"),
        cifar(pickle.dumps({b"data": Call(function, *arguments)}, protocol)),
    )
    for name, function, arguments, protocol in (
        ("system", os.system, (CANARY,), 2),
        ("eval", eval, ("open('canary', 'w')",), 2),
        ("exec", exec, ("open('canary', 'w')",), 4),
        ("Popen", subprocess.Popen, (["touch", "canary"],), 3),
        ("fromfile", np.fromfile, ("/etc/passwd", np.uint8), 2),
        ("memmap", np.memmap, ("canary", np.uint8, "w+", 0, (1,)), 4),
        ("load", torch.load, ("canary",), 2),
    )
]
PICKLES += [
    Attack(
        "a CIFAR file with a state set by a function",
        FROM_CIFAR,
        NOT_CIFAR.format(".*not allowed.*"),
        cifar(pickle.dumps({b"data": State()}, 4)),
    ),
    Attack(
        "a CIFAR file with an old instance",
        FROM_CIFAR,
        NOT_CIFAR.format(".*INST is not allowed"),
        cifar(b"(S'touch canary'\nios\nsystem\n."),
    ),
    Attack(
        "a CIFAR file of objects",
        FROM_CIFAR,
        NOT_CIFAR.format(".*'O8' is not allowed"),
        cifar(pickle.dumps({b"data": np.array([Call(os.system, CANARY)], dtype=object)})),
    ),
    Attack(
        "a CIFAR file that makes a huge array",
        FROM_CIFAR,
        NOT_CIFAR.format(".*call of NDARRAY is not allowed"),
        cifar(b"\x80\x02cnumpy\nndarray\n(\x8a\x05\x00\x00\x00\x00\x40tR."),
        memory=True,
    ),
    Attack(
        "a CIFAR file that encodes a text over and over",
        FROM_CIFAR,
        NOT_CIFAR.format(".*more memory than its size justifies"),
        cifar(
            b"\x80\x02c_codecs\nencode\nq\x00X\x40\x0d\x03\x00" + HOSTILE_TEXT + b"q\x01"
            b"X\x06\x00\x00\x00latin1q\x02](" + b"h\x00h\x01h\x02\x86R" * 100_000 + b"e."
        ),
        memory=True,
    ),
    Attack(
        "a CIFAR file with a memo of billions",
        FROM_CIFAR,
        r".*data_batch_1: does not contain 'data' and 'labels'; take the file from .*",
        cifar(b"\x80\x02Nr\xff\xff\xff\x7f."),
        memory=True,
    ),
    Attack(
        "a CIFAR file whose labels are lists in lists",
        FROM_CIFAR,
        r".*data_batch_1: the labels are not integers; take the file from .*",
        cifar(
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": nested_lists(12)}, 2)
        ),
        memory=True,
    ),
    Attack(
        "a CIFAR file of a terabyte",
        FROM_CIFAR,
        r".*data_batch_1: 1,099,511,627,776 bytes are too many for such a file; .*",
        lambda: (cifar(b"")(), sparse(f"{CIFAR10.folder}/data_batch_1")()),
        memory=True,
    ),
]
WEIGHTS = [
    *(
        Attack(
            f"{suffix} that runs code, {'zipped' if zipped else 'old'}",
            f"{FROM_WEIGHTS} hostile{suffix}",
            rf"hostile\{suffix}: contains more than tensors \(\w+\.system\) and was not loaded, .*",
            saved(
                f"hostile{suffix}",
                {"state_dict": {"fc.weight": Call(os.system, CANARY)}},
                _use_new_zipfile_serialization=zipped,
            ),
        )
        for suffix in (".pth", ".pt", ".ckpt")
        for zipped in (True, False)
    ),
    Attack(
        "weights in a whole pickled network",
        f"{FROM_WEIGHTS} network.pth",
        r"network\.pth: contains more than tensors \(torch\.nn\..*\) and was not loaded, .*",
        saved("network.pth", torch.nn.Linear(2, 2)),
    ),
    Attack(
        "weights with a state set by a function",
        f"{FROM_WEIGHTS} state.pth",
        r"state\.pth: (contains more than tensors|not a readable weight file) .*",
        saved("state.pth", State(), pickle_protocol=4),
    ),
    Attack(
        "weights that are compressed a thousandfold",
        f"{FROM_WEIGHTS} bomb.pth",
        r"bomb\.pth: was not loaded, since it could use up the memory \(.* compressed.*\); .*",
        lambda: deflated("bomb.pth", 1 << 28),
        memory=True,
    ),
    Attack(
        "weights that encode a text over and over",
        f"{FROM_WEIGHTS} bomb.pth",
        r"bomb\.pth: was not loaded, since it could use up the memory \(.*over and over\); .*",
        text(
            "bomb.pth",
            b"\x80\x02c_codecs\nencode\nq\x00X\x40\x0d\x03\x00" + HOSTILE_TEXT + b"q\x01"
            b"X\x06\x00\x00\x00latin1q\x02](" + b"h\x00h\x01h\x02\x86R" * 100_000 + b"e.",
        ),
        memory=True,
    ),
    Attack(
        "weights that stretch one number",
        f"{FROM_WEIGHTS} wide.pth",
        r"wide\.pth: 'fc\.weight' is larger than its stored data; .*",
        lambda: torch.save({"fc.weight": torch.zeros(()).expand(1 << 20, 1 << 20)}, "wide.pth"),
        memory=True,
    ),
    Attack(
        "a checkpoint that runs code",
        "train --resume hostile.ckpt",
        r"hostile\.ckpt: .*",
        saved("hostile.ckpt", {"format_version": 1, "model": Call(os.system, CANARY)}),
    ),
    Attack(
        "a network to evaluate that runs code",
        "evaluate hostile.ckpt",
        r"hostile\.ckpt: .*",
        saved("hostile.ckpt", Call(os.system, CANARY), _use_new_zipfile_serialization=False),
    ),
    Attack(
        "a network to predict with that is a bare pickle",
        "predict hostile.ckpt pictures",
        r"hostile\.ckpt: .*",
        pictures(text("hostile.ckpt", pickle.dumps(Call(os.system, CANARY)))),
    ),
    *(
        Attack(
            f"safetensors with {name}",
            f"{FROM_WEIGHTS} lies.safetensors",
            r"lies\.safetensors: .*",
            safetensors_file("lies.safetensors", header, body, length),
            memory=True,
        )
        for name, header, body, length in (
            ("a header of exabytes", {}, b"", 1 << 60),
            ("a header longer than the file", {}, b"", 90_000_000),
            ("offsets past the end", tensor_of([1 << 20, 1 << 18], [0, 1 << 40]), b"", None),
            ("offsets that go backwards", tensor_of([2], [8, 0]), bytes(8), None),
            ("a shape that overflows", tensor_of([1 << 62, 16], [0, 8]), bytes(8), None),
            ("a negative shape", tensor_of([-1], [0, 4]), bytes(4), None),
            ("an unknown dtype", tensor_of([1], [0, 4], "EVIL"), bytes(4), None),
            ("a header that is no object", [1, 2], b"", None),
            ("a header of brackets", b"[" * 100_000, b"", None),
        )
    ),
    *(
        Attack(
            f"a card with {name}",
            "predict w.safetensors pictures",
            r"w\.safetensors: .*",
            pictures(card(**changes)),
            memory=True,
        )
        for name, changes in (
            ("an enormous image size", {"image_size": 10**6}),
            ("a number of classes beyond memory", {"class_names": ["a"] * 10**6}),
            ("a module for a model", {"model": "os.system"}),
            ("code for a stem", {"stem": "__import__('os').system('touch canary')"}),
            ("a mean of text", {"mean": ["touch", "canary", "x"]}),
            ("a field that is none", {"__class__": "os.system"}),
            ("a deviation of infinity", {"std": [math.inf] * 3}),
        )
    ),
]
YAML = [
    *(
        Attack(
            f"YAML with {tag}",
            "plan --config hostile.yaml",
            r"hostile\.yaml: is not valid YAML in line 1: could not determine a constructor .*",
            text("hostile.yaml", f"lr: !!python/{tag}"),
        )
        for tag in (
            "object/apply:os.system ['touch canary']",
            "object/new:os.system ['touch canary']",
            "object/apply:subprocess.Popen [[touch, canary]]",
            "name:os.system ''",
            "module:os ''",
            "object:training_framework.cli.main.main {}",
            "tuple [1, 2]",
        )
    ),
    Attack(
        "YAML tags in a flag",
        "plan --lr '!!python/object/apply:os.system [touch canary]'",
        r"command line: lr: .* should be a valid number or 'auto'; .*",
    ),
    Attack(
        "a billion laughs",
        "plan --config hostile.yaml",
        r"hostile\.yaml: is not valid YAML in line 1: its aliases expand to more than .*",
        text("hostile.yaml", "l0: &l0 [lol, lol]\n" + LAUGHS + "lr: *l14\n"),
        memory=True,
    ),
    Attack(
        "a billion laughs in merged keys",
        "plan --config hostile.yaml",
        r"hostile\.yaml: is not valid YAML in line 1: its aliases expand to more than .*",
        text(
            "hostile.yaml",
            "m0: &m0 {a: 1}\n"
            + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n"
                      for n in range(1, 12)),
        ),
        memory=True,
    ),
    Attack(
        "an alias within itself",
        "plan --config hostile.yaml",
        r"hostile\.yaml: is not valid YAML.*: an alias contains itself; .*",
        text("hostile.yaml", "lr: &a [*a]\n"),
    ),
    Attack(
        "a number of a hundred thousand digits",
        "plan --config hostile.yaml",
        r"hostile\.yaml: (is not valid YAML.*|epochs: .{0,300}); .*",
        text("hostile.yaml", f"epochs: 0x{'f' * 100_000}\n"),
    ),
    Attack(
        "a value of a hundred thousand characters",
        "plan --config hostile.yaml",
        r"hostile\.yaml: lr: '.{1,300}' should be .{0,300}",
        text("hostile.yaml", f"lr: {'x' * 100_000}\n"),
    ),
    Attack(
        "brackets in brackets",
        "plan --config hostile.yaml",
        r"hostile\.yaml: is not valid YAML.*",
        text("hostile.yaml", "[" * 20_000),
    ),
    Attack(
        "thousands of keys",
        "plan --config hostile.yaml",
        r"hostile\.yaml: unknown key .*",
        text("hostile.yaml", "".join(f"k{number}: 1\n" for number in range(8_000))),
    ),
    Attack(
        "a configuration of a terabyte",
        "plan --config hostile.yaml",
        r"hostile\.yaml: is larger than 128 KiB; .*",
        sparse("hostile.yaml"),
        memory=True,
    ),
    Attack(
        "an endless configuration",
        "plan --config /dev/zero",
        r"/dev/zero: no such configuration file; .*",
        memory=True,
    ),
    Attack(
        "files that extend each other twice over",
        "plan --config e0.yaml",
        r"e40\.yaml: unknown key 'zzz'; .*",
        lambda: [
            text("e40.yaml", "zzz: 1")(),
            *(text(f"e{n}.yaml", f"extends: [e{n + 1}.yaml, e{n + 1}.yaml]")() for n in range(40)),
        ],
    ),
    Attack(
        "a base that is the password file",
        "plan --config hostile.yaml",
        r"/etc/passwd: (?!.*root).*",
        text("hostile.yaml", "extends: /etc/passwd\n"),
    ),
]  # fmt: skip
CODE_IN_NAMES = [
    *(
        Attack(
            f"{value} for a {key}",
            f"plan --config hostile.yaml {extra}",
            rf"hostile\.yaml: {key}: .* should .*",
            text("hostile.yaml", f"{key}: {json.dumps(value)}\n"),
        )
        for key, value, extra in (
            ("model", "os.system", ""),
            ("model", "training_framework.models.resnet:build_model", ""),
            ("optimizer", "torch.optim.SGD", ""),
            ("optimizer", "__import__('os').system('touch canary')", ""),
            ("scheduler", "builtins.eval", ""),
            ("data", "hostile.py", ""),
            ("precision", "exec", ""),
            ("compile_mode", "lambda: 0", ""),
            ("name", "x; touch canary", ""),
            ("name", "$(touch canary)", ""),
            ("name", "../../canary", ""),
            ("name", "/canary", ""),
            ("name", "-rf", ""),
            ("stem", ["os.system"], ""),
            ("lr", {"__reduce__": "os.system"}, ""),
        )
    ),
    Attack(
        "a key that names code",
        "plan --config hostile.yaml",
        r"hostile\.yaml: unknown key '_target_'; .*",
        text("hostile.yaml", "_target_: os.system\n"),
    ),
    *(
        Attack(
            f"an experiment that sets {variable}",
            COMPARE,
            r"hostile\.yaml: .*hostile: environment: \w+ could load code; .*",
            text("hostile.yaml", EXPERIMENT.format(f"{variable}: {value}")),
        )
        for variable, value in (
            ("LD_PRELOAD", "/tmp/evil.so"),
            ("PYTHONSTARTUP", "evil.py"),
            ("PATH", "."),
            ("CXX", "evil"),
            ("OMP_TOOL_LIBRARIES", "evil.so"),
            ("CUDA_INJECTION64_PATH", "evil.so"),
            ("NCCL_NET_PLUGIN", "evil"),
            ("KMP_SETTINGS", "/etc"),
        )
    ),
]
FOLDERS = [
    Attack(
        "an image that links to the password file",
        f"train {PICTURES} --batch-size 6",
        r"pictures/train/ant/0\.png: not an image of a known format (?!.*root).*",
        pictures(link(HOSTILE_PICTURE, "/etc/passwd")),
    ),
    Attack(
        "an image that never ends",
        f"plan {PICTURES}",
        r"pictures/train/ant/0\.png: not a file; .*",
        pictures(link(HOSTILE_PICTURE, "/dev/zero")),
        memory=True,
    ),
    Attack(
        "a pipe for an image",
        f"plan {PICTURES}",
        r"pictures/train/ant/pipe\.png: not a file; .*",
        pictures(lambda: os.mkfifo("pictures/train/ant/pipe.png")),
    ),
    Attack(
        "a folder that holds itself",
        f"plan {PICTURES}",
        r"pictures/train/ant/again: the class contains this folder twice, through a link; "
        "remove the link",
        pictures(link("pictures/train/ant/again", ".")),
    ),
    Attack(
        "a file name that commands the terminal",
        f"plan {PICTURES}",
        r"pictures/train/ant/\\x1b\]0;evil\\x07 \\x1b\[2J\.txt: "
        "does not have the suffix of an image; .*",
        pictures(text("pictures/train/ant/\x1b]0;evil\x07\n\x1b[2J.txt", "")),
    ),
    Attack(
        "an image of a terabyte",
        f"train {PICTURES} --batch-size 6",
        r"pictures/train/ant/0\.png: 1,099,511,627,776 bytes are more than .*",
        pictures(sparse(HOSTILE_PICTURE)),
        memory=True,
    ),
    *(
        Attack(
            f"an image that is {name}",
            f"train {PICTURES} --batch-size 6",
            rf"pictures/train/ant/0\.png: {says}.*",
            hostile_picture(content),
            memory=True,
        )
        for name, says, content in (
            ("a page of PostScript", "not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%Page: 1"),
            ("a page of SVG", "not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
            ("a PCX file", "not an image", lambda: picture_bytes("PCX", Image.new("L", (9, 9)))),
            ("a PNG of 900 million pixels", "(30000x30000|more than)", png(30_000, 30_000)),
            ("a PNG of 2**60 pixels", "(not an image|more than|.* pixels)", png(1 << 30, 1 << 30)),
            (
                "a PNG with a text of a gigabyte",
                "(cannot be decoded|not an image)",
                lambda: png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 28))),
                            data=bytes(8 * 25)),
            ),
            (
                "a PNG with a thousand texts",
                "(cannot be decoded|not an image)",
                lambda: png(8, 8, *[(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 200,
                            data=bytes(8 * 25)),
            ),
            ("a TIFF with a strip of gigabytes", "cannot be decoded",
             tiff(tag279=1 << 31, tag278=1 << 30, tag256=4000, tag257=4000)),
            ("a TIFF of a huge tile", "a tile of 32768x32768 pixels is more than",
             tiff(tag259=5, tag322=1 << 15, tag323=1 << 15, tag324=200, tag325=256)),
            ("a BMP of negative sides", ".*",
             b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -5, -(1 << 31), 1, 24, 0, 0,
                                 0, 0, 0, 0)),
            ("a WebP of its largest size", ".*",
             lambda: picture_bytes("WEBP", Image.new("RGB", (16383, 9)))[:30]),
        )
    ),
]  # fmt: skip
RESULTS = [
    *(
        Attack(
            f"a result {name}",
            "report r.json",
            r"(r\.json|/dev/zero): .*",
            text("r.json", content),
        )
        for name, content in (
            ("of brackets", "[" * 200_000),
            ("with a number of five thousand digits", '{"variants": ' + "9" * 5000 + "}"),
            ("with the wrong types", '{"variants": {"<script>": 1}, "ratios": "x"}'),
            ("of a run with text for steps",
             json.dumps({"metrics": [{"step": "__import__('os')"}]})),
            ("that is no object", '"<script>alert(1)</script>"'),
        )
    ),
    Attack("a result of a terabyte", "report r.json", r"r\.json: larger than .*",
           sparse("r.json"), memory=True),
    Attack("an endless result", "report /dev/zero", r"/dev/zero: not a file; .*", memory=True),
]  # fmt: skip
ATTACKS = [*PICKLES, *WEIGHTS, *YAML, *CODE_IN_NAMES, *FOLDERS, *RESULTS]


def deflated(path: str, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))


def fault_of(attack: Attack, status: int, err: str) -> str:
    """What is wrong with how an attack ended; empty where it was refused in good order."""
    lines = err.splitlines()
    if status != 2 or [line for line in lines if line.startswith("error: ")] != lines[-1:]:
        return f"status {status}: {err[-2000:]}"
    if not re.fullmatch(attack.says, lines[-1].removeprefix("error: ")):
        return f"says {lines[-1][:1000]}"
    if "Traceback" in err or not lines[-1].isprintable():
        return f"says {err[:1000]!r}"
    canaries = [str(path) for path in Path.cwd().parent.rglob("canary*")]
    return f"made {canaries}" if canaries else ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is alone in its own, where a canary elsewhere is noticed too."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def test_the_canary_sings_where_nothing_stops_it(place: Path) -> None:
    """The attacks would work: unpickled by Python itself, the canary appears."""
    pickle.loads(pickle.dumps(Call(os.system, CANARY)))
    assert Path("canary").exists()


def test_there_are_enough_attacks_and_each_has_its_own_name() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 100
    assert sum(attack.memory for attack in ATTACKS) >= 25


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if not attack.memory], ids=lambda attack: attack.name
)
def test_an_attack_is_one_line_and_nothing_runs(
    attack: Attack, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack.prepare()
    status = main(shlex.split(attack.command))
    assert not fault_of(attack, status, capsys.readouterr().err)


MAX_MEMORY_BYTES = 1 << 30


def test_attacks_on_memory_are_one_line_and_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def attack_memory(place: Path) -> None:
    """Meet the attacks on memory in this process, which may hardly grow; say what went wrong."""
    for attack in (attack for attack in ATTACKS if attack.memory):
        folder = place / re.sub(r"\W+", "-", attack.name) / "here"
        folder.mkdir(parents=True)
        os.chdir(folder)
        attack.prepare()
    assert main(["plan", "--data", "synthetic"]) == 0  # with all that has to be imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    for attack in (attack for attack in ATTACKS if attack.memory):
        os.chdir(place / re.sub(r"\W+", "-", attack.name) / "here")
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = main(shlex.split(attack.command))
        fault = fault_of(attack, status, err.getvalue())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (peak - before) * 1024 > MAX_MEMORY_BYTES:
            fault += f" peak memory {peak // 1024} MiB"
        if fault:
            faults.append(f"{attack.name}: {fault}")
    print("\n".join(faults))
    sys.exit(bool(faults))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../canary", {}),
        ("/tmp/canary-absolute", {}),
        (f"{CIFAR100.folder}/../../canary", {}),
        (f"{CIFAR100.folder}/train", {"type": tarfile.SYMTYPE, "linkname": "../../canary"}),
        (f"{CIFAR100.folder}/train", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
        (f"{CIFAR100.folder}/train", {"type": tarfile.FIFOTYPE}),
        (f"{CIFAR100.folder}/meta", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
    ],
)
def test_an_archive_that_reaches_out_is_one_line(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fields: dict[str, Any],
) -> None:
    archive = Path("data", CIFAR100.archive)
    archive.parent.mkdir()
    bomb_archive(archive, (name, fields))
    source = replace(
        CIFAR100,
        md5=hashlib.md5(archive.read_bytes()).hexdigest(),
        url=f"http://127.0.0.1:9/{CIFAR100.archive}",
    )
    place_of_source = "training_framework.data.sources.cifar.CIFAR100_SOURCE"
    monkeypatch.setattr(place_of_source, cifar_source(source))
    attack = Attack("", "plan --data cifar100", rf".*/data/{re.escape(source.archive)}: .*")
    assert not fault_of(attack, main(shlex.split(attack.command)), capsys.readouterr().err)
    assert [path.name for path in archive.parent.iterdir()] == [source.archive]
    assert not Path("/tmp/canary-absolute").exists()


RESULTS_FOLDER = Path(__file__).parents[2] / "benchmarks/results"
REAL_RESULTS = [next(RESULTS_FOLDER.glob(f"{name}_*.json")) for name in ("demo", "cifar10-short")]


class Page(HTMLParser):
    """What of a page could act: tags that run or load, attributes that do."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "img", "object", "embed", "form", "base", "audio", "video"):
            self.active.append(tag)
        for name, value in attrs:
            loads = name in ("href", "src") and not (value or "").startswith(("#", "data:,"))
            if name.startswith("on") or loads:
                self.active.append(f"{tag} {name}={value}")


INJECTIONS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><script>x</script>",
    "</text></svg><script>x</script>",
    "javascript:alert(1)",
    "<!--",
    "]]><b>",
]


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("result", REAL_RESULTS, ids=lambda path: path.stem.partition("_")[0])
def test_text_in_results_stays_text_in_the_page(place: Path, result: Path, injection: str) -> None:
    """Every text of a real run's result is hostile, and a key of each free mapping."""

    def hostile(value: Any, path: tuple[str, ...] = ()) -> Any:
        if isinstance(value, dict):
            free = path[-1:] in (("environment",), ("versions",), ("config",), ("hardware",))
            pairs = {key: hostile(part, (*path, key)) for key, part in value.items()}
            return {**pairs, injection: injection} if free else pairs
        if isinstance(value, list):
            return [hostile(part, path) for part in value]
        return injection + value if isinstance(value, str) and "metrics" not in path else value

    content = json.loads(result.read_text(encoding="utf-8"))
    Path("r.json").write_text(json.dumps(hostile(content)), encoding="utf-8")
    assert main(["report", "r.json"]) == 0
    page = Page()
    page.feed(Path("report.html").read_text(encoding="utf-8"))
    assert page.active == []
    assert main(["report", "r.json", "--markdown"]) == 0


if __name__ == "__main__":
    attack_memory(Path(sys.argv[1]))
