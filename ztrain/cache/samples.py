"""Triplets as training sees them: pictures by digest and size, targets in their buckets, and all that they need cached.

In: the data of a config. Out: lists of `Sample`, and for each list what it asks of the cache. A triplet that cannot be
used (broken picture, reference too thin or the target itself, target that would lose too much, prompt too long) is
counted and left out up to data.max_bad_share, and stops everything beyond it.

A training sample may have several captions, and several variants of its references: each visit takes one of each.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ztrain.cache.cache import Cache, Needs
from ztrain.config import Config, DataConfig
from ztrain.data.reading import read_triplets
from ztrain.data.digests import Known, digest_json
from ztrain.errors import InputError
from ztrain.data.exchange import Case, Exchange, exchange
from ztrain.io.files import as_text, write_text
from ztrain.images import (
    Bucket,
    Variants,
    describe_small,
    enlargement,
    pick_bucket,
    target_buckets,
)
from ztrain.model.layout import padded
from ztrain.data.rows import Triplet, one_line
from ztrain.cache.order import CAPTION, VARIANT, Integers, SampleKey, spread, turn
from ztrain.frozen.states import assemble, requests_of

MOST_FUSED = 16
"""Sequences of image and prompt that one triplet may need; each is a forward of the language model and a state."""

_ONE = Variants()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Case):
    """A case with its target in a bucket, ready to be asked for its states."""

    captions: tuple[str, ...] = ()
    """Others that training takes in place of the prompt, by turns."""
    variants: Variants = _ONE
    """By which training takes parts of the references in their place, by turns."""
    target: Known
    bucket: Bucket
    style: str | None = None
    """Where styles are balanced."""

    @property
    def choices(self) -> tuple[int, int]:
        """How many captions it has, and how many variants of its references."""
        return 1 + len(self.captions), self.variants.count if self.references else 1

    def form(self, caption: int, variant: int) -> "Sample":
        """The sample with one of its captions (0: the prompt) and one variant of its references (0: whole) alone."""
        if self.choices == (1, 1):
            return self
        references = tuple(known.variant(self.variants, variant) for known in self.references)
        prompt = self.captions[caption - 1] if caption else self.prompt
        return replace(self, prompt=prompt, captions=(), references=references, variants=_ONE)

    def forms(self) -> Iterator[tuple[int, int, "Sample"]]:
        """Every caption with every variant, by their numbers."""
        for caption, variant in itertools.product(*map(range, self.choices)):
            yield caption, variant, self.form(caption, variant)

    def visited(self, key: SampleKey) -> "Sample":
        """The form that a visit takes."""
        captions, variants = self.choices
        return self.form(turn(key, captions, CAPTION), turn(key, variants, VARIANT))


@dataclass(slots=True)
class Split:
    """The usable samples of one split, and sentences for the others."""

    name: str
    samples: list[Sample]
    rejected: list[str] = field(default_factory=list)
    small: str = ""
    """The sentence about targets that are too small, where data.small_targets lets them pass or leaves them out."""

    @property
    def told(self) -> str:
        """How many triplets there are, and in how many forms where there are several."""
        captions = sum(sample.choices[0] for sample in self.samples)
        variants = max((sample.choices[1] for sample in self.samples), default=1)
        more = f", {variants} variants of each reference" if variants > 1 else ""
        more += f", {captions} captions" if captions > len(self.samples) else ""
        return f"{self.name}: {len(self.samples)} triplets, {len(self.rejected)} left out{more}"

    def check(self, max_bad_share: float) -> None:
        """Raises InputError where more than the share is unusable, or nothing is left."""
        total = len(self.samples) + len(self.rejected)
        if len(self.rejected) > max_bad_share * total or not self.samples:
            shown = "; ".join(self.rejected[:3]) or self.small or "there are none"
            raise InputError(
                f"{self.name}: {len(self.rejected)} of {total} triplets cannot be used (data.max_bad_share "
                f"{max_bad_share:g}): {shown}"
            )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Samples, and the same with other references; exchange: how, None where nothing reads them."""

    own: list[Sample]
    others: list[Sample]
    exchange: Exchange | None


