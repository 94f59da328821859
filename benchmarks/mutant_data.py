"""Bad tokenizers, texts, arrays, images and files of our own: see mutants."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mutants import GONE, VALUES, Case, flipped, odd_files, odd_json, replaced, set_value, with_bytes

TEXTS = (
    *("null", "5", "true", "[1]", '"x"', "{}", '{"text": null}', '{"text": 5}', '{"text": ["w5"]}', '{"text": {}}'),
    *('{"text": false}', '{"Text": "w5"}', '{"text": "w5"', '{"text": "\\ud800"}', '{"text": "\\ud83d\\ude00 w5"}'),
    *(
        '{"text": "w5\u2028w6"}',
        '{"text": "w5\u0085w6"}',
        '{"text": "w5\x0cw6"}',
        '{"text": "\\u0000w5"}',
        '{"text": ""}',
    ),
    *('\ufeff{"text": "w5 w6"}', '{"text": "w5", "text": "w6"}', '{"text": "w5"}{"text": "w6"}', '{"text": NaN}'),
    *('{"text": "w5", "score": NaN}', '{"text": 1e999}', "{'text': 'w5'}", "   ", '{"text": "w5"},', "[" * 2000),
    *('{"text": "w7"}\r', '{"text": "w7\r"}', '{"a": ' * 200 + "1" + "}" * 200, '{"text": "' + "w5 " * 50_000 + '"}'),
)
KINDS = (
    "<i8",
    ">i8",
    "<u8",
    "<i4",
    ">u2",
    "|u1",
    "|i1",
    "<f4",
    "<f8",
    "<f2",
    "|b1",
    "<c8",
    "<m8[s]",
    "<M8[D]",
    "<U4",
    "S4",
    "O",
)


def tokenizers(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of a checkpoint's tokenizer files; `text.txt` beside them is what they cut."""
    rng = random.Random(seed)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        whole = json.loads((home / file).read_text())
        keys = [(key,) for key in whole] + [(k, inner) for k, v in whole.items() if isinstance(v, dict) for inner in v]
        for key in keys:
            for value in rng.sample(VALUES, 4):
                shown = "gone" if value is GONE else repr(value)[:40]
                yield Case("tokenizer", base, f"{file}: {'.'.join(key)} = {shown}", set_value(file, key, value))
        for name, change in (*odd_files(file), *odd_json(file)):
            yield Case("tokenizer", base, f"{file} is {name}", change)
    for file in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        for name, make in {
            "a pipe": os.mkfifo,
            "a directory": Path.mkdir,
            "an endless file": lambda f: f.symlink_to("/dev/zero"),
            "a list": lambda f: f.write_text("[1, 2]"),
            "deep": lambda f: f.write_text("[" * 50_000),
            "no text": lambda f: f.write_bytes(b"\xff\xfe\0"),
        }.items():
            yield Case("tokenizer", base, f"{file} is {name}", replaced(file, make))


def _array(kind: str) -> np.ndarray:
    values = np.arange(64) % 40
    if kind == "O":
        return values.astype(object)
    return values.astype(kind).reshape(8, 8)


def _npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True, **options)
    return out.getvalue()


def _raw_npy(shape: str, kind: str = "<i8", order: str = "False", content: bytes = bytes(64)) -> bytes:
    header = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def texts(base: str, seed: int = 0) -> Iterator[Case]:
    """Data for a language model: `data.jsonl`, `data.txt`, `data.npy` beside the checkpoint."""
    rng = random.Random(seed)

    def written(file: str, content: bytes, name: str) -> Case:
        return Case("data", base, f"{file}: {name}", replaced(file, lambda f: f.write_bytes(content)))

    good = '{"text": "w5 w6 w7 w8"}\n' * 8
    for line in TEXTS:
        for before, after in ((good, ""), ("", "\n" + good), (good, "\n" + good)):
            yield written("data.jsonl", (before + line + after).encode("utf-8", "surrogatepass"), repr(line)[:40])
    for name, content in {
        "nothing": b"",
        "not UTF-8": b"w5 \xff w6",
        "a mark": b"\xef\xbb\xbf" + b"w5 w6 " * 20,
        "UTF-16": ("w5 w6 " * 20).encode("utf-16"),
        "NULs": b"w5\0w6 " * 20,
        "separators": ("w5\u2028w6\u0085w7 w8 " * 20).encode(),
        "one word": b"w5" * 100_000,
    }.items():
        yield written("data.txt", content, name)
    for kind in KINDS:
        yield written("data.npy", _npy(_array(kind)), kind)
    for value in (-1, 40, -(2**62), 2**62):
        yield written("data.npy", _npy(np.array([1, value, 3] * 9)), f"id {value}")
    for shape in (
        "()",
        "(0,)",
        "(8,)",
        "(2, 4)",
        "(-8,)",
        "(8, -1)",
        "(10**12,)",
        "(2**62, 2**62)",
        "(1000000000000,)",
        "8",
        "'x'",
    ):
        for order in ("False", "True", "5"):
            yield written("data.npy", _raw_npy(shape, order=order), f"shape {shape}, {order}")
    whole = _npy(_array("<i8"))
    for length in (0, 5, 6, 9, 40, 127, 128, 200, len(whole) - 1):
        yield written("data.npy", whole[:length], f"cut at {length}")
    for _ in range(60):
        place, bit = rng.randrange(128), 1 << rng.randrange(8)
        yield written("data.npy", whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :], f"bit at {place}")
    archive = io.BytesIO()
    np.savez(archive, a=np.arange(9))
    yield written("data.npy", archive.getvalue(), "an archive")
    for file in ("data.txt", "data.jsonl", "data.npy"):
        for name, change in odd_files(file):
            if name not in ("nothing", "one byte", "half", "zeros", "a byte more"):
                yield Case("data", base, f"{file} is {name}", change)


