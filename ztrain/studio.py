"""Draws columns on rows and seeds, each picture once and for good.

In: rows and columns of lineup.py. Out: PNG files, named by a digest of all that decides them: prompt, references, list,
weights, models, settings, noise. So a comparison that was cut off goes on, and a further column or seed adds its own
pictures only. A row's noise comes from its place among the rows: with more or other rows all are drawn anew. Models are
loaded only for what is missing, and the encoders are gone before the transformer comes.

Legend: R rows, S seeds.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters
from ztrain.aspects import size_in
from ztrain.cache import Cache, digest_json
from ztrain.conditioning import Encoded, concatenate
from ztrain.config import Config, EncodersConfig
from ztrain.digests import Known
from ztrain.dit import load_transformer
from ztrain.encoders import Encoders, LatentCodec
from ztrain.errors import InputError
from ztrain.export import Identities, adapt, check_identity, encoder_identities
from ztrain.files import workspace
from ztrain.flow import sampler_noise
from ztrain.images import Bucket, fit_target, open_image
from ztrain.lineup import Case, Entry, exchanged
from ztrain.model import AdaptedDiT
from ztrain.models import Source, base_defaults, base_dtype, identity
from ztrain.sample import SampleSettings, released_or, sample

FOLDER = "pictures"
_RULES = 1  # part of every picture's name: raise it when the same settings come to draw otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One picture: a row of an entry, and what its noise starts from."""

    entry: Entry
    row: int
    seed: int
    path: Path


