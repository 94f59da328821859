"""Where a checkpoint is: in a local directory, or in a repository of the Hugging Face hub at some revision."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from ..errors import LmcError
from ..files import MIB, read_object
from .tensor_file import torch_dtype
from .writer import COMPANIONS

SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"  # as transformers looks for them, each before its index
INDEX_BYTES = 64 * MIB
GGUF = (
    "GGUF is not read; make float safetensors of it with transformers (pip install gguf accelerate): "
    "m = AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE, dtype='float32'); "
    "del m.config.quantization_config, m.hf_quantizer; m.save_pretrained(NEW); "
    "AutoTokenizer.from_pretrained(DIR, gguf_file=FILE).save_pretrained(NEW)"
)
_SMALL = ("config.json", "adapter_config.json", *COMPANIONS)
_NAME = r"[A-Za-z0-9][\w.-]*"
_SITE = r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)"
_REPOSITORY = re.compile(rf"(?:{_SITE})?(?P<id>{_NAME}(?:/{_NAME})?)(?:(?:/tree/|@)(?P<revision>[^\s?#@]+?))?/?")
HUB_SECONDS = 10.0  # to wait for the hub's first answer
_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub; `revision`: a branch, tag or commit, None for the main branch."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def find(path: str | Path) -> Path | Repository:
    """A local directory or else the repository that a text names: OWNER/NAME, OWNER/NAME@REVISION or its address.

    Raises LmcError for what is neither.
    """
    # os.path's functions know no error: users that are unknown, names that are too long or hold a NUL are not there
    text, local = str(path), Path(os.path.expanduser(path))
    if os.path.isdir(local):
        return local
    if local.suffix == ".gguf":
        raise LmcError(f"{path}: {GGUF}")
    if os.path.exists(local):
        raise LmcError(f"{path} is a file; give the directory that holds config.json and model.safetensors")
    found = _REPOSITORY.fullmatch(text)
    if not found:
        raise LmcError(f"{path} does not exist; give a checkpoint directory or a hub id such as EleutherAI/pythia-160m")
    before, at, revision = text.rpartition("@")
    if at and os.path.isdir(os.path.expanduser(before)):
        raise LmcError(f"{before} is a local directory, which has no revision {revision}; give it without @{revision}")
    return Repository(found["id"], None if found["revision"] is None else unquote(found["revision"]))


def at_revision(path: str, revision: str | None) -> str:
    """The text that names a path's repository at a revision. Raises LmcError for a local directory or a second one."""
    if revision is None:
        return path
    found = find(path)
    if isinstance(found, Path):
        raise LmcError(f"{path} is a local directory, which has no revision {revision}")
    if found.revision not in (None, revision):
        raise LmcError(f"{path} names revision {found.revision} and not {revision}; give one of them")
    return str(Repository(found.id, revision))


def download(repository: Repository) -> Path:
    """A local copy of what a checkpoint needs of a repository, and nothing else. Raises LmcError."""
    import huggingface_hub as hub

    with _told(repository):
        names = _names(repository)
        if names is not None:
            _require_weights(repository, names)

            def fetch(name: str) -> Path:
                return Path(hub.hf_hub_download(repository.id, name, revision=repository.revision))

            return _snapshot(repository, [*_small(names), *weight_files(names, fetch)])
        local = Path(hub.snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
    present = {file.name for file in local.iterdir()}
    wanted = weight_files(present, local.joinpath)
    if "config.json" not in present or not wanted or not present.issuperset(wanted):
        lost = next((name for name in ("config.json", *wanted) if name not in present), SINGLE)
        raise LmcError(f"the hub cannot be reached, and the local cache has only a part of {repository}: no {lost}")
    return local


def headers(repository: Repository) -> tuple[Path, dict[str, RemoteFile]] | None:
    """Config and tokenizer of a repository, and its safetensors' headers by file; None where those are not to be had
    without the weights: there are none, or the hub cannot be reached. Raises LmcError.
    """
    import huggingface_hub as hub

    with _told(repository):
        names = _names(repository)
        if names is None:
            return None
        _require_weights(repository, names)
        if SINGLE not in names and f"{SINGLE}.index.json" not in names:
            _log.info(
                "%s has no safetensors, whose headers could be read alone: its weights are downloaded", repository
            )
            return None
        found = hub.get_safetensors_metadata(repository.id, revision=repository.revision)
        files = {name: RemoteFile(repository, name, file.tensors) for name, file in found.files_metadata.items()}
        return _snapshot(repository, _small(names)), files


class RemoteFile:
    """A safetensors file on the hub of which only the header was read. Like TensorFile, without values."""

    def __init__(self, repository: Repository, name: str, tensors: dict[str, Any]):
        self.file, self._repository, self._tensors = Path(name), repository, tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> str:
        return str(self._tensors[name].dtype)

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.kind(name), self.file, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        raise LmcError(f"of {self._repository} only headers were read, not {name}; open it without headers_only")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)


