"""Settings of the data, the model and the subsets."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Literal

from raysubset.config.trees import Part, nearest
from raysubset.uris import holds_secret

# Sets that come with scikit-learn and Python: of images, of columns, and of texts.
EMBEDDED_NAMES = ("digits", "breast_cancer", "wine", "iris", "diabetes", "python_docs")
DATA_NAMES = (*EMBEDDED_NAMES, "mnist", "fashion_mnist", "cifar10", "cifar100")

ARROW_SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*ARROW_SUFFIXES, *DELIMITERS)
TEXT_SUFFIXES = (".txt",)

# Default (width, depth). The CNN's keep Q of four subsets of digits, a quarter of the set each, above one (Q = 2.2).
_MODEL_SIZES = {"cnn": (8, 2), "vgg": (8, 3), "cifar_resnet": (16, 20), "unet": (8, 2), "mlp": (64, 1)}
_MODEL_SIZES |= {"lstm": (64, 1), "transformer": (64, 2)}
_NORMED = ("cnn", "vgg", "cifar_resnet", "unet")

NUM_SUBSETS = 4  # that share the training set, if neither number nor size is given


def kind_of(name: str) -> Literal["named", "function", "path"]:
    """Return the kind of a data set's name.

    Raises:
        ValueError: for a name that is none of them.
    """
    if name in DATA_NAMES:
        return "named"
    if "://" not in name and "/" not in name and ":" in name:
        return "function"
    if "/" in name or name.lower().endswith((*TABLE_SUFFIXES, *TEXT_SUFFIXES)):
        return "path"
    if os.path.exists(os.path.expanduser(name)):
        return "path"
    raise ValueError(
        f"data.name = {name!r} is not one of {', '.join(DATA_NAMES)}, nor a path, a URI or package.module:function"
        f"{nearest(name, DATA_NAMES)}"
    )


def refuse_missing_data(name: str) -> None:
    """Refuse a name of no data set, and a path of this machine where nothing is. URIs and functions are not looked up.

    Raises:
        ValueError: with the way out.
    """
    if kind_of(name) == "path" and "://" not in name:
        path = os.path.abspath(os.path.expanduser(name))
        if not os.path.exists(path):
            raise nothing_there(name, path)


def nothing_there(name: str, path: str) -> ValueError:
    """Return the error for a data set's name that is a path with no file or folder."""
    hint = ": patterns are not followed, give the folder" if re.search(r"[*?\[]", path) else ": give the path of one"
    return ValueError(f"data.name = {name}: there is no file or folder {path}{hint}")


