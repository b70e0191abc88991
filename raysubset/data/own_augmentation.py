"""The user's own augmentation, data.augmentation=package.module:function, which is called with each training batch.

    rows = function(rows, generator)

`rows` are the stored tensors by name (image: uint8 [n, H, W, C]), on the device, before the task turns them into
inputs. The function returns tensors of the same names, types and shapes. The generator is on the device as well. The
epoch and the batch's first example seed it, so that a resumed run draws the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysubset.tasks import Task
from raysubset.user_code.functions import in_a_line, load_function, misfit

_FIELD = "data.augmentation"


@dataclass(frozen=True)
class OwnAugmentation:
    """Calls the user's function instead of the task's own augmentation."""

    reference: str

    def draw(self, num: int, seed: int) -> Tensor:
        """Draw a seed for each example of an epoch, int64 [num, 1] on the CPU. A batch uses its first example's."""
        return torch.randint(2**62, (num, 1), generator=torch.Generator().manual_seed(seed))

    def __call__(self, rows: Mapping[str, Tensor], draws: Tensor) -> Mapping[str, Tensor]:
        """Call the function with a batch's rows, seeded by draw()'s rows of these examples.

        Raises:
            ValueError: for what the function raises, and if, in any batch, it returns rows that do not fit.
        """
        generator = torch.Generator(draws.device).manual_seed(int(draws[0]))
        function = load_function(_FIELD, self.reference)
        with in_a_line(_FIELD, self.reference):
            augmented = function(dict(rows), generator)
        self._check(augmented, rows)
        return augmented

    def try_on(self, rows: Mapping[str, Tensor]) -> None:
        """Call the function twice with copies of some rows and the same draws.

        Raises:
            ValueError: as a call does, and if the results differ, since it draws from another generator.
        """
        seeds = torch.zeros((1, 1), dtype=torch.int64)
        results = [self({name: values.clone() for name, values in rows.items()}, seeds) for _ in range(2)]
        if not all(torch.equal(results[0][name], results[1][name]) for name in rows):
            raise misfit(
                _FIELD, self.reference, "gave other rows with the same generator: draw from the generator alone"
            )

    def _check(self, augmented: object, rows: Mapping[str, Tensor]) -> None:
        if not isinstance(augmented, Mapping) or set(augmented) != set(rows):
            description = (
                ", ".join(map(str, augmented)) if isinstance(augmented, Mapping) else f"a {type(augmented).__name__}"
            )
            raise misfit(
                _FIELD, self.reference, f"returned {description}: return a dict of {', '.join(rows)}, as it is given"
            )
        for name, values in rows.items():
            tensor = augmented[name]
            if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (values.dtype, values.shape):
                kind = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                text = f"returned {name} as {kind}, and got {values.dtype} {list(values.shape)}"
                raise misfit(_FIELD, self.reference, f"{text}: keep type and shape")


def drawn(task: Task, augmentation: OwnAugmentation | None, num: int, seed: int) -> Tensor | None:
    """Draw an epoch's augmentation of `num` examples: one row each, on the CPU; None without augmentation."""
    return task.draw(num, seed) if augmentation is None else augmentation.draw(num, seed)
