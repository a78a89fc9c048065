"""The shipped adapters beside the splice's best setting, and what each layer of the splice lets through.

    python -m benchmarks.compare_miniature [--out out/compare_miniature]      (half an hour on two cores)

Three steps, each with the commands' own code, on painted drawings whose contents the adapters were not trained on:
`tune` sweeps the splice beside prompts, on styles that nothing else here sees, and names its best setting; `lists`
compares the shipped adapters with that setting; `layers` sweeps the layers of the splice with the image alone. Out:
result files, docs/compare.md's table and picture, docs/findings/layer_spectrum.md's table and picture.
`--pages` writes pages from the committed results only.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import PAGES, RESULTS, ROOT, save_sheet, write_page
from data_tools.build import main as build
from miniature import truth_judge
from miniature.style_folders import paint_many_styles
from miniature.trials import ADAPTERS
from ztrain.compare.command import SHEET_NAME, compare
from ztrain.compare.ranking import ranked
from ztrain.compare.record import Comparison
from ztrain.compare.report.page import make_report
from ztrain.compare.sweep import BEST_NAME, sweep
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.images import open_image
from ztrain.sampling.sheet import draw_grid
from ztrain.terminal import program

LISTS, LAYERS = RESULTS.parent / "compare_miniature.json", RESULTS / "layer_spectrum.json"
PAGE, SPECTRUM = ROOT / "docs" / "compare.md", PAGES / "layer_spectrum.md"
STYLES, TUNED = 64, 32
SHIPPED = ("siglip_lora", "siglip", "projector", "splice_lora", "lora")
_SHOWN_ROWS = 6
_OF_LISTS = ("truth_style", "truth_content", "truth_leak", "copy", "palette_error", "diversity", "drift")
_OF_LAYERS = ("truth_reference_place", "truth_reference_count", "truth_reference_kind", "palette_error", "truth_style",
              "diversity", "artefacts")  # fmt: skip
_BUILD = """\
sources: [images]
dedup: null
label: {styles: {contents: contents.csv, splits: {train: train, validation: validation}}}
pair: {triplets_per_target: 1, max_copy_score: 1.0}
"""


@program
def main(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.compare_miniature", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/compare_miniature"))
    parser.add_argument("--rows", type=int, default=STYLES, help="fewer shows that everything runs")
    parser.add_argument("--pages", action="store_true", help="write pages from the committed results only")
    options = parser.parse_args(arguments)
    if not options.pages:
        measure(options.out, options.rows)
    if options.pages or options.rows == STYLES:
        write_page(PAGE, lists_table(json.loads(LISTS.read_text(encoding="utf-8"))))
        write_page(SPECTRUM, layers_table(json.loads(LAYERS.read_text(encoding="utf-8"))))


def measure(out: Path, rows: int) -> None:
    """Draws and judges what is not there yet; with all rows, the results and pictures are the committed ones."""
    config = prepare(out, rows, seed=1)
    tuned = sweep(_tuning(prepare(out, min(rows, TUNED), seed=2), out / "tune"), truth_judge)
    make_report(out / "tune")
    found = compare(_lists(config, out), truth_judge)
    make_report(out / "lists")
    spectrum = sweep(_layers(config, out / "layers"), truth_judge)
    make_report(out / "layers")
    if rows != STYLES:
        return
    LISTS.write_text(json.dumps(kept(found) | {"tuned": kept(tuned)}, indent=1) + "\n", encoding="utf-8")
    LAYERS.write_text(json.dumps(kept(spectrum), indent=1) + "\n", encoding="utf-8")
    save_sheet(_sheet_of_lists(found, out / "lists"), ROOT / "docs" / "compare.webp")
    save_sheet(open_image(out / "layers" / SHEET_NAME), PAGES / "layer_spectrum.webp")


def prepare(out: Path, rows: int, *, seed: int) -> Config:
    """Triplets of so many styles, and the experiment. `seed` 1 leaves out the contents that the shipped adapters'
    training left out."""
    folder = out / f"seed-{seed}-{rows}"
    paint_many_styles(folder / "paintings", {"train": (2, 2), "validation": (rows, 2)}, seed=seed)
    (folder / "paintings" / "build.yaml").write_text(_BUILD, encoding="utf-8")
    if build(["--config", str(folder / "paintings" / "build.yaml"), "--out", str(folder / "triplets")]) != 0:
        raise InputError(f"{folder}: the triplets were not built")
    words = [
        *("--data.train_data_dir", str(folder / "triplets"), "--cache.dir", str(out / "cache")),
        *("--compare.num_samples", str(rows), "--compare.num_seeds", "2", "--sample.num_inference_steps", "8"),
    ]
    return load_config([ROOT / "configs" / "splice.yaml", ROOT / "configs" / "miniature.yaml"], words)


def _tuning(config: Config, out: Path) -> Config:
    axes = {
        "encoders.hidden_index": [4, 5],
        "splice.tokens": ["text", "all"],
        "sample.scales": [0.1, 0.25, 0.5, 1.0],
    }
    return config.model_copy(update={"sweep": config.sweep.model_copy(update={"axes": axes, "output_dir": str(out)})})


def _lists(config: Config, out: Path) -> Config:
    chosen: dict[str, Any] = {
        "adapters": [str(ADAPTERS / name) for name in SHIPPED],
        "presets": [str(out / "tune" / BEST_NAME)] if (out / "tune" / BEST_NAME).is_file() else [],
        "shuffled": True,
        "output_dir": str(out / "lists"),
    }
    return config.model_copy(update={"compare": config.compare.model_copy(update=chosen)})


def _layers(config: Config, out: Path) -> Config:
    """The image alone: all tokens of its sequence in the prompt's place."""
    splice = config.compare.splice.model_copy(update={"compose": "replace", "tokens": "all"})
    chosen = config.compare.model_copy(update={"prompt": "none", "splice": splice})
    axes = {"encoders.hidden_index": list(range(1, 7))}
    swept = config.sweep.model_copy(update={"axes": axes, "output_dir": str(out)})
    return config.model_copy(update={"compare": chosen, "sweep": swept})


