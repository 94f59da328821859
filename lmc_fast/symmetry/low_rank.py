"""What canonical form and group elements make of a change of low rank: one of the same rank, factor by factor.

Both act on each axis of a slot by itself, W -> L W Rᵀ, so that left goes to L left and right to right Rᵀ. What they
move into a bias is no matrix: where a norm's bias, or a value bias, stands in front of the slot, the change adds
left (right t) to the slot's own bias, with t what stands there.
"""

from __future__ import annotations

from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import BLOCK_READERS
from ..checkpoints.lazy import Slots
from ..checkpoints.low_rank import LowRank
from .canonical import HEAD_READERS, LAYER_SCALES, centred_axis, for_each_query, norm_read_by, signs_of_gain
from .elements import Elements
from .groups import folds_value_bias
from .transform import apply_to_axis


def canonical_change(spec: Spec, w: Slots, slot: str, change: LowRank) -> LowRank:
    """The change, in canonical form, of a slot of a model that is not: w, its block or what lies outside the blocks."""
    left, right, bias = change.left, change.right, change.bias
    norm = norm_read_by(spec, slot)
    behind = _in_front(spec, w, slot, norm)
    if behind is not None:
        added = left @ (right @ behind.to(right))
        bias = added if bias is None else bias + added
    if norm:
        gain = w[norm].to(right)
        right = right * gain.repeat(right.shape[1] // len(gain))
    scale = next((w[name] for name, writer in LAYER_SCALES if writer == slot and name in w), None)
    signed = slot in ("q", "k") and f"{slot}_norm" in w and not spec.attention.qk_norm_last
    signs = signs_of_gain(w, slot) if signed else None
    for factor in (scale, signs):
        if factor is not None:
            factor = factor.to(left)
            left, bias = left * factor[:, None], None if bias is None else bias * factor
    axis = centred_axis(spec, slot)
    if axis == 0:
        left, bias = left - left.mean(0), None if bias is None else bias - bias.mean(0)
    elif axis == 1:
        right = right - right.mean(1, keepdim=True)
    return LowRank(left, right, bias)


def moved_change(spec: Spec, elements: Elements, slot: str, change: LowRank) -> LowRank:
    """What the elements of a transform make of the change of a slot in canonical form."""
    left = apply_to_axis(spec, elements, slot, 0, change.left)
    right = apply_to_axis(spec, elements, slot, 1, change.right.mT.contiguous()).mT
    bias = None if change.bias is None else apply_to_axis(spec, elements, f"{slot}_bias", 0, change.bias)
    return LowRank(left, right, bias)


def _in_front(spec: Spec, w: Slots, slot: str, norm: str | None) -> Tensor | None:
    """What is added to what the slot reads, and goes into its bias in canonical form; None for nothing."""
    if slot == "o" and "v_bias" in w and "o_bias" in w and folds_value_bias(spec):
        values = w["v_bias"]
        folded = _in_front(spec, w, "v", norm_read_by(spec, "v"))
        values = values if folded is None else values + w["v"] @ folded.to(w["v"])
        return for_each_query(spec, values) if (values != 0).any() else None
    shift = w.get(f"{norm}_bias")
    if norm is None or shift is None or not (shift != 0).any():
        return None
    readers: tuple[str, ...] = tuple(s for s in BLOCK_READERS if norm_read_by(spec, s) == norm)
    if slot == "head" or slot in HEAD_READERS:
        readers = ("head",) if slot == "head" else HEAD_READERS
    taken = all(f"{reader}_bias" in w for reader in readers if reader in spec.shapes)
    return shift if taken else None