class DataConfig(Part, prefix="data."):
    name: str = "digits"
    """Images: digits, mnist, fashion_mnist, cifar10, cifar100. Tables: breast_cancer, wine, iris, diabetes. Text:
    python_docs. Or the path or URI of a Parquet, Arrow, CSV or text file, of a folder of such files, of a folder with
    a folder of images for each class, or of one with images/ and masks/; words in the names (train, val, test) tell the
    splits. Or package.module:function, which returns Arrow tables, (inputs, targets), dicts of arrays, or a torch
    Dataset."""
    root: str = "~/.cache/raysubset/data"
    """Folder of torchvision's files of a named set, which data.download fetches to it."""
    download: bool = False
    """Download a named set that is missing under root. Needs a network."""
    ignored: str | None = None
    """What to leave out, separated by commas: a split of the set (validation, test), or names or paths of files and
    folders below data.name, with * and ?."""
    image_size: Annotated[int | None, "[1, ∞)"] = None
    """Resize every image's shorter side to this many pixels, and crop the centre square. Needed if shapes differ."""
    image_column: str = "image"
    """Column with the images of a table: encoded bytes, paths of files, Hugging Face structs, or uint8 tensors of one
    shape. A table without this column is learned from its other columns. Or the name of the images' folders beside
    masks'."""
    target: str | None = None
    """Column to learn: integers, class names, numbers for regression (several columns separated by commas), or masks
    for segmentation. By default target or label; for images label, or mask or label for segmentation. Or the name of
    folders of masks."""
    columns: str | None = None
    """Columns to learn from, separated by commas. By default all but the target."""
    missing: Literal["refuse", "mean"] = "refuse"
    """Refuse missing values of these columns, or fill in the training mean (for texts a category of their own)."""
    window: Annotated[int, "[1, ∞)"] = 128
    """Tokens in one example of a text."""
    vocabulary: Literal["bytes", "characters"] = "bytes"
    """Tokens of a text: its UTF-8 bytes, or the characters of the training text and one token for all others."""
    validation_fraction: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training split held out to make every choice; stratified. Ignored if the set has its own split."""
    test_fraction: Annotated[float, "(0, 1)"] = 0.2
    """Share of the set that is held out for testing if it has no test split."""
    split_seed: Annotated[int, "(-∞, ∞)"] = 0
    """Seed of these splits: apart from `seed`, so that runs with different seeds are measured on the same examples."""
    streamed: bool = False
    """For a training split larger than memory, of images or a table in Parquet that every node sees: hold only targets
    in memory; subsets read their rows by row group, full-set stages stream them. Other splits are held in memory."""
    augmentation: Annotated[str, ("auto", "none", "crop_flip", "package.module:function")] = "auto"
    """none, not even what a task of your own draws; or crop_flip: random crop (zero padding of an eighth of the side)
    and horizontal flip; auto: for CIFAR. Or your own package.module:function of (a batch's stored rows,
    torch.Generator), which returns such rows."""

    def problems(self) -> Iterator[str]:
        if holds_secret(self.name):
            yield (
                "data.name holds a password, a key or a token, and would be written to config.json: give S3's keys to "
                "all nodes as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, Azure's as AZURE_CLIENT_ID, "
                "AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or by their machines' role"
            )

    @property
    def own_augmentation(self) -> str | None:
        """Return the name of the user's own augmentation, package.module:function, or None."""
        return self.augmentation if ":" in self.augmentation else None

    @property
    def label_column(self) -> str:
        """Return the target column of images."""
        return self.target or "label"


class ModelConfig(Part, prefix="model."):
    name: str = "auto"
    """Network: cnn, vgg, cifar_resnet or lenet5 for images; alexnet_32, vgg11_32, vgg16_32 or resnet18_32 for images
    of 32×32; any classification network of torchvision; unet for masks; mlp for other numbers; lstm or transformer for
    tokens. auto: cnn, unet, mlp or transformer. Or package.module:function, called with a raysubset.tasks.Spec, or with
    (num_classes, (C, H, W)) if it takes two arguments; it returns an nn.Module from [N, *spec.inputs] to float
    [N, *spec.outputs]."""
    width: Annotated[int | None, "[1, ∞)"] = None
    """Channels of the first block (cnn, vgg, unet: 8, cifar_resnet: 16), or units of a layer (mlp, lstm and
    transformer: 64)."""
    depth: Annotated[int | None, "[1, ∞)"] = None
    """Blocks (cnn: 2, vgg: 3, transformer: 2), halvings of the image (unet: 2), hidden layers (mlp, lstm: 1), or 6n + 2
    layers (cifar_resnet: 20)."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation layers of cnn, vgg, cifar_resnet and unet."""
    weights: str | None = None
    """Weights of the shared start instead of random ones: a finished run's directory, a file of a state dict
    (.safetensors, .pt, .pth) that every node sees, or `pretrained` for torchvision's own, if torch.hub has them on
    disk. Tensors of other shapes, such as a head for other classes, start at random."""

    def problems(self) -> Iterator[str]:
        if holds_secret(self.weights):
            yield "model.weights holds a password or a token, and would be written to config.json: see data.name"
        for name, is_default, models in (
            ("width", self.width is None, _MODEL_SIZES),
            ("depth", self.depth is None, _MODEL_SIZES),
            ("norm", self.norm == "batch", _NORMED),
        ):
            if not is_default and self.name not in ("auto", *models):
                yield f"model.{name} does not apply to {self.name}: leave it out"
        if self.name == "cifar_resnet" and ((depth := self.size()[1]) < 8 or depth % 6 != 2):
            yield f"model.depth = {depth}: a CIFAR ResNet has 6n + 2 layers: give 8, 14, 20, …"

    @property
    def is_function(self) -> bool:
        """Return True if the network is the user's own: package.module:function."""
        return ":" in self.name

    def size(self) -> tuple[int, int]:
        """Return (width, depth) with the architecture's defaults filled in; only for a named network, not for auto."""
        width, depth = _MODEL_SIZES[self.name]
        return self.width or width, self.depth or depth


