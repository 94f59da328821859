"""Bad pytorch_model.bin files, each a small change of a good one: damaged zips, tensors of every kind, code."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.mutants import Case, flipped, odd_files, with_bytes

FILE = "pytorch_model.bin"
Tensors = dict[str, Any]


class _Runs:
    """What unpickling would run as code."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _rewritten(change: Callable[[Tensors], Any], **options: Any) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        tensors = torch.load(BytesIO(content), weights_only=True)
        out = BytesIO()
        changed = change(tensors)
        torch.save(tensors if changed is None else changed, out, **options)
        return out.getvalue()

    return rewrite


def _entry(ending: str, change: Callable[[bytes], bytes | None]) -> Callable[[bytes], bytes]:
    """One entry of the zip changed, or left out."""

    def rewrite(content: bytes) -> bytes:
        out = BytesIO()
        with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                kept = change(data) if name.endswith(ending) else data
                if kept is not None:
                    new.writestr(name, kept)
        return out.getvalue()

    return rewrite


def _compressed(content: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def _of_one(name: str) -> dict[str, Callable[[Tensor], Any]]:
    """What may stand for one tensor."""
    return {
        "a list": lambda t: t.tolist(),
        "None": lambda t: None,
        "a number": lambda t: 5,
        "a parameter": torch.nn.Parameter,
        "a view": lambda t: t.repeat_interleave(2, 0)[::2],
        "turned in memory": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
        "transposed": lambda t: t.mT.contiguous() if t.dim() == 2 else t[:-1],
        "float64": lambda t: t.double(),
        "float16": lambda t: t.half(),
        "bfloat16": lambda t: t.bfloat16(),
        "complex": lambda t: t.to(torch.complex64),
        "int8": lambda t: t.to(torch.int8),
        "bool": lambda t: t > 0,
        "sparse": lambda t: t.to_sparse(),
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "without storage": lambda t: t.to("meta"),
        "a wide view of little": lambda t: torch.zeros(1).expand(1 << 20, 1 << 20),
        "NaN": lambda t: torch.full_like(t, float("nan")),
        "empty": lambda t: t[:0],
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "needs gradients": lambda t: t.clone().requires_grad_(),
        "code": lambda t: _Runs(os.mkdir, "was-here"),
    }


def _of_one_storage(tensors: Tensors) -> Tensors:
    parts = torch.cat([t.flatten() for t in tensors.values()]).split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def pickles(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    rng, content = random.Random(seed), (home / FILE).read_bytes()

    def case(name: str, change: Callable[[bytes], bytes]) -> Case:
        return Case("pickled", base, name, with_bytes(FILE, change))

    for i in range(24):
        place = rng.randrange(64) if i < 4 else rng.randrange(len(content))
        yield case(f"bit at {place}", flipped(place, rng.randrange(8)))
    for length in (0, 4, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        yield case(f"cut at {length}", lambda b, n=length: b[:n])
    names = sorted(torch.load(home / FILE, weights_only=True))
    for name in rng.sample(names, 4):
        for kind, change in _of_one(name).items():
            yield case(f"{name} is {kind}", _rewritten(lambda t, n=name, c=change: t.update({n: c(t[n])})))
        yield case(f"{name} is gone", _rewritten(lambda t, n=name: {k: v for k, v in t.items() if k != n}))
        yield case(f"{name} has another name", _rewritten(lambda t, n=name: t.update({n + "x": t.pop(n)})))
    for kind, whole in {
        "a list": lambda t: list(t.values()),
        "a tensor": lambda t: torch.zeros(3),
        "nested": lambda t: {"state_dict": dict(t)},
        "nothing": lambda t: {"x": torch.zeros(1)},
        "numbered": lambda t: dict(enumerate(t.values())),
        "of one storage": _of_one_storage,
        "code": lambda t: _Runs(os.mkdir, "was-here"),
        "a class": lambda t: t | {"config": zipfile.ZipInfo("x")},
        "many names": lambda t: t | {f"extra.{i}": torch.zeros(0) for i in range(20_000)},
    }.items():
        yield case(f"the file is {kind}", _rewritten(whole))
    yield case("of the old format", _rewritten(lambda t: t, _use_new_zipfile_serialization=False))
    yield case("plain pickle", lambda b: pickle.dumps(dict.fromkeys(names, 1)))
    yield case("pickled code", lambda b: pickle.dumps(_Runs(os.mkdir, "was-here")))
    yield case("compressed", _compressed)
    for ending in ("data.pkl", "version", "byteorder", "data/0"):
        yield case(f"without {ending}", _entry(ending, lambda _: None))
        yield case(f"empty {ending}", _entry(ending, lambda _: b""))
        yield case(f"half of {ending}", _entry(ending, lambda d: d[: len(d) // 2]))
    for name, odd in odd_files(FILE):
        yield Case("pickled", base, f"{FILE} is {name}", odd)
