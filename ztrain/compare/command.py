"""`ztrain compare`: adapter lists side by side on the same rows and seeds, judged, with what the numbers can bear.

Columns: no image, the splice, presets, exported adapters, controls. In `<compare.output_dir>`: the pictures,
`comparison.json` (record.py) and `compare.png`, a labelled sheet. The splice and plain text-to-image need no
special case: they are lists without weights. With `--checkpoints` the columns are the checkpoints of a run.
"""

import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ztrain.cache.cache import Cache
from ztrain.compare.judging import Judging, Sheet, TruthLoader, Verdicts, check_judges
from ztrain.compare.lineup import Entry, check_entries, entries_of, exported_entries, names_of, read_cases
from ztrain.compare.ranking import choose, ranked
from ztrain.compare.record import Column, Comparison, Row, write_best, write_comparison
from ztrain.compare.studio import Studio
from ztrain.config import Config
from ztrain.data.digests import digest_bytes
from ztrain.data.exchange import Case, style_of
from ztrain.data.rows import parse_object
from ztrain.data.tars import PACK_MANIFEST_NAME
from ztrain.errors import InputError
from ztrain.frozen.sources import public_name
from ztrain.images import Picture, PictureFile, open_image
from ztrain.io.drawn import save_picture, still_to_draw
from ztrain.io.files import as_text, read_bytes, workspace
from ztrain.io.yamls import Strict, dump_yaml, parse
from ztrain.metrics.intervals import grouped
from ztrain.privacy import public_config, public_text
from ztrain.sampling.aspects import output_size
from ztrain.sampling.sheet import draw_grid
from ztrain.version import VERSION
from ztrain.weights import checkpoint
from ztrain.weights.adapter_folder import quoted, read_adapter
from ztrain.weights.from_checkpoint import export_checkpoint

SHEET_NAME = "compare.png"
_ROWS_SHOWN = 16  # of the sheet; the report shows all
_SETTINGS_SHOWN = 8  # rows of a sheet that has a line for each setting
_GIVEN_SIDE = 1024  # pixels of references and targets that are kept beside the pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlan:
    """What is compared: `entries` in their order, the first without images. `candidates`: roles that may be best."""

    kind: Literal["compare", "sweep", "checkpoints"]
    title: str
    folder: Path
    entries: Sequence[Entry]
    candidates: frozenset[str]
    axes: dict[str, list[Any]]


def compare(config: Config, truth: TruthLoader | None = None) -> Comparison:
    """Draws, judges and writes what compare.* asks for. `truth`: what loads judges.truth. Raises InputError."""
    entries = entries_of(config)
    lists = [public_text(entry.label) for entry in entries if entry.role == "adapter"]
    said = ", ".join(lists[:-1]) + (" and " if len(lists) > 1 else "") + lists[-1] if lists else ""
    title = f"{said} beside the splice" if lists else "The splice beside no image"
    return carry_out(
        config,
        ComparisonPlan(
            kind="compare",
            title=title,
            folder=Path(config.compare.output_dir),
            entries=entries,
            candidates=frozenset({"adapter", "splice"}),
            axes={},
        ),
        truth,
    )


def compare_checkpoints(config: Config, run: Path, truth: TruthLoader | None = None) -> Comparison:
    """Every checkpoint of a run in the place of adapters; the best is also written to `<run>/best.json`."""
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found:
        raise InputError(f"{run}: no checkpoints there; give the output_dir of a run")
    folder = Path(config.compare.output_dir)
    with workspace(folder) as scratch:
        # Written anew each time: a name says nothing about what a checkpoint holds now.
        folders = [export_checkpoint(config, path, scratch / path.name) for path in found]
        exported = [
            replace(entry, label=f"step {entry.exported.step}" if entry.exported else entry.label, role="checkpoint")
            for entry in exported_entries(folders, config)
        ]
        config = config.model_copy(
            update={"compare": config.compare.model_copy(update={"presets": [], "adapters": []})}
        )
        entries = [*entries_of(config), *exported]
        check_entries(entries)
        plan = ComparisonPlan(
            kind="checkpoints",
            title=f"Checkpoints of {public_text(run.name)}",
            folder=folder,
            entries=entries,
            candidates=frozenset({"checkpoint"}),
            axes={},
        )
        judged = carry_out(config, plan, truth)
    _mark_best(run, judged)
    return judged


