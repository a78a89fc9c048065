"""The zero-shot splice as an adapter without weights: how reference states and prompt become one caption.

Also the baseline that every trained adapter is measured against, and the composition that the projector reuses.
Two questions: which states of the spliced model (the image alone, or image and prompt in one sequence), and how they
meet the prompt's own states (replace, concatenate, blend). Formulas and defaults: README.md, "The splice".
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ztrain.adapters.base import Adapter, AdapterConfig, Reads
from ztrain.conditioning import IMAGE, MARKER, TEXT, Conditioning, Encoded, TokenStates, moved
from ztrain.errors import InputError
from ztrain.io.files import sha256_of
from ztrain.io.tensors import read_tensors
from ztrain.io.yamls import PathText

_TOKENS = {
    "all": (TEXT, IMAGE, MARKER),
    "image": (IMAGE, MARKER),
    "image_no_markers": (IMAGE,),
    "text": (TEXT,),
}
STATISTICS_KINDS = {"text": TEXT, "image": IMAGE, "marker": MARKER}
"""Names in a statistics file of the token kinds of the vision-language sequence; `prompt` is the prompt alone."""
STATISTICS_READS: Reads = frozenset({"fused"})
"""Where they are measured: in it are tokens of all kinds."""

_CLIP_SIGMAS = 3.0  # llm-dit-experiments vl/blending.py clips per-dimension z-scores at 3 sigma


class ComposeConfig(AdapterConfig):
    """How states of the spliced model become caption features."""

    composes_reference: ClassVar[bool] = True

    states: Literal["reference", "fused"] = "reference"
    """reference: the image alone through the spliced model; fused: image and prompt in one sequence."""
    compose: Literal["replace", "concatenate", "blend"] = "concatenate"
    """replace: only these states; concatenate: after the prompt's own states; blend: alpha of these, 1 - alpha of
    the prompt's."""
    order: Literal["prompt_first", "reference_first"] = "prompt_first"
    """Which comes first when concatenating: it sets the caption positions."""
    tokens: Literal["all", "image", "image_no_markers", "text"] = "image"
    """Which tokens of the sequence are used; image keeps the vision_start / vision_end markers."""
    alpha: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of the reference when blending; 0 = prompt only, 1 = reference only."""
    blend_length: Literal["truncate", "interpolate"] = "interpolate"
    """Blending needs equal lengths: cut both to the shorter, or resample the reference linearly to the prompt's."""
    scaling: Literal["none", "global", "per_dimension"] = "none"
    """Matches the states' spread to the prompt's: by one factor, or by z-scores for each dimension clipped at 3 sigma.
    The DiT normalises each caption token by its RMS, so `global` only matters when blending."""
    statistics_file: PathText | None = None
    """The safetensors file that `ztrain stats` wrote for these models and encoder settings; needed for scaling."""

    @property
    def reads(self) -> Reads:
        # Dropping the prompt of a fused sequence leaves the image alone.
        return frozenset({"reference"} if self.states == "reference" else {"reference", "fused"})

    @property
    def statistics_path(self) -> str | None:
        return self.statistics_file

    def meaning(self) -> dict[str, Any]:
        told = super().meaning()
        if self.statistics_file is not None:
            read_statistics(self.statistics_file)
            told["statistics_file"] = sha256_of(Path(self.statistics_file))
        return told

    @model_validator(mode="after")
    def _scaling_needs_statistics(self) -> "ComposeConfig":
        if self.scaling != "none" and self.statistics_file is None:
            raise ValueError(f"scaling {self.scaling} needs statistics_file (write one with `ztrain stats`)")
        return self


class SpliceConfig(ComposeConfig):
    kind: Literal["splice"] = "splice"

    @property
    def needs_training(self) -> bool:
        return False


def read_statistics(path: str) -> dict[str, Tensor]:
    """`<kind>_mean` and `<kind>_std`, each (D,), for the kinds prompt, text, image and marker."""
    if not Path(path).is_file():
        raise InputError(
            f"statistics_file {path} does not exist; write it with `ztrain stats --config ... --out {path}`"
        )
    tensors = read_tensors(Path(path), "write it anew with `ztrain stats`")
    expected = {f"{kind}_{moment}" for kind in ("prompt", *STATISTICS_KINDS) for moment in ("mean", "std")}
    if set(tensors) != expected:
        raise InputError(
            f"{path} is not a statistics file of `ztrain stats`: it lacks {sorted(expected - set(tensors))}"
        )
    if len(shapes := {tuple(tensor.shape) for tensor in tensors.values()}) > 1 or len(shapes.pop()) != 1:
        raise InputError(f"{path}: its tensors are no rows of one length; write it anew with `ztrain stats`")
    return tensors


