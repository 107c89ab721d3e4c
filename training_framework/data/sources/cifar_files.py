"""The published files of CIFAR-10 and CIFAR-100."""

from dataclasses import dataclass

__all__ = ["CIFAR10", "CIFAR100", "CifarFiles"]


@dataclass(frozen=True, kw_only=True)
class CifarFiles:
    """Address, names, digests and statistics of a CIFAR data set.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The MD5 sums
    are those that torchvision checks (torchvision/datasets/cifar.py).
    """

    name: str
    folder: str
    train_files: tuple[str, ...]
    val_file: str
    meta_file: str
    labels_key: bytes
    names_key: bytes
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    url: str
    md5: str
    file_md5s: dict[str, str]

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


CIFAR10 = CifarFiles(
    name="cifar10",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    val_file="test_batch",
    meta_file="batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    file_md5s={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR100 = CifarFiles(
    name="cifar100",
    folder="cifar-100-python",
    train_files=("train",),
    val_file="test",
    meta_file="meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    file_md5s={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
)