def kept(found: Comparison) -> dict[str, Any]:
    """What pages are written from: everything but rows and pictures."""
    document = found.model_dump(mode="json", exclude={"rows", "pictures", "config"})
    for metric in document["metrics"]:
        del metric["values"]
    counted = {"num_rows": len(found.rows), "num_seeds": len(found.rows[0].seeds)}
    return document | counted | {"above_most_style": above_most_style(found)}


def above_most_style(found: Comparison) -> dict[str, Any]:
    """Of each column: style above the splice that has most of it, whatever that does to the prompt; paired."""
    style = found.metric("truth_style")
    assert style.values is not None
    splices = [i for i, column in enumerate(found.columns) if column.role == "splice"]
    means = {i: style.means[i] for i in splices}
    most = max(splices, key=lambda i: means[i].mean if means[i] else -1.0)  # type: ignore[union-attr]
    clusters = [row.prompt_group for row in found.rows], [row.reference_group for row in found.rows]
    differences = ranked(style, most, clusters).differences
    return {
        "of": found.columns[most].label,
        "differences": [None if each is None else each.model_dump(mode="json") for each in differences],
    }


def _sheet_of_lists(found: Comparison, folder: Path) -> Any:
    shown = [i for i, column in enumerate(found.columns) if column.sees != "shuffled"]
    rows = found.rows[:_SHOWN_ROWS]
    cells = [
        [row.references[0], *(found.pictures[i][number][0] for i in shown), row.target or row.references[0]]
        for number, row in enumerate(rows)
    ]
    pictures = [[open_image(folder / name) for name in line] for line in cells]
    return draw_grid(
        ["reference", *(found.columns[i].label for i in shown), "target"], [r.prompt for r in rows], pictures
    )


# Tables


def lists_table(result: Mapping[str, Any]) -> str:
    """Of the comparison, with the rule and what it chose."""
    names = [name for name in _OF_LISTS if any(metric["name"] == name for metric in result["metrics"])]
    style = _metric(result, "truth_style")
    most = result["above_most_style"]
    extra = {
        "style above the baseline": style["differences"],
        f"style above the splice with most style ({most['of']})": most["differences"],
    }
    lines = _table(result, names, extra=extra)
    baseline = result["columns"][result["baseline"]]["label"]
    return "\n".join([
        *lines,
        "",
        f"{result['num_rows']} held-out triplets x {result['num_seeds']} seeds, {_steps(result)} steps; 95 % intervals"
        f" over prompts and references. + and - : better or worse than the baseline ({baseline}), where the interval of"
        f" the paired difference excludes 0. {result['best']['rule']} {result['best']['found']} Of the splices:"
        f" {result['best_splice']['found']}",
    ])  # fmt: skip


def layers_table(result: Mapping[str, Any]) -> str:
    names = [name for name in _OF_LAYERS if any(metric["name"] == name for metric in result["metrics"])]
    columns = [i for i, column in enumerate(result["columns"]) if column["role"] in ("none", "setting")]
    return "\n".join([
        *_table(result, names, columns),
        "",
        f"{result['num_rows']} references x {result['num_seeds']} seeds, {_steps(result)} steps, the image alone (all"
        " its tokens, no prompt); 95 % intervals over references.",
    ])  # fmt: skip


def _table(
    result: Mapping[str, Any],
    names: Sequence[str],
    columns: Sequence[int] | None = None,
    extra: Mapping[str, Sequence[Mapping[str, Any] | None]] | None = None,
) -> list[str]:
    metrics = [_metric(result, name) for name in names]
    extra = extra or {}
    titles = [metric["title"] for metric in metrics] + list(extra)
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for i in range(len(result["columns"])) if columns is None else columns:
        cells = [_cell(metric["means"][i], metric["differences"][i]) for metric in metrics]
        cells += [_cell(differences[i]) for differences in extra.values()]
        lines.append(f"| {result['columns'][i]['label']} | {' | '.join(cells)} |")
    return lines


def _metric(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(metric for metric in result["metrics"] if metric["name"] == name)


def _cell(mean: Mapping[str, Any] | None, difference: Mapping[str, Any] | None = None) -> str:
    if mean is None:
        return ""
    told = f"{mean['mean']:z.2f}"
    if mean["low"] is not None and mean["high"] > mean["low"]:
        told += f" [{mean['low']:z.2f}, {mean['high']:z.2f}]"
    verdict = None if difference is None else difference["verdict"]
    return told + (" +" if verdict == "better" else " -" if verdict == "worse" else "")


def _steps(result: Mapping[str, Any]) -> int:
    return int(result["columns"][0]["sampling"]["num_inference_steps"])


if __name__ == "__main__":
    sys.exit(main())
