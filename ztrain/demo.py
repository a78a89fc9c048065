"""The main job in one command: painted style folders -> triplets -> cache -> adapter, and whether it beats the splice.

`python -m ztrain.demo --out DIR [--adapters NAME]`: NAME is an experiment of configs/. The models are the pretrained
miniature that comes with ztrain, so content and style of every picture are known and judged. Out: `demo.png`,
`demo.md`, `result.json`, `run/export/` and `pictures/`. The splice's setting is chosen on validation triplets,
everything else is measured on triplets whose contents and styles were in neither split.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from miniature.exam import CONTENT_LOSS
from miniature.style_folders import paint_many_styles
from miniature.trials import (
    ADAPTERS,
    Outcome,
    Trials,
    as_found,
    exported_entry,
    find_best_splice,
    markdown_table,
    splices,
    text_only,
)
from ztrain.adapters import describe_list
from ztrain.config import Config, load_config
from ztrain.images import open_image
from ztrain.interrupt import run_module
from ztrain.io.drawn import save_picture
from ztrain.io.files import given_path, write_json, write_text
from ztrain.sampling.sheet import draw_grid
from ztrain.terminal import command

EXPERIMENTS = ("projector", "splice_lora", "siglip", "siglip_lora", "lora")
DEFAULT = "siglip_lora"
CONFIGS = Path("configs")

PAINTED = {"train": (200, 6), "val": (24, 2), "test": (96, 2)}
"""Style folders of each split, and pictures in each; validation chooses the splice's setting, test judges."""
LAYERS, STRENGTHS = (4, 5, 6), (0.5, 1.0)
"""Of the splice that are tried, each with two choices of tokens."""
ROWS = 6

BUILD_CONFIG = """\
sources: [images]
dedup: null  # what is drawn is known: a circle is no copy of a flower, however alike they look
label: {styles: {contents: contents.csv, splits: {train: train, val: validation, test: test}}}
pair: {triplets_per_target: 2, max_copy_score: 1.0}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What the demo does. The default one must succeed; others, and smaller ones, only tell."""

    adapters: str = DEFAULT
    steps: int = 1400
    seed: int = 0
    painted: Mapping[str, tuple[int, int]] = field(default_factory=lambda: PAINTED)
    layers: tuple[int, ...] = LAYERS
    overrides: tuple[str, ...] = ()
    """Of the experiment, as words of a command line."""

    def status(self, succeeded: bool) -> int:
        """Exit status: 1 where the default list, steps and seed do not beat the splice."""
        return 1 if self == DemoSettings() and not succeeded else 0