@dataclass(slots=True)
class Samples:
    """All data of an experiment. `validation` is empty where neither validation nor previews are on."""

    train: Split
    text_only: Split | None = None
    validation: Split | None = None

    @property
    def splits(self) -> list[Split]:
        return [split for split in (self.train, self.text_only, self.validation) if split is not None]

    @property
    def trained(self) -> list[Sample]:
        """What the order's indices stand for: triplets, then text-only samples."""
        return self.train.samples + (self.text_only.samples if self.text_only else [])

    @property
    def styles(self) -> Integers | None:
        """The number of each triplet's style, (len(train.samples),), by the order of their names; None where styles
        are not balanced."""
        names = [sample.style for sample in self.train.samples]
        return None if None in names else np.unique(np.array(names), return_inverse=True)[1]

    def held_out(self, count: int) -> list[Sample]:
        return spread(self.validation.samples, count) if self.validation else []

    def held_out_pairs(self, config: Config) -> "Pairs":
        """The samples that are validated, and the same with another one's references where the list reads any.

        Raises InputError where all have the same references: then nothing could show whether the image is used.
        """
        held_out = self.held_out(config.validation.num_samples)
        if not config.reads:
            return Pairs(held_out, held_out, None)
        mend = "add others to the validation split, or set validation.validation_steps to 0"
        found = exchange(held_out, config.seed, "validation triplets", mend)
        others = [
            replace(sample, references=held_out[other].references)
            for sample, other in zip(held_out, found.others, strict=True)
        ]
        return Pairs(held_out, others, found)

    @property
    def digest(self) -> str:
        """Differs whenever training would see other samples or the same ones in another place."""
        return digest_json([[_contents(sample) for sample in self.train.samples], self._text_only_contents()])

    def _text_only_contents(self) -> list[list[object]]:
        return [_contents(sample) for sample in self.text_only.samples] if self.text_only else []


def _contents(sample: Sample) -> list[object]:
    bucket = [sample.bucket.height, sample.bucket.width]
    # Left out where there are none, so that runs that began before there were any go on.
    more = [{"captions": sample.captions, "style": sample.style}] if sample.captions or sample.style else []
    return [sample.prompt, [known.digest for known in sample.references], sample.target.digest, bucket, *more]


def read_samples(config: Config, cache: Cache) -> Samples:
    """The samples of a config, within data.max_bad_share. Raises InputError."""
    data, validation = config.data, config.validation
    samples = Samples(_read_split(config, cache, data.train_data_dir, data.train_split, is_trained=True))
    if data.text_only_data_dir is not None and data.text_only_share:
        samples.text_only = _read_split(
            config, cache, data.text_only_data_dir, data.text_only_split, is_trained=True, text_only=True
        )
    if validation.validation_steps or validation.preview_steps or validation.score_steps:
        try:
            samples.validation = _read_split(config, cache, data.train_data_dir, data.validation_split)
        except InputError as error:
            raise InputError(
                f"{error} (for training without held-out triplets set validation.validation_steps, "
                "validation.preview_steps and validation.score_steps to 0)"
            ) from error
    for split in samples.splits:
        split.check(data.max_bad_share)
    return samples


def _read_split(
    config: Config, cache: Cache, location: str, name: str, *, is_trained: bool = False, text_only: bool = False
) -> Split:
    """is_trained: with every form in which training takes its samples."""
    data = config.data
    revision = None if text_only else data.revision
    listing = read_triplets(location, name, revision, text_only=text_only, max_bad_share=data.max_bad_share)
    pictures = [picture for triplet in listing.triplets for picture in (triplet.target, *triplet.references)]
    known = iter(cache.digests.of_pictures(pictures, data.dataloader_num_workers))
    buckets = target_buckets(data.resolution, data.max_target_aspect, padded)
    split = Split(f"{location} {name}", [], list(listing.rejected))
    for triplet in listing.triplets:
        target, *references = [next(known) for _ in range(1 + len(triplet.references))]
        try:
            sample = _sample(config, triplet, target, references, buckets)
            split.samples.append(_as_trained(config, sample, triplet) if is_trained else sample)
        except InputError as error:
            split.rejected.append(one_line(f"{triplet.where}: {error}"))
    _look_for_small(split, data)
    return split


def _look_for_small(split: Split, data: DataConfig) -> None:
    """What becomes of targets that would be enlarged too much. Raises InputError under `refuse`."""
    fitting, small = [], {}
    for sample in split.samples:
        target = sample.target
        if (times := enlargement((target.width, target.height), sample.bucket)) > data.max_upscale:
            small[f"{sample.where}: {target.picture.name}, {target.width} x {target.height}"] = times
        else:
            fitting.append(sample)
    try:
        split.small = describe_small(small, len(split.samples), data.small_targets, data.max_upscale, "data")
    except InputError as error:
        raise InputError(f"{split.name}: {error}") from error
    if data.small_targets == "leave_out":
        split.samples = fitting


