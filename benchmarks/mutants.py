"""Bad inputs of every kind, each a small change of a good one; the same for the same seed.

A case is (group, name, change): `change` damages a fresh copy of a good directory or file in place.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FAMILIES = ("neox", "gpt2", "llama", "qwen2-tied-window", "gemma2", "gemma3", "phi3-partial", "mixtral", "opt-tied")
FAMILIES += ("falcon-40b", "bloom", "bert", "vit", "stablelm", "clip-text")
GONE = object()
VALUES: tuple[Any, ...] = (
    *(GONE, None, True, False, 0, 1, 2, 3, -1, 7, 10**9, 2**31, 2**63, 10**30, -(10**9)),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e9, 1e-300, 1e300, -1e-5),
    *("", "x", "gelu", "24", "nan", "\x1b[2J\n", "../../x", "\ud800", "A" * 5000),
    *([], [1], [None], ["full_attention"] * 2, [0.5] * 2, {}, {"a": 1}, {"rope_type": "default"}, {"0": {}}),
)
# what some family of transformers, or all of them, read from a config
OPTIONS = (
    *("partial_rotary_factor", "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "sliding_window"),
    *("attention_bias", "mlp_bias", "qk_layernorm", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"),
    *("tie_word_embeddings", "is_decoder", "add_cross_attention", "num_labels", "id2label", "quantization_config"),
    *("auto_map", "dtype", "torch_dtype", "layer_types", "per_layer_config", "tie_last_hidden_states", "text_config"),
    *("vision_config", "pruned_heads", "output_attentions", "output_hidden_states"),
    *(
        "use_cache",
        "attn_implementation",
        "_attn_implementation",
        "scale_attn_by_inverse_layer_idx",
        "transformers_weights",
    ),
    *("reorder_and_upcast_attn", "query_pre_attn_scalar", "use_bidirectional_attention", "position_embedding_type"),
    *("scale_embedding", "no_scale_attention_weights", "rotary_dim", "layer_norm_eps", "architectures", "model_type"),
    *("use_sliding_window", "max_window_layers", "hidden_act", "num_local_experts", "num_experts_per_tok"),
    *("router_jitter_noise", "norm_topk_prob", "embedding_size", "word_embed_proj_dim", "do_layer_norm_before"),
    *("_remove_final_layer_norm", "activation_function", "use_parallel_residual", "problem_type"),
)
ACTIVATIONS = ("tanh", "relu2", "mish", "gelu_10", "gelu_python", "gelu_new", "leaky_relu", "laplace", "silu", "swish")
ACTIVATIONS += ("relu", "quick_gelu", "gelu_fast", "gelu_pytorch_tanh", "linear", "sigmoid", "relu6", "prelu")
ROPES: tuple[Any, ...] = (
    *({"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} for kind in ("linear", "dynamic", "yarn", "llama3", "x")),
    *({"rope_type": "default", "rope_theta": value} for value in (0, -1, 1e-300, 1e300, "x", None, 1.0, 5e3, [1])),
    *({"rope_type": "linear", "rope_theta": 1e4, "factor": value} for value in (0, -2, 0.5, None, "x", 4.0)),
    *(
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": f, "original_max_position_embeddings": n}
        for f in (0, 4.0)
        for n in (0, 16)
    ),
    *({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": p} for p in (0, 0.25, 0.5, 1.0, 2, -1, 1e9)),
    *({"type": "linear", "factor": 2.0}, {"rope_theta": 1e4}, {}, [], "default", 5),
)


def flipped(place: int, bit: int) -> Callable[[bytes], bytes]:
    """One bit of a file changed."""
    return lambda b: b[:place] + bytes([b[place] ^ (1 << bit)]) + b[place + 1 :]


class Case(NamedTuple):
    group: str
    base: str  # what it is a change of
    name: str
    change: Callable[[Path], None]


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def set_value(file: str, key: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        whole = json.loads((home / file).read_text())
        place = whole
        for part in key[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                return
        if value is GONE:
            place.pop(key[-1], None)
        else:
            place[key[-1]] = copy.deepcopy(value)
        _write_json(home / file, whole)

    return change


def with_bytes(file: str, function: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        (home / file).write_bytes(function((home / file).read_bytes()))

    return change


def replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(home: Path) -> None:
        (home / file).unlink(missing_ok=True)
        make(home / file)

    return change


def odd_files(file: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What may stand where a file is expected."""
    yield "a pipe", replaced(file, os.mkfifo)
    yield "a directory", replaced(file, Path.mkdir)
    yield "absent", replaced(file, lambda f: None)
    for target in ("/dev/zero", "/dev/null", "/dev/tty", file, "nowhere", "/proc/self/mem"):
        yield f"a link to {target}", replaced(file, lambda f, target=target: f.symlink_to(target))
    yield "4 TB", replaced(file, lambda f: (f.touch(), os.truncate(f, 4 << 40)))
    yield "nothing", with_bytes(file, lambda b: b"")
    yield "one byte", with_bytes(file, lambda b: b[:1])
    yield "half", with_bytes(file, lambda b: b[: len(b) // 2])
    yield "zeros", with_bytes(file, lambda b: bytes(len(b)))
    yield "a byte more", with_bytes(file, lambda b: b + b"\0")


def damaged_files(
    file: str, content: bytes, rng: random.Random, count: int
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Bits changed at `count` places, cuts, and zeros to the end."""
    for place in rng.choices(range(len(content)), k=count if content else 0):
        yield f"changed at {place}", with_bytes(file, flipped(place, rng.randrange(8)))
    for length in sorted({0, 7, 8, len(content) // 2, max(0, len(content) - 1)}):
        yield f"cut at {length}", with_bytes(file, lambda b, n=length: b[:n])
    start = len(content) // 3
    yield f"zeros from {start}", with_bytes(file, lambda b: b[:start] + bytes(len(b) - start))


def odd_json(file: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What may stand where a JSON object is expected."""
    for text in (
        "null",
        "5",
        '"x"',
        "[]",
        "[1]",
        "{}",
        "[{}]",
        "NaN",
        "{,}",
        '{"a":1e999}',
        "{}{}",
        '{"a":NaN}',
        "'x'",
    ):
        yield text, with_bytes(file, lambda b, text=text: text.encode())
    for depth in (60, 100, 900, 5000, 100_000):
        yield f"{depth} lists", with_bytes(file, lambda b, n=depth: b"[" * n + b"]" * n)
        yield (
            f"{depth} deep beside",
            with_bytes(file, lambda b, n=depth: b'{"x":' + b'{"a":' * n + b"1" + b"}" * n + b"," + b.strip()[1:]),
        )
    yield "a mark", with_bytes(file, lambda b: b"\xef\xbb\xbf" + b)
    yield "UTF-16", with_bytes(file, lambda b: b.decode().encode("utf-16"))
    yield "not UTF-8", with_bytes(file, lambda b: b.replace(b'"', b'"\xff', 1))
    yield "5000 digits", with_bytes(file, lambda b: b'{"x":' + b"9" * 5000 + b"," + b.strip()[1:])
    yield "a long key", with_bytes(file, lambda b: b'{"' + b"k" * 1_000_000 + b'":1,' + b.strip()[1:])
    yield "a surrogate", with_bytes(file, lambda b: b'{"\\ud800":"\\udfff",' + b.strip()[1:])
    yield "a NUL", with_bytes(file, lambda b: b'{"\\u0000":"\\u0000",' + b.strip()[1:])
    yield "doubled keys", with_bytes(file, lambda b: b.strip()[:-1] + b"," + b.strip()[1:])


def configs(bases: dict[str, Path], seed: int = 0) -> Iterator[Case]:
    """Changes of config.json: every key with many values, options of other families, activations, RoPEs, shapes."""
    rng = random.Random(seed)
    for base, home in bases.items():
        config = json.loads((home / "config.json").read_text())
        keys = [(key,) for key in config] + [(key,) for key in OPTIONS if key not in config]
        keys += [("rope_parameters", part) for part in config.get("rope_parameters", {})]
        for key in keys:
            for value in rng.sample(VALUES, 4 if key[0] in config else 1):
                shown = "gone" if value is GONE else repr(value)[:40]
                yield Case("config", base, f"{'.'.join(key)} = {shown}", set_value("config.json", key, value))
        for name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
            for value in ACTIVATIONS if name in config else ():
                yield Case("config", base, f"{name} = {value}", set_value("config.json", (name,), value))
        for value in ROPES if "rope_parameters" in config else ():
            yield Case(
                "config", base, f"rope_parameters = {value}", set_value("config.json", ("rope_parameters",), value)
            )
        for key in [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)]:
            for value in (config[key] + 1, config[key] * 2, max(0, config[key] - 1)):
                yield Case("config", base, f"{key} = {value}", set_value("config.json", (key,), value))
    base = next(iter(bases))
    for name, change in (*odd_files("config.json"), *odd_json("config.json")):
        yield Case("config", base, f"config.json is {name}", change)


def _header(function: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        header = function(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return change


def safetensors(bases: dict[str, Path], seed: int = 0) -> Iterator[Case]:
    """Changes of model.safetensors: bits, cuts, headers, names, shapes, dtypes, places."""
    rng = random.Random(seed)
    file = "model.safetensors"
    for base, home in list(bases.items())[:4]:
        for name, change in header_changes(file, (home / file).read_bytes(), rng):
            yield Case("safetensors", base, name, change)
    base = next(iter(bases))
    for name, change in odd_files(file):
        yield Case("safetensors", base, f"{file} is {name}", change)
    yield Case("safetensors", base, "1.2 million names", replaced(file, _many_names))
    yield Case("safetensors", base, "200,000 names", replaced(file, lambda f: _many_names(f, 200_000)))


def header_changes(file: str, content: bytes, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Changes of a safetensors file of this content."""
    size = 8 + struct.unpack("<Q", content[:8])[0]

    def case(name: str, function: Callable[[bytes], bytes]) -> tuple[str, Callable[[Path], None]]:
        return name, with_bytes(file, function)

    for i in range(24):
        place = rng.randrange(8) if i < 4 else rng.randrange(8, size) if i < 16 else rng.randrange(size, len(content))
        yield case(f"bit at {place}", flipped(place, rng.randrange(8)))
    for length in (0, 4, 8, size // 2, size - 1, size, (size + len(content)) // 2, len(content) - 1):
        yield case(f"cut at {length}", lambda b, n=length: b[:n])
    for length in (0, 1, size - 9, size - 7, 2**20, 2**27, 2**40, 2**63, 2**64 - 1):
        yield case(f"header of {length}", lambda b, n=length: struct.pack("<Q", n) + b[8:])
    names = [n for n in json.loads(content[8:size]) if n != "__metadata__"]
    for name in rng.sample(names, min(5, len(names))):
        for key, values in {
            "dtype": ("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "x", 5, None),
            "shape": ([], [0], [1], [-1], [2**62, 2], [1.5], "x", None, [[1]], [10**30]),
            "data_offsets": ([0, 0], [1, 0], [-1, 4], [0, 2**62], [0], "x", None, [0.5, 1]),
        }.items():
            for value in rng.sample(values, 4):
                changed = _header(lambda h, n=name, k=key, v=value: h[n].update({k: v}))
                yield case(f"{name}: {key} = {value}", changed)
        yield case(f"{name} is gone", _header(lambda h, n=name: h.pop(n) and None))
        yield case(f"{name} has another name", _header(lambda h, n=name: h.update({n + "x": h.pop(n)})))
        yield case(f"{name} is transposed", _header(lambda h, n=name: h[n]["shape"].reverse()))
        yield case(
            f"{name} twice",
            _header(lambda h, n=name: json.dumps(h)[:-1].encode() + f', "{n}": {json.dumps(h[n])}}}'.encode()),
        )
    for name, function in {
        "a list": lambda h: b"[]",
        "empty": lambda h: b"{}",
        "deep": lambda h: b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        "metadata of numbers": lambda h: h.update(__metadata__={"a": 5}),
        "metadata null": lambda h: h.update(__metadata__=None),
        "no metadata": lambda h: h.pop("__metadata__", None) and None,
        "an odd name": lambda h: h.update({"\x1b[2J\n\u202e": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "an empty name": lambda h: h.update({"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "overlap": lambda h, names=names: (
            [h[n].update(data_offsets=h[names[0]]["data_offsets"]) for n in names[:2]] and None
        ),
    }.items():
        yield case(f"header: {name}", _header(function))
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e30, 1e-45, 0.0):
        word = struct.pack("<f", value)
        place = (size + len(content)) // 8 * 4
        place = size + (place - size) // 4 * 4
        yield case(f"{value} inside", lambda b, p=place, w=word: b[:p] + w + b[p + 4 :])


def _many_names(file: Path, count: int = 1_200_000) -> None:
    entry = '"model.layers.%d.mlp.gate.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(count)) + "}").encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def indexes(bases: dict[str, Path]) -> Iterator[Case]:
    """Changes of model.safetensors.index.json of a sharded checkpoint, and of its shards."""
    file = "model.safetensors.index.json"
    for base, home in bases.items():
        index = json.loads((home / file).read_text())
        names = sorted(index["weight_map"])
        shard = index["weight_map"][names[0]]
        targets = (
            "",
            ".",
            "..",
            "../x.safetensors",
            "/etc/passwd",
            "x.bin",
            "absent.safetensors",
            "a\0.safetensors",
            None,
        )
        targets += (5, [], {}, "n" * 300 + ".safetensors", "\ud800.safetensors", "\x1b[2J.safetensors", shard, file)
        for value in targets:
            for name in (names[0], names[-1]):
                yield Case("index", base, f"{name} -> {value!r:.40}", set_value(file, ("weight_map", name), value))
            yield Case("index", base, f"a new name -> {value!r:.40}", set_value(file, ("weight_map", "new"), value))
        for key in ("weight_map", "metadata"):
            for value in VALUES:
                shown = "gone" if value is GONE else repr(value)[:40]
                yield Case("index", base, f"{key} = {shown}", set_value(file, (key,), value))
        for name, change in (*odd_files(file), *odd_json(file), *odd_files(shard)):
            yield Case("index", base, f"{file} or shard is {name}", change)