def _mark_best(run: Path, judged: Comparison) -> None:
    place = judged.best.column
    steps: dict[str, Any] = {}
    for i, column in enumerate(judged.columns):
        if column.role == "checkpoint":
            told = [judged.metric(name).means[i] for name in (judged.style, judged.adherence) if name is not None]
            steps[str(column.step)] = [None if mean is None else mean.mean for mean in told]
    best = None if place is None else judged.columns[place].step
    write_best(run, judged.best, best, steps, by="compare --checkpoints")


def carry_out(config: Config, plan: ComparisonPlan, truth: TruthLoader | None) -> Comparison:
    """Draws what is missing, judges all of it, and writes sheet and record."""
    started = time.perf_counter()
    cache = Cache(config)
    cases, lost = read_cases(config, cache.digests)
    data = _data(config) | ({"rows that cannot be used": lost} if lost else {})
    check_judges(config.judges, cases, truth)
    given = _keep_given(cases, plan.folder)  # what cannot be opened is met before anything is drawn
    studio = Studio(config, cases, plan.folder, cache)
    drawn = studio.draw(plan.entries)
    trained = [place for place, entry in enumerate(plan.entries) if entry.exported and not entry.is_shuffled]
    trained = trained if config.compare.drift else []
    bare = studio.draw([plan.entries[place].without_reference for place in trained], num_seeds=1)
    sheet = Sheet(
        cases=cases,
        pictures=[[[PictureFile(path) for path in row] for row in column] for column in drawn],
        plain=0,
        bare={place: [PictureFile(row[0]) for row in column] for place, column in zip(trained, bare, strict=True)},
    )
    verdicts = Judging(config.judges, studio.device, truth).score(sheet)
    found = _record(config, plan, studio, drawn, verdicts, given, data, time.perf_counter() - started)
    save_picture(_draw_sheet(found, plan.folder), plan.folder / SHEET_NAME)
    write_comparison(found, plan.folder)
    return found


def _keep_given(cases: Sequence[Case], folder: Path) -> dict[str, str]:
    """References and targets as pictures of the comparison, by their own names; copied again where they are damaged."""
    pictures: dict[str, Picture] = {}
    for case in cases:
        pictures |= {known.name: known for known in case.references}
        pictures |= {case.target.name: case.target} if case.target else {}
    kept = {}
    for name, picture in pictures.items():
        image = open_image(picture)
        image.thumbnail((_GIVEN_SIDE, _GIVEN_SIDE))
        size = "{} x {} ".format(*image.size).encode()  # two plain pictures may differ in their shape alone
        path = folder / "given" / f"{digest_bytes(size + image.tobytes())[:16]}.png"
        if still_to_draw([path]):
            save_picture(image, path)
        kept[name] = path.relative_to(folder).as_posix()
    return kept


