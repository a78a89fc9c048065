"""Many adapters trained and judged on the drawings of one family: what findings and shipped adapters come from.

Every run is a process of the project's own commands on a pretrained family, several side by side and dealt to the GPUs
there are; what is judged is kept in a small file, so a command that was interrupted, or that runs on another machine,
goes on where it was.

    out/drawings, out/triplets, out/cache      what is drawn, in pairs, and as the models see it
    out/runs/<variant>-<seed>/                 a training run, its export, and train.log
    out/scores/<run>.json                      scores of every test triplet, by way of asking
    out/scores/<run>.png, <run>.<way>.png      the first pictures of the first way, and of each further one

Legend: T triplets, S pixels of a side.
"""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from benchmarks.drawings import Drawings, Paintings, StudySettings, Variant
from benchmarks.side_by_side import run_modules
from data_tools.build import main as build
from miniature.exam import Clusters, Scores
from miniature.trials import Trials, exported_entry
from ztrain.compare.lineup import Entry
from ztrain.config import Config, load_config
from ztrain.errors import InputError
from ztrain.images import Picture, open_image
from ztrain.weights.adapter_folder import read_adapter
from ztrain.weights.checkpoint import find as find_checkpoint

Ways = Mapping[str, Mapping[str, Any]]
"""By name, how an entry is asked: changes to it, and under `sample` to how it is sampled."""