class SubsetsConfig(Part, prefix="subsets."):
    num: Annotated[int | None, "[1, ∞)"] = None
    """Number of disjoint subsets. Give at most two of num, size and fraction; by default 4 share the training set."""
    size: Annotated[int | None, "[1, ∞)"] = None
    """Examples per subset. Q = size · outputs / parameters should exceed 1."""
    fraction: Annotated[float | None, "(0, 1]"] = None
    """Size of a subset as a share of the training set."""
    scheme: Literal["stratified", "iid", "dirichlet", "column", "function"] = "stratified"
    """How examples are dealt: every class alike, at random, with label skew, by a column's values, or by a function."""
    alpha: Annotated[float, "(0, ∞)"] = 0.5
    """Concentration of the Dirichlet label skew, Dir(alpha · class shares) as in Hsu et al.: the smaller, the fewer
    classes a subset sees. Flower's alpha is this one divided by the number of classes."""
    column: str | None = None
    """For the column scheme: the column of the training table whose values name the subsets."""
    function: str | None = None
    """For the function scheme: package.module:function(labels, num, seed) -> subset id of each example, -1 for none.
    The labels are classes; of numbers the tenths of the first, 0 to 9; of texts and masks 0."""
    start: Literal["shared", "independent"] = "shared"
    """Weights the actors start from: the same, or each its own random ones. Means need a shared start to be good."""
    shares: str = "equal"
    """Relative sizes of the subsets, so that nodes of unequal speed finish together: equal; measured (each kind of node
    is timed once, and recorded); or speeds per accelerator type, such as "A100=3.5,T4=1"."""
    per_actor: Annotated[int, "[1, ∞)"] = 1
    """Subsets that one actor minimizes on at once, with stacked weights: for networks too small to fill a GPU. Used
    only if a trial on the first actor's device shows that it is faster; the decision is recorded."""

    def problems(self) -> Iterator[str]:
        sizes = [n for n in ("num", "size", "fraction") if getattr(self, n) is not None]
        if len(sizes) == 3:
            yield "give at most two of subsets.num, subsets.size and subsets.fraction"
        if {"size", "fraction"} <= set(sizes):
            yield "subsets.size and subsets.fraction say the same: give one of them"
        for scheme in ("column", "function"):
            if (self.scheme == scheme) != (getattr(self, scheme) is not None):
                yield f"subsets.scheme={scheme} and subsets.{scheme} go together: give both, or neither"
        if self.scheme == "column" and self.num is not None:
            yield "subsets.num follows from the column's values: leave it out"
        if self.shares != "equal" and self.scheme not in ("stratified", "iid"):
            yield f"subsets.shares sets sizes, which subsets.scheme={self.scheme} does too: use stratified or iid"
        self.speeds()  # raises

    def speeds(self) -> dict[str, float] | None:
        """Return the speeds by accelerator type, or None if shares gives none."""
        if self.shares in ("equal", "measured"):
            return None
        pairs = [part.partition("=") for part in self.shares.split(",")]
        with suppress(ValueError):
            speeds = {name.strip(): float(value) for name, _, value in pairs}
            if len(speeds) == len(pairs) and all(name and 0 < value < math.inf for name, value in speeds.items()):
                return speeds
        raise ValueError(f"subsets.shares = {self.shares!r} should be equal, measured or like A100=3.5,T4=1, each once")
