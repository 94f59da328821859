"""Pairs in memory: the same bits as through directories, nothing on disk, the models left as they are."""

import builtins
import io
import os

import pytest
import torch
import zoo
from checkpoints_tiny import VOCAB, randomize
from safetensors.torch import load_file
from transformers import AutoConfig

import lmc_fast as lmc

FAMILIES = ["llama", "gpt2-tied", "gemma2", "mixtral", "bert", "vit", "neox", "qwen3", "phi3"]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture
def no_disk(monkeypatch, tmp_path):
    """Everything that would write to a disk fails; the directory of work is empty and read-only."""
    home = tmp_path / "cwd"
    home.mkdir()
    monkeypatch.chdir(home)

    def guard(function, mode):
        def guarded(file, *args, **options):
            how = args[0] if args else options.get("mode", options.get("flags", "r"))
            if (
                isinstance(file, str | os.PathLike)
                and not os.fspath(file).startswith(("/proc/", "/dev/"))
                and mode(how)
            ):
                raise AssertionError(f"{file} is opened to be written")
            return function(file, *args, **options)

        return guarded

    def wanted(how):
        return how & WRITES if isinstance(how, int) else set("wax+") & set(how)

    for owner, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name), wanted))
    for name in ("mkdir", "makedirs", "mkdtemp"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("a directory is made"))
    monkeypatch.setenv("LMC_FAST_ROUTE", "weight")  # else the crossover is measured, and remembered in a file
    return home


def data_for(name):
    x = zoo.inputs(name)
    if x.is_floating_point():
        return lmc.Examples(x.float().repeat(6, 1, 1, 1), torch.arange(18) % 5)
    ids = torch.randint(VOCAB, (18, 16), generator=torch.Generator().manual_seed(3))
    if name != "bert":
        return ids
    targets = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.3, ids, -1)
    targets[:, 0] = ids[:, 0]
    return lmc.Examples(ids, targets)


def equal(x, y):
    return x.keys() == y.keys() and all(torch.equal(t, y[n]) and t.dtype == y[n].dtype for n, t in x.items())


