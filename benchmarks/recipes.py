"""docs/recipes.md: the recipes for one 24 GB card line by line: key, value, why; then hours, passes and disk.

    python -m benchmarks.recipes

In: configs/*_24gb.yaml (stage one, 512 px), configs/then_1024.yaml (stage two of every list), the reasons below,
ztrain's own plans, and of benchmarks/results: train_real_size_nvidia_h200.json, step_nvidia_h200.json, and once it is
there train_real_size_512_nvidia_h200.json. Out: docs/recipes.md between its marks. A key without a reason, a reason
without a key and a key that only repeats a default fail a test.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.cards import LISTS, MEASURED_GIB, RESULTS, changed, counted_of
from benchmarks.pages import ROOT, write_page
from benchmarks.scale import entry_bytes
from data_tools.pair import PairRules
from ztrain.config import Config, load_config
from ztrain.io.yamls import load_yaml
from ztrain.plan.cards import CARDS
from ztrain.plan.command import Plan, plan
from ztrain.plan.expected import RATE, Tokens, flops

PAGE, CONFIGS = ROOT / "docs" / "recipes.md", ROOT / "configs"
THEN = CONFIGS / "then_1024.yaml"
SHOWN_CARDS = ("rtx_4090", "rtx_3090")
PASSES = (1_000, 10_000)
"""Triplets of the smallest and the largest data set that the recipes are for."""
SIGMAS = 6
"""Of a validation: validation.sigmas auto."""

# Peers, at the commit that was read.
_IP = "https://github.com/tencent-ailab/IP-Adapter/blob/62e4af9d0c1ac7d5f8dd386a0ccf2211346af1a2"
_AI = "https://github.com/ostris/ai-toolkit/blob/27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
_MUSUBI = "https://github.com/kohya-ss/musubi-tuner/blob/30c658c4f4b0bf05038b3346eff9670259b10fc7/docs/zimage.md"
_ONE = "https://github.com/Nerogar/OneTrainer/blob/23df3832e8f213d64c337e39f9365ba46e99fed0"
_SIMPLE = "https://github.com/bghira/SimpleTuner/blob/bc8e6ab7738ce457a2ed8eb2d26cadd91c6442cb"
_DIFFSYNTH = "https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde"
_DIFFUSERS = "https://github.com/huggingface/diffusers/blob/9aabdc7d7b3ea6d3d46f7eac90a408fe6d191bc4"
_SIMPLE_CONFIG = f"{_SIMPLE}/simpletuner/examples/z-image.peft-lora/config.json"
_AI_JOB = f"{_AI}/ui/src/app/jobs/new/jobConfig.ts"
_DIFFSYNTH_LORA = f"{_DIFFSYNTH}/examples/z_image/model_training/lora/Z-Image.sh"
_ONE_LORA = f"{_ONE}/training_presets/Z-Image/%23z-image%20LoRA%2016GB.json"

STAGE_ONE: dict[str, str] = {
    "output_dir": "a folder for each list; yours goes into `my.yaml`",
    "adapters.siglip.learning_rate": f"""
        [IP-Adapter]({_IP}/tutorial_train.py#L208) trains its image part from scratch at 1e-4; the
        [miniature](../configs/miniature.yaml)'s {{mini_rate}} at {{wider}} times the width is {{scaled_rate}} by the
        rule for Adam, 1 / width ([muP](https://arxiv.org/abs/2203.03466))""",
    "adapters.projector.learning_rate": f"""
        [ai-toolkit]({_AI}/config/examples/train_flex_redux.yaml#L71) trains Redux at 1e-4, also an MLP from image
        states to what a DiT reads as text. It is in units of each state's own size, so that the miniature takes [the
        same](../configs/projector.yaml)""",
    "adapters.lora.learning_rate": f"""
        where [diffusers]({_DIFFUSERS}/examples/dreambooth/README_z_image.md), [DiffSynth]({_DIFFSYNTH_LORA}#L9),
        [musubi-tuner]({_MUSUBI}#L146) and [ai-toolkit]({_AI_JOB}#L87) start with a LoRA of Z-Image
        ([OneTrainer]({_ONE_LORA}#L4): 3e-4). Beside `siglip` the same:
        [IP-Adapter]({_IP}/tutorial_train_faceid.py#L339) has one rate for its image part and a LoRA, and so had the
        miniature's best list""",
    "data.resolution": f"""
        a triplet takes {{less}} times as long at 1024 px, and a reference is read at its own size either way.
        [IP-Adapter]({_IP}/README.md#L119) found 1024 px from the start inefficient and went from 512 to more;
        [OneTrainer]({_ONE_LORA}#L7) trains Z-Image at 512 as well""",
    "data.reference_variants": """
        the whole reference and random crops of it. Training sees each of 1,000 triplets in {passes} passes, and a
        crop cannot be copied pixel by pixel. Each crop costs disk (table below) and an encoding, no time in training.
        Nobody has measured how many are enough""",
    "train.gradient_accumulation_steps": f"""
        lists that read references were measured at 16 triplets a step ([findings](findings/adapter_lists.md));
        [IP-Adapter]({_IP}/README.md#L125) takes 64, ai-toolkit's Redux
        [6]({_AI}/config/examples/train_flex_redux.yaml#L55). A LoRA alone: 4, as
        [diffusers]({_DIFFUSERS}/examples/dreambooth/README_z_image.md). One triplet at a time, because two together
        take {{batch_two}} longer each by computation: less of a block can be kept""",
    "train.max_train_steps": f"""
        by how long the miniature's lists learned: `[siglip]` went from style {{early_siglip}} after
        {{early_steps}} steps of {{early_batch}} to {{long_siglip}} after {{long_steps}} of {{long_batch}},
        `[siglip, lora]` from {{early_siglip_lora}} to {{long_siglip_lora}}, `[projector]` stood at
        {{early_projector}} and {{long_projector}}, `[splice, lora]` only came to follow the prompt better
        ([early](findings/guidance.md), [long](../miniature/adapters/README.md)). `[lora]`:
        [ai-toolkit]({_AI_JOB}#L73). The most, not the right number: see when to stop""",
    "train.gradient_checkpointing": """
        at 1024 px, with a LoRA of rank 16, a step in 24 GiB of an H200 takes {budget_ms} ms, and {on_ms} with `on`
        ([figures](../benchmarks/results/step_nvidia_h200.json))""",
    "train.checkpointing_steps": "what a power cut may cost: {lost} minutes at most on an RTX 4090",
    "train.checkpoints_total_limit": """
        the last 2,000 steps, which are 4 validations: the rule for [when to stop](training.md#when-to-stop) compares
        the last three with those before. {kept} GB at most""",
    "sample.num_inference_steps": f"""
        previews are to be cheap: [SimpleTuner]({_SIMPLE_CONFIG}#L45) and
        [ai-toolkit]({_AI}/ui/src/app/jobs/new/options.tsx#L698) take 30 for Z-Image. The released Base takes 50, and
        so should what you show""",
}
"""Why each key of configs/*_24gb.yaml is as it is; {names} are filled in by `facts`."""

STAGE_TWO: dict[str, str] = {
    "data.resolution": "what Z-Image draws; references are encoded already, targets are encoded anew",
    "train.gradient_accumulation_steps": """
        half of the batch of lists that read references, as a triplet takes {less} times as long; twice that of
        `[lora]`""",
    "train.max_train_steps": """
        8,000 triplets: most of 10,000 are seen once more. The reference is known by then, and what is new is detail.
        Nobody has measured it""",
    "train.lr_scheduler": """
        the end is known here, so the rate can fall to zero, as it did for the [shipped
        adapters](../miniature/adapters/README.md). In stage one it is constant, because that may be stopped or
        prolonged (`--resume_from_checkpoint latest --train.max_train_steps 9000`)""",
}
"""The same of configs/then_1024.yaml."""

LEFT: dict[str, str] = {
    "flow.shift": f"""
        sigmas are uniform, moved by the base's own shift (6): the reference matters where there is most noise, and
        that is where Base is sampled. [musubi-tuner]({_MUSUBI}#L145) trains at 2, and says that it is unclear""",
    "train.dropout_reference": """
        with `dropout_text`, `dropout_both` and `prior_weight` [what the list needs for
        guidance](training.md#dropout-and-the-prior), as [measured](findings/guidance.md);
        [seldom](findings/dropout.md), for a step without its reference teaches no style""",
    "sample.negative": """
        guidance away from weights that see neither prompt nor reference [adds style](findings/guidance.md); where
        the reference stands on both sides it takes style""",
    "data.balance": "`style` where some folders have many times as many pictures as others",
    "train.train_batch_size": "accumulation makes the batch",
    "train.lr_scheduler": f"100 steps of warm-up, then constant, as [SimpleTuner]({_SIMPLE_CONFIG}#L15)",
    "train.optimizer": "moments in 8 bits save what no list needs: all fit",
    "train.adam_weight_decay": f"""
        [IP-Adapter]({_IP}/tutorial_train.py#L211)'s. It takes {{decayed}} of a weight in 6,000 steps, and 1e-4, as
        [ai-toolkit]({_AI_JOB}#L83) has it for a LoRA, a hundredth of that: neither decides anything""",
    "train.ema_decay": "4 bytes a weight; the rate that falls in stage two does what it is for",
    "adapters.lora.rank": f"""
        [ai-toolkit]({_AI_JOB}#L52)'s, [DiffSynth]({_DIFFSYNTH_LORA}#L15)'s and [musubi-tuner]({_MUSUBI}#L148)'s for
        Z-Image; alpha is equal to it""",
    "adapters.siglip.init": "[it hardly matters](findings/siglip_init.md)",
}
"""Defaults that somebody may look for."""

DATA: dict[str, str] = {
    "triplets_per_target": """
        a target that always comes with the same reference can be known by it. Costs rows only: a picture is encoded
        once""",
    "references_per_triplet": "as many as will be given when it draws; several only for those who give several",
}
"""The same of a build's section `pair`."""


# --- configs ----------------------------------------------------------------------------------------------------------


def keys_of(file: Path) -> dict[str, Any]:
    """What a recipe's file says, by dotted key; adapters by kind."""
    document = load_yaml(file)
    return dict(_flat({**document, "adapters": {a.pop("kind"): a for a in document.get("adapters", [])}}, ""))


def _flat(tree: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def default_of(key: str) -> Any:
    """Of a dotted key, with adapters by kind."""
    config = Config.model_validate({"adapters": [{"kind": kind} for kind in ("siglip", "lora")]})
    flat = config.model_dump() | {"adapters": {a.kind: a.model_dump() for a in config.adapters}}
    return dict(_flat(flat, "")).get(key)


@dataclass(frozen=True, slots=True)
class Stage:
    """A list at one of its two sizes."""

    name: str
    config: Config

    @classmethod
    def all(cls) -> "list[Stage]":
        overlays: tuple[list[Path], ...] = ([], [THEN])
        return [
            cls(name, load_config([CONFIGS / f"{name}_24gb.yaml", *overlay])) for name in LISTS for overlay in overlays
        ]

    @property
    def side(self) -> int:
        return self.config.data.resolution

    @property
    def batch(self) -> int:
        """Triplets of an optimizer step."""
        return self.config.train.train_batch_size * self.config.train.gradient_accumulation_steps

    def on(self, card: str, batch: int = 1) -> Plan:
        config = changed(self.config, train={"train_batch_size": batch})
        gib = MEASURED_GIB if card == "h200" else None
        return plan(config, card=CARDS[card], memory_gib=gib, counted=counted_of(self.name))

    def seconds(self, card: str) -> float:
        """Of an optimizer step, by computation."""
        return self.on(card).step * self.config.train.gradient_accumulation_steps

    def hours(self, seconds: float) -> float:
        return self.config.train.max_train_steps * seconds / 3600

    @property
    def looking(self) -> float:
        """Time of validation and previews over that of training, about: a forward pass is taken to be half of a step in
        which nothing is computed again."""
        config, ways = self.config, 3 if self.config.reads else 1
        forwards = ways * config.validation.num_samples * SIGMAS / config.validation.validation_steps
        drawn = 2 * ways * config.validation.num_previews * (config.sample.num_inference_steps or 50)  # 2: guidance
        forwards += drawn / config.validation.preview_steps
        return forwards * flops(counted_of(self.name), Tokens.of(config)) / RATE / 2 / self.seconds("h200")


# --- the parts of the page --------------------------------------------------------------------------------------------


def said(value: Any) -> str:
    """As a YAML says it."""
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"`{json.dumps(value)}`" if value is None else str(value)


LEARNED = ("findings/guidance.json", "shipped_adapters.json")
"""Style of the miniature's lists without guidance, after few steps and after many."""


def facts(stages: Sequence[Stage]) -> dict[str, str]:
    """What is computed or read for the reasons, by the name in braces."""
    small, large = ([stage for stage in stages if stage.side == side] for side in (512, 1024))
    less = [b.on("rtx_4090").step / a.on("rtx_4090").step for a, b in zip(small, large, strict=True)]
    two = [stage.on("rtx_4090", 2).step / 2 / stage.on("rtx_4090").step - 1 for stage in small]
    steps = json.loads((RESULTS / "step_nvidia_h200.json").read_text(encoding="utf-8"))["rows"]
    ms = {row["case"]: row["ms"] for row in steps if row["way"] == "ztrain"}
    lost = max(stage.config.train.checkpointing_steps * stage.seconds("rtx_4090") for stage in stages)
    states = max(12 * counted_of(stage.name).trained for stage in small)  # bytes of weights and two moments
    passes = [stage.config.train.max_train_steps * stage.batch / PASSES[0] for stage in small if stage.config.reads]
    mini_rate = load_yaml(CONFIGS / "miniature.yaml")["train"]["learning_rate"]
    mini = json.loads((ROOT / "miniature/weights/Z-Image/transformer/config.json").read_text(encoding="utf-8"))
    wider = counted_of("siglip").dim / mini["dim"]
    decay = stages[0].config.train
    left = (1 - decay.learning_rate * decay.adam_weight_decay) ** 6000
    early, long = (json.loads((RESULTS / file).read_text(encoding="utf-8")) for file in LEARNED)
    styles = {
        f"early_{name}": early["training"][name]["ways"]["own"]["style"]["mean"] for name in LISTS if name != "lora"
    } | {f"long_{name}": row["figures"]["unguided"]["style_cosine"]["mean"] for name, row in long["rows"].items()}
    told = {name: f"{mean:.2f}" for name, mean in styles.items()} | {
        f"{when}_{what}": f"{result['plan'][what]:,}"
        for when, result in (("early", early), ("long", long))
        for what in ("steps", "batch")
    }
    return told | {
        "less": f"{min(less):.1f} to {max(less):.1f}",
        "batch_two": f"{min(two):.0%} to {max(two):.0%}",
        "budget_ms": f"{ms['lora_1024_b1_24gib']:.0f}",
        "on_ms": f"{ms['lora_1024_b1_full_recompute']:.0f}",
        "lost": f"{lost / 60:.0f}",
        "kept": f"{stages[0].config.train.checkpoints_total_limit * states / 1e9:.0f}",
        "passes": f"{min(passes):.0f} to {max(passes):.0f}",
        "mini_rate": said(mini_rate),
        "wider": f"{wider:g}",
        "scaled_rate": said(mini_rate / wider),
        "decayed": f"{1 - left:.1%}",
    }


def _told(why: str, filled: Mapping[str, str]) -> str:
    return " ".join(why.format(**filled).split())


def stage_one(filled: Mapping[str, str]) -> str:
    files = {name: keys_of(CONFIGS / f"{name}_24gb.yaml") for name in LISTS}
    lines = [f"| key | {' | '.join(LISTS.values())} | why |", "|---" * (len(LISTS) + 2) + "|"]
    for key, why in STAGE_ONE.items():
        values = " | ".join(said(keys[key]) if key in keys else "" for keys in files.values())
        lines.append(f"| `{key}` | {values} | {_told(why, filled)} |")
    return "\n".join(lines)


def stage_two(filled: Mapping[str, str]) -> str:
    keys = keys_of(THEN)
    rows = [f"| `{key}` | {said(keys[key])} | {_told(why, filled)} |" for key, why in STAGE_TWO.items()]
    return "\n".join(["| key | value | why |", "|---|---|---|", *rows])


def left(filled: Mapping[str, str]) -> str:
    rows = [f"| `{key}` | {said(default_of(key))} | {_told(why, filled)} |" for key, why in LEFT.items()]
    return "\n".join(["| key | default | why it stays |", "|---|---|---|", *rows])


def data() -> str:
    rows = [f"| `pair.{key}` | {said(getattr(PairRules(), key))} | {_told(why, {})} |" for key, why in DATA.items()]
    return "\n".join(["| key | default | why |", "|---|---|---|", *rows])


@cache
def measured(side: int) -> dict[str, float]:
    """Seconds of a micro-step on an H200 within 24 GiB, by list; nothing where nobody has measured."""
    size = "" if side == 1024 else f"_{side}"
    path = RESULTS / f"train_real_size{size}_nvidia_h200.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {row["list"]: row["ms"] / 1e3 for row in rows}


def hours(stages: Sequence[Stage]) -> str:
    heads = ["list, px", "steps x triplets", *(f"passes of {count:,}" for count in PASSES), "H200, 24 GiB of it"]
    heads += [CARDS[card].name for card in SHOWN_CARDS] + ["validation and previews", f"cache of {PASSES[1]:,}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for stage in stages:
        steps = stage.config.train.max_train_steps
        cells = [f"{LISTS[stage.name]}, {stage.side}", f"{steps:,} x {stage.batch}"]
        cells += [f"{steps * stage.batch / count:.1f}" for count in PASSES]
        known = measured(stage.side).get(stage.name)
        seconds = stage.seconds("h200") if known is None else known * stage.config.train.gradient_accumulation_steps
        cells.append(_hours(stage, seconds, is_measured=known is not None))
        cells += [_hours(stage, stage.seconds(card)) for card in SHOWN_CARDS]
        cells += [f"+ {stage.looking:.0%}", f"{disk(stage.config) / 1e9:.0f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _told(HOURS_LEGEND, {"per_target": str(PairRules().triplets_per_target)})])


def _hours(stage: Stage, seconds: float, is_measured: bool = False) -> str:
    return f"{stage.hours(seconds):.1f} h ({seconds:.1f} s{', **measured**' if is_measured else ''})"


HOURS_LEGEND = """
    Hours of all steps (seconds of one). *Measured*: step times of whole runs within 24 GiB of an H200
    ([figures](../benchmarks/results/train_real_size_nvidia_h200.json)). All else is computed from that card's
    constants and the other's sheet, within 15 % where it was measured ([how](cards.md)); nobody has run it. Passes:
    how often each triplet of a data set so large is seen. Validation and previews: computed, on top of the hours, as
    is the prior of a LoRA that reads references: its forward passes, of a tenth of the samples, take 5 % at most.
    Cache: all that the largest data set reads, where each of its pictures is a target {per_target} times, and a
    reference; stage two uses what is there of stage one."""


def disk(config: Config) -> float:
    """Bytes in the cache of the largest data set, of style folders, where each picture is target and reference."""
    sizes = entry_bytes(config)
    once = sizes["latents"] + sizes["text"]
    of_picture = once + config.data.reference_variants * (sum(sizes.values()) - once)
    return of_picture * PASSES[1] / PairRules().triplets_per_target


def text() -> str:
    stages = Stage.all()
    filled = facts(stages)
    parts = (
        ("Stage one: `configs/<list>_24gb.yaml`, 512 px", stage_one(filled)),
        ("Stage two: `configs/then_1024.yaml`, every list", stage_two(filled)),
        ("Left at its default", left(filled)),
        ("The data set", data()),
        ("Hours", hours(stages)),
    )
    return "\n\n".join(f"### {title}\n\n{part}" for title, part in parts)


if __name__ == "__main__":
    write_page(PAGE, text())
