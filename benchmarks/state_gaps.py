"""How far a reference's states lie from a prompt's, dimension by dimension, before and after a projector.

Every state is divided by its own root mean square first, as the transformer's cap_embedder does: what is left is what
it can see. Legend: L tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ztrain.compare.lineup import Entry
from ztrain.conditioning import IMAGE, TEXT
from ztrain.config import Config
from ztrain.data.exchange import Case
from ztrain.frozen.sources import Source
from ztrain.frozen.states import Encoders
from ztrain.frozen.statistics import Moments
from ztrain.images import open_image
from ztrain.model.dit import load_transformer
from ztrain.weights.adapter_folder import adapt

NAMES = {TEXT: "text tokens after the image", IMAGE: "image tokens"}


@torch.no_grad()
def state_gaps(config: Config, cases: Sequence[Case], entry: Entry, kind: int) -> dict[str, Any]:
    """`before` and `after` the entry's projector, of the tokens of that kind of all rows' references: see _gap."""
    assert entry.exported is not None, "a projector was trained"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dit = load_transformer(Source.of(config.models.base), torch.float32, device)
    projector = adapt(dit, entry.exported).adapters[0]
    encoders = Encoders.load(config, entry.reads, torch.float32, device)
    pictures = [[open_image(known) for known in case.references] for case in cases]
    encoded = encoders.encode([case.prompt for case in cases], pictures, entry.reads, entry.encoders)
    prompts, before, after = Moments(), Moments(), Moments()
    for text, reference in zip(encoded.text, encoded.reference, strict=True):
        assert reference is not None, "every triplet has a reference"
        states = reference.select([kind]).states
        prompts.add(_unit(text))
        before.add(_unit(states))
        after.add(_unit(projector.correct(states)))
    return {"kind": NAMES[kind], "before": _gap(before, prompts), "after": _gap(after, prompts)}


def _unit(states: Tensor) -> Tensor:
    return states.float() / states.float().square().mean(-1, keepdim=True).sqrt()


def _gap(states: Moments, prompts: Moments) -> dict[str, list[float]]:
    """For each dimension: distance of the means and standard deviation, both in the prompts' standard deviations."""
    unit = prompts.std().clamp_min(1e-6)
    shift, spread = (states.mean() - prompts.mean()) / unit, states.std() / unit
    return {"shift": [round(x, 4) for x in shift.tolist()], "spread": [round(x, 4) for x in spread.tolist()]}


def mean_gaps(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """By name, the gap's size: `shift_rms`, `spread` with its median and 5 % and 95 % quantiles over dimensions, and
    `sorted_shift`, absolute, for a plot; each the mean over seeds."""
    told = {}
    for seeds in measured.values():
        for moment in ("before", "after"):
            shift = torch.tensor([seed[moment]["shift"] for seed in seeds])
            spread = torch.tensor([seed[moment]["spread"] for seed in seeds])
            low, median, high = spread.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=1).mean(1).tolist()
            told[f"{seeds[0]['kind']}, {moment} the projector"] = {
                "shift_rms": shift.square().mean(1).sqrt().mean().item(),
                "spread": {"median": median, "low": low, "high": high},
                "sorted_shift": [round(x, 3) for x in shift.abs().sort(dim=1).values.mean(0).tolist()],
            }
    return told