def _sample(
    config: Config,
    triplet: Triplet,
    target: Known | InputError,
    references: Sequence[Known | InputError],
    buckets: Sequence[Bucket],
) -> Sample:
    data, whole = config.data, []
    for known in (target, *references):
        if isinstance(known, InputError):
            raise known
        whole.append(known)
    for known in whole[1:]:
        data.check_reference((known.width, known.height), known.picture.name)
    picture = whole[0]
    if not data.allow_reference_is_target and picture.digest in {known.digest for known in whole[1:]}:
        raise InputError(
            f"{picture.picture.name} is a reference of itself, byte for byte; give another one, or set "
            "data.allow_reference_is_target"
        )
    bucket = pick_bucket((picture.width, picture.height), buckets, data.max_crop, picture.picture.name)
    return Sample(
        prompt=triplet.prompt,
        references=tuple(whole[1:]),
        target=picture,
        bucket=bucket,
        where=triplet.where,
        columns=triplet.columns,
    )


def _as_trained(config: Config, sample: Sample, triplet: Triplet) -> Sample:
    """With all its forms, and the style that it is balanced by. Raises InputError."""
    data, style = config.data, None
    if data.balance == "style" and sample.references:
        style = triplet.columns.get("style")
        if not isinstance(style, str | int) or not str(style).strip():
            raise InputError(
                f"data.balance style needs the row's style as text in a column 'style', not {style!r}; write it, or "
                "set data.balance to none"
            )
    rule = Variants(
        count=data.reference_variants,
        mirror=data.reference_mirror,
        min_side=data.reference_min_side,
        max_aspect=data.reference_max_aspect,
    )
    trained = replace(
        sample, captions=triplet.captions, variants=rule, style=None if style is None else str(style).strip()
    )
    captions, variants = trained.choices
    if captions * variants > MOST_FUSED and any(each.text and each.pictures for each in requests_of(config.reads)):
        raise InputError(
            f"{captions} captions with {variants} variants of the references are {captions * variants} sequences of "
            f"image and prompt, more than {MOST_FUSED}; lower data.reference_variants, write fewer prompts, or take an "
            "adapter that reads the reference alone (states: reference)"
        )
    return trained


def write_manifest(samples: Samples, path: Path) -> Path:
    """The training samples as JSON lines, pictures by name and digest: what a run was trained on, without paths."""

    def describe(known: Known) -> dict[str, str]:
        return {"name": as_text(Path(known.picture.name).name), "xxh3": known.digest}

    rows = [
        {
            "prompt": s.prompt,
            **({"prompts": s.captions} if s.captions else {}),
            "references": [describe(known) for known in s.references],
            "target": describe(s.target),
        }
        for s in samples.trained
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def needs_of(samples: Iterable[Sample], reads: frozenset[str], needs: Needs, negative_prompt: str = "") -> None:
    """Adds what `samples` ask of a cache under `reads`: their targets' latents and every encoded state of each form."""
    for sample in samples:
        needs.latents(sample.target, sample.bucket)
        for _, _, form in sample.forms():
            assemble(needs, [form.prompt], [form.references], reads, negative_prompt=negative_prompt)


def all_needs(config: Config, samples: Samples) -> Needs:
    """Everything that a run of this config reads from the cache: training, validation and previews."""
    needs = Needs()
    needs_of(samples.trained, config.reads, needs)
    if config.validation.validation_steps:
        pairs = samples.held_out_pairs(config)
        needs_of([*pairs.own, *pairs.others], config.reads, needs)
    reads, negative_prompt = config.reads | config.compare.splice.reads, config.sample.negative_prompt
    if config.validation.preview_steps:
        needs_of(samples.held_out(config.validation.num_previews), reads, needs, negative_prompt)
    if config.validation.score_steps:
        needs_of(samples.held_out(config.validation.num_scored), reads, needs, negative_prompt)
    return needs


def drop_refused(config: Config, samples: Samples, cache: Cache) -> bool:
    """Takes out the samples that the encoders refused, counted against data.max_bad_share like any other.

    True where it took some: then other held-out samples may move up, whose states are needed as well. Raises InputError
    beyond the share, and where something was refused that belongs to no single sample.
    """
    refused = cache.refusals(all_needs(config, samples))
    if not refused:
        return False
    dropped = 0
    for split in samples.splits:
        kept = []
        for sample in split.samples:
            own = Needs()
            needs_of([sample], config.reads | config.compare.splice.reads, own)
            reason = next((refused[place] for place in own.requests if place in refused), None)
            if reason is None:
                kept.append(sample)
            else:
                split.rejected.append(f"{sample.where}: {reason}")
        dropped += len(split.samples) - len(kept)
        split.samples = kept
        split.check(config.data.max_bad_share)
    if not dropped:
        raise InputError(f"states that validation needs cannot be made: {'; '.join(list(refused.values())[:3])}")
    return True
