"""Reads data sets by name: those that come with scikit-learn and Python, and those that torchvision reads."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysubset.config import DataConfig, TaskConfig
from raysubset.data.decoding import Source, SourceSplit
from raysubset.data.finding import Ignored
from raysubset.data.images import as_images
from raysubset.data.split import SplitName
from raysubset.data.tables import Tables, tables_in_memory
from raysubset.data.targets import Targets, class_targets, named_labels
from raysubset.errors import first_line
from raysubset.events import Note

TABLE_NAMES = ("breast_cancer", "wine", "iris", "diabetes")
TEXT_NAMES = ("python_docs",)

_TEST_SEED, _TEST_SHARE = 0, 0.1  # of python_docs' topics


def read_named_table(config: DataConfig) -> Tables:
    """Read one of TABLE_NAMES, with scikit-learn's names of columns and classes. None has a test split.

    Raises:
        ValueError: if the config names a missing column.
    """
    from sklearn import datasets

    Ignored(config).refuse_unmatched(())
    options = {"scaled": False} if config.name == "diabetes" else {}
    loaded: Any = getattr(datasets, f"load_{config.name}")(**options)
    columns = {str(name): pa.array(values) for name, values in zip(loaded.feature_names, loaded.data.T, strict=True)}
    target = pa.array(loaded.target)
    if "target_names" in loaded:
        names = pa.array([str(name) for name in loaded.target_names])
        target = pa.DictionaryArray.from_arrays(target.cast(pa.int32()), names)
    table = pa.table({**columns, "target": target})
    note = Note(f"train split: {table.num_rows} examples of the named set {config.name}")
    return tables_in_memory({"train": (config.name, table)}, config, "classification", [note])


def read_named_texts(config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    """Read one of TEXT_NAMES: Python's own help, one document a topic, some of them for testing; and notes."""
    from pydoc_data import topics  # type: ignore[import-untyped]

    texts: list[str] = [topics.topics[name] for name in sorted(topics.topics)]
    is_test = np.random.default_rng(_TEST_SEED).permutation(len(texts)) < round(len(texts) * _TEST_SHARE)
    splits: dict[SplitName, list[str]] = {
        "train": [text for text, test in zip(texts, is_test, strict=True) if not test],
        "test": [text for text, test in zip(texts, is_test, strict=True) if test],
    }
    topics_by_split = Ignored(config).chosen(splits)
    version = ".".join(map(str, sys.version_info[:2]))
    notes = [
        Note(
            f"{name} split: {sum(map(len, topic_texts))} characters of {len(topic_texts)} of the {len(texts)} help "
            f"topics of Python {version}{', drawn by chance' if name == 'test' else ''}"
        )
        for name, topic_texts in topics_by_split.items()
    ]
    return topics_by_split, tuple(notes)


def read_named(config: DataConfig, task: TaskConfig) -> tuple[Source, Targets, tuple[Note, ...]]:
    """Read one of the data sets of images in config.DATA_NAMES.

    Raises:
        ValueError: if its files are missing, damaged, or cannot be downloaded, or if the task does not learn classes.
    """
    parts: dict[SplitName, bool] = {"train": True} if config.name == "digits" else {"train": True, "test": False}
    source, labels, notes = Source(), dict[SplitName, pa.ChunkedArray](), list[Note]()
    for split, is_train in Ignored(config).chosen(parts).items():
        pixels, labels[split] = _digits() if config.name == "digits" else _torchvision(config, train=is_train)
        images, _ = as_images(pixels, config.name, config.image_size)
        source[split] = SourceSplit(images, config.name)
        notes.append(Note(f"{split} split: {len(images)} examples of the named set {config.name}"))
    return source, class_targets(labels, config, task), tuple(notes)


def _digits() -> tuple[np.ndarray, pa.ChunkedArray]:
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    # the file of load_digits(); importing sklearn, which imports scipy, takes more than a second of a CPU
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0 to 16 in the source
    return pixels, pa.chunked_array([rows[:, -1].astype(np.int64)])


def _torchvision(config: DataConfig, *, train: bool) -> tuple[np.ndarray, pa.ChunkedArray]:
    name, root = config.name, Path(config.root).expanduser()
    files = torchvision_files(name, str(root))
    missing = [path for path in files if not path.exists()]
    if missing and not config.download:
        raise ValueError(
            f"{name} is not under {root}: expected {', '.join(str(path.relative_to(root)) for path in missing)} "
            "there: set --data.root to the folder that has them, or fetch them with --data.download"
        )
    try:
        pixels, labels, class_names = _read(name, root, files, train=train, download=bool(missing))
    # URLError is an OSError; CIFAR's pickles are checked against torchvision's digests first.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if missing:
            raise ValueError(
                f"{name} could not be downloaded ({reason}): put {', '.join(path.name for path in missing)} "
                f"into {missing[0].parent} by hand"
            ) from error
        raise ValueError(
            f"{name} under {root} is damaged ({reason}): set --data.root to an intact copy, or remove "
            f"{files[0].parent} and fetch it again with --data.download"
        ) from error
    return pixels, named_labels(labels, class_names, name) if class_names else pa.chunked_array([labels])


def _read(
    name: str, root: Path, files: list[Path], *, train: bool, download: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Read pixels, labels and class names of a split. MNIST's are None: its "0 - zero" repeats the labels."""
    class_name, _, file_names = _SETS[name]
    if download or file_names != _IDX_FILES:
        from torchvision import datasets  # imports torch._dynamo, which takes two seconds of a CPU

        dataset: Any = getattr(datasets, class_name)(root, train=train, download=download)
        if file_names != _IDX_FILES:
            return np.asarray(dataset.data), np.asarray(dataset.targets), tuple(dataset.classes)
    images, labels = (path for path in files if path.name.startswith("train" if train else "t10k"))
    pixels, numbers = _of_idx(images, 3), _of_idx(labels, 1).astype(np.int64)
    if len(pixels) != len(numbers):
        raise ValueError(f"{images.name} has {len(pixels)} images, and {labels.name} {len(numbers)} labels")
    return pixels, numbers, _FASHION if name == "fashion_mnist" else None


def _of_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Read an IDX file: its type (8: bytes) and number of dimensions, their lengths, and the values, uint8."""
    data = path.read_bytes()
    try:
        if data[:4] != bytes([0, 0, 8, num_dimensions]):
            raise ValueError(f"it begins with {data[:4]!r}")
        lengths = np.frombuffer(data, ">u4", num_dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + lengths.nbytes).reshape(lengths)
    except ValueError as error:
        raise ValueError(f"{path.name} is no whole IDX file of bytes: {first_line(error)}") from error


def torchvision_files(name: str, root: str) -> list[Path]:
    """Return the paths of the files from which torchvision reads a set."""
    _, folder, files = _SETS[name]
    return [Path(root, folder, file) for file in files]


_IDX_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
_SETS = {  # torchvision's class, its folder and its files
    "mnist": ("MNIST", "MNIST/raw", _IDX_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _IDX_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR10_FILES),
    "cifar100": ("CIFAR100", "cifar-100-python", ("train", "test", "meta")),
}