def _record(
    config: Config,
    plan: ComparisonPlan,
    studio: Studio,
    drawn: Sequence[Sequence[Sequence[Path]]],
    verdicts: Verdicts,
    given: dict[str, str],
    data: dict[str, Any],
    seconds: float,
) -> Comparison:
    cases, entries = studio.cases, plan.entries
    clusters = prompts, references = grouped(c.prompt for c in cases), grouped(c.look for c in cases)
    labels, keep = [public_text(entry.label) for entry in entries], config.compare.keep_adherence
    splices = [place for place, entry in enumerate(entries) if entry.role == "splice"]
    best_splice = choose(verdicts, from_noise(entries, splices), 0, keep, labels, clusters)
    # Where none keeps the prompt, the first is still what everybody has for free.
    baseline = best_splice.column if best_splice.column is not None else next(iter(splices), None)
    candidates = [place for place, entry in enumerate(entries) if entry.role in plan.candidates]
    best = choose(verdicts, from_noise(entries, candidates), 0, keep, labels, clusters)
    return Comparison(
        ztrain_version=VERSION,
        kind=plan.kind,
        title=plan.title,
        columns=[_column(entries, place, name, studio) for place, name in enumerate(names_of(entries))],
        rows=[
            Row(
                prompt=case.prompt,
                prompt_group=prompts[i],
                reference_group=references[i],
                where=_without_folder(case.where, config),
                references=[given[known.name] for known in case.references],
                target=given[case.target.name] if case.target else None,
                style=None if (style := style_of(case.columns)) is None else public_text(style),
                seeds=studio.seeds(i),
            )
            for i, case in enumerate(cases)
        ],
        pictures=[[[p.relative_to(plan.folder).as_posix() for p in row] for row in column] for column in drawn],
        metrics=[ranked(score, baseline, clusters) for score in verdicts.scores],
        baseline=baseline,
        style=verdicts.style,
        adherence=verdicts.adherence,
        best=best,
        best_splice=best_splice,
        axes=public_config(plan.axes),
        conditions=_conditions(config, studio, verdicts),
        data=data,
        config=dump_yaml(public_config(config.model_dump(mode="json"))),
        loading=_loading(entries, best.column),
        seconds=round(seconds, 1),
    )


def from_noise(entries: Sequence[Entry], places: Sequence[int]) -> list[int]:
    """Those of the places that do not start at their reference, if there are any: the others have its look for free."""
    return [place for place in places if entries[place].sample.strength == 1.0] or list(places)


def _column(entries: Sequence[Entry], place: int, name: str, studio: Studio) -> Column:
    entry = entries[place]
    settings = studio.settings(entry)
    exported = entry.exported
    return Column(
        name=name,
        label=public_text(entry.label),
        role=entry.role,
        adapters=[public_config(adapter.model_dump(mode="json")) for adapter in entry.adapters],
        encoders=entry.encoders.model_dump(mode="json"),
        sampling={
            "height": studio.size(entry)[0],
            "width": studio.size(entry)[1],
            "num_inference_steps": settings.num_inference_steps,
            "shift": settings.shift,
            **entry.sample.model_dump(
                mode="json",
                include={"image_guidance_scale", "guidance_normalization", "guidance_window", "reference_window"}
                | {"negative", "negative_prompt", "scales", "strength"},
            ),
            "guidance_scale": settings.guidance_scale,
        },
        settings=public_config(dict(entry.settings)),
        sees="shuffled" if entry.is_shuffled else "own" if entry.looks else "none",
        of=next((i for i, other in enumerate(entries) if other.label == entry.of), None),
        folder=None if exported is None else public_name(str(exported.folder)),
        step=None if exported is None else exported.step,
        num_weights=0 if exported is None else _num_weights(exported.folder),
    )


def _num_weights(folder: Path) -> int:
    """Each weight once, though a LoRA is exported in several layouts."""
    files = read_adapter(folder).files
    return max((sum(tensor.numel() for tensor in tensors.values()) for tensors in files.values()), default=0)


def _without_folder(where: str, config: Config) -> str:
    """Of a row of the data set: its file and line, wherever that lies."""
    for place in {config.data.train_data_dir, str(Path(config.data.train_data_dir))}:
        where = where.replace(f"{place.rstrip('/')}/", "")
    return public_text(where)


def _conditions(config: Config, studio: Studio, verdicts: Verdicts) -> dict[str, Any]:
    cuda = studio.device.type == "cuda"
    found: dict[str, Any] = {
        "base": public_name(config.models.base.pretrained_model_name_or_path),
        "base revision": config.models.base.revision,
        "size": "{1} x {0}".format(*output_size(config)),
        "precision": "float32" if studio.dtype == torch.float32 else "bfloat16",
        "seeds for each row": config.compare.num_seeds,
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
    }
    found |= {name: version(name) for name in ("torch", "diffusers", "transformers")}
    if verdicts.missing:
        found["not scored"] = "; ".join(verdicts.missing)
    return found