def weight_files(names: set[str], get: Callable[[str], Path]) -> list[str]:
    """The files of weights that transformers would read, with their index, of a repository that has these names."""
    for single in (SINGLE, PICKLED):
        index = f"{single}.index.json"
        if single in names:
            return [single]
        if index in names:
            shards = read_object(get(index), INDEX_BYTES, "download it again").get("weight_map")
            return [index, *sorted({str(s) for s in shards.values()})] if isinstance(shards, dict) else [index]
    return []


def _names(repository: Repository) -> set[str] | None:
    """All files of a repository; None where the hub cannot be reached, which one question tells."""
    import huggingface_hub as hub

    try:
        # unlike list_repo_files, this does not ask for half a minute in vain: the name may only be mistyped
        found = hub.model_info(repository.id, revision=repository.revision, timeout=HUB_SECONDS)
        return {file.rfilename for file in found.siblings or ()}
    except Exception as error:
        if _answered(error):
            raise
        return None


def _small(names: set[str]) -> list[str]:
    return sorted(n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in _SMALL))


def _snapshot(repository: Repository, files: list[str]) -> Path:
    import huggingface_hub as hub

    return Path(hub.snapshot_download(repository.id, revision=repository.revision, allow_patterns=files))


def _require_weights(repository: Repository, names: set[str]) -> None:
    """Raises LmcError where a repository has nothing that could be read."""
    ends = {Path(name).suffix for name in names}
    if "adapter_config.json" in names or {SINGLE, PICKLED, f"{SINGLE}.index.json", f"{PICKLED}.index.json"} & names:
        return
    if ".gguf" in ends:
        raise LmcError(f"{repository}: {GGUF}")
    raise LmcError(f"{repository} has no {SINGLE}, no {PICKLED} and no index of either; give a repository of weights")


def _answered(error: Exception) -> bool:
    """Whether it is the hub that says no, and not that it could not be asked."""
    from huggingface_hub import errors

    kinds = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    if isinstance(error, kinds):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status < 500


@contextmanager
def _told(repository: Repository) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository.id}"
    try:
        yield
    except LmcError:
        raise
    except errors.GatedRepoError as error:
        text = f"{repository.id} is gated: accept its terms on {page}, then log in with hf auth login"
        raise LmcError(text) from error
    except errors.RepositoryNotFoundError as error:
        text = (
            f"there is no directory {repository}, and the hub has no repository {repository.id}, or it is private: "
            "check the name, or hf auth login"
        )
        raise LmcError(text) from error
    except errors.RevisionNotFoundError as error:
        text = f"{repository.id} has no revision {repository.revision or 'main'}; {page}/tree/main lists them"
        raise LmcError(text) from error
    except errors.HFValidationError as error:
        raise LmcError(f"{repository.id} is neither a local directory nor a hub id; check the name") from error
    except Exception as error:  # the client raises a dozen more kinds
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise LmcError(f"{repository} does not fit on the disk of the hub's cache; free some space") from error
        if _answered(error):
            raise LmcError(f"the hub does not deliver {repository} ({type(error).__name__}); see {page}") from error
        raise LmcError(
            f"there is no directory {repository}, and as a name on the hub it is not in the local cache, and the hub "
            "cannot be reached; check the path, or connect"
        ) from error
