"""What was trained on one endpoint, carried over: exact, or refused in one sentence with nothing left behind."""

import json
import shutil

import pytest
import torch
from checkpoints_tiny import edit_config, reference_logits, write_lines
from lora import PREFIX, adapted, merge_into, write_adapter
from random_elements import random_element
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast import Alignment, LmcError
from lmc_fast.cli import main
from lmc_fast.pipeline.resume import made_from
from lmc_fast.symmetry.grown import record_of

CPU32 = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def home(make_checkpoint, tmp_path_factory):
    """home(variant) -> a directory with a/, b/ and alignment.safetensors, for random elements of both endpoints."""
    made = {}

    def make(variant):
        if variant not in made:
            pair = lmc.open_pair(make_checkpoint(variant, 1), make_checkpoint(variant, 2))
            both = random_element(pair.spec, 3), random_element(pair.spec, 4)
            inputs = made_from(pair, torch.zeros(1, 4, dtype=torch.int64), None)
            made[variant] = tmp_path_factory.mktemp(variant) / "aligned"
            lmc.export(pair, Alignment(*both, both, {"inputs": inputs}), made[variant])
        return made[variant]

    return make


@pytest.fixture
def child_of(tmp_path):
    """child_of(directory) -> a child of that checkpoint: everything a little different, the norms, too."""

    def make(directory, amount=0.02, seed=9):
        model = AutoModelForCausalLM.from_pretrained(directory, **CPU32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += amount * torch.randn(p.shape, generator=generator)
        out = shutil.copytree(directory, tmp_path / "child")
        model.save_pretrained(out)
        return out

    return make


def state(directory):
    """Tensor by tensor, as transformers loads a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).state_dict()


def log_probabilities(directory, tokens):
    return reference_logits(directory, tokens).log_softmax(-1)


def clean(tmp_path):
    return not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama-tied-biased"])
def test_a_child_keeps_its_function_and_is_added_to_the_other_endpoint(
    variant, home, child_of, make_checkpoint, tokens, tmp_path
):
    aligned, child = home(variant), child_of(make_checkpoint(variant, 2))
    report = lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "out", member="b")
    assert report["proof"]["by"].startswith("transformers") and report["proof"]["kl"] < 1e-8
    assert 0 < report["distance"] < 0.2
    expected = log_probabilities(child, tokens)
    assert (log_probabilities(tmp_path / "out", tokens) - expected).abs().max() < 2e-5 * expected.abs().max()
    onto = {"onto": aligned / "a", "weight": 0.5, "evenly": True}
    report = lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "sum", member="b", **onto)
    assert report["moved"]["kl"] > 1e-6 and sorted(f.name for f in (tmp_path / "sum").iterdir()) == sorted(
        f.name for f in (aligned / "a").iterdir()
    )
    a, b, c, found = (state(d) for d in (aligned / "a", aligned / "b", tmp_path / "out", tmp_path / "sum"))
    assert found.keys() == a.keys()
    for name, t in found.items():
        assert (t - (a[name] + 0.5 * (c[name] - b[name]))).abs().max() < 1e-5, name


def test_a_matrix_counts_as_far_as_it_agrees(home, child_of, make_checkpoint, tmp_path):
    aligned, child = home("llama-tied-biased"), child_of(make_checkpoint("llama-tied-biased", 2))
    lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "c", member="b")
    report = lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "sum", member="b", onto=aligned / "a")
    a, b, c, found = (state(d) for d in (aligned / "a", aligned / "b", tmp_path / "c", tmp_path / "sum"))
    slots = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "gate", "up_proj": "up"}
    assert report["basis"] == "aligned" and report["agreement"].keys() == set(slots.values())
    for name, t in found.items():
        *_, layer, part = name.split(".")
        weight = name.removesuffix(part) + "weight"
        share = torch.cosine_similarity(a[weight].flatten(), b[weight].flatten(), 0).clamp(0) if layer in slots else 1
        assert (t - (a[name] + share * (c[name] - b[name]))).abs().max() < 1e-5, name


def test_the_basis_in_which_both_endpoints_are_nearer(make_checkpoint, child_of, tokens, tmp_path):
    pair = lmc.open_pair(make_checkpoint("neox", 2), make_checkpoint("neox", 2))
    planted, astray = random_element(pair.spec, 3), random_element(pair.spec, 4)
    info = {"inputs": made_from(pair, torch.zeros(1, 4, dtype=torch.int64), None), "history": {}}
    lmc.export(pair, Alignment(planted, astray, (planted, planted), info), tmp_path / "one")
    file, child = tmp_path / "one" / "alignment.safetensors", child_of(make_checkpoint("neox", 2))
    expected, found = log_probabilities(child, tokens), {}
    for basis in ("auto", "matched", "aligned"):
        how = {"member": "b", "onto": tmp_path / "one" / "a", "basis": basis, "dtype": torch.float32}
        found[basis] = lmc.carry(file, child, tmp_path / basis, **how)["basis"]
        off = (log_probabilities(tmp_path / basis, tokens) - expected).abs().max() / expected.abs().max()
        assert (off < 2e-5) == (basis != "aligned")
    assert found == {"auto": "matched", "matched": "matched", "aligned": "aligned"}
    with pytest.raises(LmcError, match="basis 'learned' is unknown; choose one of auto, aligned, matched"):
        lmc.carry(file, child, tmp_path / "out", member="b", onto=tmp_path / "one" / "a", basis="learned")
    assert clean(tmp_path)


def test_an_endpoint_itself_is_aligned_on_the_way(home, child_of, make_checkpoint, tmp_path):
    aligned, child = home("neox"), child_of(make_checkpoint("neox", 1))
    for name, onto in (("one", aligned / "b"), ("two", make_checkpoint("neox", 2))):
        lmc.carry(aligned / "alignment.safetensors", child, tmp_path / name, member="a", onto=onto)
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    assert all((one[name] - t).abs().max() < 1e-5 for name, t in two.items())


def test_without_the_original_the_aligned_endpoint_serves(home, child_of, make_checkpoint, tmp_path, caplog):
    aligned = shutil.copytree(home("neox"), tmp_path / "aligned")
    child = child_of(make_checkpoint("neox", 2))
    found = Alignment.load(aligned / "alignment.safetensors")
    found.info["inputs"]["sources"][1] = "/nowhere"
    found.save(aligned / "alignment.safetensors")
    report = lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "one", member="b", onto=aligned / "a")
    assert report["endpoint"] == str(aligned / "b")
    found.info.clear()
    found.save(aligned / "alignment.safetensors")
    assert not caplog.records
    lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "two", member="b", onto=aligned / "a")
    assert "holds no digests of its endpoints" in caplog.text
    given = {"endpoint": make_checkpoint("neox", 2), "onto": aligned / "a"}
    lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "three", member="b", **given)
    one, two, three = (state(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(t, two[name]) and (t - three[name]).abs().max() < 1e-5 for name, t in one.items())
    shutil.rmtree(aligned / "b")
    with pytest.raises(LmcError, match="name it with --endpoint"):
        lmc.carry(aligned / "alignment.safetensors", child, tmp_path / "out", member="b")


def test_what_does_not_fit_together_is_refused(home, child_of, make_checkpoint, tmp_path):
    aligned, b = home("neox"), make_checkpoint("neox", 2)
    file, child = aligned / "alignment.safetensors", child_of(b)
    other = home("neox-sequential")

    def refused(words, alignment=file, given=child, member="b", **options):
        with pytest.raises(LmcError, match=words):
            lmc.carry(alignment, given, tmp_path / "out", member=member, **options)
        assert clean(tmp_path)

    refused("no child of it; it is near to b: use --from b", member="a")
    refused("no child of it; it is near to a: use --from a", given=make_checkpoint("neox", 1))
    refused("no child of it; give a checkpoint that was trained", given=make_checkpoint("neox", 7))
    refused("was not trained from .*: their architectures differ", given=make_checkpoint("llama", 2))
    refused("was not trained from .*: activation differs|parallel differs", other / "alignment.safetensors")
    refused("is not the checkpoint that .* was made for as b: its files differ", endpoint=make_checkpoint("neox", 7))
    refused("not in the aligned basis", onto=child)
    refused("not in the aligned basis", onto=make_checkpoint("neox", 7))
    refused("cannot be added to .*architectures differ", onto=home("llama") / "a")
    refused("does not exist", alignment=tmp_path / "missing.safetensors")
    refused("give --onto, too", weight=0.5)
    refused("not a finite number", weight=float("nan"))
    refused("one of a, b", member="c")
    refused("--full is for adapters", full=True)
    refused("too small for these models", memory=1 << 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(LmcError, match="exists and is not empty"):
        lmc.carry(file, child, tmp_path / "out", member="b")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(LmcError, match="is an input"):
        lmc.carry(file, child, child, member="b")


def test_what_changes_while_it_is_carried_is_not_published(home, child_of, make_checkpoint, tmp_path, monkeypatch):
    child = child_of(make_checkpoint("neox", 2))
    from lmc_fast.pipeline import carry as module

    monkeypatch.setattr(module, "compare", lambda x, y, *_: (edit_config(child, eos_token_id=1), _same())[1])
    with pytest.raises(LmcError, match="was changed while it was in use"):
        lmc.carry(home("neox") / "alignment.safetensors", child, tmp_path / "out", member="b")
    monkeypatch.setattr(module, "compare", lambda x, y, *_: (_same()[0], False))
    with pytest.raises(LmcError, match="would not keep its function"):
        lmc.carry(home("neox") / "alignment.safetensors", child, tmp_path / "out", member="b")
    assert clean(tmp_path)


def _same():
    return lmc.Difference(0.0, 0.0, 1.0, 1.0), True


def test_a_child_of_an_endpoint_that_was_grown(make_checkpoint, child_of, adapter_for, tokens, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", 2), **CPU32)
    del small.model.layers[1]
    small.config.num_hidden_layers = 1
    b = shutil.copytree(make_checkpoint("llama", 2), tmp_path / "b")
    small.save_pretrained(b)
    pair = lmc.open_pair(make_checkpoint("llama", 1), b)
    both = random_element(pair.spec, 3), random_element(pair.spec, 4)
    inputs = made_from(pair, tokens, None) | {"sources": [None, str(b)]}
    info = {"inputs": inputs} | record_of((pair.a, pair.b))
    aligned = tmp_path / "aligned"
    lmc.export(pair, Alignment(*both, both, info), aligned)
    child, adapter, file = child_of(b), adapter_for(b), aligned / "alignment.safetensors"
    lmc.carry(file, child, tmp_path / "out", member="b")
    expected = log_probabilities(child, tokens)
    assert (log_probabilities(tmp_path / "out", tokens) - expected).abs().max() < 2e-5 * expected.abs().max()
    with pytest.raises(LmcError, match="was grown to the size of the other endpoint"):
        lmc.carry(file, adapter, tmp_path / "adapter-out", member="b")
    lmc.carry(file, adapter, tmp_path / "full", member="b", full=True, onto=aligned / "b")
    expected = merge_into(AutoModelForCausalLM.from_pretrained(b, dtype=torch.float64), adapter)
    with torch.no_grad():
        expected = expected.eval()(input_ids=tokens).logits.log_softmax(-1)
    assert (log_probabilities(tmp_path / "full", tokens) - expected).abs().max() < 2e-5 * expected.abs().max()


# Adapters


@pytest.fixture
def adapter_for(tmp_path):
    """adapter_for(checkpoint, embeddings, **config) -> the directory of an adapter with random factors."""

    def make(directory, embeddings=False, name="adapter", **changes):
        model = AutoModelForCausalLM.from_pretrained(directory, **CPU32)
        return write_adapter(tmp_path / name, adapted(model, embeddings), dtype=torch.float32, **changes)

    return make


def test_an_adapter_by_command_and_the_checkpoint_it_makes(
    home, make_checkpoint, adapter_for, tokens, tmp_path, capsys
):
    aligned, b = home("neox"), make_checkpoint("neox", 2)
    command = ["carry", aligned / "alignment.safetensors", adapter_for(b, use_rslora=True), "--from", "b"]
    data = write_lines(tmp_path / "text.txt")
    for more in (["--out", tmp_path / "out"], ["--full", "--out", tmp_path / "full", "--data", data]):
        assert main([str(x) for x in (*command, "--onto", aligned / "a", *more)]) == 0
    shown = capsys.readouterr().out
    assert "of rank 3, exact" in shown and "has biases now" in shown and "same function, says transformers" in shown
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(aligned / "a") and config["lora_bias"] and config["use_rslora"]
    load = AutoModelForCausalLM.from_pretrained
    merged = merge_into(load(aligned / "a", dtype=torch.float64), tmp_path / "out")
    full = load(tmp_path / "full", dtype=torch.float64)
    with torch.no_grad():
        one, other = (model.eval()(input_ids=tokens).logits.log_softmax(-1) for model in (merged, full))
    assert (one - other).abs().max() < 1e-4 < (one - log_probabilities(aligned / "a", tokens)).abs().max()


def test_several_adapters_as_peft_saves_them(home, make_checkpoint, adapter_for, tmp_path):
    aligned, b = home("llama"), make_checkpoint("llama", 2)
    for name in ("both", "both/second"):
        adapter_for(b, embeddings=True, name=name)
    report = lmc.carry(aligned / "alignment.safetensors", tmp_path / "both", tmp_path / "out", member="b")
    assert report["adapters"] == [".", "second"] and not report["biases"]
    first, second = (load_file(tmp_path / "out" / x / "adapter_model.safetensors") for x in (".", "second"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    with pytest.raises(LmcError, match="several adapters"):
        lmc.carry(aligned / "alignment.safetensors", tmp_path / "both", tmp_path / "x", member="b", full=True)


def _rename(tensors):
    return {name.replace("q_proj", "z_proj"): t for name, t in tensors.items()}


def _half(tensors):
    return {name: t for name, t in tensors.items() if "k_proj.lora_A" not in name}


def _narrow(tensors):
    return {name: t[:, :-1].clone() if "v_proj.lora_A" in name else t for name, t in tensors.items()}


def _nan(tensors):
    return {name: t * float("nan") for name, t in tensors.items()}


def _with(name):
    return lambda tensors: tensors | {f"{PREFIX}model.layers.0.self_attn.q_proj.{name}": torch.ones(32)}


def _other_head(tensors):
    return tensors | {f"{PREFIX}lm_head.base_layer.weight": torch.ones(40, 24)}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (None, {"use_dora": True}, "use_dora is True: DoRA rescales whole rows"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'.: it holds whole modules"),
        (None, {"bias": "all"}, "bias is 'all'"),
        (None, {"peft_type": "IA3"}, "type 'IA3' is no low-rank change"),
        (None, {"init_lora_weights": "pissa"}, "also changes the base"),
        (None, {"target_parameters": ["experts"]}, "target_parameters is .'experts'., which is not known"),
        (None, {"r": 4}, "the rank of .* is 3, but r is 4"),
        (None, {"lora_alpha": "x"}, "lora_alpha is 'x'"),
        (None, {"rank_pattern": {"(": 2}}, "holds no pattern"),
        (None, {"rank_pattern": {"(x+)+": 2}}, "can take for ever"),
        (None, {"alpha_pattern": {".*" * 12 + "x": 2}}, "can take for ever"),
        (None, {"alpha_pattern": {".*": 1e300}}, r"lora_alpha is 1e\+300"),
        (None, {"task_type": "x"}, "task_type is 'x', which peft does not take"),
        (None, {"megatron_config": 0.5}, "megatron_config is 0.5"),
        (None, {"lora_bias": 1}, "lora_bias is 1, which peft does not take"),
        (None, {"target_modules": []}, "target_modules is .., which peft does not take"),
        (None, {"target_modules": ["v_proj"]}, "target_modules leaves out .*, of which there are factors"),
        (None, {"target_modules": "(x+)+"}, "can take for ever"),
        (None, {"exclude_modules": 5}, "exclude_modules is 5"),
        (None, {"exclude_modules": ".*v_proj"}, "exclude_modules leaves out .*v_proj"),
        (None, {"layers_to_transform": [1]}, "layers_to_transform leaves out"),
        (None, {"layers_to_transform": [0.5]}, "layers_to_transform is .0.5."),
        (None, {"layers_pattern": "h"}, "layers_pattern is 'h'"),
        (_rename, {}, "changes model.layers.0.self_attn.z_proj, which is no linear layer"),
        (_half, {}, "only one of the two factors of .*k_proj"),
        (_narrow, {}, "an adapter of another model: its factors of .*v_proj make 16 x 23"),
        (_nan, {}, "NaN or infinity"),
        (_with("lora_magnitude_vector"), {}, "lora_magnitude_vector is no factor"),
        (_with("lora_B.bias"), {}, "adds a bias where"),
        (_other_head, {}, "lm_head.base_layer.weight is another than that of"),
        (lambda tensors: {"x": torch.ones(1)}, {}, "x is no factor"),
        (lambda tensors: {}, {}, "holds nothing"),
    ],
)
def test_adapters_that_cannot_be_carried(change, config, words, home, make_checkpoint, adapter_for, tmp_path):
    adapter = adapter_for(make_checkpoint("llama", 2))
    edit_config(adapter, "adapter_config.json", **config)
    if change:
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
    with pytest.raises(LmcError, match=words):
        lmc.carry(home("llama") / "alignment.safetensors", adapter, tmp_path / "out", member="b")
    assert clean(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*_proj"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [0, 1], "lora_bias": None},
    ],
)
def test_other_ways_to_name_what_an_adapter_changes(config, home, make_checkpoint, adapter_for, tmp_path):
    adapter = adapter_for(make_checkpoint("llama", 2))
    edit_config(adapter, "adapter_config.json", **config)
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lm_head" not in name}, file)
    lmc.carry(home("llama") / "alignment.safetensors", adapter, tmp_path / "out", member="b")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()).items() >= config.items()


def test_adapters_and_what_is_around_them(home, make_checkpoint, adapter_for, tmp_path):
    aligned, b = home("gpt2-tied"), make_checkpoint("gpt2-tied", 2)
    adapter, file = adapter_for(b), aligned / "alignment.safetensors"

    def refused(words, given=adapter, member="b", **options):
        with pytest.raises(LmcError, match=words):
            lmc.carry(file, given, tmp_path / "out", member=member, **options)
        assert clean(tmp_path)

    edit_config(adapter, "adapter_config.json", base_model_name_or_path=str(b))
    refused("is an adapter of .*, which is b: use --from b", member="a")
    refused("is not aligned", onto=make_checkpoint("gpt2-tied", 1))
    refused("has no biases in adapters that change an embedding", adapter_for(b, True, "tables"))
    refused("is not aligned", onto=make_checkpoint("gpt2-tied", 1))
    refused("its files differ", endpoint=make_checkpoint("gpt2-tied", 7))
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused("corrupt")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused("only adapter_model.bin; save it as safetensors")
    (adapter / "adapter_config.json").write_text("[")
    refused("not valid JSON")