def match_statistics(states: TokenStates, statistics: dict[str, Tensor], scaling: str) -> TokenStates:
    """`states` with the spread of the prompt's states, kind by kind of token; (L, D) in and out."""
    if scaling == "none":
        return states
    if (width := len(statistics["prompt_mean"])) != states.states.shape[1]:
        raise InputError(
            f"the statistics_file is of states {width} wide, this model's are {states.states.shape[1]}; measure again"
        )
    table = {name: tensor.to(states.states.device, torch.float32) for name, tensor in statistics.items()}
    matched = states.states.float()
    for name, kind in STATISTICS_KINDS.items():
        rows = (states.kinds == kind).to(matched.device, non_blocking=True).unsqueeze(-1)  # (L, 1)
        mean, std = table[f"{name}_mean"], table[f"{name}_std"]
        if scaling == "global":
            scaled = matched * (table["prompt_std"].square().mean().sqrt() / std.square().mean().sqrt())
        else:
            score = ((matched - mean) / std.clamp_min(1e-6)).clamp(-_CLIP_SIGMAS, _CLIP_SIGMAS)
            scaled = score * table["prompt_std"] + table["prompt_mean"]
        matched = torch.where(rows, scaled, matched)
    return replace(states, states=matched.to(states.states.dtype))


def _blend(text: Tensor, states: Tensor, alpha: float, blend_length: str) -> Tensor:
    if blend_length == "truncate":
        length = min(len(text), len(states))
        text, states = text[:length], states[:length]
    elif len(states) != len(text):
        resampled = F.interpolate(states.float().T.unsqueeze(0), size=len(text), mode="linear", align_corners=True)
        states = resampled.squeeze(0).T.to(text.dtype)
    return torch.lerp(text.float(), states.float(), alpha).to(text.dtype)


def compose(
    config: ComposeConfig,
    text: Tensor,
    states: TokenStates,
    scale: float,
    correct: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Caption features (L, D) and attention scales (L,) or None from a prompt's (L, D) and a sequence's states.

    `correct` maps the selected states (L, D) to corrected ones, before they meet the prompt. `scale` weakens the
    reference: blending shares are multiplied by it, tokens of the other two are attended to that much less, each by
    its own weight too. Blending several references that have weights is an InputError: it has one share for all.
    """
    chosen = states.select(_TOKENS[config.tokens])
    selected = chosen.states if correct is None else correct(chosen.states)
    if config.compose == "blend":
        if chosen.weights is not None:
            raise InputError(
                "references with weights cannot be blended; set the splice's compose to concatenate or replace, or "
                "give all weights but one as 0"
            )
        return _blend(text, selected, config.alpha * scale, config.blend_length), None
    weights = torch.full((len(selected),), scale) if chosen.weights is None else scale * chosen.weights
    of_text = torch.ones(len(text))
    parts = [(text, of_text), (selected, weights)]
    if config.compose == "replace":
        parts = [(selected, weights)]
    elif config.order == "reference_first":
        parts.reverse()
    caption = torch.cat([part for part, _ in parts])
    if bool((weights == 1.0).all()):
        return caption, None
    return caption, moved(torch.cat([factors for _, factors in parts]), caption.device)


class ComposingAdapter(Adapter[ComposeConfig]):
    """Reads a reference through the spliced model; samples without one keep their text."""

    def __init__(self, config: ComposeConfig) -> None:
        super().__init__(config)
        self.statistics = read_statistics(config.statistics_file) if config.statistics_file else {}

    def correct(self, states: Tensor) -> Tensor:
        """What is learned about the states (L, D); nothing here."""
        return states

    def forward(self, conditioning: Conditioning, encoded: Encoded) -> Conditioning:
        captions, scales = list(conditioning.caption), list(conditioning.caption_scale)
        sequences = encoded.fused if self.config.states == "fused" else encoded.reference
        for i, states in enumerate(sequences):
            if states is not None:
                matched = match_statistics(states, self.statistics, self.config.scaling)
                captions[i], scales[i] = compose(self.config, captions[i], matched, self.scale, self.correct)
        return replace(conditioning, caption=captions, caption_scale=scales)


class Splice(ComposingAdapter):
    """The learned part is empty: [splice] is the zero-shot baseline."""
