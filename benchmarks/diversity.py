"""Where does the diversity go, and can it be had back? The page docs/findings/diversity.md.

    python -m benchmarks.diversity [--out out/diversity]     (minutes on one GPU, many hours on a laptop)
    python -m benchmarks.diversity --pages                   (the page again, from the committed result)

Draws held-out pairs of prompt and reference from several seeds: text only, the splice at every layer, every shipped
adapter, and three of these with every option of diversity_options.py; and watches attention meanwhile. Out:
benchmarks/results/findings/diversity.json, the tables and two pictures of the page. What is drawn is kept in `--out`
and not drawn again. `--measure` stops before the page; `--smoke` writes to `--out` only.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.attention_mass import KINDS, SINK, by_kind, times_uniform
from benchmarks.diversity_options import OPTIONS
from benchmarks.diversity_study import Study, strip
from benchmarks.diversity_tables import BASES, FIGURES, NAME, OPTION_FIGURES, ROWS, WATCHED, choose, table
from benchmarks.laboratory import machine
from benchmarks.pages import PAGES, RESULTS, save_sheet, write_page
from ztrain.adapters.splice import SpliceConfig
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.grid import draw_grid
from ztrain.mini.exam import Clusters, Scores
from ztrain.mini.subject import Subject
from ztrain.mini.trials import ADAPTERS, WEIGHTS, Method

PAIRS, SEEDS = 128, 8
SMOKE = (4, 2)
SHOWN = 2
"""Pairs whose pictures are kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.diversity", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/diversity"))
    parser.add_argument("--measure", action="store_true", help="write no page; it can be written from OUT")
    parser.add_argument("--pages", action="store_true", help="draw nothing; tables and plot from the committed result")
    parser.add_argument("--smoke", action="store_true", help="shows that everything runs")
    options = parser.parse_args(arguments)
    results, pages = (options.out, options.out) if options.smoke else (RESULTS, PAGES)
    try:
        if options.pages:
            write(read_result(results / f"{NAME}.json"), pages)
            return 0
        kept = Kept(options.out, *(SMOKE if options.smoke else (PAIRS, SEEDS)))
        measure(kept)
        if not options.measure:
            result = result_of(kept)
            results.mkdir(parents=True, exist_ok=True)
            (results / f"{NAME}.json").write_text(lines_of(result), encoding="utf-8")
            pages.mkdir(parents=True, exist_ok=True)
            write(result, pages)
            save_sheet(sheet(kept, result), pages / f"{NAME}.webp")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing: restore it, or run the command without --pages to measure again")
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def write(result: Mapping[str, Any], pages: Path) -> None:
    """Tables and plot of a result."""
    # Here, because a machine that only measures may lack matplotlib.
    from benchmarks.diversity_plot import draw

    write_page(pages / f"{NAME}.md", table(result))
    draw(pages / f"{NAME}.png", result)
    print(f"wrote {pages / NAME}.md and its plot")


# --- what is asked ----------------------------------------------------------------------------------------------------


def method_of(name: str, config: Config) -> Method:
    """What a row, base or watched list stands for: text, alone-<layer>, beside-<layer>, or a shipped adapter; `-blind`
    without its reference."""
    kind, _, rest = name.partition("-")
    encoders = config.encoders
    if kind in ("alone", "beside"):
        encoders = encoders.model_copy(update={"hidden_index": int(rest)})
    match kind:
        case "text":
            return Method(label=name, has_prompt=rest != "promptless")
        case "alone":
            splice = SpliceConfig(compose="replace", tokens="all")
            return Method(label=name, adapters=(splice,), encoders=encoders, has_prompt=False)
        case "beside":
            return Method(label=name, adapters=(SpliceConfig(tokens="text"),), encoders=encoders)
    method = Method.of_folder(name, ADAPTERS / kind)
    return replace(method, sees="none") if rest else method


