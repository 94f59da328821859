"""transformers as the judge: it reads what from_pretrained reads, holds one block, and catches our own misreading."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints_tiny import edit_config, reference_logits
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import lmc_fast as lmc
from lmc_fast.checkpoints import Checkpoint, Model, tensor_file
from lmc_fast.cli import main
from lmc_fast.evaluation.reference import Reference, Unreadable
from lmc_fast.pipeline import proof


def log_probabilities(directory, tokens):
    found = Reference(directory, "causal")
    rows = found.head_inputs(tokens, 8)
    return torch.cat([part for _, part in found.logits(rows, 11)], 1).log_softmax(-1)


@pytest.fixture
def copy(make_checkpoint, tmp_path):
    def make(variant="gpt2-tied", change=None, name="copy"):
        directory = shutil.copytree(make_checkpoint(variant), tmp_path / name)
        if change:
            tensors = change(load_file(directory / "model.safetensors"))
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


def only_head(t):
    return t | {"lm_head.weight": t.pop("transformer.wte.weight")}


def other_head(t):
    return t | {"lm_head.weight": 2 * t["transformer.wte.weight"].flip(0)}


def bare(t):
    return {name.removeprefix("transformer."): value for name, value in t.items()}


@pytest.mark.parametrize("change", [dict, only_head, other_head, bare])
def test_names_and_ties_are_those_of_transformers(change, copy, tokens):
    directory = copy(change=change)
    expected = reference_logits(directory, tokens, torch.float32)[:, :-1].log_softmax(-1).flatten(0, 1)
    assert (log_probabilities(directory, tokens) - expected).abs().max() < 1e-5


def test_files_are_those_of_transformers(copy, tokens):
    directory = copy("llama")
    expected = log_probabilities(directory, tokens)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in files.items():
        save_file({n: tensors[n] for n in members}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, members in files.items() for n in members}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(log_probabilities(directory, tokens), expected)
    for file in files:
        (directory / file).unlink()
    (directory / "model.safetensors.index.json").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    assert torch.equal(log_probabilities(directory, tokens), expected)


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama-tied-biased"])
def test_one_block_and_rows_of_tables_are_held(variant, make_checkpoint, tokens, monkeypatch):
    found = Reference(make_checkpoint(variant), "causal")
    block = next(m for m in found.model.modules() if type(m).__name__.endswith(("Layer", "Block")))
    most = sum(p.numel() for p in block.parameters())
    rest = sum(p.numel() for p in found.model.parameters() if not p.is_meta)
    held = []

    def look(module, *_):
        held.append(sum(p.numel() for p in {id(p): p for p in found.model.parameters()}.values() if not p.is_meta))

    for module in list(found.model.modules()):
        module.register_forward_pre_hook(look)
    rows = found.head_inputs(tokens, 8)
    assert max(held) <= most + rest and len(held) > 10
    held.clear()
    for _ in found.logits(rows, 3):
        assert sum(p.numel() for p in found.model.parameters() if not p.is_meta) == rest
    assert max(held) <= rest + 3 * 24


@pytest.fixture
def pair(make_checkpoint):
    return [str(make_checkpoint("gpt2-tied", seed)) for seed in (1, 2)]


def drop_head(monkeypatch, pair, tmp_path):
    """Endpoint a has another head than the embedding, and our reader does not see it."""
    changed = shutil.copytree(pair[0], tmp_path / "changed")
    tensors = other_head(load_file(changed / "model.safetensors"))
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    real = Checkpoint.names.fget

    def names(self):
        return [n for n in real(self) if n != "lm_head.weight" or self.path != changed]

    monkeypatch.setattr(Checkpoint, "names", property(names))
    return [str(changed), pair[1]]


def scale_tensor(monkeypatch, pair, tmp_path):
    """Our reader gives one matrix of endpoint a 2 % too large."""
    real = tensor_file.TensorFile.read

    def read(self, name):
        off = name == "transformer.h.1.mlp.c_proj.weight" and str(self.file).startswith(pair[0])
        return real(self, name) * (1.02 if off else 1)

    monkeypatch.setattr(tensor_file.TensorFile, "read", read)
    return pair


@pytest.mark.parametrize("misread", [drop_head, scale_tensor])
def test_what_our_reader_misreads_is_not_published(misread, pair, tmp_path, monkeypatch, capsys):
    ends = misread(monkeypatch, pair, tmp_path)
    data = tmp_path / "ids.npy"
    np.save(data, torch.randint(40, (2000,), generator=torch.Generator().manual_seed(1)).numpy())
    options = ["--data", str(data), "--method", "weight", "--block", "16"]
    assert main(["align", *ends, *options, "--out", str(tmp_path / "out")]) == 2
    assert "does not keep its function" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def never(*_, **__):
        raise Unreadable("of a test")

    monkeypatch.setattr(proof, "Reference", never)  # our engine believes what our reader says
    assert main(["align", *ends, *options, "--out", str(tmp_path / "out")]) == 0
    assert "lmc_fast, since of a test" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["proof"]["a"]["by"] == "lmc_fast, since of a test"
    monkeypatch.undo()
    assert main(["verify", ends[0], str(tmp_path / "out" / "a")]) == 1
    assert "different functions, says transformers" in capsys.readouterr().out


def test_a_budget_below_its_needs(pair, monkeypatch):
    monkeypatch.setattr(proof, "SPARE", 0.99)
    found, same = lmc.verify(*pair, memory=8 << 30)
    assert not same and "needs more memory than is allowed" in found.by and found.by.startswith("lmc_fast")
    monkeypatch.undo()
    roomy, _ = lmc.verify(*pair, memory=8 << 30)
    assert roomy.by.startswith("transformers") and roomy.kl == pytest.approx(found.kl, rel=1e-4)


def test_within_a_budget_fewer_go_at_a_time(pair, monkeypatch):
    model, seen, real = Model(pair[0]), [], Reference.head_inputs
    data = torch.randint(40, (6, 20), generator=torch.Generator().manual_seed(2))

    def head_inputs(self, part, batch):
        seen.append((len(part), batch))
        return real(self, part, batch)

    monkeypatch.setattr(Reference, "head_inputs", head_inputs)
    monkeypatch.setattr(proof, "counted_bytes", lambda _: 0)
    monkeypatch.setattr(proof, "HELD", 0)
    monkeypatch.setattr(proof, "TABLES", 0)
    with pytest.raises(Unreadable, match="more memory"):
        proof.by_transformers(model, model, data, memory=70 << 10)
    found = [proof.by_transformers(model, model, data, memory=size << 10) for size in (150, 250, 4096)]
    assert [f.kl for f in found] == pytest.approx([0] * 3, abs=1e-12)
    shares = list(dict.fromkeys(seen))
    assert shares[-1] == (6, 32) and shares == sorted(shares) and len(shares) > 1 and shares[0][1] == 1


def test_another_version_of_transformers_is_told(pair, monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "_load_pretrained_model")
    with pytest.raises(Unreadable, match="_load_pretrained_model"):
        Reference(Model(pair[0]).path, "causal")
    assert "_load_pretrained_model" in lmc.verify(*pair)[0].by


def test_what_transformers_would_make_up_is_refused(copy):
    def short(tensors):
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        return tensors

    with pytest.raises(lmc.LmcError, match=r"finds no weights for transformer.h.1.mlp.c_fc.weight"):
        Reference(copy(change=short), "causal")
    broken = copy(name="broken")
    edit_config(broken, n_embd=25)
    with pytest.raises((lmc.LmcError, Unreadable)):
        Reference(broken, "causal")


def test_of_padded_vocabularies_the_common_part_is_compared(pair, copy):
    def padded(tensors):
        table = tensors["transformer.wte.weight"]
        return tensors | {"transformer.wte.weight": torch.cat([table, 3 * table[:4]])}

    longer = copy(change=padded)
    edit_config(longer, vocab_size=44)
    found, same = lmc.verify(pair[0], longer)
    assert same and found.kl < 1e-10 and found.by.startswith("transformers")
