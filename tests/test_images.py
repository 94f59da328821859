"""Image data that is damaged or made to harm: one sentence, no time and no memory."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
import zoo
from PIL import Image

from lmc_fast import LmcError, read_images
from lmc_fast.checkpoints import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vit")
    zoo.write("vit", directory)
    return Model(directory)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


LABELS = np.arange(6) % 5


def test_floats_of_any_width_and_byte_order_are_read(model, pixels, tmp_path):
    floats = pixels / 255
    for kind in ("<f8", ">f4", "f2", "longdouble"):
        np.savez(tmp_path / "x.npz", images=floats.astype(kind), labels=LABELS.astype(">i2"))
        found = read_images(tmp_path / "x.npz", model)
        assert torch.allclose(found.inputs, torch.from_numpy(floats).float().permute(0, 3, 1, 2), atol=1e-3)
        assert found.targets.tolist() == LABELS.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300], ids=str)
def test_an_image_that_is_not_finite_is_named(bad, model, pixels, tmp_path):
    floats = pixels / 255
    floats[4, 3, 2, 1] = bad
    np.savez(tmp_path / "x.npz", images=floats, labels=LABELS)
    with pytest.raises(LmcError, match=r"x.npz: image 4 holds NaN"):
        read_images(tmp_path / "x.npz", model)


@pytest.mark.parametrize("label", [-1, 5, -(2**40)])
def test_the_label_that_is_no_class_is_named(label, model, pixels, tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array([0, 4, label, 1, 2, 3]))
    with pytest.raises(LmcError, match=f"has label {label}, but the model has 5 classes"):
        read_images(tmp_path / "x.npz", model)


def test_times_are_no_labels(model, pixels, tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels, labels=LABELS.astype("m8[s]"))
    with pytest.raises(LmcError, match="labels are timedelta64"):
        read_images(tmp_path / "x.npz", model)


def test_damaged_archives_are_refused(model, pixels, tmp_path):
    whole = io.BytesIO()
    np.savez_compressed(whole, images=pixels, labels=LABELS)
    whole = whole.getvalue()
    rng = np.random.default_rng(1)
    cases = [whole[:n] for n in (0, 3, 30, len(whole) // 2, len(whole) - 10)] + [b"\x93NUMPY" + whole]
    for _ in range(60):
        flipped = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            flipped[place] ^= 1 << rng.integers(8)
        cases.append(bytes(flipped))
    array = io.BytesIO()
    np.save(array, pixels)
    refusals = 0
    for case in [*cases, array.getvalue()]:
        (tmp_path / "x.npz").write_bytes(case)
        try:
            found = read_images(tmp_path / "x.npz", model)
            assert found.targets.tolist() == LABELS.tolist()  # only what does not matter was changed
        except LmcError as error:
            assert "x.npz" in str(error)
            refusals += 1
    assert refusals > 40


def test_an_archive_that_would_unpack_to_gigabytes_is_not_unpacked(model, tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 8, 8, 3), }"
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        np.lib.format.write_array(out.open("labels.npy", "w"), LABELS)
        with out.open("images.npy", "w", force_zip64=True) as member:
            text = (header % (1 << 20)).ljust(117).encode() + b"\n"
            member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
            for _ in range(192):
                member.write(bytes(1 << 20))
    assert (tmp_path / "x.npz").stat().st_size < 2 << 20
    with pytest.raises(LmcError, match=r"x.npz would unpack to 201,.* bytes"):
        read_images(tmp_path / "x.npz", model)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [_png(12_000, 10_000), _png(60_000, 60_000), _png(0, 5), _png(9, 9)[:40], b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", None],
    ids=["large", "huge", "empty", "cut", "nothing", "a program", "a pipe"],
)
def test_image_files_that_are_none_are_refused(content, model, pixels, tmp_path):
    (tmp_path / "class").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "class" / "a.png")
    if content is None:
        os.mkfifo(tmp_path / "class" / "b.png")
    else:
        (tmp_path / "class" / "b.png").write_bytes(content)
    with pytest.raises(LmcError, match=r"b.png (is|has)"):
        read_images(tmp_path, model)


@pytest.mark.parametrize(
    "settings, words",
    [
        ([1], "not a JSON object"),
        ({"image_mean": "x", "image_std": 1}, "image_mean is neither"),
        ({"image_mean": [0.5], "image_std": [None]}, "image_std is neither"),
        ({"image_mean": [0.5]}, "image_std is neither"),
        ({"image_mean": [], "image_std": []}, "image_mean is neither"),
        ({"image_mean": [[0.5]], "image_std": [1]}, "image_mean is neither"),
        ({"image_mean": 0.5, "image_std": 0}, "image_std must be above 0"),
        ({"image_mean": [0.5, 0.5], "image_std": [1, 1]}, "normalises 2 channels"),
        ({"image_mean": 1e300, "image_std": 1}, "holds NaN"),
    ],
)
def test_an_image_processor_of_wrong_types_is_refused(settings, words, pixels, tmp_path):
    zoo.write("vit", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    np.savez(tmp_path / "x.npz", images=pixels, labels=LABELS)
    with pytest.raises(LmcError, match=words):
        read_images(tmp_path / "x.npz", Model(tmp_path))