SMOKE = DemoSettings(
    painted={"train": (6, 4), "val": (3, 2), "test": (4, 2)},
    layers=(5,),
    overrides=(
        *("--sample.num_inference_steps", "2", "--sample.guidance_scale", "0"),
        *("--validation.num_samples", "4", "--validation.num_previews", "2"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the default run does not beat the splice, 2 something the user can mend; of a step that
    fails, its own."""
    parser = argparse.ArgumentParser(prog="ztrain.demo", description=__doc__)
    parser.add_argument("--out", type=given_path, default=Path("out/demo"))
    parser.add_argument("--adapters", choices=EXPERIMENTS, default=DEFAULT, help="experiment of configs/ to train")
    parser.add_argument("--steps", type=int, default=DemoSettings().steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=DemoSettings().seed)
    parser.add_argument("--smoke", action="store_true", help="few drawings and settings: shows that everything runs")
    options = parser.parse_args(arguments)
    plan = SMOKE if options.smoke else DemoSettings()
    plan = replace(plan, adapters=options.adapters, steps=options.steps, seed=options.seed)
    return command(lambda: plan.status(demo(options.out, plan)))


def demo(out: Path, plan: DemoSettings) -> bool:
    """All steps; whether the adapter beats the splice and follows the prompt. The last line is the picture's path."""
    started = time.perf_counter()

    print("1/6 painting drawings", flush=True)
    paint_many_styles(out / "paintings", plan.painted)
    build_file = out / "paintings" / "build.yaml"
    write_text(build_file, BUILD_CONFIG)

    print("2/6 pairing drawings into triplets", flush=True)
    run("data_tools.build", "--config", str(build_file), "--out", str(out / "triplets"))

    print("3/6 finding the splice's best setting", flush=True)
    experiment = [str(CONFIGS / f"{plan.adapters}.yaml"), str(CONFIGS / "miniature.yaml")]
    overrides = [
        *("--seed", str(plan.seed)),
        *("--data.train_data_dir", str(out / "triplets")),
        *("--cache.dir", str(out / "cache")),
        *("--output_dir", str(out / "run")),
        *("--train.max_train_steps", str(plan.steps)),
        *plan.overrides,
    ]
    config = load_config([Path(file) for file in experiment], overrides)
    settings = splices(config, plan.layers, STRENGTHS)
    most, kept = find_best_splice(Trials.of(config, "validation", out), settings)
    best, keeping = most.entry, None if kept is None else kept.entry
    print(f"most style: {best.label}; most of those that keep the content: {keeping.label if keeping else 'none'}")
    overrides += as_found(config, best)

    print("4/6 caching what training reads", flush=True)
    run("ztrain.cli", "cache", "--config", *experiment, *overrides)

    print(f"5/6 training {plan.adapters} for {plan.steps} steps", flush=True)
    shutil.rmtree(out / "run", ignore_errors=True)  # the demo's own run of an earlier time
    run("ztrain.train", "--config", *experiment, *overrides)

    print("6/6 judging everybody on drawings of other contents in other styles", flush=True)
    entries = {"text_only": text_only(config), "splice": best}
    if keeping is not None and keeping != best:
        entries["splice_keeping_content"] = keeping
    listed = describe_list(config.adapters)
    ours = exported_entry(f"{listed}, {plan.steps} steps", out / "run" / "export", config)
    entries |= {"adapter": ours, "adapter_shuffled": ours.shuffled}
    if (shipped := ADAPTERS / plan.adapters).is_dir():
        label = f"{listed}, as shipped: it knows most of these contents, no style"
        entries["shipped"] = exported_entry(label, shipped, config)
    else:
        print(f"no column for a shipped adapter: none comes with ztrain for {listed}")
    trials = Trials.of(config, "test", out)
    outcomes = dict(zip(entries, trials.run(*entries.values()), strict=True))
    return _report(out, config, trials, outcomes, time.perf_counter() - started)


def run(*command: str) -> None:
    """One step as a user would type it; a failure ends the demo with its status."""
    print("$", " ".join(command), flush=True)
    if status := run_module(*command, environment={"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}):
        sys.exit(status)


def _report(out: Path, config: Config, trials: Trials, outcomes: dict[str, Outcome], seconds: float) -> bool:
    """Writes table, picture and result; says and gives the verdict."""
    text, splice, ours = (outcomes[name] for name in ("text_only", "splice", "adapter"))
    gain = trials.difference("style_cosine", ours, splice)
    lost = {name: text.mean(f"prompt_{name}") - ours.mean(f"prompt_{name}") for name in trials.truth.truth.contents}
    beats, follows = gain["low"] > 0, max(lost.values()) <= CONTENT_LOSS
    said = f"style cosine above the splice's best: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    worst = max(lost, key=lost.__getitem__)
    verdict = (
        f"The adapter {'beats' if beats else 'does not beat'} the splice ({said}; {len(trials)} held-out triplets) and"
        f" {'follows' if follows else 'does not follow'} the prompt as text alone does"
        f" ({worst} {-lost[worst]:+.3f}, at most {CONTENT_LOSS:g} lower is allowed)."
    )
    table = markdown_table(trials, list(outcomes.values()))
    write_text(out / "demo.md", f"{table}\n{verdict}\n")
    result: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "steps": config.train.max_train_steps,
        "seed": config.seed,
        "adapters": [adapter.model_dump(mode="json") for adapter in config.adapters],
        "triplets": len(trials),
        "splice_setting": splice.entry.label,
        "style_cosine": _means(outcomes, "style_cosine")
        | {"difference": gain["mean"], "difference_low": gain["low"], "difference_high": gain["high"]},
        "content": _means(outcomes, "prompt_content"),
        "leak": {name: outcome.mean("leak_above_chance") for name, outcome in outcomes.items()},
        "beats_splice": beats,
        "follows_prompt": follows,
        "figures": {name: trials.figures(outcome) for name, outcome in outcomes.items()},
    }
    write_json(out / "result.json", result)
    picture = _draw(out / "demo.png", trials, outcomes)
    print(f"\n{table}\n{verdict}\n")
    print(f"done in {seconds:.0f} s; adapter: {out / 'run' / 'export'}, figures: {out / 'result.json'}")
    print("The models are the miniature; the real weights take the same commands: README, 'Your own images'.")
    print(picture)
    return beats and follows


def _means(outcomes: dict[str, Outcome], figure: str) -> dict[str, float | None]:
    names = dict.fromkeys(("text_only", "splice", "adapter", "shipped"))
    return names | {name: outcome.mean(figure) for name, outcome in outcomes.items()}


def _draw(path: Path, trials: Trials, outcomes: dict[str, Outcome]) -> Path:
    """reference | no image | splice | this adapter | shipped adapter | target."""
    columns = {"text_only": "no image", "splice": "splice", "adapter": "this adapter", "shipped": "shipped adapter"}
    shown = {label: outcomes[name].pictures for name, label in columns.items() if name in outcomes}
    lines = zip(trials.references[:ROWS], *shown.values(), trials.targets, strict=False)
    rows = [[open_image(picture) for picture in line] for line in lines]
    prompts = [case.prompt for case in trials.cases[:ROWS]]
    save_picture(draw_grid(["reference", *shown, "target"], prompts, rows), path)
    return path


if __name__ == "__main__":
    sys.exit(main())
