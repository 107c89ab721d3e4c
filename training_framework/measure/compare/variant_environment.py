"""Which environment variables an experiment may set for its variants."""

import re
from collections.abc import Mapping

__all__ = ["refused_variable"]

# An experiment file from somebody else must not be able to load code, as LD_PRELOAD would.
_SETTINGS_OF_LIBRARIES = re.compile(
    r"(ATEN|CUBLAS|CUDA|CUDNN|DNNL|GOMP|KMP|MALLOC|MKL|NCCL|NVIDIA|OMP|ONEDNN|OPENBLAS|PYTORCH"
    r"|TORCH|TORCHINDUCTOR)_[A-Z0-9_]+"
)
_NAMES_CODE = re.compile(r"PATH|PLUGIN|LIB|TOOL|INJECT|PRELOAD|CXX|COMPILER|HOOK|DIR|FILE")


def refused_variable(environment: Mapping[str, str]) -> str | None:
    """The first variable that could load a program or library; None if there is none.

    Only switches and numbers of the libraries that compute are allowed, and none that names a file.
    """
    for name, value in environment.items():
        known = _SETTINGS_OF_LIBRARIES.fullmatch(name) and not _NAMES_CODE.search(name)
        if not known or "/" in value:
            return name
    return None
