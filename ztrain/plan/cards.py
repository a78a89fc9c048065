"""The cards that a plan knows: memory, peak rate, memory bandwidth and link, from public sheets.

TFLOP/s are of dense bf16 products that sum in float32, without sparsity. Sources: GA102 whitepaper v2, Ada and RTX
Blackwell architecture whitepapers (their tables "FP32 accumulate", as quoted with links in PrimeIntellect's
zeroband tests, mfu_tracker: 3090 71, 4070 58.3, 4080 97.5, 4090 165.2, 5090 209.5); RTX 4060 Ti: twice its 22.06
FP32 TFLOP/s (cputronic.com), as for every Ada card above; A100, H100, H200 and L40S data sheets (312; 989 and 989;
362; nvidia.com/en-us/data-center/h100, llmbook.apartsin.com appendix G). GB/s: the same sheets; 3090 and 5090
nikolasent.github.io, 4070 thefpsreview.com, 4080 22.4 GHz x 256 bit. GiB: what torch says a card has, in its own
out-of-memory messages: 23.6 of a 24 GB card (3DTopia/Phidias-Diffusion 8, pinokiofactory/flux-webui 11), 39.5 of 40
(TianheWu/CoSeR 10), 79.2 of 80 (levihsu/OOTDiffusion 235), 139 of an H200; the others assumed at the same 98.3 %, an
L40S at 44.4 with ECC on. Links: one direction of PCIe 4.0 or 5.0, or half of the sheet's NVLink figure.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """name: as people say it; gib: that torch sees; tflops: peak in bf16, 10^12/s; gb_s: of its memory, 10^9 bytes/s;
    link: to the next card of its machine; link_gb_s: of that, one direction, by the sheet, 10^9 bytes/s."""

    name: str
    gib: float
    tflops: float
    gb_s: float
    link: str
    link_gb_s: float


_PCIE4, _PCIE5 = ("PCIe 4.0 x16", 32.0), ("PCIe 5.0 x16", 64.0)


def _card(name: str, gib: float, tflops: float, gb_s: float, link: tuple[str, float]) -> Card:
    return Card(name=name, gib=gib, tflops=tflops, gb_s=gb_s, link=link[0], link_gb_s=link[1])


CARDS: dict[str, Card] = {
    "rtx_4070": _card("RTX 4070 12 GB", 11.8, 58.3, 504.0, _PCIE4),
    "rtx_4060_ti": _card("RTX 4060 Ti 16 GB", 15.7, 44.1, 288.0, ("PCIe 4.0 x8", 16.0)),
    "rtx_4080": _card("RTX 4080 16 GB", 15.7, 97.5, 716.8, _PCIE4),
    "rtx_3090": _card("RTX 3090 24 GB", 23.6, 71.0, 936.0, _PCIE4),
    "rtx_4090": _card("RTX 4090 24 GB", 23.6, 165.2, 1008.0, _PCIE4),
    "rtx_5090": _card("RTX 5090 32 GB", 31.4, 209.5, 1792.0, _PCIE5),
    "a100_40": _card("A100 40 GB", 39.5, 312.0, 1555.0, ("NVLink 3", 300.0)),
    "l40s": _card("L40S 48 GB", 44.4, 362.0, 864.0, _PCIE4),
    "a100_80": _card("A100 80 GB", 79.2, 312.0, 2039.0, ("NVLink 3", 300.0)),
    "h100": _card("H100 80 GB", 79.2, 989.0, 3350.0, ("NVLink 4", 450.0)),
    "h200": _card("H200 141 GB", 139.0, 989.0, 4800.0, ("NVLink 4", 450.0)),
}
"""By the word of `ztrain plan --card`."""