@dataclass(frozen=True)
class Laboratory:
    """A plan, and the folder in which it is carried out."""

    out: Path
    plan: StudySettings
    jobs: int = 1
    ways: Ways = field(default_factory=lambda: {"own": {}})
    drawings: Drawings = field(default_factory=Paintings)
    shown: int = 5
    """Pictures of each run that are kept."""
    as_far_as_trained: bool = False
    """Runs that were cut off are exported as they stood, instead of going on."""

    # --- the world --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Draws and pairs."""
        if not (self.out / "triplets").is_dir():
            self.drawings.lay_out(self.out / "drawings", self.plan)
            told = build(["--config", str(self.out / "drawings/build.yaml"), "--out", str(self.out / "triplets")])
            if told:
                raise InputError(f"{self.out}: triplets cannot be built")

    def cache(self, variants: Iterable[Variant]) -> None:
        """Computes what these variants read."""
        for variant in self._reading_most(variants):
            # Several processes share the work: they claim shards.
            words = self._words(variant, 0)
            logs = [self.out / f"cache-{place}.log" for place in range(self.jobs)]
            run_modules([("ztrain.cli", "cache", *words)] * self.jobs, logs, self.jobs)

    def _reading_most(self, variants: Iterable[Variant]) -> list[Variant]:
        """Of the variants, those whose cache covers all others'."""
        reads = {}
        for variant in variants:
            config = self.config_of(variant)
            reads[variant] = {*config.reads, config.encoders.model_dump_json()}
        distinct = {frozenset(read): variant for variant, read in reads.items()}
        return [variant for read, variant in distinct.items() if not any(read < other for other in distinct)]

    def config_of(self, variant: Variant, seed: int = 0) -> Config:
        """The whole experiment. Raises InputError for a variant that cannot be."""
        words = self._words(variant, seed)
        files = words[1 : words.index("--data.train_data_dir")]
        return load_config([Path(file) for file in files], words[1 + len(files) :])

    @cached_property
    def config(self) -> Config:
        return load_config(
            [Path("configs/siglip.yaml"), Path("configs/miniature.yaml")],
            [
                *("--data.train_data_dir", str(self.out / "triplets")),
                *("--cache.dir", str(self.out / "cache"), "--seed", str(self.plan.seed)),
                *self.drawings.options,
            ],
        )

    @cached_property
    def trials(self) -> Trials:
        """Of the split test."""
        return self.trials_of("test")

    def trials_of(self, split: str) -> Trials:
        return Trials.of(self.config, split, self.out / "judged", self.drawings.truth)

    # --- training ---------------------------------------------------------------------------------------------------

    def folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-{seed}"

    def _words(self, variant: Variant, seed: int, output: Path | None = None) -> list[str]:
        """The experiment and its overrides, as on a command line."""
        steps = str(self.plan.steps_of(variant))
        return [
            *("--config", f"configs/{variant.experiment}.yaml", "configs/miniature.yaml"),
            *("--data.train_data_dir", str(self.out / "triplets")),
            *("--cache.dir", str(self.out / "cache")),
            *("--output_dir", str(output or self.out / "runs" / "none")),
            *("--seed", str(seed)),
            *("--train.max_train_steps", steps),
            *("--train.checkpointing_steps", str(min(500, int(steps)))),
            *("--train.train_batch_size", str(self.plan.batch)),
            *("--validation.validation_steps", "0"),
            *("--validation.preview_steps", "0"),
            *("--resume_from_checkpoint", "latest"),
            *("--export.dtype", "bfloat16"),  # to be small where they are brought back from another machine
            *self.drawings.options,
            *variant.options,
            *(word for option in variant.seeded for word in (option, str(seed))),
        ]

    def carry_out(self, runs: Sequence[tuple[str, Variant, int]], ways: Mapping[str, Sequence[str]]) -> None:
        """Trains the runs that are not trained or judged yet, `jobs` side by side, and judges each as it is done, in
        the ways that are given for its variant."""

        def judge(run: tuple[str, Variant, int]) -> None:
            name, variant, seed = run
            if not self._is_judged(f"{name}-{seed}"):
                folder = self.folder(name, seed)
                entry = exported_entry(variant.label, folder / "export", self.config)
                noted = json.loads((folder / "env.json").read_text(encoding="utf-8"))
                trained_on = {key: noted[key] for key in ("device", "torch", "python")}
                self.judge(f"{name}-{seed}", entry, ways.get(name, ("own",)), trained_on)

        due = [run for run in runs if not self._is_judged(f"{run[0]}-{run[2]}") and not self._is_trained(run)]
        self.cache({name: variant for name, variant, _ in due}.values())
        commands = [
            ("ztrain.train", *self._words(variant, seed, self.folder(name, seed))) for name, variant, seed in due
        ]
        for name, _, seed in due:
            self.folder(name, seed).mkdir(parents=True, exist_ok=True)
        logs = [self.folder(name, seed) / "train.log" for name, _, seed in due]
        run_modules(commands, logs, self.jobs, lambda place: judge(due[place]))
        for run in tqdm(runs, desc="judging the rest", unit="run", disable=None):
            judge(run)

    def _is_trained(self, run: tuple[str, Variant, int]) -> bool:
        """Whether there is its export, or, where that is enough, what its newest checkpoint gives."""
        name, variant, seed = run
        exported = self.folder(name, seed) / "export"
        if self.as_far_as_trained and not exported.is_dir():
            newest, _ = find_checkpoint("latest", self.folder(name, seed) / "checkpoints")
            if newest is None:
                raise InputError(f"{self.folder(name, seed)} has no checkpoint to export; train it for a while")
            words = (*self._words(variant, seed), "--checkpoint", str(newest.path), "--out", str(exported))
            run_modules([("ztrain.cli", "export", *words)], [self.folder(name, seed) / "export.log"], 1)
        told = read_adapter(exported).step if exported.is_dir() else None
        return told is not None and (self.as_far_as_trained or told == self.plan.steps_of(variant))

    def seconds_per_step(self, path: Path, variants: Mapping[str, Variant], steps: int) -> dict[str, float]:
        """Of each variant alone on one machine, the median over the later half of so many steps; twice, the faster
        one. Kept in a file, so that another machine may carry on: remove it to measure again."""
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["seconds"]
        self.cache(variants.values())
        alone = replace(self, plan=replace(self.plan, steps=steps), jobs=1)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for attempt in range(2):
            for name, variant in tqdm(variants.items(), desc="seconds per step", disable=None):
                folder = self.out / "timing" / f"{name}-{attempt}"
                folder.mkdir(parents=True, exist_ok=True)
                words = alone._words(replace(variant, share=1.0), 0, folder)
                run_modules([("ztrain.train", *words)], [folder / "train.log"], 1)
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                taken = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
                seconds[name].append(statistics.median(taken[len(taken) // 2 :]))
        fastest = {name: min(values) for name, values in seconds.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"seconds": fastest, "all": seconds, "batch": self.plan.batch, "machine": machine()}
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return fastest

    # --- judging ----------------------------------------------------------------------------------------------------

    def _scores(self, run: str) -> Path:
        return self.out / "scores" / f"{run}.json"

    def _is_judged(self, run: str) -> bool:
        """Raises InputError where it was judged under another plan: its figures would pass for this one's."""
        path = self._scores(run)
        if not path.is_file():
            return False
        if json.loads(path.read_text(encoding="utf-8"))["plan"] != self._plan_told():
            raise InputError(f"{path} was made under another plan; choose another --out or remove the folder")
        return True

    def _plan_told(self) -> dict[str, Any]:
        """The plan as files of scores name it."""
        counts = {split: list(numbers) for split, numbers in self.plan.counts.items()}
        return {"steps": self.plan.steps, "batch": self.plan.batch, "seed": self.plan.seed, "counts": counts}

    def judge(
        self, run: str, entry: Entry, ways: Sequence[str] = ("own",), trained_on: Mapping[str, Any] | None = None
    ) -> None:
        """Scores one entry in these ways and keeps first pictures of each, unless that was done before."""
        if self._is_judged(run):
            return
        asked = [_changed(entry, self.ways[way]) for way in ways]
        outcomes = dict(zip(ways, self.trials.run(*asked), strict=True))
        weights = 0 if entry.exported is None else sum(_count(entry.exported.files).values())
        scores = {way: outcome.scores for way, outcome in outcomes.items()}
        about = {"label": entry.label, "weights": weights, "trained_on": trained_on}
        if entry.exported is not None:
            about["steps"] = entry.exported.step
        self._keep(run, about, scores, {way: outcome.pictures for way, outcome in outcomes.items()})

    def judge_targets(self, run: str, label: str) -> None:
        """Scores the true drawings, as far as anybody can be right."""
        if not self._is_judged(run):
            about = {"label": label, "weights": 0}
            targets = self.trials.targets
            self._keep(run, about, {"own": self.trials.score(targets)}, {"own": targets})

    def _keep(
        self, run: str, about: Mapping[str, Any], scores: Mapping[str, Scores], drawn: Mapping[str, Sequence[Picture]]
    ) -> None:
        path = self._scores(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        for place, (way, pictures) in enumerate(drawn.items()):
            strip = f"{run}.{way}.png" if place else f"{run}.png"
            _save_strip(path.with_name(strip), pictures[: self.shown])
        told = {
            **about,
            "judged_on": machine(),
            "plan": self._plan_told(),
            "scores": {way: _plain(of_way) for way, of_way in scores.items()},
        }
        path.write_text(json.dumps(told) + "\n", encoding="utf-8")

    def read(self, run: str) -> dict[str, Any]:
        """What `judge` kept."""
        if not self._is_judged(run):
            raise InputError(f"{self._scores(run)} is missing: {run} is not judged yet; run the page's command")
        return json.loads(self._scores(run).read_text(encoding="utf-8"))

    def machines(self, runs: Iterable[str]) -> list[dict[str, Any]]:
        """Those on which these runs were trained, each once."""
        found = [self.read(run).get("trained_on") for run in runs]
        return [told for place, told in enumerate(found) if told and told not in found[:place]]

    def scores(self, runs: Sequence[str], way: str = "own") -> Scores:
        """Of each triplet, (T,), the mean over these runs: seeds of one variant."""
        kept = [self.read(run)["scores"][way] for run in runs]
        return {name: torch.tensor([scores[name] for scores in kept]).mean(0) for name in kept[0]}

    def keep_truth(self) -> None:
        """What an interval draws together and the triplets' styles, in the order of the scores, with the first prompts,
        references and targets."""
        folder, trials = self.out / "scores", self.trials
        folder.mkdir(parents=True, exist_ok=True)
        truth = {
            "clusters": {"of": trials.clusters.of, "numbers": trials.clusters.numbers.tolist()},
            "styles": trials.styles,
            "prompts": [case.prompt for case in trials.cases[: self.shown]],
        }
        (folder / "truth.json").write_text(json.dumps(truth) + "\n", encoding="utf-8")
        _save_strip(folder / "reference.png", trials.references[: self.shown])
        _save_strip(folder / "target.png", trials.targets[: self.shown])

    @cached_property
    def truth(self) -> dict[str, Any]:
        """What `keep_truth` kept."""
        return json.loads((self.out / "scores" / "truth.json").read_text(encoding="utf-8"))

    def clusters(self) -> Clusters:
        told = self.truth["clusters"]
        return Clusters(of=told["of"], numbers=torch.tensor(told["numbers"]))

    def pictures(self, run: str) -> list[Image.Image]:
        """The first of a run, or of "reference" and "target"."""
        strip = Image.open(self.out / "scores" / f"{run}.png")
        side = strip.height
        return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def _changed(entry: Entry, way: Mapping[str, Any]) -> Entry:
    changes = dict(way)
    return replace(entry, sample=entry.sample.model_copy(update=changes.pop("sample", {})), **changes)


def _plain(scores: Scores) -> dict[str, list[float]]:
    return {name: [round(value, 5) for value in values.float().tolist()] for name, values in scores.items()}


def _count(files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, int]:
    """Numbers of weights by file, the second layout of a LoRA left out."""
    kept = {name: tensors for name, tensors in files.items() if "comfyui" not in name}
    return {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in kept.items()}


def _save_strip(path: Path, pictures: Sequence[Picture]) -> None:
    images = [open_image(picture) for picture in pictures]
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        strip.paste(image, (place * width, 0))
    strip.save(path)


def machine() -> dict[str, Any]:
    """What may be said about where something was measured."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
