"""What shows that a file of ours is as it was written, and one sentence where its content means nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LmcError


def checksum(tensors: dict[str, Tensor], text: str) -> str:
    """Of names, dtypes, shapes and every bit of tensors in main memory, and of the metadata beside them."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, t in sorted(tensors.items()):
        digest.update(f"\0{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def understood(file: Path, what: str) -> Iterator[None]:
    """Whatever fails while a file's content is taken in, as one sentence: it is of another version, or was edited."""
    try:
        yield
    except LmcError as error:
        raise LmcError(f"{file}: {error}") from error
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LmcError(f"{file} is not {what} that this version understands ({reason}); make it again") from error