def _is_whole(path: Path) -> bool:
    """Whether it is there, and not cut short since: else it is drawn again."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


class Studio:
    """Draws for one experiment into `<folder>/pictures`."""

    def __init__(self, config: Config, cases: Sequence[Case], folder: Path, cache: Cache) -> None:
        self.config, self.cases, self.folder, self.cache = config, cases, folder / FOLDER, cache
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = base_dtype(config.train.mixed_precision)
        self._exchanged: list[tuple[Known, ...]] | None = None

    def seeds(self, row: int) -> list[int]:
        """S numbers; the first are those of a comparison with fewer seeds."""
        return [self.config.seed + row + turn * len(self.cases) for turn in range(self.config.compare.num_seeds)]

    def settings(self, entry: Entry) -> SampleSettings:
        return released_or(entry.sample, base_defaults(self.config.models))

    def size(self, entry: Entry) -> tuple[int, int]:
        """(height, width) in pixels."""
        return size_in(entry.sample, self.config.data.resolution)

    def references(self, entry: Entry, row: int) -> tuple[Known, ...]:
        """What an entry is shown."""
        if not entry.has_reference:
            return ()
        if not entry.is_shuffled:
            return self.cases[row].references
        if self._exchanged is None:
            self._exchanged = exchanged(self.cases, self.config.seed)
        return self._exchanged[row]

    def draw(self, entries: Sequence[Entry], *, num_seeds: int | None = None) -> list[list[list[Path]]]:
        """Paths of all pictures, entries x R x S (or fewer seeds), drawn where they are missing."""
        shots = [[self._shots(entry, row)[:num_seeds] for row in range(len(self.cases))] for entry in entries]
        self.cache.digests.save()
        every = {shot.path: shot for of_entry in shots for row in of_entry for shot in row}
        missing = [shot for shot in every.values() if not _is_whole(shot.path)]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make(missing)
        return [[[shot.path for shot in row] for row in of_entry] for of_entry in shots]

    # What decides a picture

    def _shots(self, entry: Entry, row: int) -> list[Shot]:
        decided = self._decided(entry) | {
            "prompt": self.cases[row].prompt,
            "references": [known.digest for known in self.references(entry, row)] if entry.looks else [],
        }
        return [
            Shot(entry=entry, row=row, seed=seed, path=self.folder / f"{digest_json(decided | {'seed': seed})}.png")
            for seed in self.seeds(row)
        ]

    def _decided(self, entry: Entry) -> dict[str, Any]:
        """Of all rows of an entry."""
        roles = {"transformer", "vae", "text_encoder"}
        roles |= {"vision_language"} if entry.reads & {"reference", "fused"} else set()
        roles |= {"siglip"} if "siglip" in entry.reads else set()
        encoders = entry.encoders.model_dump(mode="json")
        return {
            "rules": _RULES,
            "adapters": [self._settings_of(adapter) for adapter in entry.adapters],
            "weights": self._weights(entry),
            "encoders": encoders if entry.looks else {"max_sequence_length": encoders["max_sequence_length"]},
            "sampling": asdict(self.settings(entry)),
            "scales": entry.sample.scales if entry.adapters else 1.0,
            "size": self.size(entry),
            "precision": self.config.train.mixed_precision,
            "models": {role: self.cache.model_files(role) for role in sorted(roles)},
        }

    def _settings_of(self, adapter: Any) -> dict[str, Any]:
        """Statistics count by what is in the file, not by where it lies."""
        settings: dict[str, Any] = adapter.model_dump(mode="json")
        if path := adapter.statistics_path:
            settings["statistics_file"] = self.cache.digests.of_file(Path(path))
        return settings

    def _weights(self, entry: Entry) -> list[str]:
        if entry.exported is None:
            return []
        return [self.cache.digests.of_file(entry.exported.folder / name) for name in sorted(entry.exported.files)]

    # Drawing

    def _make(self, shots: Sequence[Shot]) -> None:
        with workspace(self.folder) as scratch, tqdm(total=len(shots), desc="pictures", unit="picture") as bar:
            encoded, known, codec, siglip_dim = self._encode(shots, bar)
            dit: Any = None
            base = Source.of(self.config.models.base)
            # Weights change the transformer, so each trained list gets a fresh one, after the last one is gone.
            by_weights: dict[Path | None, dict[int, list[Shot]]] = {}
            for shot in shots:
                folder = shot.entry.exported.folder if shot.entry.exported else None
                by_weights.setdefault(folder, {}).setdefault(id(shot.entry), []).append(shot)
            for of_weights in by_weights.values():
                dit = None
                dit = load_transformer(base, self.dtype, self.device, self.config.models.transformer_file)
                if "transformer" not in known:
                    known["transformer"] = identity(dit, "transformer")
                adapted = None
                for of_entry in of_weights.values():
                    entry = of_entry[0].entry
                    bar.set_postfix_str(entry.label)
                    if entry.exported is None:
                        model = AdaptedDiT(dit, build_adapters(list(entry.adapters), siglip_dim)).eval()
                    else:
                        check_identity(entry.exported, known)
                        model = adapted = adapt(dit, entry.exported) if adapted is None else adapted
                    scales = entry.sample.scales
                    model.set_scales(scales if isinstance(scales, list) else [scales] * len(entry.adapters))
                    for start in range(0, len(of_entry), entry.sample.batch_size):
                        some = of_entry[start : start + entry.sample.batch_size]
                        self._draw(model, codec, some, [encoded[self._state_key(shot)] for shot in some], scratch)
                        bar.update(len(some))

    def _draw(
        self, model: AdaptedDiT, codec: LatentCodec, shots: Sequence[Shot], encoded: Sequence[Encoded], scratch: Path
    ) -> None:
        entry = shots[0].entry
        shape = codec.latent_shape(*self.size(entry))
        noise = [sampler_noise(shot.seed, shape).to(self.device) for shot in shots]
        start = [self._start(codec, shot) for shot in shots] if entry.sample.strength < 1.0 else None
        states = concatenate(encoded).to(self.device)
        try:
            drawn = sample(model, states, noise, self.settings(entry), start=start)
        except InputError as error:
            raise InputError(f"{entry.label}: {error}") from error
        for shot, latents in zip(shots, drawn, strict=True):
            file = scratch / shot.path.name
            codec.decode(latents).save(file)
            os.replace(file, shot.path)  # a picture that is there is whole

    def _start(self, codec: LatentCodec, shot: Shot) -> Tensor:
        """The reference, cut to the shape of the output."""
        image = open_image(self.references(shot.entry, shot.row)[0].picture)
        return codec.encode(fit_target(image, Bucket(*self.size(shot.entry))))

    # States

    def _state_key(self, shot: Shot) -> tuple[Any, ...]:
        """Shots with equal ones read the same states."""
        if not shot.entry.looks:
            return shot.row, shot.entry.encoders.max_sequence_length
        return shot.row, shot.entry.encoders, shot.entry.reads, shot.entry.is_shuffled

    def _encode(
        self, shots: Sequence[Shot], bar: Any
    ) -> tuple[dict[tuple[Any, ...], Encoded], Identities, LatentCodec, int | None]:
        """Every state that is read, on the CPU."""
        bar.set_postfix_str("reading prompts and references")
        wanted = {self._state_key(shot): shot for shot in shots}
        reads = frozenset[str]().union(*(shot.entry.reads for shot in wanted.values() if shot.entry.looks))
        encoders = Encoders.load(self.config, reads, self.dtype, self.device)
        encoded = {}
        for key, shot in wanted.items():
            pictures = [open_image(known.picture) for known in self.references(shot.entry, shot.row)]
            settings: EncodersConfig = shot.entry.encoders
            states = encoders.encode([self.cases[shot.row].prompt], [pictures], shot.entry.reads, settings)
            encoded[key] = states.to(torch.device("cpu"))
        return encoded, encoder_identities(encoders), encoders.codec, encoders.siglip_dim