class Kept:
    """A study, and what has been drawn of it: a file for each row, and its first pictures."""

    def __init__(self, out: Path, count: int, seeds: int) -> None:
        self.out, self.count, self.seeds = out, count, seeds
        (out / "scores").mkdir(parents=True, exist_ok=True)

    @cached_property
    def study(self) -> Study:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        steps = self.config.sample.num_inference_steps
        assert steps is not None, "configs/miniature.yaml says how many"
        subject = Subject.load(WEIGHTS, self.config.data.resolution, 0, device, num_inference_steps=steps)
        return Study(subject, self.config, self.count, range(self.seeds))

    @cached_property
    def config(self) -> Config:
        return load_config([Path("configs/siglip.yaml"), Path("configs/miniature.yaml")])

    @property
    def plan(self) -> dict[str, int]:
        return {"pairs": self.count, "seeds": self.seeds}

    @property
    def clusters(self) -> Clusters:
        """Each pair has a style and a reference of its own."""
        return Clusters(of="styles", numbers=torch.arange(self.count))

    def path(self, name: str) -> Path:
        return self.out / "scores" / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        if not self.path(name).is_file():
            raise InputError(f"{self.path(name)} is missing: {name} is not measured yet; run the command again")
        told: dict[str, Any] = json.loads(self.path(name).read_text(encoding="utf-8"))
        if told["plan"] != self.plan:
            raise InputError(
                f"{self.path(name)} was made under another plan; choose another --out or remove the folder"
            )
        return told

    def scores(self, name: str) -> Scores:
        """Of each pair, (T,)."""
        return {figure: torch.tensor(values) for figure, values in self.read(name)["scores"].items()}

    def keep(self, name: str, told: Mapping[str, Any]) -> None:
        text = json.dumps({"machine": machine(), "plan": self.plan, **told})
        self.path(name).write_text(text + "\n", encoding="utf-8")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(kept: Kept) -> None:
    """Draws, watches and judges what is not there yet."""
    due = [(name, work) for name, work in works(kept) if not kept.path(name).is_file()]
    for name, work in tqdm(due, desc="diversity", unit="row", disable=None):
        told = work()
        if (images := told.pop("images", None)) is not None:
            strip(images, SHOWN).save(kept.path(name).with_suffix(".png"))
            scores = kept.study.score(images)
            told["scores"] = {figure: [round(v, 5) for v in values.tolist()] for figure, values in scores.items()}
        kept.keep(name, told)


def works(kept: Kept) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything that is measured, by the name of its file."""

    def drawn(name: str, option: str = "plain") -> dict[str, Any]:
        return {"images": kept.study.draw(method_of(name, kept.config), OPTIONS[option])}

    for name in ROWS:
        if name.startswith("painter"):
            yield name, partial(_painted, kept, name == "painter-one")
        else:
            yield name, partial(drawn, name)
    for name in WATCHED:
        yield f"attention-{name}", partial(watched, kept, name)
    for base in BASES:
        for option in OPTIONS.values():
            if option.name != "plain":
                yield f"{base}+{option.name}", partial(drawn, base, option.name)


def _painted(kept: Kept, in_one_style: bool) -> dict[str, Any]:
    return {"images": kept.study.painted(in_one_style=in_one_style)}


def watched(kept: Kept, name: str) -> dict[str, Any]:
    """Of each main layer: each pair's shares by kind of token, (T, KINDS), mean over steps; shares by sigma; the token
    that gets most, of all heads and of each one."""
    tokens, masses = kept.study.watch(method_of(name, kept.config))
    layers = []
    for layer in sorted({mass.layer for mass in masses}):
        of_layer = [mass for mass in masses if mass.layer == layer]
        from_picture = torch.stack([by_kind(mass.from_picture, tokens) for mass in of_layer])  # (steps, T, KINDS)
        from_all = torch.stack([by_kind(mass.from_all, tokens) for mass in of_layer])
        picture = torch.stack([mass.from_picture for mass in of_layer])  # (steps, T, heads, N)
        times = torch.stack([times_uniform(mass.from_picture, tokens) for mass in of_layer]).mean(0)  # (T, N)
        of_heads = (picture * tokens.counts[:, None, None]).mean(0)  # (T, heads, N)
        layers.append(
            {
                "from_picture": _rounded(from_picture.mean(0)),
                "from_all": _rounded(from_all.mean(0)),
                "by_sigma": {
                    f"{mass.sigma:.3f}": _rounded(shares.mean(0))
                    for mass, shares in zip(of_layer, from_picture, strict=True)
                },
                "largest": largest(times, tokens.names),
                "heads": [largest(each, tokens.names) for each in of_heads.unbind(1)],
            }
        )
    return {"layers": layers}


def largest(times: torch.Tensor, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The token with the largest mean of `times` (T, N), among those that most pairs have; each pair's own number."""
    of_name: dict[str, list[float]] = {}
    for row, called in zip(times.tolist(), names, strict=True):
        for value, name in zip(row, called, strict=True):
            if name:
                of_name.setdefault(name, []).append(value)
    common = {name: values for name, values in of_name.items() if len(values) > len(names) / 2}
    name = max(common, key=lambda each: sum(common[each]) / len(common[each]))
    return {"name": name, "times": [round(value, 3) for value in common[name]]}


