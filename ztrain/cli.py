"""`ztrain VERB --config FILE [FILE ...] [--dotted.key value ...]`: the commands people type.

config show   prints the resolved experiment
cache         computes every state that training reads; --verify checks what is there
train         trains the adapter list in this process (accelerate launch -m ztrain.train for several)
export        writes the adapter of a checkpoint: --checkpoint RUN/checkpoints/step-00000500 --out DIR
compare       renders no image, splice and exported adapters into one labelled picture
sample        renders one prompt with references
stats         measures state statistics for the splice's scaling

`ztrain mini pretrain|measure`: makes a miniature family and judges it; see `ztrain mini --help`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ztrain.config import Config, load_config
from ztrain.errors import InputError, sentence
from ztrain.yamls import dump_yaml


def _config_show(config: Config, options: argparse.Namespace) -> str:
    return dump_yaml(config.model_dump(mode="json")).rstrip()


def _cache(config: Config, options: argparse.Namespace) -> str:
    from ztrain.prepare import cache_states

    return cache_states(config, check=options.verify)


def _export(config: Config, options: argparse.Namespace) -> str:
    from ztrain.from_checkpoint import export_checkpoint

    return str(export_checkpoint(config, options.checkpoint, options.out))


def _compare(config: Config, options: argparse.Namespace) -> str:
    from ztrain.compare import compare

    return str(compare(config))


def _stats(config: Config, options: argparse.Namespace) -> str:
    from ztrain.stats import measure

    return str(measure(config, options.out))


def _sample(config: Config, options: argparse.Namespace) -> str:
    from ztrain.render import render

    return str(
        render(
            config,
            options.prompt,
            options.reference,
            options.adapter,
            options.out,
            start_image=options.start_image,
            strength=options.strength,
            scales=options.scales,
        )
    )


def _mini(words: Sequence[str]) -> int:
    from ztrain.mini.command import main as mini

    try:
        finished = mini(words)
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    print(finished if finished is not None else "some stages are still to be run")
    return 0


_VERBS = {
    "config show": _config_show,
    "cache": _cache,
    "export": _export,
    "compare": _compare,
    "stats": _stats,
    "sample": _sample,
}


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"ztrain {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", type=Path, default=[])
    if verb in ("export", "sample", "stats"):
        parser.add_argument("--out", type=Path, required=True)
    if verb == "export":
        parser.add_argument("--checkpoint", type=Path, required=True)
    if verb == "cache":
        parser.add_argument("--verify", action="store_true")
    if verb == "sample":
        parser.add_argument("--prompt", default="")
        parser.add_argument("--reference", nargs="*", type=Path, default=[])
        parser.add_argument("--adapter", type=Path, default=None)
        parser.add_argument("--start-image", type=Path, default=None)
        parser.add_argument("--strength", type=float, default=None)
        parser.add_argument("--scales", nargs="*", type=float, default=None)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from ztrain.train import main as train

        return train(words[1:])
    if words[:1] == ["mini"]:
        return _mini(words[1:])
    verb = next((name for name in _VERBS if words[: len(name.split())] == name.split()), None)
    if verb is None:
        helped = bool(words) and words[0] in ("-h", "--help")
        print(__doc__, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    options, overrides = _parser(verb).parse_known_args(words[len(verb.split()) :])
    try:
        print(_VERBS[verb](load_config(options.config, overrides, f"ztrain {verb}"), options))
    except (InputError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
