"""Labelled images from an .npz file, or from a folder with one folder of image files for each class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .architectures import ImageInput
from .checkpoints import Model
from .errors import LmcError
from .examples import Examples

_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_images(path: str | Path, model: Model, at_least: int = 1) -> Examples:
    """Images (n, c, size, size) float32 and labels (n,) int64 for an image classifier.

    .npz: `images` (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or float, and integer `labels` (n,). uint8 is divided
    by 255 and normalised as the checkpoint's preprocessor_config.json says; float is taken as it is. Folder: the
    classes are its subfolders in the order of their names; images are resized.

    Raises LmcError for a missing or unreadable file, another image size, or labels that are not classes.
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
    if labels.min() < 0 or labels.max() >= model.spec.vocab:
        raise LmcError(f"{source} has label {int(labels.max())}, but the model has {model.spec.vocab} classes")
    return Examples(pixels.float().contiguous(), labels)


def _read_arrays(file: Path, image: ImageInput) -> tuple[Tensor, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["images"], arrays["labels"]
    except (ValueError, OSError, KeyError, EOFError) as error:
        raise LmcError(f"{file} is not an .npz file with `images` and `labels` ({error})") from error
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise LmcError(f"{file}: labels are {labels.dtype} of shape {labels.shape}, not integers (n,)")
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise LmcError(f"{file}: images are {pixels.dtype}; give uint8 or float")
    x = torch.from_numpy(pixels)
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() == 4 and x.shape[1] != image.channels and x.shape[3] == image.channels:
        x = x.permute(0, 3, 1, 2)
    wanted = (image.channels, image.size, image.size)
    if x.dim() != 4 or tuple(x.shape[1:]) != wanted:
        raise LmcError(f"{file}: images have shape {list(pixels.shape)[1:]}, the model reads {list(wanted)}")
    return x, torch.from_numpy(labels.astype(np.int64))


def _read_folder(folder: Path, image: ImageInput) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise LmcError("image folders need Pillow; install it, or give an .npz file") from error
    mode = {1: "L", 3: "RGB"}.get(image.channels)
    if mode is None:
        raise LmcError(f"a model of {image.channels} channels reads no image files; give an .npz file")
    pixels, labels = [], []
    for label, home in enumerate(sorted(entry for entry in folder.iterdir() if entry.is_dir())):
        for file in sorted(entry for entry in home.iterdir() if entry.suffix.lower() in _FILES):
            try:
                with Image.open(file) as opened:
                    picture = opened.convert(mode).resize((image.size, image.size), Image.Resampling.BICUBIC)
            except OSError as error:
                raise LmcError(f"{file} is not a readable image ({error})") from error
            pixels.append(np.asarray(picture).reshape(image.size, image.size, image.channels))
            labels.append(label)
    if not pixels:
        raise LmcError(f"{folder} holds no class folders with image files ({', '.join(_FILES)})")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def _normalised(x: Tensor, path: Path) -> Tensor:
    """(x - mean) / std of the checkpoint's image processor; as it is where there is none."""
    file = path / "preprocessor_config.json"
    if not file.exists():
        return x
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LmcError(f"{file} is not valid JSON ({error})") from error
    if not settings.get("do_normalize", True) or "image_mean" not in settings:
        return x
    mean, std = (torch.tensor(settings[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
    if mean.shape[0] not in (1, x.shape[1]) or mean.shape != std.shape:
        raise LmcError(f"{file} normalises {mean.shape[0]} channels, the model reads {x.shape[1]}")
    return (x - mean) / std
