"""Augmentations as users write them: some that work, and one for each mistake that is told."""

import torch


def noise(rows, generator):
    images = rows["image"]
    drawn = torch.randint(0, 32, images.shape, dtype=torch.uint8, generator=generator)
    return {**rows, "image": images // 2 + drawn}


def mixed(rows, generator):
    order = torch.randperm(len(rows["image"]), generator=generator)
    return {**rows, "image": rows["image"] // 2 + rows["image"][order] // 2}


def in_place(rows, generator):
    rows["image"].random_(0, 256, generator=generator)
    return rows


def nothing(rows, generator):
    return rows


def jitter(rows, generator):
    return {
        name: values + 0.1 * torch.randn(values.shape, generator=generator) if values.is_floating_point() else values
        for name, values in rows.items()
    }


def forgets(rows, generator):
    return {"image": rows["image"]}


def returns_none(rows, generator):
    rows["image"] // 2


def widens(rows, generator):
    return {**rows, "image": rows["image"].float()}


def from_elsewhere(rows, generator):
    return {**rows, "image": torch.randint_like(rows["image"], 256)}


def fails_late(rows, generator):
    return rows if len(rows["image"]) > 7 else rows["picture"]


def narrows_late(rows, generator):
    return rows if len(rows["image"]) > 7 else {name: values[1:] for name, values in rows.items()}


def widens_late_in_place(rows, generator):
    if len(rows["image"]) < 8:
        rows["image"] = rows["image"].float()
    return rows


def fails(rows, generator):
    return rows["picture"]
