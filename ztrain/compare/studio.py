"""Draws columns on rows and seeds, each picture once and for good.

In: rows and columns of lineup.py. Out: PNG files, named by a digest of all that decides them: prompt, references, list,
weights, models, settings, noise. So a comparison that was cut off goes on, and a further column or seed adds its own
pictures only. A row's noise comes from its place among the rows: with more or other rows all are drawn anew. Models are
loaded only for what is missing, and the encoders are gone before the transformer comes.

Legend: R rows, S seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ztrain.adapters import build_adapters
from ztrain.cache.cache import Cache
from ztrain.compare.lineup import Entry
from ztrain.conditioning import Encoded, concatenate
from ztrain.config import Config, EncodersConfig
from ztrain.data.digests import Known, digest_json
from ztrain.data.exchange import Case, Exchange, exchange
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec
from ztrain.frozen.sources import Source, base_defaults, base_dtype, identity
from ztrain.frozen.states import VAE, Encoders, models_of
from ztrain.images import Bucket, fit_target, open_image
from ztrain.io.drawn import save_picture, still_to_draw
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.model.dit import load_transformer
from ztrain.model.sampler import Picture, SampleSettings, released_or, sample_all
from ztrain.sampling.aspects import size_in
from ztrain.weights.adapter_folder import Identities, check_identity, load_weights

FOLDER = "pictures"
_RULES = 1  # part of every picture's name: raise it when the same settings come to draw otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One picture: a row of an entry, and what its noise starts from."""

    entry: Entry
    row: int
    seed: int
    path: Path


def _batches(every: Iterable[Shot], missing: frozenset[Path]) -> list[list[Shot]]:
    """Batches of one entry each that have something to draw. They are those of all its shots, whatever is missing:
    the others of its batch decide a picture's last bits, so it comes out as it would have without an interruption."""
    of_entries: dict[int, list[Shot]] = {}
    for shot in every:
        of_entries.setdefault(id(shot.entry), []).append(shot)
    sizes = [(shots, shots[0].entry.sample.batch_size) for shots in of_entries.values()]
    batches = [shots[start : start + size] for shots, size in sizes for start in range(0, len(shots), size)]
    return [batch for batch in batches if any(shot.path in missing for shot in batch)]


def _trained_list(entry: Entry) -> str:
    """What its weights mean; empty where it has none."""
    return "" if entry.exported is None else digest_json([adapter.meaning() for adapter in entry.adapters])


