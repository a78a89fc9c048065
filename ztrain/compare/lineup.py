"""Who is compared on what: the rows (a prompt with references) and the columns (a list of adapters, how it is sampled).

In: an experiment, its data set or a file of prompts and a folder of pictures, exported adapters and preset files. Out:
`Case`s and `Entry`s. Nothing is loaded but adapter folders, and pictures are not opened here, only hashed.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ztrain.adapters import describe_list
from ztrain.cache.order import spread
from ztrain.compare.record import Role
from ztrain.config import Config, EncodersConfig, SampleConfig, list_reads
from ztrain.data.digests import Digests, Known
from ztrain.data.exchange import Case
from ztrain.data.reading import read_triplets
from ztrain.data.rows import check_text
from ztrain.errors import InputError
from ztrain.frozen.statistics import check_statistics
from ztrain.images import Picture, PictureFile
from ztrain.io.files import read_text
from ztrain.io.yamls import load_yaml, parse
from ztrain.weights.adapter_folder import CONFIG_FILE, ExportedAdapter, read_adapter

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A column: a list of adapters, by its settings or as exported with weights, and how it is sampled."""

    label: str
    role: Role
    adapters: tuple[Any, ...]
    encoders: EncodersConfig
    sample: SampleConfig
    exported: ExportedAdapter | None = None
    is_shuffled: bool = False
    """Whether it is shown another row's references."""
    has_reference: bool = True
    """Without: the trained list on its prompt alone."""
    has_prompt: bool = True
    """Without: on its reference alone."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of a sweep: what it has on each axis."""
    of: str | None = None
    """Label of the entry that this is the control of."""

    @property
    def reads(self) -> frozenset[str]:
        return list_reads(self.adapters)

    @property
    def looks(self) -> bool:
        """Whether a reference can change what it draws."""
        return self.has_reference and (bool(self.reads) or self.sample.strength < 1.0)

    @property
    def without_reference(self) -> "Entry":
        return replace(self, has_reference=False, sample=self.sample.model_copy(update={"strength": 1.0}))

    @property
    def shuffled(self) -> "Entry":
        """Its control: shown another row's references."""
        return replace(self, label=f"{self.label}, shuffled", role="control", is_shuffled=True, of=self.label)


# Rows


def read_cases(config: Config, digests: Digests) -> tuple[list[Case], int]:
    """At most compare.num_samples rows, spread evenly, and how many of the data set cannot be used, up to
    data.max_bad_share. Raises InputError."""
    chosen, lost = config.compare, 0
    if chosen.prompts is not None and chosen.references is not None:
        cases = _crossed(Path(chosen.prompts), Path(chosen.references), config, digests)
    else:
        listing = read_triplets(
            config.data.train_data_dir, chosen.split, config.data.revision, max_bad_share=config.data.max_bad_share
        )
        lost = len(listing.rejected)
        triplets = spread(listing.triplets, chosen.num_samples)
        known = iter(_known([p for triplet in triplets for p in triplet.references], config, digests))
        cases = [
            Case(
                prompt=triplet.prompt,
                references=tuple(next(known) for _ in triplet.references),
                target=triplet.target,
                where=triplet.where,
                columns=triplet.columns,
            )
            for triplet in triplets
        ]
    if chosen.prompt == "none":
        cases = [replace(case, prompt="") for case in cases]
    return cases, lost


def _crossed(prompts: Path, folder: Path, config: Config, digests: Digests) -> list[Case]:
    """Each prompt of a file with each picture of a folder."""
    try:
        lines = read_text(prompts, "table").split("\n")  # U+2028 inside a prompt is no line end
    except OSError as error:
        raise InputError(f"{prompts}: cannot read prompts ({error.strerror}); correct compare.prompts") from error
    places = {f"{prompts}:{number}": line for number, line in enumerate(lines, start=1) if line.strip()}
    asked = list(dict.fromkeys(check_text(line, "the prompt", where=where) for where, line in places.items()))
    if not asked:
        raise InputError(f"{prompts}: no line has a prompt; write one a line")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; correct compare.references")
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))  # ._a.png is no picture, but macOS'
    files = sorted(path for path in visible if path.suffix.lower() in _PICTURES)
    if not files:
        raise InputError(f"{folder}: no pictures there; correct compare.references")
    pairs = spread(list(itertools.product(asked, files)), config.compare.num_samples)
    known = _known([PictureFile(file) for _, file in pairs], config, digests)
    return [
        Case(prompt=prompt, references=(reference,), where=f"{prompts.name} with {file.name}")
        for (prompt, file), reference in zip(pairs, known, strict=True)
    ]


def _known(pictures: Sequence[Picture], config: Config, digests: Digests) -> list[Known]:
    """Their digests, after checking that they are fit to be references."""
    found = digests.of_pictures(pictures, config.data.dataloader_num_workers)
    for known in found:
        if isinstance(known, InputError):
            raise known
        config.data.check_reference((known.width, known.height), known.name)
    return [known for known in found if isinstance(known, Known)]


# Columns


