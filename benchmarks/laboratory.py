"""Many adapters trained and judged on one painted world: what the findings and the shipped adapters come from.

Every run is a process of the project's own commands on the pretrained miniature, several side by side; what is judged
is kept in a small file, so a command that was interrupted, or that runs on another machine, goes on where it was.

    out/paintings, out/triplets, out/cache     the world, as `make demo` makes it
    out/runs/<variant>-<seed>/                 a training run, its export, and train.log
    out/scores/<run>.json, <run>.png           scores of every test triplet, by way of asking; the first pictures

Legend: T triplets, S pixels of a side.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from data_tools.build import main as build
from ztrain.config import Config, load_config
from ztrain.data import read_triplets
from ztrain.errors import InputError
from ztrain.mini.exam import Clusters, Scores
from ztrain.mini.style_folders import paint_many_styles
from ztrain.mini.subject import Subject, to_pictures
from ztrain.mini.trials import WEIGHTS, Method, Outcome, Trials

SHOWN = 5
"""Pictures of each run that are kept."""
_BUILD = "{images: images, contents: contents.csv, splits: {train: train, test: test}, triplets_per_target: 2}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train. `experiment`: its file in configs/; `options`: overrides; `seeded`: options whose value is
    the run's seed; `share`: of the plan's steps."""

    label: str
    experiment: str
    options: tuple[str, ...] = ()
    seeded: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of everything. `painted`: style folders of each split, and pictures in each."""

    painted: Mapping[str, tuple[int, int]]
    steps: int
    batch: int
    seed: int = 0

    def steps_of(self, variant: Variant) -> int:
        return max(1, round(self.steps * variant.share))


@dataclass(frozen=True)
class Laboratory:
    """A plan, and the folder in which it is carried out."""

    out: Path
    plan: Plan
    jobs: int = 1
    ways: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"own": {}})
    """By name, how a method is asked: changes to `Method`."""

    # --- the world --------------------------------------------------------------------------------------------------

    def prepare(self, variants: Iterable[Variant]) -> None:
        """Paints, pairs, and caches what these variants read."""
        if not (self.out / "triplets").is_dir():
            paint_many_styles(self.out / "paintings", self.plan.painted, seed=self.plan.seed)
            (self.out / "paintings" / "build.yaml").write_text(_BUILD, encoding="utf-8")
            told = build(["--config", str(self.out / "paintings/build.yaml"), "--out", str(self.out / "triplets")])
            if told:
                raise InputError(f"{self.out}: triplets cannot be built")
        for variant in self._reading_most(variants):
            # Several processes share the work: they claim shards.
            words = self._words(variant, 0)
            self._side_by_side([("ztrain.cli", "cache", *words)] * self.jobs, self.out / "cache.log")

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
            ["--data.train_data_dir", str(self.out / "triplets")],
        )

    @cached_property
    def trials(self) -> Trials:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        steps = self.config.sample.num_inference_steps
        assert steps is not None, "configs/miniature.yaml says how many"
        subject = Subject.load(WEIGHTS, self.config.data.resolution, self.plan.seed, device, num_inference_steps=steps)
        return Trials(subject, self.config, read_triplets(self.config.data.train_data_dir, "test").triplets)

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
            *variant.options,
            *(word for option in variant.seeded for word in (option, str(seed))),
        ]

    def train(self, runs: Sequence[tuple[str, Variant, int]]) -> None:
        """Trains the runs that are not trained or judged yet, `jobs` side by side."""
        due = [run for run in runs if not self._is_judged(f"{run[0]}-{run[2]}") and not self._is_trained(run)]
        commands = [
            ("ztrain.train", *self._words(variant, seed, self.folder(name, seed))) for name, variant, seed in due
        ]
        for name, _, seed in due:
            self.folder(name, seed).mkdir(parents=True, exist_ok=True)
        logs = [self.folder(name, seed) / "train.log" for name, _, seed in due]
        self._side_by_side(commands, *logs)

    def _is_trained(self, run: tuple[str, Variant, int]) -> bool:
        name, variant, seed = run
        exported = self.folder(name, seed) / "export" / "adapter_config.json"
        return exported.is_file() and json.loads(exported.read_text())["step"] == self.plan.steps_of(variant)

    def _side_by_side(self, commands: Sequence[tuple[str, ...]], *logs: Path) -> None:
        """Runs modules; the first that fails ends it all with its log's name and last lines. One log, or one each."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}

        def run(place: int) -> None:
            log = logs[place % len(logs)]
            with log.open("ab") as file:
                words = [sys.executable, "-m", *commands[place]]
                done = subprocess.run(words, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
                raise InputError(f"{' '.join(commands[place][:2])} failed, see {log}: {' | '.join(last)}")

        with ThreadPoolExecutor(self.jobs) as pool:
            finished = [pool.submit(run, place) for place in range(len(commands))]
            try:
                for future in tqdm(finished, desc=commands[0][0] if commands else "", unit="process", disable=None):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def seconds_per_step(self, path: Path, variants: Mapping[str, Variant], steps: int) -> dict[str, float]:
        """Of each variant alone on one machine, the median over the later half of so many steps; twice, the faster
        one. Kept in a file, so that another machine may carry on: remove it to measure again."""
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["seconds"]
        alone = replace(self, plan=replace(self.plan, steps=steps), jobs=1)
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for attempt in range(2):
            for name, variant in tqdm(variants.items(), desc="seconds per step", disable=None):
                folder = self.out / "timing" / f"{name}-{attempt}"
                folder.mkdir(parents=True, exist_ok=True)
                words = alone._words(replace(variant, share=1.0), 0, folder)
                alone._side_by_side([("ztrain.train", *words)], folder / "train.log")
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
        painted = {split: list(numbers) for split, numbers in self.plan.painted.items()}
        return {"steps": self.plan.steps, "batch": self.plan.batch, "seed": self.plan.seed, "painted": painted}

    def judge(self, run: str, method: Method, ways: Sequence[str] = ("own",)) -> None:
        """Scores one method in these ways and keeps its first pictures, unless that was done before."""
        if self._is_judged(run):
            return
        outcomes = {way: self.trials.run(replace(method, **self.ways[way])) for way in ways}
        self._scores(run).parent.mkdir(parents=True, exist_ok=True)
        first = outcomes[ways[0]]
        _save_strip(self.out / "scores" / f"{run}.png", to_pictures(first.images[:SHOWN]))
        weights = 0 if method.exported is None else sum(_count(method.exported.files).values())
        told = {
            "label": method.label,
            "weights": weights,
            "machine": machine(),
            "plan": self._plan_told(),
            "scores": {way: _plain(outcome) for way, outcome in outcomes.items()},
        }
        self._scores(run).write_text(json.dumps(told) + "\n", encoding="utf-8")

    def judge_runs(self, runs: Sequence[tuple[str, Variant, int]], ways: Mapping[str, Sequence[str]]) -> None:
        for name, variant, seed in tqdm(runs, desc="judging", unit="run", disable=None):
            if not self._is_judged(f"{name}-{seed}"):
                method = Method.of_folder(variant.label, self.folder(name, seed) / "export")
                self.judge(f"{name}-{seed}", method, ways.get(name, ("own",)))

    def read(self, run: str) -> dict[str, Any]:
        """What `judge` kept."""
        if not self._is_judged(run):
            raise InputError(f"{self._scores(run)} is missing: {run} is not judged yet; run the page's command")
        return json.loads(self._scores(run).read_text(encoding="utf-8"))

    def scores(self, runs: Sequence[str], way: str = "own") -> Scores:
        """Of each triplet, (T,), the mean over these runs: seeds of one variant."""
        kept = [self.read(run)["scores"][way] for run in runs]
        return {name: torch.tensor([scores[name] for scores in kept]).mean(0) for name in kept[0]}

    def keep_truth(self) -> None:
        """The triplets' styles, in the order of the scores, with the first prompts, references and targets."""
        folder, trials = self.out / "scores", self.trials
        folder.mkdir(parents=True, exist_ok=True)
        truth = {
            "styles": trials.clusters.numbers.tolist(),
            "prompts": [triplet.prompt for triplet in trials.triplets[:SHOWN]],
        }
        (folder / "truth.json").write_text(json.dumps(truth) + "\n", encoding="utf-8")
        _save_strip(folder / "reference.png", trials.references[:SHOWN])
        _save_strip(folder / "target.png", to_pictures(trials.targets[:SHOWN]))

    @cached_property
    def truth(self) -> dict[str, Any]:
        """What `keep_truth` kept."""
        return json.loads((self.out / "scores" / "truth.json").read_text(encoding="utf-8"))

    def clusters(self) -> Clusters:
        return Clusters(of="styles", numbers=torch.tensor(self.truth["styles"]))

    def pictures(self, run: str) -> list[Image.Image]:
        """The first of a run, or of "reference" and "target"."""
        strip = Image.open(self.out / "scores" / f"{run}.png")
        side = strip.height
        return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def _plain(outcome: Outcome) -> dict[str, list[float]]:
    scores = outcome.scores | {"leak_above_chance": outcome.scores["leak"] - outcome.scores["leak_by_chance"]}
    return {name: [round(value, 5) for value in values.float().tolist()] for name, values in scores.items()}


def _count(files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, int]:
    """Numbers of weights by file, the second layout of a LoRA left out."""
    kept = {name: tensors for name, tensors in files.items() if "comfyui" not in name}
    return {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in kept.items()}


def _save_strip(path: Path, pictures: Sequence[Image.Image]) -> None:
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * width, 0))
    strip.save(path)


def machine() -> dict[str, Any]:
    """What may be said about where something was measured."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
