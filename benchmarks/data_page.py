"""The tables of docs/data.md from data_tools.json: what is found, what it costs, and what that makes for a billion.

python -m benchmarks.data_page
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT, write_page

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PICTURES = 1_000_000_000
MACHINES, CORES = 64, 64
CELL, PROBES = 100_000, 8
"""Pictures in a cell of like ones, and cells that each picture is compared with."""
WORDS = {
    "recompressed": "JPEG of quality 40 to 60",
    "smaller": "half to three quarters of the size",
    "larger": "one and a half times the size",
    "cropped": "95 % of each side kept, anywhere",
    "brightness_contrast": "brightness and contrast, up to 20 %",
    "saturation": "saturation, up to 20 %",
    "colour_cast": "a colour cast",
    "hue": "hue turned by up to 18 degrees",
    "gray": "gray",
    "combined": "crop, brightness, size and JPEG at once",
    "mirrored": "mirrored, when asked for",
}


def found_table(planted: Mapping[str, Any]) -> str:
    lines = ["| copy | found |", "|---|---|"]
    lines += [f"| {WORDS[name]} | {share:.1%} |" for name, share in planted["by_transform"].items()]
    styles = planted["within_style"].values()
    wrong, pairs = (sum(style[key] for style in styles) for key in ("called_duplicates", "pairs"))
    told = (
        f"{planted['pairs']:,} planted copies of drawings and photographs: {planted['recall']:.1%} found; of what is"
        f" called a copy {planted['precision']:.1%} are. Of {planted['random_pairs']:,} random pairs of different"
        f" contents {planted['random_called_duplicates_share']:.1%} are called copies, of all {pairs:,} pairs of"
        f" different drawings inside one style {wrong}, most of them one drawing in another colour. Crops to 90 % of"
        f" each side are beyond it: {_harder(planted):.0%} are found."
    )
    return "\n".join([*lines, "", told])


def _harder(planted: Mapping[str, Any]) -> float:
    [share] = [value for name, value in planted["harder"].items() if "90" in name]
    return float(share)


def cost_table(document: Mapping[str, Any]) -> str:
    scan, planted = document["scan"], document["planted_duplicates"]
    semantic = document["semantic_dedup"]["rows"]["100000"]
    ours, index, clusters = (semantic[name] for name in ("ztrain", "usearch_bf16", "clusters"))
    speed = scan["speed_over_bare_decode"]
    growth = scan["ms_per_picture_beyond_the_first_size"]
    rows = {
        "scan, hashes only": f"{speed['scan_hashes']:.2f} of the speed of a bare decode",
        "scan, all columns": f"{speed['scan_all_columns']:.2f} of it",
        "a picture, of 10,000 and of 100,000": f"{growth[0]:.2f} and {growth[1]:.2f} ms",
        "copies among 100,000 by looks": f"{planted['search']['seconds']:.0f} s, one core",
        "near-duplicates among 100,000 embeddings": (
            f"{clusters['both_seconds']:.0f} s, {clusters['both_peak_mib'] / 1024:.1f} GiB, recall {ours['recall']:.4f}"
        ),
        "the same by usearch (HNSW, bf16)": f"{index['seconds']:.0f} s, recall {index['recall']:.4f}",
    }
    lines = ["| | |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())]
    machine = document["machine"]
    told = f"{machine['cores']} cores, torch {machine['torch']}, {document['date']}; embeddings of 768 numbers"
    return "\n".join([*lines, "", f"{told}. Photographs of 512 pixels."])


def billion_table(document: Mapping[str, Any]) -> str:
    scan, semantic = document["scan"], document["semantic_dedup"]
    seconds = sorted(scan["seconds"]["scan_all_columns"])[1]
    per_picture = seconds * scan["workers"] / scan["pictures"]
    pairs = 100_000 * 99_999 / 2
    by_looks = document["planted_duplicates"]["search"]["processor_seconds"] / pairs
    by_meaning = semantic["rows"]["100000"]["ztrain"]["seconds"] * semantic["threads"] / pairs
    compared, everything = PICTURES * PROBES * CELL / 2, PICTURES**2 / 2
    rows = {
        "scan, all columns": per_picture * PICTURES,
        "copies by looks, in cells": by_looks * compared,
        "near-duplicates by embedding, in cells": by_meaning * compared,
        "the same, every picture with every other": by_meaning * everything,
    }
    lines = [f"| a billion pictures | core hours | hours on {MACHINES} machines of {CORES} cores |", "|---|---|---|"]
    for what, core_seconds in rows.items():
        lines.append(f"| {what} | {core_seconds / 3600:,.0f} | {core_seconds / 3600 / MACHINES / CORES:,.2f} |")
    told = (
        f"Reckoned from the figures above, not run. Cells: {CELL:,} like pictures each, every picture compared with"
        f" {PROBES} of them; cutting a set into cells is not built yet, and its cost is left out, as are storage and"
        " network. For comparison: Z-Image's authors report 8 hours on 8 H800 for a billion (arXiv 2511.22699; their"
        " figure, not checked here)."
    )
    return "\n".join([*lines, "", told])


def tables(results: Path) -> str:
    document = json.loads((results / "data_tools.json").read_text(encoding="utf-8"))
    parts = {
        "What is found": found_table(document["planted_duplicates"]),
        "What it costs": cost_table(document),
        "A billion": billion_table(document),
    }
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts.items())


def main(docs: Path = DOCS) -> None:
    write_page(docs / "data.md", tables(RESULTS))


if __name__ == "__main__":
    main()
