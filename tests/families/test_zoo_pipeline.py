"""From checkpoints to aligned and merged ones on other tasks than text: images, masked tokens, towers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from checkpoints_tiny import edit_config, save_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

import lmc_fast as lmc
from lmc_fast.checkpoints import Model
from lmc_fast.cli import main
from lmc_fast.data import mask_tokens, read_data
from lmc_fast.engine.evaluate import evaluate
from lmc_fast.engine.model import labels, logits
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident


@pytest.fixture
def ends(tmp_path):
    """ends(name) -> two checkpoints that the test may change."""

    def make(name):
        for side, seed in (("a", 1), ("b", 2)):
            zoo.write(name, tmp_path / side, seed)
        return tmp_path / "a", tmp_path / "b"

    return make


def write_images(file, count=80, shape=(3, 8, 8), kind=np.float32):
    draw = np.random.default_rng(3)
    pixels = draw.integers(0, 256, (count, *shape)).astype(np.uint8) if kind == np.uint8 else draw.normal(
        size=(count, *shape)
    ).astype(kind)  # fmt: skip
    np.savez(file, images=pixels, labels=draw.integers(0, 5, count))
    return file


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_image_classifiers_from_align_to_merge(name, ends, tmp_path, capsys):
    a, b = ends(name)
    data = write_images(tmp_path / "data.npz")
    options = ["--data", str(data), "--test", str(data), "--steps", "3", "--batch", "8"]
    assert main(["align", str(a), str(b), *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(curve["accuracies"]) for curve in report["curves"]] == [3, 3, 11]
    for side, original in (("a", a), ("b", b)):
        assert main(["verify", str(original), str(tmp_path / "out" / side), "--quiet"]) == 0
        assert main(["verify", str(original), str(tmp_path / "out" / side), "--data", str(data), "--quiet"]) == 0
    assert main(["verify", str(a), str(b), "--quiet"]) == 1
    halves = [str(tmp_path / "out" / side) for side in "ab"]
    assert main(["merge", *halves, "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    assert zoo.reference(tmp_path / "merged", zoo.inputs(name)).shape == (3, 5)


def test_masked_language_models_from_align_to_merge(ends, tmp_path, capsys):
    a, b = ends("bert")
    for directory in (a, b):
        save_tokenizer(directory)
        edit = json.loads((directory / "tokenizer_config.json").read_text()) | {"mask_token": "w3"}
        (directory / "tokenizer_config.json").write_text(json.dumps(edit))
    ids = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "ids.npy", ids.numpy())
    data = str(tmp_path / "ids.npy")
    options = ["--data", data, "--test", data, "--steps", "3", "--block", "16"]
    assert main(["align", str(a), str(b), *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(p["kl"] for p in report["proof"].values()) < 1e-8
    assert main(["barrier", str(a), str(b), "--data", data, "--block", "16", "--points", "3", "--quiet"]) == 0
    halves = [str(tmp_path / "out" / side) for side in "ab"]
    assert main(["merge", *halves, "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    assert zoo.reference(tmp_path / "merged", zoo.inputs("bert")).shape == (3, 20, 40)


@pytest.mark.parametrize(("name", "each"), [("bert-label", ()), ("gpt2-label", ()), ("bert-tags", (16,))])
def test_classifiers_of_texts_from_align_to_merge(name, each, ends, tmp_path, capsys):
    a, b = ends(name)
    draw = np.random.default_rng(3)
    data = tmp_path / "data.npz"
    np.savez(data, tokens=draw.integers(0, 40, (40, 16)), labels=draw.integers(0, 5, (40, *each)))
    options = ["--data", str(data), "--test", str(data), "--steps", "3", "--batch", "8"]
    assert main(["align", str(a), str(b), *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["curves"][0]["accuracies"]) == 3
    for side, original in (("a", a), ("b", b)):
        assert main(["verify", str(original), str(tmp_path / "out" / side), "--quiet"]) == 0
    assert main(["verify", str(a), str(b), "--quiet"]) == 1
    assert (
        main(["merge", *(str(tmp_path / "out" / side) for side in "ab"), "--out", str(tmp_path / "m"), "--quiet"]) == 0
    )
    assert zoo.reference(tmp_path / "m", zoo.inputs(name)).shape == (3, *((20,) if each else ()), 5)


def test_labelled_texts_that_are_refused(checkpoint_of, tmp_path):
    model, tokens = Model(checkpoint_of("bert-label")), np.zeros((2, 8), np.int64)

    def refused(words, **arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(lmc.LmcError, match=words):
            read_data(tmp_path / "bad.npz", model, 8)

    refused("labels", tokens=tokens)
    refused("2 texts and 1 labels", tokens=tokens, labels=np.array([0]))
    refused("a target is 9, outside", tokens=tokens, labels=np.array([0, 9]))
    refused("a token id is 90, outside", tokens=tokens + 90, labels=np.array([0, 1]))
    refused("targets must be integers of shape", tokens=tokens, labels=tokens)
    (tmp_path / "text.txt").write_text("w1 w2")
    for file in ("text.txt", "none.npz"):
        with pytest.raises(lmc.LmcError, match=r"give a \.npz file of token ids"):
            read_data(tmp_path / file, model, 8)


@pytest.mark.parametrize("name", ["clip-vision", "clip-text", "clip-vision-headless", "bert-headless", "bert-answers"])
def test_towers_learn_from_the_distance_of_features(name, ends, tmp_path, capsys):
    a, b = ends(name)
    if name.startswith("clip-vision"):
        data = write_images(tmp_path / "data.npz")
    else:
        data = tmp_path / "ids.npy"
        np.save(data, np.arange(1200) % 40)
    common = [str(a), str(b), "--data", str(data), "--out", str(tmp_path / "out"), "--block", "16"]
    assert main(["align", *common, "--steps", "12", "--batch", "8", "--quiet", "--objective", "text"]) == 2
    assert "features" in capsys.readouterr().err
    assert main(["align", *common, "--steps", "12", "--batch", "8", "--json"]) == 0
    naive, matched, learned = (curve for curve in json.loads(capsys.readouterr().out)["curves"])
    assert naive["losses"][0] == naive["losses"][-1] == 0 and naive["unit"] == "of the features' squares"
    assert naive["barrier"] > matched["barrier"] >= learned["barrier"] > 0
    assert main(["verify", str(b), str(tmp_path / "out" / "b"), "--quiet"]) == 0
    assert main(["verify", str(a), str(b), "--quiet"]) == 1
    assert main(["barrier", str(a), str(b), "--data", str(data), "--block", "16", "--quiet"]) == 0
    with pytest.raises(lmc.LmcError, match="this needs a model with a loss"):
        lmc.heal(a, [a, b], zoo.inputs(name), tmp_path / "healed")


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "qwen2-moe", "bloom", "olmo-clipped"])
def test_learning_runs_with_discrete_groups(name, ends):
    a, b = ends(name)
    pair = lmc.open_pair(a, b)
    tokens = torch.randint(40, (24, 16), generator=torch.Generator().manual_seed(1))
    found = lmc.align(pair, tokens, steps=3, batch=4)
    before, after = lmc.barrier(pair, tokens, points=3), lmc.barrier(pair, tokens, found, points=3)
    assert before.losses[0] == pytest.approx(after.losses[0], rel=1e-4)
    assert before.losses[2] == pytest.approx(after.losses[2], rel=1e-4)


def score(weights, data):
    (found,) = evaluate(Resident(weights, weights), [Item(data, 0.0)], None)
    return found


def test_losses_and_accuracy_are_those_of_the_logits(checkpoint_of):
    weights = Model(checkpoint_of("vit")).load(torch.float64)
    x = zoo.inputs("vit")
    y = logits(weights, x)
    examples = lmc.Examples(x, torch.tensor([0, 3, 4]))
    assert score(weights, examples).loss == pytest.approx(F.cross_entropy(y, examples.targets).item())
    assert score(weights, lmc.Examples(x, y.argmax(1))).accuracy == 1.0
    weights = Model(checkpoint_of("roberta")).load(torch.float64)
    masked = mask_tokens(zoo.inputs("roberta"), 3)
    y = logits(weights, masked.inputs)[masked.targets >= 0]
    assert score(weights, masked).loss == pytest.approx(F.cross_entropy(y, labels(masked)).item())


def test_soft_caps_are_part_of_the_loss(checkpoint_of):
    weights = Model(checkpoint_of("gemma2")).load(torch.float64)
    assert weights.spec.head_softcap == 30
    tokens = zoo.inputs("gemma2")
    y = torch.atanh(logits(weights, tokens[:, :-1]) / 30) * 30
    weights.spec = replace(weights.spec, head_softcap=2.0)
    expected = F.cross_entropy((2 * torch.tanh(y / 2)).flatten(0, 1), tokens[:, 1:].flatten())
    assert score(weights, tokens).loss == pytest.approx(expected.item(), rel=1e-12)


def test_masks_depend_on_the_shape_alone():
    tokens = torch.arange(200).view(5, 40) % 30
    first, second = mask_tokens(tokens, 39), mask_tokens(tokens.flip(0), 39)
    assert torch.equal(first.targets >= 0, second.targets >= 0)
    assert ((first.targets >= 0).sum(1) >= 1).all() and first.numel() == int((first.inputs == 39).sum())
    assert torch.equal(torch.where(first.targets >= 0, first.targets, first.inputs), tokens)


def test_image_arrays_and_folders(checkpoint_of, tmp_path):
    model = Model(checkpoint_of("vit"))
    plain = lmc.read_images(write_images(tmp_path / "x.npz", kind=np.uint8), model)
    assert plain.inputs.shape == (80, 3, 8, 8) and plain.inputs.min() >= 0 and plain.inputs.max() <= 1
    with np.load(tmp_path / "x.npz") as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    np.savez(tmp_path / "last.npz", images=pixels.transpose(0, 2, 3, 1), labels=labels)
    assert torch.equal(lmc.read_images(tmp_path / "last.npz", model).inputs, plain.inputs)
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels[2 * label + i].transpose(1, 2, 0)).save(tmp_path / "folder" / name / f"{i}.png")
    folder = read_data(tmp_path / "folder", model, 0)
    assert folder.targets.tolist() == [0, 0, 1, 1] and torch.equal(folder.inputs, plain.inputs[:4])


def test_images_are_normalised_as_the_checkpoint_says(ends, tmp_path):
    a, _ = ends("vit")
    plain = lmc.read_images(write_images(tmp_path / "x.npz", kind=np.uint8), Model(a)).inputs
    settings = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (a / "preprocessor_config.json").write_text(json.dumps(settings))
    expected = (plain - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    assert torch.equal(lmc.read_images(tmp_path / "x.npz", Model(a)).inputs, expected)


def test_bad_images_are_refused(checkpoint_of, tmp_path):
    model = Model(checkpoint_of("vit"))

    def refused(words, **arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(lmc.LmcError, match=words):
            lmc.read_images(tmp_path / "bad.npz", model)

    good, labels = np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 1])
    refused("images", labels=labels)
    refused("shape", images=good[..., :4], labels=labels)
    refused("label 7", images=good, labels=labels + 6)
    refused("2 images and 1", images=good, labels=labels[:1])
    refused("int64", images=good.astype(np.int64), labels=labels)
    refused("not integers", images=good, labels=labels.astype(float))
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "no class folders"), (tmp_path / "none.npz", "neither")):
        with pytest.raises(lmc.LmcError, match=words):
            lmc.read_images(path, model)


def test_what_is_refused_says_what_to_do(ends, tmp_path):
    a, _ = ends("qwen2")

    def refused(path, *words):
        with pytest.raises(lmc.LmcError) as error:
            Model(path)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value

    for method in ("gptq", "awq", "bitsandbytes"):
        edit_config(a, quantization_config={"quant_method": method})
        refused(a, "quantised", method, "original")
    edit_config(a, quantization_config=None, model_type="gemma3", text_config={}, vision_config={})
    refused(a, "nests several models", "text_config", "save_pretrained")
    edit_config(a, model_type="qwen2", architectures=["Qwen2ForMultipleChoice"])
    refused(a, "not a causal language model")
    zoo.write("dinov2", tmp_path / "tower")
    edit_config(tmp_path / "tower", architectures=["Dinov2Backbone"])
    refused(tmp_path / "tower", "not a dinov2 model with its head", "ForImageClassification")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "GGUF", "save_pretrained")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "gguf", "GGUF", "save_pretrained")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen3-moe", {"decoder_sparse_step": 2}, "no experts"),
        ("opt", {"do_layer_norm_before": False}, "opt-350m"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("vit", {"patch_size": 3}, "multiple"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_options_that_are_not_computed_are_refused(name, change, words, tmp_path):
    zoo.write(name, tmp_path / "x")
    edit_config(tmp_path / "x", **change)
    with pytest.raises(lmc.LmcError, match=words):
        Model(tmp_path / "x")


def test_old_names_of_bert(ends):
    a, _ = ends("bert")
    before = Model(a).load()
    tensors = load_file(a / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for k, t in tensors.items()}  # fmt: skip
    save_file(old, a / "model.safetensors", metadata={"format": "pt"})
    after = Model(a).load()
    assert all(torch.equal(before.ends[key], after.ends[key]) for key in before.ends)


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "bloom", "mixtral", "vit"])
def test_inspect_names_the_groups_and_the_reasons(name, checkpoint_of, capsys):
    assert main(["inspect", str(checkpoint_of(name))]) == 0
    out = capsys.readouterr().out
    expected = {
        "qwen3": ["signs of 4 rotary pairs"],
        "olmo2": ["signed permutations of 24 channels", "branch-norms have gains"],
        "bloom": ["no   heads", "ALiBi", "solved anew"],
        "mixtral": ["permutations of 4 experts", "router"],
        "vit": ["fixing the ones vector"],
    }
    assert all(words in out for words in expected[name]), out
