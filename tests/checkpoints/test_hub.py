"""Repositories of the hub: which files are fetched, at which revision, and what is said where they cannot be had.

The hub is a directory of repositories here, behind the functions of huggingface_hub that are used: no network.
"""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoints_tiny import edit_config
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from lmc_fast import LmcError, open_pair
from lmc_fast.checkpoints import Model
from lmc_fast.checkpoints.hub import GGUF, Repository, at_revision, find
from lmc_fast.cli import main
from lmc_fast.cli.arguments import parser


class Hub:
    """Repositories (id, revision) -> directory, a cache, and a log of what was fetched."""

    def __init__(self, cache: Path):
        self.repositories: dict[tuple[str, str | None], Path] = {}
        self.cache, self.fetched, self.failure = cache, [], None

    def _home(self, repo, revision):
        if self.failure:
            raise self.failure
        return self.repositories[repo, revision]

    def model_info(self, repo, revision=None, timeout=None):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self._files(repo, revision)])

    def _files(self, repo, revision):
        home = self._home(repo, revision)
        return [str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()]

    def snapshot_download(self, repo, revision=None, allow_patterns=None, local_files_only=False):
        local = self.cache / f"{repo.replace('/', '--')}@{revision}"
        if local_files_only:
            if not local.is_dir():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(local)
        for name in self._files(repo, revision):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self._home(repo, revision) / name, local / name)
                self.fetched.append(name)
        return str(local)

    def hf_hub_download(self, repo, name, revision=None):
        return str(self._home(repo, revision) / name)

    def get_safetensors_metadata(self, repo, revision=None):
        home = self._home(repo, revision)
        index = home / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
        files = {}
        for name in names or ["model.safetensors"]:
            tensors = load_file(home / name)
            kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
            infos = {n: SimpleNamespace(dtype=kinds[t.dtype], shape=list(t.shape)) for n, t in tensors.items()}
            files[name] = SimpleNamespace(tensors=infos)
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path / "cache")
    for name in ("model_info", "snapshot_download", "hf_hub_download", "get_safetensors_metadata"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def repository(hub, make_checkpoint, tmp_path):
    """repository(revision, seed, sharded, variant): adds lab/tiny, with much that nobody needs."""

    def add(revision=None, seed=1, sharded=False, variant="neox"):
        home = shutil.copytree(make_checkpoint(variant, seed), tmp_path / f"lab-{revision}-{seed}")
        for name in ("consolidated.safetensors", "fp16/model.safetensors", "onnx/model.onnx", "original/params.json"):
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_bytes(b"x")
        for name in ("training_args.bin", "flax_model.msgpack", "model.gguf", "README.md", "trainer_state.json"):
            (home / name).write_bytes(b"x")
        if sharded:
            tensors = load_file(home / "model.safetensors")
            (home / "model.safetensors").unlink()
            names = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
            for file in set(names.values()):
                save_file({n: tensors[n] for n in tensors if names[n] == file}, home / file)
            (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        hub.repositories["lab/tiny", revision] = home
        return home

    return add


SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("sharded", [False, True])
def test_only_what_is_needed_is_downloaded(sharded, repository, hub):
    home = repository(sharded=sharded)
    found = Model("lab/tiny").load()
    expected = Model(home).load()
    assert all(torch.equal(found.ends[name], t) for name, t in expected.ends.items())
    weights = {file.name for file in home.glob("model*safetensors*")}
    assert set(hub.fetched) == SMALL | weights and len(weights) == (3 if sharded else 1)


def test_pickled_weights_only_where_there_is_nothing_else(repository, hub):
    home = repository()
    torch.save(load_file(home / "model.safetensors"), home / "pytorch_model.bin")
    Model("lab/tiny")
    assert "pytorch_model.bin" not in hub.fetched
    (home / "model.safetensors").unlink()
    hub.fetched.clear()
    Model("lab/tiny")
    assert set(hub.fetched) == SMALL | {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("lab/tiny", None),
        ("lab/tiny@step1000", "step1000"),
        ("https://huggingface.co/lab/tiny", None),
        ("https://huggingface.co/lab/tiny/", None),
        ("https://huggingface.co/lab/tiny/tree/step1000", "step1000"),
        ("https://hf.co/lab/tiny/tree/refs%2Fpr%2F3", "refs/pr/3"),
        ("hf://lab/tiny@stage1-step100/2", "stage1-step100/2"),
    ],
)
def test_names_of_repositories(text, revision, hub):
    assert find(text) == Repository("lab/tiny", revision)


@pytest.mark.parametrize("text", ["lab/tiny/blob", "../tiny", "lab/tiny@", "https://example.com/lab/tiny", "a b", "@x"])
def test_what_is_no_repository(text, hub):
    with pytest.raises(LmcError, match="does not exist"):
        find(text)


def test_local_directories_come_first_and_have_no_revisions(hub, tmp_path):
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    (tmp_path / "lab" / "tiny@odd").mkdir()
    assert find("lab/tiny") == Path("lab/tiny") and find("lab/tiny@odd") == Path("lab/tiny@odd")
    for ask in (lambda: find("lab/tiny@step1"), lambda: at_revision("lab/tiny", "step1")):
        with pytest.raises(LmcError, match="lab/tiny is a local directory, which has no revision step1"):
            ask()


def test_revisions_are_other_models(repository, hub, capsys):
    first, second = repository(), repository("step1000", 2)
    pair = open_pair("lab/tiny", "lab/tiny@step1000")
    for model, home in ((pair.a, first), (pair.b, second)):
        assert torch.equal(model.load().ends["embed"], Model(home).load().ends["embed"])
    assert main(["verify", "lab/tiny", "lab/tiny", "--revision-b", "step1000"]) == 1
    assert main(["inspect", "lab/tiny", "lab/tiny", "--revision-b", "step1000"]) == 0
    assert "lab/tiny and lab/tiny@step1000 can be aligned" in capsys.readouterr().out
    assert main(["inspect", "lab/tiny", "--revision-b", "step1000"]) == 2
    assert main(["inspect", "lab/tiny@main", "--revision-a", "step1000"]) == 2
    said = capsys.readouterr().err
    assert "no B" in said and "give one of them" in said
    heal = ["heal", str(first), "--from", "x", "y", "--data", "z", "--out", "o", "--revision-merged", "step1000"]
    for words in (heal, ["verify", str(first), str(second), "--revision-a", ""]):
        assert main(words) == 2 and "has no revision" in capsys.readouterr().err
    for command in ("inspect", "plan", "merge", "barrier", "verify", "align"):
        assert "--revision-b" in parser()._subparsers._group_actions[0].choices[command].format_help()


@pytest.mark.parametrize("sharded", [False, True])
def test_inspect_and_plan_read_headers_alone(sharded, repository, hub, capsys):
    home = repository(sharded=sharded)
    assert main(["plan", "lab/tiny", "lab/tiny", "--memory", "8GiB"]) == 0
    assert main(["inspect", "lab/tiny", str(home)]) == 0
    assert "can be aligned" in capsys.readouterr().out and set(hub.fetched) == SMALL
    model = Model("lab/tiny", headers_only=True)
    assert model.dtype == torch.float32 and model.spec == Model(home).spec
    with pytest.raises(LmcError, match="only headers were read"):
        model.load()


def test_headers_cannot_tell_whether_a_stored_head_is_the_embedding(repository, hub):
    home = repository(variant="gpt2-tied")
    tensors = load_file(home / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, home / "model.safetensors")
    assert Model("lab/tiny").spec.tied and not Model("lab/tiny", headers_only=True).spec.tied


def test_a_wrong_shape_is_found_in_headers(repository, hub):
    edit_config(repository(), hidden_size=48)
    with pytest.raises(LmcError, match="has shape"):
        Model("lab/tiny", headers_only=True)


def test_pickled_weights_are_downloaded_to_be_inspected(repository, hub, caplog):
    caplog.set_level("INFO", "lmc_fast")
    home = repository()
    torch.save(load_file(home / "model.safetensors"), home / "pytorch_model.bin")
    (home / "model.safetensors").unlink()
    assert Model("lab/tiny", headers_only=True).load() and "its weights are downloaded" in caplog.text


def test_offline_the_cache_serves(repository, hub):
    repository()
    Model("lab/tiny")
    hub.failure = errors.OfflineModeIsEnabled("offline")
    assert Model("lab/tiny", headers_only=True).load()
    (hub.cache / "lab--tiny@None" / "model.safetensors").unlink()
    with pytest.raises(LmcError, match=r"has only a part of lab/tiny: no model\.safetensors"):
        Model("lab/tiny")
    with pytest.raises(
        LmcError, match=r"no directory lab/tiny@step9, .* not in the local cache, and the hub cannot be reached"
    ):
        Model("lab/tiny@step9")


def response(status):
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("x", response=response(403)), "is gated: accept its terms on https://huggingface.co/"),
        (errors.RepositoryNotFoundError("x", response=response(404)), "has no repository lab/tiny, or it is private"),
        (errors.RevisionNotFoundError("x", response=response(404)), "lab/tiny has no revision step1"),
        (errors.HfHubHTTPError("x", response=response(401)), "does not deliver lab/tiny@step1"),
        (errors.HfHubHTTPError("x", response=response(503)), "the hub cannot be reached"),
        (ConnectionError("x"), "the hub cannot be reached"),
        (errors.HFValidationError("x"), "neither a local directory nor a hub id"),
    ],
)
@pytest.mark.parametrize("headers_only", [False, True])
def test_each_refusal_has_its_sentence(error, words, headers_only, hub):
    hub.failure = error
    with pytest.raises(LmcError) as found:
        Model("lab/tiny@step1", headers_only)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_a_full_disk_and_repositories_of_something_else(repository, hub, monkeypatch):
    home = repository()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "x")))
    with pytest.raises(LmcError, match="does not fit on the disk"):
        Model("lab/tiny")
    (home / "model.safetensors").unlink()
    for headers_only in (False, True):
        with pytest.raises(LmcError, match="GGUF is not read"):
            Model("lab/tiny", headers_only)
    (home / "model.gguf").unlink()
    with pytest.raises(LmcError, match="no index of either"):
        Model("lab/tiny")


def test_adapters_and_gguf(repository, hub, make_checkpoint, tmp_path):
    home = repository()
    (home / "model.safetensors").unlink()
    (home / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lab/base"}))
    (home / "adapter_model.safetensors").write_bytes(b"x")
    for path in ("lab/tiny", home):
        for headers_only in (False, True):
            with pytest.raises(LmcError, match=r"is an adapter for lab/base, not a model: merge it first with peft"):
                Model(path, headers_only)
    (home / "config.json").unlink()
    with pytest.raises(LmcError, match="is an adapter"):
        Model(home)
    left_over = shutil.copytree(make_checkpoint("neox"), tmp_path / "merged")
    shutil.copy(home / "adapter_config.json", left_over)
    assert Model(left_over).spec.layers == 2
    assert all(word in GGUF for word in ("gguf_file", "hf_quantizer", "save_pretrained"))