class _Manifest(Strict, extra="ignore"):
    """What is shown of a data set's manifest; it holds more."""

    fingerprint: str | None = None
    triplets: dict[str, int] | None = None
    licences: list[str] | None = None


def _data(config: Config) -> dict[str, Any]:
    """What the data set says of itself."""
    chosen = config.compare
    if chosen.prompts is not None and chosen.references is not None:
        return {"prompts": as_text(Path(chosen.prompts).name), "references": public_name(chosen.references)}
    found: dict[str, Any] = {"name": public_name(config.data.train_data_dir), "split": chosen.split}
    manifest = Path(config.data.train_data_dir) / PACK_MANIFEST_NAME
    if manifest.exists():
        told = parse(_Manifest, parse_object(read_bytes(manifest, "record"), where=str(manifest)), str(manifest))
        found["fingerprint"] = told.fingerprint
        found |= {f"triplets in {split}": count for split, count in (told.triplets or {}).items()}
        found["licences"] = ", ".join(told.licences or []) or None
    return found


def _loading(entries: Sequence[Entry], best: int | None) -> str | None:
    """How the best adapter, or else the last one, is loaded onto a stock pipeline."""
    exported = [entry for entry in entries if entry.exported and not entry.is_shuffled]
    if not exported:
        return None
    chosen = entries[best] if best is not None and entries[best].exported else exported[-1]
    assert chosen.exported is not None
    base = chosen.exported.models["base"]["pretrained_model_name_or_path"]
    return (
        "import torch\nimport ztrain\nfrom diffusers import ZImagePipeline\n\n"
        f'pipe = ZImagePipeline.from_pretrained({quoted(str(base))}, torch_dtype=torch.bfloat16).to("cuda")\n'
        f"adapted = ztrain.load_adapter(pipe, {quoted(public_name(str(chosen.exported.folder)))})\n"
        "images = adapted(prompt, reference)\n"
    )


def _draw_sheet(found: Comparison, folder: Path) -> Image.Image:
    """The first seed of some rows; of a sweep a line for each setting."""

    def opened(name: str) -> Image.Image:
        return open_image(folder / name)

    if found.axes:
        rows = range(min(_SETTINGS_SHOWN, len(found.rows)))
        lines = [[opened(found.rows[i].references[0]) for i in rows]]
        lines += [[opened(column[i][0]) for i in rows] for column in found.pictures]
        headers = [found.rows[i].prompt[:24] for i in rows]
        return draw_grid(headers, ["reference", *(column.label for column in found.columns)], lines)
    shown = found.rows[:_ROWS_SHOWN]
    cells = []
    for i, row in enumerate(shown):
        target = [opened(row.target)] if row.target else []
        cells.append([opened(row.references[0]), *(opened(c[i][0]) for c in found.pictures), *target])
    has_targets = all(row.target for row in shown)
    labels = ["reference", *(column.label for column in found.columns), *(["target"] if has_targets else [])]
    return draw_grid(labels, [row.prompt for row in shown], cells)


def table(found: Comparison) -> str:
    """Headline metrics as a Markdown table, for the terminal."""

    def in_a_cell(text: str) -> str:
        return re.sub(r"([\\|])", r"\\\1", " ".join(text.split()))

    shown = [metric for metric in found.metrics if metric.name in {found.style, found.adherence}]
    shown += [m for m in found.metrics if m.name in {"copy", "diversity", "drift", "truth_leak"} and m not in shown]
    lines = [f"| | {' | '.join(in_a_cell(m.title) for m in shown)} |", "|" + "---|" * (len(shown) + 1)]
    for place, column in enumerate(found.columns):
        cells = [_cell(metric.means[place], metric.differences[place]) for metric in shown]
        mark = " (best)" if place == found.best.column else ""
        lines.append(f"| {in_a_cell(column.label)}{mark} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(" ".join(text.split()) for text in (found.best.rule, found.best.found))])


def _cell(mean: Any, difference: Any) -> str:
    if mean is None:
        return ""
    told = f"{mean.mean:.3f}" if mean.low is None else f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
    marks = {"better": " +", "worse": " -"}
    return told + (marks.get(difference.verdict, "") if difference is not None else "")
