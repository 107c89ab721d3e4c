"""Packages from a folder of wheels, for a machine without pip, network and our dependencies.

Only Python's own library is used here, since nothing else is there yet.
"""

import os
import platform
import re
import site as python_site
import sys
import zipfile
from pathlib import Path

__all__ = ["environment_for", "fits", "unpack_wheels"]

WHEEL = re.compile(
    r"(?P<name>[^-]+)-[^-]+(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<on>[^-]+)"
)


def fits(wheel: Path) -> bool:
    """Whether a wheel, by its name, is for this Python on this processor (PEP 425)."""
    match = WHEEL.fullmatch(wheel.stem)
    if match is None:
        return False
    minor = sys.version_info.minor
    pythons, abis = match["python"].split("."), match["abi"].split(".")
    here = f"cp3{minor}"
    older = {f"cp3{number}" for number in range(2, minor + 1)}
    right_python = (
        (here in pythons and here in abis)
        or ("abi3" in abis and not older.isdisjoint(pythons))
        or ("none" in abis and not {"py3", f"py3{minor}", here}.isdisjoint(pythons))
    )
    places = match["on"].split(".")
    return right_python and any(
        place == "any" or place.endswith(f"_{platform.machine()}") for place in places
    )


def unpack_wheels(wheels: Path, site: Path) -> list[str]:
    """Unpack the wheels that fit this machine, once.

    Args:
        wheels: The folder of wheels; it may be missing, for a machine that has everything.
        site: The folder to import from. A wheel that is there already is left alone.

    Returns:
        The names of the packages.
    """
    names = []
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        if not fits(wheel):
            continue
        names.append(wheel.name.partition("-")[0])
        mark = site / f".{wheel.stem}"
        if not mark.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            mark.touch()
    return names


def environment_for(site: Path, root: Path, scratch: Path) -> dict[str, str]:
    """Environment variables for a process that imports from `site` and `root`.

    Everything that it would write outside the results goes to `scratch`.
    """
    caches, temporary = scratch / "cache", scratch / "tmp"
    for folder in (caches, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(root), str(root / "benchmarks")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "KINETO_LOG_LEVEL": "6",
        "HOME": str(scratch),
        # Packages that pip has installed for this user alone, PyTorch perhaps, are in its home.
        "PYTHONUSERBASE": python_site.getuserbase(),
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(caches),
        "MPLCONFIGDIR": str(caches / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }
