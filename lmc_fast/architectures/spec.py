"""The vocabulary in which an architecture is described: features, slots, and the table of a family's tensors.

A *slot* is one matrix or vector of the normal form that the engine and the symmetry group work on, with PyTorch's
(out, in) orientation whatever the checkpoint's layout is, gains as the factor they are (Gemma stores them less 1), and
rotary pairs as (i, i + rotary_dim/2) (GPT-J stores (2i, 2i + 1)):

block  q (H·e, d) · k, v (G·e, d) · o (d, H·e) · up, gate (f, d) · down (d, f) · each with `_bias` (out,)
       attn_norm, ffn_norm · attn_post_norm, ffn_post_norm · each (d,), LayerNorm with `_bias` (d,)
       q_norm, k_norm (e,) or (H·e,), (G·e,) · attn_scale, ffn_scale (d,)
       router (E, d) · experts_up, experts_gate (E, x, d) · experts_down (E, d, x) · switch (1, d)
ends   embed (V, d) · positions (P, d) · types (t, d) · patch (d, c·p²), patch_bias (d,) · cls, distill, mask (1, d)
       embed_norm, final_norm (d,), each with `_bias` · head (V, d) · head_bias (V,)
       head_transform (d, d), head_transform_bias, head_norm, head_norm_bias (d,)
       pooler (d, d), pooler_bias (d,), relation (2, d), relation_bias (2,)

with d width, H heads, G key/value groups, e head_dim, f ffn_width, V vocab (or classes), P position rows, E experts,
x expert_width, c channels, p patch size. A mixture's always active expert is the ordinary up, gate and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

BLOCK_NORMS = ("attn_norm", "ffn_norm")
POST_NORMS = ("attn_post_norm", "ffn_post_norm")
ATTN_READERS = ("q", "k", "v")
FFN_READERS = ("up", "gate", "router", "switch", "experts_up", "experts_gate")
BLOCK_READERS = ATTN_READERS + FFN_READERS
BLOCK_WRITERS = ("o", "down", "experts_down")
END_ROWS = ("embed", "positions", "types", "cls", "distill", "mask")  # each row is added to the stream
END_WRITERS = ("patch",)  # writes with its columns


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
class Spec:
    """What a checkpoint computes: everything the engine and the symmetry group need to know."""

    family: str
    layers: int
    width: int
    vocab: int  # classes of an image classifier, features of a tower
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int  # 0: only experts
    max_positions: int
    norm: str  # "layernorm" or "rmsnorm"
    norm_eps: float
    activation: str  # a key of engine.ffn.ACTIVATIONS
    gated: bool
    parallel: bool  # attention and FFN both read the block's input
    tied: bool  # the head is the embedding table
    biases: frozenset[str] = frozenset()  # linear slots that have a bias
    position_table: bool = False
    inv_freq: tuple[float, ...] = ()  # one per rotary pair (i, i + rotary_dim/2); empty: no RoPE
    rope_scaling: float = 1.0  # factor on cos and sin (YaRN's attention factor)
    # where the norms are: "pre" x + f(n(x)) · "branch" x + n(f(x)) · "sandwich" x + n'(f(n(x))) · "post" n(x + f(x))
    placement: str = "pre"
    parametric: bool = True  # norms have gains (and, LayerNorm, biases)
    shared_norm: bool = False  # attention and FFN read the same normalised stream
    embed_norm: bool = False  # the embedded input is normalised before the first block
    qk_norm: str = ""  # RMSNorm on queries and keys: "head" by head with one gain, "full" over all heads together
    clip_qkv: float = 0.0  # queries, keys and values are clamped to [-c, c]; 0: they are not
    alibi: float = 0.0  # factor on ALiBi's distance penalty; 0: none
    alibi_rounded: bool = False  # the penalty is rounded to bfloat16, as Falcon does
    logit_scale: float = 0.0  # factor on q·k; 0: 1/sqrt(head_dim)
    attn_softcap: float = 0.0  # c tanh(s/c) on attention scores; 0: none
    head_softcap: float = 0.0  # the same on the model's logits
    windows: tuple[int, ...] = ()  # per block: how many tokens back it sees, itself included; 0: all; empty: all do
    local_inv_freq: tuple[float, ...] = ()  # RoPE of the blocks with a window, where it differs
    embed_scale: float = 1.0  # factor on token embeddings
    position_offset: int = 0  # the row of the positions table that the first token takes
    pad_token: int = -1  # positions count only tokens other than this one (RoBERTa); -1: all count
    layer_scale: bool = False  # a factor for each channel of what a branch adds
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    renormalised: bool = False  # the chosen experts' probabilities are scaled to sum 1
    switched: bool = False  # up, gate, down are a shared expert with a sigmoid switch
    causal: bool = True
    task: str = "causal"  # "causal" or "masked" language model, "image" classifier, "features" of an image or a text
    image: ImageInput | None = None
    front: int = 0  # class and distillation tokens before the patches
    pooling: str = ""  # what the head reads: "" every token, "cls", "cls+mean" of the patches, "end" token's place
    end_token: int = -1  # of pooling "end"; -1: the largest id
    types: int = 0  # rows of the token type table; type 0 is used
    table: int = 0  # token embeddings, where the head does not have a row for each
    head_transform: bool = False  # dense, activation and LayerNorm before the head

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    @property
    def queries_per_group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def position_rows(self) -> int:
        return self.image.patches + self.front if self.image else self.max_positions + self.position_offset

    def length(self, inputs: Sequence[int]) -> int:
        """Rows of the stream for each input of a batch (n, T) of tokens, or (n, ...) of images."""
        return self.position_rows if self.image else inputs[1]

    def window(self, block: int) -> int:
        """How many tokens back a block sees; 0: all."""
        return self.windows[block] if self.windows else 0

    def shape(self, slot: str) -> tuple[int, ...] | None:
        """Shape of a slot, or None where this architecture has none of that name."""
        return self._shapes.get(slot)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d, q, kv = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        if self.ffn_width:
            linear |= {"up": (self.ffn_width, d), "down": (d, self.ffn_width)}
            if self.gated:
                linear["gate"] = linear["up"]
        linear["head"] = (self.vocab, d * (2 if self.pooling == "cls+mean" else 1))
        if self.image:
            linear["patch"] = (d, self.image.channels * self.image.patch**2)
        if self.head_transform:
            linear |= {"head_transform": (d, d), "pooler": (d, d), "relation": (2, d)}
        shapes: dict[str, tuple[int, ...]] = dict(linear)
        shapes |= {f"{slot}_bias": shape[:1] for slot, shape in linear.items() if slot in self.biases}
        if self.experts:
            expert = (self.experts, self.expert_width, d)
            shapes |= {"router": (self.experts, d), "experts_up": expert, "experts_gate": expert}
            shapes["experts_down"] = (self.experts, d, self.expert_width)
            if self.switched:
                shapes["switch"] = (1, d)
        for norm in self._norms if self.parametric else ():
            shapes[norm] = (d,)
            if self.norm == "layernorm":
                shapes[f"{norm}_bias"] = (d,)
        if self.qk_norm:
            head = (self.head_dim,)
            shapes |= {"q_norm": (q,), "k_norm": (kv,)} if self.qk_norm == "full" else {"q_norm": head, "k_norm": head}
        if self.layer_scale:
            shapes |= {"attn_scale": (d,), "ffn_scale": (d,)}
        return shapes | self._inputs

    @property
    def _norms(self) -> list[str]:
        norms = ["attn_norm"] + (["ffn_norm"] if not self.shared_norm else [])
        names = {"pre": norms, "branch": [*POST_NORMS], "sandwich": [*norms, *POST_NORMS], "post": [*POST_NORMS]}
        ends = (["embed_norm"] if self.embed_norm else []) + (["head_norm"] if self.head_transform else [])
        return names[self.placement] + ends + ([] if self.placement == "post" else ["final_norm"])

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