def entries_of(config: Config) -> list[Entry]:
    """No image, the splice, presets and exported adapters, with the controls that are asked for. Raises InputError."""
    chosen, encoders, sampled = config.compare, config.encoders, config.sample
    splice = (chosen.splice,)
    drawn = fitting(sampled, splice)
    entries = [plain(config), Entry(label="splice", role="splice", adapters=splice, encoders=encoders, sample=drawn)]
    entries += _presets([Path(file) for file in chosen.presets], config)
    entries += exported_entries([Path(folder) for folder in chosen.adapters], config)
    if chosen.shuffled:
        entries += [entry.shuffled for entry in entries if entry.looks]
    check_entries(entries)
    return entries


_OF_PRESETS = {"encoders", "adapters", "sample"}


def _presets(files: Sequence[Path], config: Config) -> list[Entry]:
    """Further splices, a file each."""
    names = [file.stem.replace("_", " ") for file in files]
    entries = []
    for place, file in enumerate(files):
        told = load_yaml(file)
        if foreign := sorted(set(told) - _OF_PRESETS):
            raise InputError(f"{file}: a preset has encoders, adapters and sample; {foreign[0]} has no place in it")
        preset = parse(Config, told, str(file))
        if not list_reads(preset.adapters):
            raise InputError(f"{file}: its adapters read no reference; a preset is a splice")
        sampled = parse(SampleConfig, config.sample.model_dump(mode="json") | told.get("sample", {}), str(file))
        adapters = tuple(preset.adapters)
        own = names[place] if names.count(names[place]) == 1 and names[place] != "splice" else None
        entries.append(
            Entry(
                label=own or f"{names[place]} {_told_apart(files, place)}",
                role="splice",
                adapters=adapters,
                encoders=preset.encoders,
                sample=fitting(sampled, adapters),
            )
        )
    return entries


def fitting(sample: SampleConfig, adapters: Sequence[Any]) -> SampleConfig:
    """Scales for each of a list's adapters, where there are as many; else they are for another list, and 1 here."""
    if not isinstance(sample.scales, list) or len(sample.scales) == len(adapters):
        return sample
    return sample.model_copy(update={"scales": 1.0})


def plain(config: Config) -> Entry:
    """Text alone: what every likeness and every loss of adherence is seen against."""
    sample = config.sample.model_copy(update={"strength": 1.0, "scales": 1.0})
    return Entry(label="no image", role="none", adapters=(), encoders=config.encoders, sample=sample)


def exported_entries(folders: Sequence[Path], config: Config) -> list[Entry]:
    """A column for each exported folder, or folder of a run that has exported."""
    real = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in folders if real.count(folder.resolve()) > 1), None):
        raise InputError(f"compare.adapters names {twice} twice; give it once")
    found = [_exported(folder, config) for folder in folders]
    labels = [entry.label for entry in found]
    return [
        entry if labels.count(entry.label) == 1 else replace(entry, label=f"{entry.label} {_told_apart(folders, i)}")
        for i, entry in enumerate(found)
    ]


def _exported(folder: Path, config: Config) -> Entry:
    inside = folder / "export"
    place = inside if (inside / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file() else folder
    exported = read_adapter(place)
    adapters = tuple(exported.adapters)
    return Entry(
        label=describe_list(exported.adapters),
        # A list that reads nothing shows what training alone does.
        role="adapter" if list_reads(adapters) else "control",
        adapters=adapters,
        encoders=exported.encoders,
        sample=config.sample,
        exported=exported,
    )


def _told_apart(folders: Sequence[Path], place: int) -> str:
    """The part of its path that the others do not have."""
    parts = [[part for part in folder.parts if part != "export"] for folder in folders]
    different = [part for part in parts[place] if sum(part in other for other in parts) == 1]
    return different[-1] if different else f"({place + 1})"


def check_entries(entries: Sequence[Entry]) -> None:
    """Raises InputError for what cannot be drawn."""
    for entry in entries:
        check_statistics(list(entry.adapters), entry.encoders)
        if entry.exported is None and any(adapter.needs_training for adapter in entry.adapters):
            raise InputError(
                f"compare: {entry.label} {describe_list(list(entry.adapters))} is untrained; export it first"
            )
        scales = entry.sample.scales
        if isinstance(scales, list) and entry.adapters and len(scales) != len(entry.adapters):
            raise InputError(
                f"sample.scales has {len(scales)} numbers for the {len(entry.adapters)} adapters of {entry.label}; give"
                " one for each, or one number for all"
            )
    labels = [entry.label for entry in entries]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"compare: two columns are called {twice!r}; give each adapter or preset once")


def names_of(entries: Sequence[Entry]) -> list[str]:
    """For each a short name of letters, digits and hyphens, unique."""
    names: list[str] = []
    for entry in entries:
        name = re.sub(r"[^a-z0-9]+", "-", entry.label.lower()).strip("-")[:48] or "column"
        number = sum(other == name or other.startswith(f"{name}~") for other in names)
        names.append(f"{name}~{number + 1}" if number else name)
    return names
