"""Vision transformers: ViT, DeiT (distillation token), DINOv2 (layer-scale), and CLIP's vision tower."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .heads import no_head
from .layouts import PatchConvolution, Plain, Shaped, Stacked
from .spec import FFN, Attention, ImageInput, Norms, Spec

_LINEAR = ("q", "k", "v", "o", "up", "down")


def _image(config: Any) -> ImageInput:
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int):
        if len({*size}) != 1 or len({*patch}) != 1:
            raise LmcError(f"{config.model_type} with images or patches that are not square is not supported")
        size, patch = size[0], patch[0]
    if not (isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size):
        raise LmcError(
            f"image_size is {config.image_size!r} and patch_size {config.patch_size!r}; both must be positive"
        )
    if size % patch:
        raise LmcError(f"{config.model_type} whose image size is no multiple of its patch size is not supported")
    return ImageInput(size, patch, config.num_channels)


def vision_spec(config: Any, **features: Any) -> Spec:
    """The spec of a vision transformer's config; `features` are what the family sets otherwise (Spec.changed)."""
    qkv = {"q", "k", "v"} if getattr(config, "qkv_bias", True) else set()
    base = Spec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.num_labels,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
            causal=False,
        ),
        ffn=FFN(width=getattr(config, "intermediate_size", 0), activation=config.hidden_act),
        max_positions=0,
        norms=Norms(kind="layernorm", eps=config.layer_norm_eps),
        tied=False,
        biases=frozenset(qkv | {"o", "up", "down", "patch", "head"}),
        position_table=True,
        task="image",
        image=_image(config),
        front=1,
        pooling="cls",
    )
    return base.changed(**features)