def lines_of(result: Mapping[str, Any]) -> str:
    """A result as JSON, a line for each row."""
    parts = []
    for key, value in result.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        parts.append(f'"{key}": [\n  {rows}\n ]' if rows else f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _rounded(values: torch.Tensor) -> Any:
    return [_rounded(row) for row in values] if values.ndim > 1 else [round(v, 4) for v in values.tolist()]


# --- what came out ----------------------------------------------------------------------------------------------------


def result_of(kept: Kept) -> dict[str, Any]:
    """All figures with intervals over styles; of options on the second half of the pairs, chosen on the first."""
    names = [name for name, _ in works(kept)]
    machines = [kept.read(name)["machine"] for name in names]
    return {
        "page": NAME,
        "machines": [told for place, told in enumerate(machines) if told not in machines[:place]],
        "plan": kept.plan | {"pictures": sum(not n.startswith("attention") for n in names) * kept.count * kept.seeds},
        "rows": [
            {"name": name, "label": label, "figures": _figures(FIGURES, kept.scores(name), kept.clusters)}
            for name, label in ROWS.items()
        ],
        "kinds": list(KINDS),
        "attention": [_attention(kept, name) for name in WATCHED],
        "options": [_options(kept, base) for base in BASES],
    }


def _figures(names: Sequence[str], scores: Scores, clusters: Clusters, against: Scores | None = None) -> dict[str, Any]:
    found = {}
    for name in names:
        theirs = None if against is None else against[name]
        found[name] = _short(clusters.figure(scores[name], theirs, drop_nan=True))
    return found


def _short(figure: Mapping[str, Any]) -> dict[str, Any]:
    """`count` of the pairs that could tell, where not all could."""
    told = {key: round(figure[key], 3) for key in ("mean", "low", "high")}
    return told if figure["count"] == figure["groups"] else told | {"count": figure["count"]}


def _attention(kept: Kept, name: str) -> dict[str, Any]:
    layers = []
    for told in kept.read(f"attention-{name}")["layers"]:
        columns = torch.tensor(told["from_picture"]).unbind(1)
        shares = {kind: _short(kept.clusters.figure(column)) for kind, column in zip(KINDS, columns, strict=True)}
        heads = [(head["name"], sum(head["times"]) / len(head["times"])) for head in told["heads"]]
        times = torch.tensor(told["largest"]["times"])
        every = Clusters(of="styles", numbers=torch.arange(len(times)))
        layers.append(
            {
                "from_picture": shares,
                "from_all": [round(share, 3) for share in torch.tensor(told["from_all"]).mean(0).tolist()],
                "by_sigma": {sigma: [round(share, 3) for share in row] for sigma, row in told["by_sigma"].items()},
                "largest": {"name": told["largest"]["name"], "times": _short(every.figure(times))},
                "heads": [{"name": called, "times": round(mean, 2), "sink": mean > SINK} for called, mean in heads],
            }
        )
    return {"name": name, "label": WATCHED[name], "layers": layers}


def _options(kept: Kept, base: str) -> dict[str, Any]:
    plain = kept.scores(base)
    half = kept.count // 2
    first, second = torch.arange(half), torch.arange(half, kept.count)

    def rows_of(scores: Scores, rows: torch.Tensor) -> Scores:
        return {name: values[rows] for name, values in scores.items()}

    rows = []
    for option in OPTIONS.values():
        own = plain if option.name == "plain" else kept.scores(f"{base}+{option.name}")
        asked = ("structure_diversity", "style_cosine", BASES[base].content)
        on_first = {name: (own[name] - plain[name])[first].nanmean().item() for name in asked}
        clusters = kept.clusters.select(second)
        rows.append(
            {
                "name": option.name,
                "label": option.label,
                "on_first_half": {name: round(value, 3) for name, value in on_first.items()},
                "figures": _figures(OPTION_FIGURES, rows_of(own, second), clusters),
                "above_plain": _figures(OPTION_FIGURES, rows_of(own, second), clusters, rows_of(plain, second)),
            }
        )
    return {"name": base, "label": BASES[base].label, "rows": rows, **choose(rows, BASES[base].content)}


def sheet(kept: Kept, result: Mapping[str, Any]) -> Image.Image:
    """The first pair's pictures, a column for each seed: of some rows, and of what won for a base."""
    shown = {name: ROWS[name] for name in ("painter-one", "text")}
    for told in result["options"]:
        shown[told["name"]] = told["label"]
        if told["winner"]:
            label = OPTIONS[told["winner"]].label
            shown[f"{told['name']}+{told['winner']}"] = f"{told['label']}: {label}"
    rows = []
    for name in shown:
        pictures = Image.open(kept.path(name).with_suffix(".png"))
        side = pictures.height // SHOWN
        rows.append([pictures.crop((left, 0, left + side, side)) for left in range(0, pictures.width, side)])
    return draw_grid([f"seed {seed}" for seed in range(kept.seeds)], list(shown.values()), rows)


if __name__ == "__main__":
    sys.exit(main())