def images(base: str, seed: int = 0) -> Iterator[Case]:
    """Data for an image classifier: `data.npz`, or the folder `pictures`, and preprocessor_config.json."""
    rng = random.Random(seed)
    pixels, labels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8), np.arange(6) % 5

    def packed(name: str, **arrays: Any) -> Case:
        out = io.BytesIO()
        np.savez_compressed(out, **arrays)
        return Case("images", base, f"data.npz: {name}", replaced("data.npz", lambda f: f.write_bytes(out.getvalue())))

    for kind in KINDS[:-1]:
        yield packed(
            f"images {kind}",
            images=pixels.astype(kind) if kind[-1] != "]" else pixels.astype(int).astype(kind),
            labels=labels,
        )
        yield packed(f"labels {kind}", images=pixels, labels=labels.astype(kind))
    for value in (np.nan, np.inf, 1e38, 1e300, -1e30):
        floats = pixels / 255.0
        floats[3, 2, 1, 0] = value
        yield packed(f"a pixel {value}", images=floats, labels=labels)
    for value in (-1, 5, 2**40):
        yield packed(f"label {value}", images=pixels, labels=np.array([0, 1, 2, 3, 4, value]))
    yield packed("no labels", images=pixels)
    yield packed("nothing", images=pixels[:0], labels=labels[:0])
    yield packed("more labels", images=pixels, labels=np.arange(7) % 5)
    yield packed("odd shapes", images=pixels[..., :2], labels=labels[:, None])
    out = io.BytesIO()
    np.savez_compressed(out, images=pixels, labels=labels)
    whole = out.getvalue()

    def damaged(content: bytes, name: str) -> Case:
        return Case("images", base, f"data.npz {name}", replaced("data.npz", lambda f: f.write_bytes(content)))

    for length in (0, 3, 30, len(whole) // 2, len(whole) - 10):
        yield damaged(whole[:length], f"cut at {length}")
    for _ in range(60):
        place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        yield damaged(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :], f"bit at {place}")
    yield damaged(_npy(pixels), "an array")
    yield Case("images", base, "data.npz a bomb", replaced("data.npz", _bomb))
    for key in ("image_mean", "image_std", "do_normalize"):
        for value in VALUES[1:]:
            settings = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | {key: value}
            text = json.dumps(settings)
            change = replaced("preprocessor_config.json", lambda f, t=text: f.write_text(t))
            yield Case("images", base, f"{key} = {value!r:.40}", change)


def _bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        out.writestr("labels.npy", _npy(np.arange(6) % 5))
        with out.open("images.npy", "w", force_zip64=True) as member:
            member.write(_raw_npy("(16777216, 8, 8, 3)", "|u1", content=b""))
            for _ in range(3 << 8):
                member.write(bytes(1 << 22))


def own(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of alignment.safetensors and state.safetensors."""
    rng = random.Random(seed)
    for file in ("alignment.safetensors", "state.safetensors"):
        content = (home / file).read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        places = [
            *range(8),
            *(rng.randrange(8, size) for _ in range(24)),
            *(rng.randrange(size, len(content)) for _ in range(24)),
        ]
        for place in places:
            change = with_bytes(file, flipped(place, rng.randrange(8)))
            yield Case("own", base, f"{file}: bit at {place}", change)
        for length in (0, 7, 8, size, len(content) // 2, len(content) - 1):
            yield Case("own", base, f"{file}: cut at {length}", with_bytes(file, lambda b, n=length: b[:n]))
        for start in (size, (size + len(content)) // 2):
            change = with_bytes(file, lambda b, s=start: b[:s] + bytes(len(b) - s))
            yield Case("own", base, f"{file}: zeros from {start}", change)
        for name, change in odd_files(file):
            yield Case("own", base, f"{file} is {name}", change)
