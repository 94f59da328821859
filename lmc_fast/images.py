"""Labelled images from an .npz file, or from a folder with one folder of image files for each class."""

from __future__ import annotations

import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .architectures import ImageInput
from .budget.meter import require_memory
from .checkpoints import Model
from .errors import LmcError
from .examples import Examples
from .files import MIB, read_object, require_regular

_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP", "GIF")  # whatever the name says; not those that run programs
_COPIES = 4  # of the arrays, in other dtypes, while they are made ready
_BOMB = 64 * MIB, 100  # an array of more than so many bytes, packed into so small a part of them, is no pictures
_MOST_PIXELS = 100_000_000  # of one image file


def read_images(path: str | Path, model: Model, at_least: int = 1) -> Examples:
    """Reads labelled images for an image classifier.

    Args:
        path: a .npz of `images` (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or float, and integer `labels` (n,); or
            a folder whose subfolders, in the order of their names, are the classes. uint8 and files are divided by 255
            and normalised as the checkpoint's preprocessor_config.json says; float is taken as it is. Files are
            resized.
        model: whose image size, channels and classes count.
        at_least: how many images there must be.

    Returns:
        Inputs (n, c, size, size) float32 and targets (n,) int64.

    Raises:
        LmcError: the model reads no images; the file is missing, unreadable or of another image size; a label is no
            class.

    >>> examples = lmc.read_images("images.npz", lmc.Model("IMAGES"))
    >>> examples.inputs.shape, examples.targets.shape
    (torch.Size([6, 3, 8, 8]), torch.Size([6]))
    """
    image = model.spec.image
    if image is None:
        raise LmcError(f"{model.path} reads no images; give it text or token ids")
    source = Path(path)
    if source.is_dir():
        pixels, labels = _read_folder(source, image)
    elif source.suffix == ".npz" and source.is_file():
        pixels, labels = _read_arrays(source, image)
    else:
        raise LmcError(f"{source} is neither an .npz file of `images` and `labels` nor a folder of images")
    if not pixels.is_floating_point():
        pixels = _normalised(pixels.float() / 255, model.path)
    if len(pixels) != len(labels) or len(pixels) < at_least:
        raise LmcError(f"{source} has {len(pixels)} images and {len(labels)} labels; at least {at_least} are needed")
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= model.spec.vocab:
            raise LmcError(
                f"{source} has label {low if low < 0 else high}, but the model has {model.spec.vocab} classes"
            )
    pixels = pixels.float().contiguous()
    finite = pixels.flatten(1).isfinite().all(1)
    if not finite.all():
        raise LmcError(f"{source}: image {int(finite.int().argmin())} holds NaN, infinity or more than float32 can")
    return Examples(pixels, labels)


def _read_arrays(file: Path, image: ImageInput) -> tuple[Tensor, Tensor]:
    try:
        with zipfile.ZipFile(file) as packed:
            parts = {part.filename: part for part in packed.infolist()}
        members = [parts["images.npy"], parts["labels.npy"]]
        size = sum(part.file_size for part in members)
        if size > _BOMB[0] and size > _BOMB[1] * sum(part.compress_size for part in members):
            raise LmcError(
                f"{file} would unpack to {size:,} bytes, {_BOMB[1]} times its size; it is damaged or made to harm"
            )
        require_memory(_COPIES * size, file)
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["images"], arrays["labels"]
    except LmcError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged files
        raise LmcError(f"{file} is not an .npz file with `images` and `labels` ({error})") from error
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise LmcError(f"{file}: labels are {labels.dtype} of shape {labels.shape}, not integers (n,)")
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise LmcError(f"{file}: images are {pixels.dtype}; give uint8 or float")
    if pixels.dtype != np.uint8:  # any byte order and width
        with np.errstate(over="ignore"):
            pixels = pixels.astype(np.float32)
    x = torch.from_numpy(pixels)
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() == 4 and x.shape[1] != image.channels and x.shape[3] == image.channels:
        x = x.permute(0, 3, 1, 2)
    wanted = (image.channels, image.size, image.size)
    if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
        raise LmcError(f"{file}: images have shape {list(pixels.shape)[1:]}, the model reads {list(wanted)}")
    return x, torch.from_numpy(labels.astype(np.int64))


def _read_folder(folder: Path, image: ImageInput) -> tuple[Tensor, Tensor]:
    mode = {1: "L", 3: "RGB"}.get(image.channels)
    if mode is None:
        raise LmcError(f"a model of {image.channels} channels reads no image files; give an .npz file")
    homes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    found = [
        (label, file)
        for label, home in enumerate(homes)
        for file in sorted(entry for entry in home.iterdir() if entry.suffix.lower() in _FILES)
    ]
    if not found:
        raise LmcError(f"{folder} holds no class folders with image files ({', '.join(_FILES)})")
    require_memory(_COPIES * len(found) * image.size**2 * image.channels, folder)
    pixels = np.stack([_read_image(file, image, mode) for _, file in found])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([label for label, _ in found])


def _read_image(file: Path, image: ImageInput, mode: str) -> np.ndarray:
    """(size, size, channels) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise LmcError("image folders need Pillow; install it, or give an .npz file") from error
    require_regular(file, "remove it, or give an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as opened:
                if math.prod(opened.size) > _MOST_PIXELS:
                    raise LmcError(f"{file} has {opened.size[0]} x {opened.size[1]} pixels; make it smaller")
                picture = opened.convert(mode).resize((image.size, image.size), Image.Resampling.BICUBIC)
    except LmcError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise LmcError(f"{file} is not a readable image ({error})") from error
    return np.asarray(picture).reshape(image.size, image.size, image.channels)


def _normalised(x: Tensor, path: Path) -> Tensor:
    """(x - mean) / std of the checkpoint's image processor; as it is where there is none."""
    file = path / "preprocessor_config.json"
    if not file.exists():
        return x
    settings = read_object(file)
    if not settings.get("do_normalize", True) or "image_mean" not in settings:
        return x
    mean, std = (_channels(settings.get(key), file, key) for key in ("image_mean", "image_std"))
    if mean.shape[0] not in (1, x.shape[1]) or mean.shape != std.shape:
        raise LmcError(f"{file} normalises {mean.shape[0]} channels, the model reads {x.shape[1]}")
    if not (std > 0).all():
        raise LmcError(f"{file}: image_std must be above 0; download it again")
    return (x - mean) / std


def _channels(values: Any, file: Path, key: str) -> Tensor:
    """One number for each channel, or one for all, as (c, 1, 1)."""
    values = values if isinstance(values, list) else [values]
    if not values or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in values):
        raise LmcError(f"{file}: {key} is neither a number nor a list of numbers; download it again")
    return torch.tensor([float(x) for x in values]).view(-1, 1, 1)