class Studio:
    """Draws for one experiment into `<folder>/pictures`."""

    def __init__(self, config: Config, cases: Sequence[Case], folder: Path, cache: Cache) -> None:
        self.config, self.cases, self.folder, self.cache = config, cases, folder / FOLDER, cache
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = base_dtype(config.train.mixed_precision)
        self._exchanged: Exchange | None = None

    def seeds(self, row: int) -> list[int]:
        """S numbers; the first are those of a comparison with fewer seeds."""
        return [self.config.seed + row + turn * len(self.cases) for turn in range(self.config.compare.num_seeds)]

    def settings(self, entry: Entry) -> SampleSettings:
        return released_or(entry.sample, base_defaults(self.config.models))

    def size(self, entry: Entry) -> tuple[int, int]:
        """(height, width) in pixels."""
        return size_in(entry.sample, self.config.data.resolution)

    def prompt(self, entry: Entry, row: int) -> str:
        return self.cases[row].prompt if entry.has_prompt else ""

    def references(self, entry: Entry, row: int) -> tuple[Known, ...]:
        """What an entry is shown."""
        if not entry.has_reference:
            return ()
        if not entry.is_shuffled:
            return self.cases[row].references
        if self._exchanged is None:
            mend = "compare more, or leave out compare.shuffled"
            self._exchanged = exchange(self.cases, self.config.seed, "rows", mend)
            if self._exchanged.words:
                print(f"compare.shuffled: {self._exchanged.words}", flush=True)
        return self.cases[self._exchanged.others[row]].references

    def draw(self, entries: Sequence[Entry], *, num_seeds: int | None = None) -> list[list[list[Path]]]:
        """Paths of all pictures, entries x R x S (or fewer seeds), drawn where they are missing."""
        shots = [[self._shots(entry, row)[:num_seeds] for row in range(len(self.cases))] for entry in entries]
        self.cache.digests.save()
        every = {shot.path: shot for of_entry in shots for row in of_entry for shot in row}
        if missing := frozenset(still_to_draw(every)):
            self._make(_batches(every.values(), missing), missing)
        return [[[shot.path for shot in row] for row in of_entry] for of_entry in shots]

    # What decides a picture

    def _shots(self, entry: Entry, row: int) -> list[Shot]:
        decided = self._decided(entry) | {
            "prompt": self.prompt(entry, row),
            "references": [known.digest for known in self.references(entry, row)] if entry.looks else [],
        }
        return [
            Shot(entry=entry, row=row, seed=seed, path=self.folder / f"{digest_json(decided | {'seed': seed})}.png")
            for seed in self.seeds(row)
        ]

    def _decided(self, entry: Entry) -> dict[str, Any]:
        """Of all rows of an entry."""
        encoders = entry.encoders.model_dump(mode="json")
        return {
            "rules": _RULES,
            "adapters": [self._settings_of(adapter) for adapter in entry.adapters],
            "weights": self._weights(entry),
            "encoders": encoders if entry.looks else {"max_sequence_length": encoders["max_sequence_length"]},
            "sampling": self.settings(entry).decided,
            "scales": entry.sample.scales if entry.adapters else 1.0,
            "size": self.size(entry),
            "precision": self.config.train.mixed_precision,
            "models": {
                "transformer": self.cache.transformer_files(),
                **{model.role: self.cache.model_files(model) for model in (VAE, *models_of(entry.reads))},
            },
        }

    def _settings_of(self, adapter: Any) -> dict[str, Any]:
        """Statistics count by what is in the file, not by where it lies."""
        settings: dict[str, Any] = adapter.at_work()
        if path := adapter.statistics_path:
            settings["statistics_file"] = self.cache.digests.of_file(Path(path))
        return settings

    def _weights(self, entry: Entry) -> list[str]:
        if entry.exported is None:
            return []
        return [self.cache.digests.of_file(entry.exported.folder / name) for name in sorted(entry.exported.files)]

    # Drawing

    def _make(self, batches: Sequence[Sequence[Shot]], missing: frozenset[Path]) -> None:
        with tqdm(total=len(missing), desc="pictures", unit="picture") as bar:
            encoded, known, codec, siglip_dim = self._encode([shot for batch in batches for shot in batch], bar)
            base, file = Source.of(self.config.models.base), self.config.models.transformer_file
            dit = model = None
            inside = ""
            # A list without weights leaves the transformer as it is. Those that differ in weights alone, as a run's
            # checkpoints do, share one; for another list it comes fresh, after the last one is gone.
            for entry in sorted({id(batch[0].entry): batch[0].entry for batch in batches}.values(), key=_trained_list):
                bar.set_postfix_str(entry.label)
                before, inside = inside, _trained_list(entry)
                if dit is None or before not in ("", inside):
                    dit = model = None
                    dit = load_transformer(base, self.dtype, self.device, file)
                    known.setdefault("transformer", identity(dit))
                if entry.exported is None:
                    model = AdaptedDiT(dit, build_adapters(list(entry.adapters), siglip_dim)).eval()
                else:
                    check_identity(entry.exported, known)
                    if model is None or before != inside:
                        model = AdaptedDiT(dit, build_adapters(entry.exported.adapters)).eval()
                    load_weights(model, entry.exported)
                scales = entry.sample.scales
                model.set_scales(scales if isinstance(scales, list) else [scales] * len(entry.adapters))
                for batch in (batch for batch in batches if batch[0].entry is entry):
                    states = [encoded[self._state_key(shot)] for shot in batch]
                    for shot, latents in zip(batch, self._draw(model, codec, batch, states), strict=True):
                        if shot.path in missing:
                            save_picture(codec.decode(latents), shot.path)
                            bar.update()

    def _draw(
        self, model: AdaptedDiT, codec: LatentCodec, shots: Sequence[Shot], encoded: Sequence[Encoded]
    ) -> list[Tensor]:
        """Latents of each shot of a batch."""
        entry = shots[0].entry
        shape, has_start = codec.latent_shape(*self.size(entry)), entry.sample.strength < 1.0
        pictures = [
            Picture(row=i, seed=shot.seed, shape=shape, start=self._start(codec, shot) if has_start else None)
            for i, shot in enumerate(shots)
        ]
        states, settings = concatenate(encoded), self.settings(entry)
        try:
            return list(sample_all(model, states, pictures, settings, batch_size=len(shots), device=self.device))
        except InputError as error:
            raise InputError(f"{entry.label}: {error}") from error

    def _start(self, codec: LatentCodec, shot: Shot) -> Tensor:
        """The reference, cut to the shape of the output."""
        image = open_image(self.references(shot.entry, shot.row)[0])
        return codec.encode(fit_target(image, Bucket(*self.size(shot.entry))))

    # States

    def _state_key(self, shot: Shot) -> tuple[Any, ...]:
        """Shots with equal ones read the same states."""
        entry, asked = shot.entry, (shot.row, shot.entry.has_prompt, shot.entry.sample.negative_prompt)
        if not entry.looks:
            return *asked, entry.encoders.max_sequence_length
        return *asked, entry.encoders, entry.reads, entry.is_shuffled

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
            pictures = [open_image(known) for known in self.references(shot.entry, shot.row)]
            entry, prompt = shot.entry, self.prompt(shot.entry, shot.row)
            settings: EncodersConfig = entry.encoders
            states = encoders.encode(
                [prompt], [pictures], entry.reads, settings, negative_prompt=entry.sample.negative_prompt
            )
            encoded[key] = states.to(torch.device("cpu"))
        return encoded, encoders.identities, encoders.codec, encoders.siglip_dim
