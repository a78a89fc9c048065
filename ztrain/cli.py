"""`ztrain VERB --config FILE [FILE ...] [--dotted.key value ...]`: the commands people type.

config show   prints the resolved experiment
plan          what it will need in memory and time: --strategy fsdp2 --cards 2 --card rtx_4080; --json
cache         computes every state that training reads; --verify checks what is there
              (accelerate launch ... -m ztrain.cli cache spreads it over GPUs and nodes)
train         trains the adapter list in this process (accelerate launch -m ztrain.train for several)
export        writes the adapter of a checkpoint: --checkpoint RUN/checkpoints/step-00000500 --out DIR
compare       draws and judges no image, splice and exported adapters; --checkpoints RUN: a run's checkpoints
sweep         draws and judges settings of the splice, and names the best
report        makes one page of a comparison or a run: --blind asks A or B instead
sample        renders prompts with references
stats         measures state statistics for the splice's scaling

`ztrain mini pretrain|measure`: makes a miniature family and judges it; see `ztrain mini --help`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from miniature import truth_judge
from ztrain.config import Aspect, Config, load_config
from ztrain.errors import InputError
from ztrain.io.files import given_path
from ztrain.io.yamls import dump_yaml
from ztrain.terminal import command


def _config_show(config: Config, options: argparse.Namespace) -> str:
    return dump_yaml(config.model_dump(mode="json")).rstrip()


def _cache(config: Config, options: argparse.Namespace) -> str:
    from ztrain.cache.prepare import cache_states
    from ztrain.interrupt import end_with_launcher

    end_with_launcher()
    return cache_states(config, check=options.verify)


def _plan(config: Config, options: argparse.Namespace) -> str:
    from ztrain.plan.cards import CARDS
    from ztrain.plan.command import as_json, plan, render

    if options.card not in CARDS:
        raise InputError(f"--card {options.card} is not known here; there are {', '.join(CARDS)}")
    made = plan(
        config,
        strategy=options.strategy or ("one_gpu" if options.cards == 1 else "ddp"),
        cards=options.cards,
        card=CARDS[options.card],
        memory_gib=options.memory_gib,
    )
    return as_json(made) if options.json else render(made)


def _export(config: Config, options: argparse.Namespace) -> str:
    from ztrain.weights.from_checkpoint import export_checkpoint

    return str(export_checkpoint(config, options.checkpoint, options.out))


def _compare(config: Config, options: argparse.Namespace) -> str:
    from ztrain.compare.command import compare, compare_checkpoints, table
    from ztrain.compare.report.page import make_report

    if options.checkpoints is None:
        found = compare(config, truth_judge)
    else:
        found = compare_checkpoints(config, options.checkpoints, truth_judge)
    return f"{table(found)}\n{make_report(Path(config.compare.output_dir))}"


def _sweep(config: Config, options: argparse.Namespace) -> str:
    from ztrain.compare.command import table
    from ztrain.compare.report.page import make_report
    from ztrain.compare.sweep import sweep

    return f"{table(sweep(config, truth_judge))}\n{make_report(Path(config.sweep.output_dir))}"


def _stats(config: Config, options: argparse.Namespace) -> str:
    from ztrain.frozen.statistics import measure

    return str(measure(config, options.out))


def _sample(config: Config, options: argparse.Namespace) -> str:
    from ztrain.sampling.command import Order, render

    order = Order(
        prompts=options.prompt,
        out=options.out,
        references=options.reference,
        weights=options.reference_weights,
        adapter=options.adapter,
        scales=options.scales,
        start_image=options.start_image,
        strength=options.strength,
        aspects=options.aspect,
        num_images=options.num_images,
        offload=options.offload,
    )
    return str(render(config, order))


def _mini(words: Sequence[str]) -> int:
    from miniature.command import main as mini

    return command(lambda: mini(words) or "some stages are still to be run")


def report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ztrain report", allow_abbrev=False)
    parser.add_argument("place", type=given_path, help="folder of a comparison, a sweep or a run")
    parser.add_argument(
        "--out", type=given_path, default=None, help="page to write (default: report.html in the folder)"
    )
    parser.add_argument("--blind", action="store_true", help="a page that asks A or B and writes the votes as JSON")
    parser.add_argument("--max-rows", type=int, default=None, help="rows with pictures, spread evenly")
    return parser


def _report(words: Sequence[str]) -> int:
    options = report_parser().parse_args(words)
    from ztrain.compare.report.page import make_report

    return command(lambda: make_report(options.place, options.out, blind=options.blind, max_rows=options.max_rows))


VERBS = {
    "config show": _config_show,
    "plan": _plan,
    "cache": _cache,
    "export": _export,
    "compare": _compare,
    "sweep": _sweep,
    "stats": _stats,
    "sample": _sample,
}


def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"ztrain {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", type=given_path, default=[])
    if verb in ("export", "sample", "stats"):
        parser.add_argument("--out", type=given_path, required=True)
    if verb == "export":
        parser.add_argument("--checkpoint", type=given_path, required=True)
    if verb == "compare":
        parser.add_argument("--checkpoints", type=given_path, default=None)
    if verb == "cache":
        parser.add_argument("--verify", action="store_true")
    if verb == "plan":
        parser.add_argument("--strategy", choices=["one_gpu", "ddp", "fsdp2", "zero2", "zero3"], default=None)
        parser.add_argument("--cards", type=int, default=1)
        parser.add_argument("--card", default="rtx_4090")
        parser.add_argument("--memory_gib", type=float, default=None)
        parser.add_argument("--json", action="store_true")
    if verb == "sample":
        parser.add_argument("--prompt", nargs="+", default=[""])
        parser.add_argument("--reference", nargs="*", type=given_path, default=[])
        parser.add_argument("--reference-weights", nargs="+", type=float, default=None)
        parser.add_argument("--aspect", nargs="+", choices=get_args(Aspect), default=[])
        parser.add_argument("--num-images", type=int, default=1)
        parser.add_argument("--offload", action="store_true")
        parser.add_argument("--adapter", type=given_path, default=None)
        parser.add_argument("--start-image", type=given_path, default=None)
        parser.add_argument("--strength", type=float, default=None)
        parser.add_argument("--scales", nargs="*", type=float, default=None)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from ztrain.train.loop import main as train

        return train(words[1:])
    if words[:1] == ["mini"]:
        return _mini(words[1:])
    if words[:1] == ["report"]:
        return _report(words[1:])
    verb = next((name for name in VERBS if words[: len(name.split())] == name.split()), None)
    if verb is None:
        helped = bool(words) and words[0] in ("-h", "--help")
        print(__doc__, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    parser = parser_of(verb)
    if {"-h", "--help"} & set(words):
        print(parser.format_usage())
        return command(lambda: load_config([], ["--help"], parser.prog) and None)
    options, overrides = parser.parse_known_args(words[len(verb.split()) :])
    return command(
        lambda: VERBS[verb](load_config(options.config, overrides, parser.prog, list(vars(options))), options) or None
    )


if __name__ == "__main__":
    sys.exit(main())
