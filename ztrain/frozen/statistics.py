"""Measures the spread of prompt and reference states, for `scaling` of the splice: `ztrain stats --out FILE`.

Means and standard deviations for each dimension over a split's prompts and references with the loaded models and
encoder settings, because published numbers belong to other models (zimage_facts.md section 4, "Scaling").
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.adapters.splice import STATISTICS_KINDS, STATISTICS_READS, read_statistics
from ztrain.config import Config, EncodersConfig
from ztrain.data.reading import read_triplets
from ztrain.errors import InputError
from ztrain.frozen.sources import base_dtype
from ztrain.frozen.states import Encoders
from ztrain.images import open_image
from ztrain.io.files import whole_file
from ztrain.io.tensors import open_tensors


class Moments:
    """Running mean and standard deviation for each dimension, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, states: Tensor) -> None:
        """(L, D), L may be 0."""
        values = states.double().cpu()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    def std(self) -> Tensor:
        variance = self.squares / self.count - (self.total / self.count).square()
        return variance.clamp_min(0).sqrt().float()


def measure(config: Config, out: Path) -> Path:
    """Writes `<kind>_mean` and `<kind>_std` (D,) for the prompt alone and for text, image and marker tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = Encoders.load(config, STATISTICS_READS, base_dtype(config.train.mixed_precision), device)
    moments = {kind: Moments() for kind in ("prompt", *STATISTICS_KINDS)}
    triplets = read_triplets(config.data.train_data_dir, config.data.train_split, config.data.revision).triplets
    for triplet in tqdm(triplets, unit="triplet"):
        images = [open_image(path) for path in triplet.references]
        encoded = encoders.encode([triplet.prompt], [images], STATISTICS_READS, config.encoders)
        moments["prompt"].add(encoded.text[0])
        fused = encoded.fused[0]
        assert fused is not None, "every triplet has a reference"
        for kind, number in STATISTICS_KINDS.items():
            moments[kind].add(fused.states[fused.kinds == number])
    tensors = {f"{kind}_mean": m.mean() for kind, m in moments.items()}
    tensors |= {f"{kind}_std": m.std() for kind, m in moments.items()}
    tokens = {kind: m.count for kind, m in moments.items()}
    told = {"tokens": json.dumps(tokens), "encoders": config.encoders.model_dump_json()}
    with whole_file(out, sync=True) as building:
        save_file(tensors, building, metadata=told)
    return out


def check_statistics(adapters: Sequence[Any], settings: EncodersConfig) -> None:
    """Refuses a statistics file that was measured under other encoder settings than those of this run."""
    for adapter in adapters:
        if not (path := adapter.statistics_path):
            continue
        read_statistics(path)
        with open_tensors(Path(path)) as file:
            told = (file.metadata() or {}).get("encoders", "")
        try:
            measured = dict(json.loads(told))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: does not say under which encoder settings it was measured; write it anew with `ztrain stats`"
            ) from error
        now = settings.model_dump(mode="json")
        if changed := sorted(key for key in now if measured.get(key) != now[key]):
            key = changed[0]
            raise InputError(
                f"{path} was measured with encoders.{key} {measured.get(key)}, this run has {now[key]};"
                " measure again with `ztrain stats`"
            )
