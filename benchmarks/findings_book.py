"""The pages of docs/findings as data: which variants are trained, how each is asked, and what a page's table shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.drawings import Variant
from benchmarks.laboratory import Ways
from miniature.trials import splice, text_only
from ztrain.compare.lineup import Entry
from ztrain.conditioning import IMAGE, TEXT
from ztrain.config import Config

_SEEDED = ("--adapters.0.init_seed",)
_TEXT = ("--adapters.0.tokens", "text")
_PROJECTOR = ("--adapters.0.hidden_dim", "512")


def _siglip(label: str, *options: str) -> Variant:
    return Variant(label=label, experiment="siglip", options=options, seeded=_SEEDED)


def _dropout(label: str, **shares: float) -> Variant:
    options = tuple(word for name, share in shares.items() for word in (f"--train.dropout_{name}", f"{share:g}"))
    return Variant(label=label, experiment="siglip_lora", options=options, seeded=_SEEDED)


LISTS = {
    "siglip": _siglip("[siglip]"),
    "siglip_embedder": _siglip("[siglip], embedder only", "--adapters.0.trains", "embedder"),
    "siglip_lora": Variant(label="[siglip, lora]", experiment="siglip_lora", seeded=_SEEDED),
    "projector": Variant(label="[projector]", experiment="projector", options=(*_TEXT, *_PROJECTOR)),
    "splice_lora": Variant(label="[splice, lora]", experiment="splice_lora", options=_TEXT),
    "lora": Variant(label="[lora], sees no reference", experiment="lora"),
}
"""What is compared at equal steps and at equal seconds."""

VARIANTS = LISTS | {
    "stock_order": _siglip("stock order", "--adapters.0.token_order", "stock"),
    "stock_segments": _siglip(
        "three, blank latents",
        *("--adapters.0.layout", "stock_without_latents", "--adapters.0.token_order", "rows"),
    ),
    "stock": _siglip("stock in everything", "--adapters.0.layout", "stock"),
    "init_random": _siglip("random", "--adapters.0.init", "random"),
    "init_statistics": _siglip("statistics_matched", "--adapters.0.init", "statistics_matched"),
    "init_slice": _siglip("cap_embedder_slice", "--adapters.0.init", "cap_embedder_slice"),
    "projector_all": Variant(
        label="[projector] on image and text tokens",
        experiment="projector",
        options=("--adapters.0.tokens", "all", *_PROJECTOR),
    ),
    "drop_none": _dropout("nothing dropped", reference=0.0),
    "drop_reference_20": _dropout("reference 0.20", reference=0.2),
    "drop_reference_50": _dropout("reference 0.50", reference=0.5),
    "drop_all_5": _dropout("each 0.05", reference=0.05, text=0.05, both=0.05),
}

_UNGUIDED = {"sample": {"guidance_scale": 0.0}}  # what guidance does to every list is benchmarks/guidance.py's question
WAYS: Ways = {
    "own": _UNGUIDED,
    "shuffled": {"is_shuffled": True} | _UNGUIDED,
    "guided": {"sample": {"guidance_scale": 0.0, "image_guidance_scale": 1.0}},
    "blind": {"has_reference": False} | _UNGUIDED,
    "promptless": {"has_prompt": False} | _UNGUIDED,
}
STRENGTHS = (0.25, 0.5, 1.0)


_SPLICES: dict[str, Callable[[Config], Entry]] = {
    f"splice-{layer}-{tokens}-{strength:g}": partial(splice, layer=layer, tokens=tokens, strength=strength)
    for layer in range(1, 7)
    for tokens in ("text", "all")
    for strength in STRENGTHS
}
UNTRAINED = {"text": text_only} | _SPLICES
PROJECTED = {"projector": TEXT, "projector_all": IMAGE}
"""The kind of tokens of which the page says what the projector makes of them."""
DROPOUTS = ("siglip_lora", "drop_none", "drop_reference_20", "drop_reference_50", "drop_all_5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a table. `way`: how the adapter was asked (WAYS); `against`: the same figure of the first row, or
    of another way of the same row, is subtracted, in pairs."""

    head: str
    figure: str
    way: str = "own"
    against: str | None = None


STYLE = Column(head="style cosine", figure="style_cosine")
COMMON = (
    STYLE,
    Column(head="above the first row", figure="style_cosine", against="first"),
    Column(head="content right", figure="prompt_content"),
    Column(head="leak above chance", figure="leak_above_chance"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """`rows`: label by variant, or by run for what is not trained."""

    rows: Mapping[str, str]
    columns: Sequence[Column] = COMMON
    extra: Sequence[str] = ()
    """Further variants that the page needs besides its rows."""

    @property
    def variants(self) -> list[str]:
        return [name for name in (*self.rows, *self.extra) if name.removesuffix("_seconds") in VARIANTS]


def _labels(*names: str, **first: str) -> dict[str, str]:
    return first | {name: VARIANTS[name].label for name in names if name not in first}


EQUAL_STEPS = {name: variant.label for name, variant in LISTS.items()}
EQUAL_SECONDS = {
    f"{name}_seconds": f"{variant.label}, equal seconds" for name, variant in LISTS.items() if name != "siglip"
}
BOOK: dict[str, Page] = {
    "token_order": Page(rows=_labels("stock_order", siglip="row order")),
    "caption_segments": Page(rows=_labels("stock_segments", "stock", siglip="one segment")),
    "siglip_init": Page(rows=_labels("init_random", "init_statistics", "init_slice", siglip="context_refiner")),
    "adapter_lists": Page(
        rows=EQUAL_STEPS | EQUAL_SECONDS | {"splice-5-text-1": "the splice, untrained", "text": "text only"}
    ),
    "splice_setting": Page(
        rows={
            f"splice-{layer}-text-{s:g}": f"layer {layer}, strength {s:g}" for layer in range(1, 7) for s in STRENGTHS
        }
        | {f"splice-{layer}-all-1": f"layer {layer}, image tokens too" for layer in (4, 5, 6)}
        | {"projector": "[projector] at layer 5, trained", "text": "text only"},
        extra=("projector_all",),
    ),
    "dropout": Page(
        rows=_labels(*DROPOUTS[1:], siglip_lora="reference 0.05 (default)"),
        columns=(
            *COMMON[:3],
            Column(head="image guidance adds", figure="style_cosine", way="guided", against="own"),
            Column(head="content then", figure="prompt_content", way="guided"),
            Column(head="without reference: content", figure="prompt_content", way="blind"),
            Column(head="without prompt: style", figure="style_cosine", way="promptless"),
            Column(head="... reference's kind", figure="reference_kind", way="promptless"),
        ),
    ),
}
