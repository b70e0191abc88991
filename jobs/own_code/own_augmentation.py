"""An augmentation of your own: a square of each training image is blackened (Cutout, arXiv:1708.04552).

Command:    cd jobs/own_code && raysubset run --data.augmentation own_augmentation:cutout
"""

import torch

SHARE = 4  # of the side


def cutout(rows, generator):
    """The stored rows of a batch, of the same names, types and shapes: image is uint8 [n, H, W, C], on the device.

    What the generator draws, a resumed run draws again.
    """
    images = rows["image"]
    num, height, width, _ = images.shape
    top, left = (
        torch.randint(side, (num, 1), generator=generator, device=images.device) - side // SHARE // 2
        for side in (height, width)
    )
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    in_rows = (y >= top) & (y < top + height // SHARE)  # [n, H]
    in_columns = (x >= left) & (x < left + width // SHARE)
    is_cut = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    return {**rows, "image": images.masked_fill(is_cut, 0)}
