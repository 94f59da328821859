"""Figures of devices that are not at hand; read without torch, since the command names them among its options."""

from __future__ import annotations

from typing import NamedTuple


class Sheet(NamedTuple):
    """As devices.Device, with the name of the dtype. flops: about 60 % of the data sheet's dense peak (4090: 75 %, T4:
    40 %). bandwidth: about 80 % of the link's.
    """

    dtype: str
    memory: int
    flops: float
    bandwidth: float
    source: str


SHEETS = {
    "h100-80gb": Sheet("bfloat16", 80 * 10**9, 600e12, 52e9, "pinned memory, PCIe 5 x16 (assumed)"),
    "h200": Sheet("bfloat16", 141 * 10**9, 600e12, 52e9, "pinned memory, PCIe 5 x16 (assumed)"),
    "rtx4090": Sheet("bfloat16", 24 * 10**9, 120e12, 25e9, "pinned memory, PCIe 4 x16 (assumed)"),
    "t4": Sheet("float16", 15 * 10**9, 26e12, 12e9, "pinned memory, PCIe 3 x16 (assumed)"),
}
