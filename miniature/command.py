"""`ztrain mini pretrain` and `ztrain mini measure`: makes a miniature family, and says how good it is."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ztrain.errors import InputError
from ztrain.io.files import given_path

PAINTED_SIZE, FOLDER_SIZE = 64, 128
"""Pixels of a side, where nobody says otherwise."""


def mini_parser() -> argparse.ArgumentParser:
    """The words after `ztrain mini`."""
    from miniature.pretrain import STAGES
    from miniature.scorecard import PARTS

    parser = argparse.ArgumentParser(prog="ztrain mini", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    pretrain = verbs.add_parser("pretrain", help="train every member of a family, stage by stage", allow_abbrev=False)
    pretrain.add_argument("--out", type=given_path, required=True, help="folder of the parts and the finished family")
    pretrain.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these; finished ones are skipped"
    )
    pretrain.add_argument("--smoke", action="store_true", help="tiny models and three steps a stage: seconds on a CPU")

    measure = verbs.add_parser("measure", help="judge a finished family", allow_abbrev=False)
    measure.add_argument("family", type=given_path, help="the folder that pretrain finished")
    measure.add_argument(
        "--out", type=given_path, required=True, help="folder of scorecard.json, scorecard.md, pictures"
    )
    measure.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    measure.add_argument("--count", type=int, default=256, help="pictures or triplets per figure (default: 256)")
    measure.add_argument("--steps", type=int, default=12, help="of the sampler (default: 12)")
    measure.add_argument("--guidance", type=float, default=0.0, help="of the sampler, 0 = off (default: 0)")

    for verb in (pretrain, measure):
        verb.add_argument("--data", type=given_path, help="a folder of captioned pictures instead of the painted world")
        verb.add_argument("--size", type=int, help="pixels of a side (default: 64 painted, 128 from a folder)")
        verb.add_argument("--seed", type=int, default=0, help="decides everything that is drawn (default: 0)")
    return parser


def main(words: Sequence[str]) -> Path | None:
    """Runs one verb; gives what it finished: the family, the scorecard, or None while stages are missing."""
    options = mini_parser().parse_args(words)
    size = options.size or (PAINTED_SIZE if options.data is None else FOLDER_SIZE)
    if size < 16 or size % 16:
        raise InputError(f"--size {size} must be a multiple of 16")
    from miniature.folders import FolderWorld
    from miniature.gallery import World
    from miniature.painter import PaintedWorld

    world: World = PaintedWorld(size=size) if options.data is None else FolderWorld.read(options.data, size)
    if options.verb == "measure":
        from miniature.scorecard import measure

        return measure(
            options.family,
            options.out,
            world,
            count=options.count,
            seed=options.seed,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            parts=tuple(options.parts),
        )
    from miniature.pretrain import FOLDER, PAINTED, pretrain, smoke

    recipe = PAINTED if options.data is None else FOLDER
    if options.smoke:
        recipe = smoke(recipe)
    return pretrain(options.out, world, recipe, seed=options.seed, stages=tuple(options.stages))
