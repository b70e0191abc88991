"""to_safetensors() yields a weights file in parts, a tensor at a time, so that no second copy is held in memory."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

_DTYPES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
_ALIGNMENT = 8  # bytes, of the position where tensors begin
_FROZEN = "frozen"  # the metadata that names the file with the rest of the weights


def to_safetensors(weights: Mapping[str, Tensor], *, frozen: str | None = None) -> Iterator[memoryview]:
    """Yield the file's header, then each tensor's bytes in the default memory layout, those of wide types first.

    safetensors' own save() takes three times as long: it copies all tensors twice, and returns the file as a whole.

    Args:
        frozen: the path of the file that holds the rest of the weights, for frozen_of().

    Raises:
        ValueError: for a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {_FROZEN: frozen}} if frozen else {}
    at, names = 0, sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    for name in names:
        tensor = weights[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors cannot hold")
        end = at + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = weights[name].detach().cpu().contiguous()
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def frozen_of(file: BinaryIO) -> str | None:
    """Return the path of the file that holds the rest of the weights, as to_safetensors() wrote it; None: no rest."""
    num_bytes, begin = int.from_bytes(file.read(8), "little"), b'{"__metadata__"'
    if file.read(len(begin)) != begin:
        return None
    return json.loads(begin + file.read(num_bytes - len(begin)))["__metadata__"].get(_FROZEN)