def _dinov2(config: Any) -> Spec:
    width = int(config.hidden_size * config.mlp_ratio)
    if not config.use_swiglu_ffn:
        return vision_spec(config, ffn={"width": width}, norms={"layer_scale": True}, pooling="cls+mean")
    biases = frozenset({*_LINEAR, "gate", "patch", "head"} - (set() if config.qkv_bias else {"q", "k", "v"}))
    return vision_spec(
        config,
        ffn={"width": (int(width * 2 / 3) + 7) // 8 * 8, "gated": True, "activation": "silu"},
        norms={"layer_scale": True},
        pooling="cls+mean",
        biases=biases,
    )


def _clip_vision(config: Any) -> Spec:
    return vision_spec(
        config,
        vocab=config.projection_dim,
        attention={"head_dim": config.hidden_size // config.num_attention_heads},
        norms={"embedded": True},
        biases=frozenset(_LINEAR),
        task="features",
    )


def _gated(spec: Spec) -> bool:
    return spec.ffn.gated


def _plain(spec: Spec) -> bool:
    return not spec.ffn.gated


def _vit_ends(home: str) -> tuple[Entry, ...]:
    token = Shaped((1, 1, 0))
    embeddings = f"{home}.embeddings."
    return (
        Entry(embeddings + "patch_embeddings.projection.weight", ("patch",), PatchConvolution()),
        Entry(embeddings + "patch_embeddings.projection.bias", ("patch_bias",)),
        Entry(embeddings + "position_embeddings", ("positions",), Shaped((1, -1, 0))),
        Entry(embeddings + "cls_token", ("cls",), token),
        Entry(embeddings + "distillation_token", ("distill",), token),
        Entry(embeddings + "mask_token", ("mask",), Plain() if home == "dinov2" else token, optional=True),
        *linear(f"{home}.layernorm", "final_norm"),
        *linear("classifier", "head"),
    )


def _vit_attention(home: str) -> tuple[Entry, ...]:
    names = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
    return tuple(
        e for slot, name in names.items() for e in linear(f"{home}.encoder.layer.{{i}}.attention.{name}", slot)
    )


def _vit_block(home: str) -> tuple[Entry, ...]:
    layer = f"{home}.encoder.layer.{{i}}."
    return (
        *linear(layer + "layernorm_before", "attn_norm"),
        *linear(layer + "layernorm_after", "ffn_norm"),
        *_vit_attention(home),
        *linear(layer + "intermediate.dense", "up"),
        *linear(layer + "output.dense", "down"),
    )


_DINO = "dinov2.encoder.layer.{i}."
_FUSED, _FUSED_BIAS = ("gate", "up"), ("gate_bias", "up_bias")
_DINO_BLOCK = (
    *linear(_DINO + "norm1", "attn_norm"),
    *linear(_DINO + "norm2", "ffn_norm"),
    *_vit_attention("dinov2"),
    Entry(_DINO + "layer_scale1.lambda1", ("attn_scale",)),
    Entry(_DINO + "layer_scale2.lambda1", ("ffn_scale",)),
    Entry(_DINO + "mlp.fc1.weight", ("up",), when=_plain),
    Entry(_DINO + "mlp.fc1.bias", ("up_bias",), when=_plain),
    Entry(_DINO + "mlp.fc2.weight", ("down",), when=_plain),
    Entry(_DINO + "mlp.fc2.bias", ("down_bias",), when=_plain),
    Entry(_DINO + "mlp.weights_in.weight", _FUSED, Stacked(_FUSED), when=_gated),
    Entry(_DINO + "mlp.weights_in.bias", _FUSED_BIAS, Stacked(_FUSED_BIAS), when=_gated),
    Entry(_DINO + "mlp.weights_out.weight", ("down",), when=_gated),
    Entry(_DINO + "mlp.weights_out.bias", ("down_bias",), when=_gated),
)


def clip_block(home: str) -> tuple[Entry, ...]:
    """A block of either of CLIP's towers."""
    layer = f"{home}.encoder.layers.{{i}}."
    return (
        *linear(layer + "layer_norm1", "attn_norm"),
        *linear(layer + "layer_norm2", "ffn_norm"),
        *(e for n in "qkv" for e in linear(f"{layer}self_attn.{n}_proj", n)),
        *linear(layer + "self_attn.out_proj", "o"),
        *linear(layer + "mlp.fc1", "up"),
        *linear(layer + "mlp.fc2", "down"),
    )


_CLIP = "vision_model.embeddings."
_CLASSIFIER = ("ForImageClassification",)

FAMILIES = (
    Family(
        "vit",
        vision_spec,
        _vit_ends("vit"),
        _vit_block("vit"),
        "vit.",
        architectures=_CLASSIFIER,
        heads=(no_head("ViTModel", "vit"),),
    ),
    Family(
        "vit_msn",
        vision_spec,
        _vit_ends("vit"),
        _vit_block("vit"),
        "vit.",
        architectures=_CLASSIFIER,
        heads=(no_head("ViTMSNModel"),),
    ),
    Family(
        "deit",
        lambda config: vision_spec(config, front=2),
        _vit_ends("deit"),
        _vit_block("deit"),
        "deit.",
        architectures=_CLASSIFIER,
        heads=(no_head("DeiTModel", "deit"),),
    ),
    Family(
        "dinov2",
        _dinov2,
        _vit_ends("dinov2"),
        _DINO_BLOCK,
        "dinov2.",
        architectures=_CLASSIFIER,
        heads=(no_head("Dinov2Model", pooling="cls"),),
    ),
    Family(
        name="clip_vision_model",
        spec=_clip_vision,
        prefix="vision_model.",
        ends=(
            Entry(_CLIP + "patch_embedding.weight", ("patch",), PatchConvolution()),
            Entry(_CLIP + "class_embedding", ("cls",), Shaped((0,))),
            Entry(_CLIP + "position_embedding.weight", ("positions",)),
            *linear("vision_model.pre_layrnorm", "embed_norm"),
            *linear("vision_model.post_layernorm", "final_norm"),
            Entry("visual_projection.weight", ("head",)),
        ),
        block=clip_block("vision_model"),
        buffers=(r"embeddings\.position_ids$",),
        architectures=("CLIPVisionModelWithProjection",),
        heads=(no_head("CLIPVisionModel", pooling="raw"),),
    ),
)