@pytest.mark.parametrize("name", FAMILIES[:6])
def test_nothing_touches_a_disk_and_models_stay_as_they_are(name, no_disk):
    models, data = [zoo.ZOO[name]() for _ in range(2)], data_for(name)
    for seed, model in enumerate(models):
        randomize(model, seed)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in models]
    pair = lmc.open_pair(*models)
    found = lmc.align(pair, data, steps=2, batch=4, validation=data[:4])
    dicts = found.state_dicts(pair)
    stocks = lmc.export(pair, found, in_memory=True, tokens=data)
    assert all(equal(x.state_dict, y.state_dict) for x, y in zip(dicts, stocks, strict=True))
    assert all(lmc.verify(m, s, data)[1] for m, s in zip(models, stocks, strict=True))
    assert not lmc.verify(*models, data)[1]
    again, line = lmc.open_pair(*stocks), lmc.barrier(pair, data, found, 3).losses
    assert lmc.barrier(again, data, points=3).losses == pytest.approx(line, rel=1e-4)
    matched = lmc.align(pair, data, method="activation")
    assert all(lmc.verify(m, s, data)[1] for m, s in zip(models, matched.state_dicts(pair), strict=True))
    assert all(equal(m.state_dict(), old) for m, old in zip(models, before, strict=True))
    assert not list(no_disk.iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_of_directories_is_what_is_handed_out(name, checkpoint_of, tmp_path):
    places, data = [checkpoint_of(name, seed) for seed in (1, 2)], data_for(name)
    how = {"steps": 2, "batch": 4, "validation": data[:4]}
    on_disk = lmc.open_pair(*places)
    wanted = lmc.align(on_disk, data, **how)
    lmc.export(on_disk, wanted, tmp_path / "out", tokens=data)
    models = [zoo.stock(place, torch.float32) for place in places]
    plain = [(AutoConfig.from_pretrained(p), load_file(p / "model.safetensors")) for p in places]
    for ends in (models, plain, [places[0], models[1]]):
        pair = lmc.open_pair(*ends)
        found = lmc.align(pair, data, **how)
        assert found.info["history"] == wanted.info["history"]
        for side, stock in zip("ab", found.state_dicts(pair), strict=True):
            assert equal(stock.state_dict, load_file(tmp_path / "out" / side / "model.safetensors")), side
            written = AutoConfig.from_pretrained(tmp_path / "out" / side).to_diff_dict()
            assert {k: v for k, v in stock.config.to_diff_dict().items() if v != written.get(k)} == {}
    lmc.export(pair, found, tmp_path / "mixed", tokens=data)  # a pair in memory, onto the disk
    assert equal(*(load_file(tmp_path / out / "b" / "model.safetensors") for out in ("out", "mixed")))


def test_stock_models_load_as_transformers_models(make_checkpoint, tokens):
    models = [zoo.stock(make_checkpoint("gpt2-tied", seed), torch.float32) for seed in (1, 2)]
    pair = lmc.open_pair(*models)
    for model, stock in zip(models, lmc.align(pair, tokens, method="weight").state_dicts(pair), strict=True):
        aligned = stock.model()
        assert type(aligned).__name__ == "GPT2LMHeadModel" and not aligned.config.tie_word_embeddings
        with torch.no_grad():
            before, after = (m.eval()(input_ids=tokens).logits.log_softmax(-1) for m in (model, aligned))
        assert (before - after).abs().max() < 1e-3
    half = lmc.export(pair, lmc.align(pair, tokens, method="weight"), in_memory=True, dtype=torch.bfloat16)
    assert {t.dtype for t in half[0].state_dict.values()} == {torch.bfloat16} and half[
        0
    ].model().dtype == torch.bfloat16


def test_a_model_that_changes_while_it_is_in_use_is_noticed(make_checkpoint, tokens):
    a, b = (zoo.stock(make_checkpoint("llama", seed), torch.float32) for seed in (1, 2))
    pair = lmc.open_pair(a, b)
    found = lmc.align(pair, tokens, method="weight")
    with torch.no_grad():
        b.lm_head.weight.mul_(2)
    with pytest.raises(lmc.LmcError, match="LlamaForCausalLM in memory were changed while"):
        lmc.export(pair, found, in_memory=True)
    pair = lmc.open_pair(a, b)
    found = lmc.align(pair, tokens, method="weight")
    b.lm_head.weight.data.mul_(2)  # which no counter of versions sees
    with pytest.raises(lmc.LmcError, match="changed while"):
        lmc.export(pair, found, in_memory=True)


def test_what_is_no_model_is_refused(make_checkpoint, tokens, tmp_path):
    model = zoo.stock(make_checkpoint("llama"), torch.float32)
    config, tensors = model.config, model.state_dict()

    def refused(place, words):
        with pytest.raises(lmc.LmcError, match=words):
            lmc.open_pair(make_checkpoint("llama"), place)

    refused(torch.nn.Linear(2, 2), "a Linear is no model")
    refused(7, "int is no model")
    refused((config,), "tuple is no model")
    refused((config, [1]), "not LlamaConfig and list")
    refused((config, tensors | {"lm_head.weight": 3}), "lm_head.weight of the state dict is a int")
    refused((config, tensors | {"lm_head.weight": tensors["lm_head.weight"].to("meta")}), "no values in memory")
    refused((config, tensors | {"lm_head.weight": tensors["lm_head.weight"].to_sparse()}), "not a plain tensor")
    refused((config, tensors | {"more": tensors["lm_head.weight"]}), "tensor more .* is not part of the llama")
    refused((config, {n: t for n, t in tensors.items() if n != "lm_head.weight"}), "lm_head.weight is missing")
    refused((config, tensors | {"lm_head.weight": tensors["lm_head.weight"][:3]}), r"has shape \[3, 24\]")
    refused(({"model_type": "llama", "x": {1, 2}}, tensors), "cannot be written as JSON")
    refused(({"model_type": "new"}, tensors), "'new' is not supported")
    refused(({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, tensors), r"quantised \(awq\)")
    tensors = {n: t.clone() for n, t in tensors.items()}
    tensors["model.norm.weight"][3] = float("nan")
    pair = lmc.open_pair(make_checkpoint("llama"), (config, tensors))
    with pytest.raises(lmc.LmcError, match=r"model.norm.weight holds NaN"):
        lmc.align(pair, tokens, method="weight")
    pair = lmc.open_pair(make_checkpoint("llama"), model)
    (tmp_path / "text.txt").write_text("w1 w2 " * 200)
    with pytest.raises(lmc.LmcError, match="neither a tokenizer nor"):
        lmc.read_tokens(tmp_path / "text.txt", pair.b, 8)
    with pytest.raises(lmc.LmcError, match="memory= prepares a pair on disk"):
        lmc.align(pair, tokens, memory=1 << 30)
    found = lmc.align(pair, tokens, method="weight")
    for options in ({}, {"out": tmp_path / "x", "in_memory": True}):
        with pytest.raises(lmc.LmcError, match="give one of them"):
            lmc.export(pair, found, **options)
