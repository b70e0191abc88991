"""The user's own augmentation, data.augmentation=package.module:function: called with each batch of training rows.

    rows = function(rows, generator)

`rows` are tensors by name as they are stored (image: uint8 [n, H, W, C]), on the device, before the task makes them
inputs; returned are others of the same names, types and shapes. The generator, on the device too, is seeded by the
epoch and the batch's first example, so that a resumed run draws the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysubset.tasks import Task
from raysubset.user_functions import in_a_line, load_function

_FIELD = "data.augmentation"


@dataclass(frozen=True)
class OwnAugmentation:
    """Calls the function of this name, in the place of the task's own augmentation."""

    reference: str

    def draw(self, num: int, seed: int) -> Tensor:
        """Seeds of an epoch's examples, int64 [num, 1] on the CPU: a batch takes its first's."""
        return torch.randint(2**62, (num, 1), generator=torch.Generator().manual_seed(seed))

    def __call__(self, rows: Mapping[str, Tensor], draws: Tensor) -> Mapping[str, Tensor]:
        """The rows of a batch as the function gives them; draw()'s rows of these examples are its seeds.

        Raises:
            ValueError: if it does not return rows that fit, in any batch; or for what it raises.
        """
        generator = torch.Generator(draws.device).manual_seed(int(draws[0]))
        function = load_function(_FIELD, self.reference)
        with in_a_line(_FIELD, self.reference):
            found = function(dict(rows), generator)
        self._check(found, rows)
        return found

    def try_on(self, rows: Mapping[str, Tensor]) -> None:
        """Call the function with copies of some rows, and with the same draws again.

        Raises:
            ValueError: as a call does, or if it draws from elsewhere.
        """
        seeds = torch.zeros((1, 1), dtype=torch.int64)
        found = [self({name: values.clone() for name, values in rows.items()}, seeds) for _ in range(2)]
        if not all(torch.equal(found[0][name], found[1][name]) for name in rows):
            raise self._misfit("gave other rows with the same generator: draw from the generator alone")

    def _check(self, found: object, rows: Mapping[str, Tensor]) -> None:
        if not isinstance(found, Mapping) or set(found) != set(rows):
            what = ", ".join(map(str, found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise self._misfit(f"returned {what}: return a dict of {', '.join(rows)}, as it is given")
        for name, values in rows.items():
            own = found[name]
            if not isinstance(own, Tensor) or (own.dtype, own.shape) != (values.dtype, values.shape):
                kind = f"{own.dtype} {list(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
                text = f"returned {name} as {kind}, and was given {values.dtype} {list(values.shape)}"
                raise self._misfit(f"{text}: return it as it is given")

    def _misfit(self, text: str) -> ValueError:
        return ValueError(f"{_FIELD} = {self.reference!r} {text}")


def drawn(task: Task, own: OwnAugmentation | None, num: int, seed: int) -> Tensor | None:
    """An epoch's augmentation of so many examples: a row each, on the CPU; None without one."""
    return task.draw(num, seed) if own is None else own.draw(num, seed)
