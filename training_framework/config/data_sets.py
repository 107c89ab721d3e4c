"""The data sets that `data` can name: one line each."""

from typing import NamedTuple

__all__ = ["DATA_SETS", "DataSetEntry"]


class DataSetEntry(NamedTuple):
    """Where to find the code of a data set.

    Attributes:
        source: `module:name` of its `DataSource`, imported when it is needed.
        reads_files: Whether it reads the user's files, from `data_root`.
    """

    source: str
    reads_files: bool = True


_SOURCES = "training_framework.data.sources"

# A path given without a name is tried in this order.
DATA_SETS = {
    "digits": DataSetEntry(f"{_SOURCES}.digits:SOURCE", reads_files=False),
    "folder": DataSetEntry(f"{_SOURCES}.folder:SOURCE"),
    "cifar10": DataSetEntry(f"{_SOURCES}.cifar:CIFAR10_SOURCE"),
    "cifar100": DataSetEntry(f"{_SOURCES}.cifar:CIFAR100_SOURCE"),
    "shards": DataSetEntry(f"{_SOURCES}.shards:SOURCE"),
    "synthetic": DataSetEntry(f"{_SOURCES}.synthetic:SOURCE", reads_files=False),
}
