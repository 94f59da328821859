"""The vocabulary in which an architecture is described: features, slots, and the table of a family's tensors.

A *slot* is one matrix or vector of the normal form that the engine and the symmetry group work on, with PyTorch's
(out, in) orientation whatever the checkpoint's layout is, gains as the factor they are (Gemma stores them less 1), and
rotary pairs as (i, i + rotary_dim/2) (GPT-J stores (2i, 2i + 1)):

block  q (H·e, d) · k, v (G·e, d) · o (d, H·e) · up, gate (f, d) · down (d, f) · each with `_bias` (out,)
       attn_norm, ffn_norm · attn_post_norm, ffn_post_norm · each (d,), LayerNorm with `_bias` (d,)
       q_norm, k_norm (e,) or (H·e,), (G·e,) · attn_scale, ffn_scale (d,)
       sinks (H,) · experts_up_bias, experts_gate_bias (E, x) · experts_down_bias (E, d) · router_bias (E,)
       relative (rows, d), relative_norm (d,), relative_norm_bias: one table for all blocks, held in each
       router (E, d) · experts_up, experts_gate (E, x, d) · experts_down (E, d, x) · switch (1, d)
ends   embed (V, d) · positions (P, d) · types (t, d) · patch (d, c·p²), patch_bias (d,) · cls, distill, mask (1, d)
       embed_norm, final_norm (d,), each with `_bias` · head (V, d) · head_bias (V,)
       head_transform (d, d), head_transform_bias, head_norm, head_norm_bias (d,)
       pooler (d, d), pooler_bias (d,), relation (2, d), relation_bias (2,)

A model without a head yields the stream behind its final norm: its head is the identity, and no tensor of a file.

with d width, H heads, G key/value groups, e head_dim, f units, V vocab (or classes), P position rows, E experts,
x an expert's width, c channels, p patch size. A mixture's always active expert is the ordinary up, gate and down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

POST_NORMS = ("attn_post_norm", "ffn_post_norm")
SHARED = ("relative", "relative_norm", "relative_norm_bias")  # one tensor of a file, held in every block


@dataclass(frozen=True)
class ImageInput:
    """Square images cut into square patches."""

    size: int
    patch: int
    channels: int

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class Attention:
    """Heads, what they see, and what happens to queries, keys and scores."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    # per block: how many tokens back (and ahead, if not causal) it sees, itself included; 0: all; empty: all do
    windows: tuple[int, ...] = ()
    qk_norm: str = ""  # RMSNorm on queries and keys: "head" by head with one gain, "full" over all heads together
    qk_norm_last: bool = False  # that norm stands behind RoPE, not in front of it
    clip_qkv: float = 0.0  # queries, keys and values are clamped to [-c, c]; 0: they are not
    logit_scale: float = 0.0  # factor on q·k; 0: 1/sqrt(head_dim)
    softcap: float = 0.0  # c tanh(s/c) on scores; 0: none
    sinks: bool = False  # each head's softmax has one more score, of nothing
    alibi: float = 0.0  # factor on ALiBi's distance penalty; 0: none
    # which row of a table of relative positions each distance query - key has, from the farthest back to the farthest
    # ahead: beside q·k, queries meet the row's key and keys its query (DeBERTa); empty: there is no such table
    distances: tuple[int, ...] = ()
    distance_rows: int = 0  # of that table
    distance_terms: str = ""  # "q": queries meet keys of distances, "k": keys meet queries of distances
    distances_normed: bool = False  # the table is read through a LayerNorm
    alibi_rounded: bool = False  # the penalty is rounded to bfloat16, as Falcon does

    @property
    def query_width(self) -> int:
        """Rows of q, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of k, and of v."""
        return self.kv_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        return self.heads // self.kv_heads

    def window(self, block: int) -> int:
        """How many tokens back a block sees; 0: all."""
        return self.windows[block] if self.windows else 0


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    inv_freq: tuple[float, ...] = ()  # one per rotary pair (i, i + rotary_dim/2); empty: no RoPE
    scaling: float = 1.0  # factor on cos and sin (YaRN's attention factor)
    local_inv_freq: tuple[float, ...] = ()  # of the blocks with a window, where it differs
    blocks: tuple[bool, ...] = ()  # per block: whether it turns anything; empty: all do

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def turns(self, block: int) -> bool:
        """Whether a block has rotary positions."""
        return bool(self.inv_freq) and (not self.blocks or self.blocks[block])


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: gated FFNs of which a router chooses some for each token."""

    count: int = 0  # 0: no mixture
    per_token: int = 0
    width: int = 0  # units of one
    renormalised: bool = False  # the chosen experts' probabilities are scaled to sum 1
    switched: bool = False  # up, gate, down are a shared expert with a sigmoid switch


@dataclass(frozen=True)
class FFN:
    """The feed-forward network of a block."""

    width: int  # 0: only experts
    activation: str  # a key of engine.ffn.ACTIVATIONS
    gated: bool = False
    clamped: float = 0.0  # c: gated units are act(min(gate, c)) (1 + clamp(up, -c, c)); 0: act(gate) up
    experts: Experts = field(default_factory=Experts)


@dataclass(frozen=True)
class Norms:
    """The norms, where they are, and the factors on what a branch adds."""

    kind: str  # "layernorm" or "rmsnorm"
    eps: float
    # where they are: "pre" x + f(n(x)) · "branch" x + n(f(x)) · "sandwich" x + n'(f(n(x))) · "post" n(x + f(x))
    placement: str = "pre"
    parametric: bool = True  # they have gains (and, LayerNorm, biases)
    biased: bool = True  # LayerNorms with gains have biases, too
    shared: bool = False  # attention and FFN read the same normalised stream
    embedded: bool = False  # the embedded input is normalised before the first block
    layer_scale: bool = False  # a factor for each channel of what a branch adds
    bare_start: bool = False  # the first block's attention reads the stream without a norm


@dataclass(frozen=True)
class Spec:
    """What a checkpoint computes: everything the engine and the symmetry group need to know."""

    family: str
    layers: int
    width: int
    vocab: int  # classes of an image classifier, features of a tower
    max_positions: int
    attention: Attention
    ffn: FFN
    norms: Norms
    rope: Rope = field(default_factory=Rope)
    parallel: bool = False  # attention and FFN both read the block's input
    tied: bool = False  # the head is the embedding table
    biases: frozenset[str] = frozenset()  # linear slots that have a bias
    position_table: bool = False
    position_offset: int = 0  # the row of the positions table that the first token takes
    pad_token: int = -1  # positions count only tokens other than this one (RoBERTa); -1: all count
    types: int = 0  # rows of the token type table; type 0 is used
    table: int = 0  # token embeddings, where the head does not have a row for each
    embed_scale: float = 1.0  # factor on token embeddings
    branch_scale: float = 1.0  # factor on what each branch adds to the stream
    head_scale: float = 1.0  # factor on logits, in front of their soft cap
    # "causal" or "masked" language model, "image" classifier, classifier of a text ("label") or of its tokens
    # ("tags"), "features" of an image or a text
    task: str = "causal"
    headless: bool = False  # its output is what a head would read, and so is the basis of the stream
    image: ImageInput | None = None
    front: int = 0  # class and distillation tokens before the patches
    # what the head reads: "" every token, "cls", "cls+mean" of the patches, "mean" of all tokens, the "end" token's
    # place, the "last" token that is no padding; "raw" the stream as it is and, below it, its normed first row
    pooling: str = ""
    end_token: int = -1  # of pooling "end" the token, -1: the largest id; of "last" the padding, -1: none
    head_transform: bool = False  # dense, activation and perhaps LayerNorm before the head
    head_activation: str = ""  # of that; empty: the FFN's
    head_normed: bool = True
    head_softcap: float = 0.0  # c tanh(s/c) on the model's logits; 0: none

    def changed(self, **values: Any) -> Spec:
        """A copy with other values; some of a group's come as a mapping, such as norms={"eps": 1e-6}."""
        whole = {k: replace(getattr(self, k), **v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return replace(self, **whole)

    @property
    def position_rows(self) -> int:
        return self.image.patches + self.front if self.image else self.max_positions + self.position_offset

    def length(self, inputs: Sequence[int]) -> int:
        """Rows of the stream for each input of a batch (n, T) of tokens, or (n, ...) of images."""
        return self.position_rows if self.image else inputs[1]

    def shape(self, slot: str) -> tuple[int, ...] | None:
        """Shape of a slot, or None where this architecture has none of that name."""
        return self.shapes.get(slot)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every slot of this architecture and its shape."""
        a, ffn, experts = self.attention, self.ffn, self.ffn.experts
        d, q, kv = self.width, a.query_width, a.kv_width
        linear = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        if ffn.width:
            linear |= {"up": (ffn.width, d), "down": (d, ffn.width)}
            if ffn.gated:
                linear["gate"] = linear["up"]
        linear["head"] = (self.vocab, d * (2 if self.pooling == "cls+mean" else 1))
        if self.image:
            linear["patch"] = (d, self.image.channels * self.image.patch**2)
        if self.head_transform:
            linear["head_transform"] = (d, d)
        for slot, shape in (("pooler", (d, d)), ("relation", (2, d))):
            if slot in self.biases:
                linear[slot] = shape
        shapes: dict[str, tuple[int, ...]] = dict(linear)
        shapes |= {f"{slot}_bias": shape[:1] for slot, shape in linear.items() if slot in self.biases}
        if experts.count:
            expert = (experts.count, experts.width, d)
            shapes |= {"router": (experts.count, d), "experts_up": expert, "experts_gate": expert}
            shapes["experts_down"] = (experts.count, d, experts.width)
            if "experts" in self.biases:
                shapes |= {"router_bias": (experts.count,), "experts_down_bias": (experts.count, d)}
                shapes |= dict.fromkeys(("experts_up_bias", "experts_gate_bias"), expert[:2])
            if experts.switched:
                shapes["switch"] = (1, d)
        for norm in self._norms if self.norms.parametric else ():
            shapes[norm] = (d,)
            if self.norms.kind == "layernorm" and self.norms.biased:
                shapes[f"{norm}_bias"] = (d,)
        if a.qk_norm:
            head = (a.head_dim,)
            shapes |= {"q_norm": (q,), "k_norm": (kv,)} if a.qk_norm == "full" else {"q_norm": head, "k_norm": head}
        if a.sinks:
            shapes["sinks"] = (a.heads,)
        if a.distances:
            shapes["relative"] = (a.distance_rows, d)
            if a.distances_normed:
                shapes |= {"relative_norm": (d,), "relative_norm_bias": (d,)}
        if self.norms.layer_scale:
            shapes |= {"attn_scale": (d,), "ffn_scale": (d,)}
        return shapes | self._inputs

    @property
    def _norms(self) -> list[str]:
        norms = ["attn_norm"] + (["ffn_norm"] if not self.norms.shared else [])
        names = {"pre": norms, "branch": [*POST_NORMS], "sandwich": [*norms, *POST_NORMS], "post": [*POST_NORMS]}
        ends = ["embed_norm"] if self.norms.embedded else []
        ends += ["head_norm"] if self.head_transform and self.head_normed else []
        return names[self.norms.placement] + ends + ([] if self.norms.placement == "post" else ["final_norm"])

    @property
    def _inputs(self) -> dict[str, tuple[int, ...]]:
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.image:
            shapes["embed"] = (self.table or self.vocab, d)
        if self.position_table:
            shapes["positions"] = (self.position_rows, d)
        if self.types:
            shapes["types"] = (self.types, d)
        if self.image:
            shapes |= {"cls": (1, d), "mask": (1, d)}
            if self.front == 2:
                shapes["distill"] = (1, d)
        return shapes


_FLAT_NAMES = {
    "attention.softcap": "attn_softcap",
    "rope.scaling": "rope_scaling",
    "ffn.width": "ffn_width",
    "ffn.experts.count": "experts",
    "ffn.experts.per_token": "experts_per_token",
    "ffn.experts.width": "expert_width",
    "norms.kind": "norm",
    "norms.eps": "norm_eps",
    "norms.shared": "shared_norm",
    "norms.embedded": "embed_norm",
}


def flat_fields(spec: Spec) -> dict[str, Any]:
    """Every field of a spec and of its groups under a name of its own, for messages and for what stores remember."""
    return dict(_flat(spec, ""))


def _flat(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for f in fields(group):
        value = getattr(group, f.name)
        if isinstance(value, (Attention, Rope, FFN, Experts, Norms)):
            yield from _flat(value, f"{path}{f.name}.")
        else:
            yield _FLAT_NAMES.get(path + f.name, f.name), value
