"""Pretrains a whole miniature family, stage by stage, and writes it in the layout of the real repositories.

    ztrain mini pretrain --out DIR [--data DIR] [--seed N] [--stages NAME ...]

Without --data the world is the painted one; with it, any folder of captioned pictures (folders.py says which layouts).
Every stage leaves its weights in <out>/parts and is skipped when they are there, so that a recipe can stop anywhere and
stages that need not wait for each other can run as processes side by side:

    vae | language -> vision_language | language -> siglip | judges        transformer needs vae and language
"""

import functools
import json
import platform
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Tokenizer

from miniature.autoencoder import train_vae
from miniature.denoiser import train_denoiser
from miniature.family import BASE, write_repositories, write_whole
from miniature.fit import FitSettings, Fitted, Partial
from miniature.gallery import Gallery, World
from miniature.judges import (
    STYLE_JUDGES,
    ContentJudge,
    StyleJudge,
    save_judge,
    train_content_judge,
    train_style_judge,
)
from miniature.language import train_language, train_vision_language
from miniature.parts import (
    FamilySizes,
    Parts,
    build_siglip,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    build_vision_language,
    vocab_size,
)
from miniature.siglip import train_siglip
from miniature.turns import CONTENT, DETAIL
from ztrain.config import EncodersConfig
from ztrain.errors import InputError
from ztrain.frozen.encoders import LatentCodec, TextEncoder
from ztrain.frozen.sources import pretrained_tokenizer
from ztrain.io.files import remove, whole_file, whole_folder, write_json
from ztrain.io.tensors import read_tensors
from ztrain.model.flow import SigmaDensity

STAGES = ("vae", "language", "vision_language", "siglip", "judges", "transformer")
_NEEDS = {"vision_language": ("language",), "siglip": ("language",), "transformer": ("vae", "language")}
"""Stages whose parts a stage reads."""
_FIELDS = {
    "vae": ("vae", "augment_vae"),
    "language": ("language",),
    "vision_language": ("front_end", "together", "reference_pixels"),
    "siglip": ("siglip",),
    "judges": ("content_judge", "style_judge"),
    "transformer": ("transformer", "density"),
}
"""Fields of the recipe that decide a stage, beside sizes and pictures: changing another one leaves its parts alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a family beside the world and the seed."""

    sizes: FamilySizes
    pictures: int | None
    """Pictures of a painted world to train on; None = its own choice, and all that a folder has."""
    vae: FitSettings
    language: FitSettings
    front_end: FitSettings
    together: FitSettings
    siglip: FitSettings
    content_judge: FitSettings
    style_judge: FitSettings
    transformer: FitSettings
    density: SigmaDensity = field(default_factory=lambda: SigmaDensity(sampling="logit_normal", shift=2.0))
    shift: float = 3.0
    """Of the sampler's schedule, written into scheduler_config.json."""
    reference_pixels: tuple[int, int] = (128 * 128, 256 * 256)
    """Areas between which Qwen3-VL's processor keeps a picture: 16 to 64 tokens."""
    augment_vae: bool = False


SIZES = FamilySizes(
    bpe_tokens=640,
    lm_hidden=128,
    lm_mlp=320,
    lm_layers=6,
    lm_heads=4,
    lm_kv_heads=2,
    lm_head_dim=32,
    mrope_section=(8, 4, 4),
    lm_init_std=0.05,
    vl_hidden=80,
    vl_mlp=240,
    vl_depth=5,
    vl_heads=2,
    vl_positions=64,
    vl_deepstack=(1, 2, 3),
    siglip_hidden=128,
    siglip_mlp=256,
    siglip_layers=3,
    siglip_heads=4,
    siglip_patches=64,
    dit_dim=192,
    dit_layers=6,
    dit_refiner_layers=1,
    dit_heads=6,
    vae_channels=(32, 56, 88),
)

PAINTED = Recipe(
    sizes=SIZES,
    pictures=None,
    vae=FitSettings(steps=2500, batch_size=64, learning_rate=1e-3),
    language=FitSettings(steps=3000, batch_size=256, learning_rate=2e-3),
    front_end=FitSettings(steps=7000, batch_size=1024, learning_rate=1.5e-3, matrix_learning_rate=2e-3),
    together=FitSettings(steps=1200, batch_size=512, learning_rate=1e-3),
    siglip=FitSettings(steps=3000, batch_size=512, learning_rate=1e-3),
    content_judge=FitSettings(steps=4000, batch_size=256, learning_rate=2e-3),
    style_judge=FitSettings(steps=2500, batch_size=512, learning_rate=1e-3),
    transformer=FitSettings(steps=14000, batch_size=1024, learning_rate=2e-3, matrix_learning_rate=3e-3),
)

FOLDER = replace(
    PAINTED,
    # A VAE of factor 8 as the real one's: 128 pixels are 64 tokens of the transformer.
    sizes=replace(SIZES, bpe_tokens=2000, vae_channels=(32, 48, 64, 96)),
    vae=FitSettings(steps=3000, batch_size=64, learning_rate=1e-3),
    augment_vae=True,
    front_end=FitSettings(steps=3000, batch_size=512, learning_rate=1.5e-3, matrix_learning_rate=2e-3),
    together=FitSettings(steps=600, batch_size=256, learning_rate=1e-3),
)
"""For folders of a few thousand pictures."""


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe with models and steps that take a CPU seconds."""
    short = {
        name: replace(getattr(recipe, name), steps=3, batch_size=8)
        for name in Recipe.__dataclass_fields__
        if isinstance(getattr(recipe, name), FitSettings)
    }
    sizes = FamilySizes(vae_channels=(8,) * len(recipe.sizes.vae_channels))
    return replace(recipe, sizes=sizes, pictures=64, **short)


Trained = tuple[dict[str, Any], list[Fitted], dict[str, Any]]
"""What a stage gives: its modules by name, how they were fitted, and facts to keep."""


class Pretraining:
    """One family in the making: a world, a recipe, a seed and a folder of finished parts."""

    def __init__(self, out: Path, world: World, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.out, self.world, self.recipe, self.seed, self.device = out, world, recipe, seed, device
        self.parts = out / "parts"
        self._gallery: Gallery | None = None

    @property
    def gallery(self) -> Gallery:
        """What models may see, made when the first stage asks."""
        if self._gallery is None:
            self._gallery = self.world.gallery("train", self.recipe.pictures, self.seed, self.device)
        return self._gallery

    def run(self, stages: tuple[str, ...]) -> None:
        """Trains the stages that are not there yet, in the order of STAGES."""
        train: dict[str, Callable[[], Trained]] = {
            "vae": self._train_vae,
            "language": self._train_language,
            "vision_language": self._train_vision_language,
            "siglip": self._train_siglip,
            "judges": self._train_judges,
            "transformer": self._train_transformer,
        }
        for stage in (name for name in STAGES if name in stages):
            if self._is_done(stage):
                print(f"{stage}: done already", flush=True)
                continue
            torch.manual_seed(zlib.crc32(f"{self.seed} {stage}".encode()))
            started = time.perf_counter()
            modules, fitted, facts = train[stage]()
            self._save(stage, modules, fitted, facts, time.perf_counter() - started)

    def is_done(self, stages: tuple[str, ...]) -> bool:
        """Whether every one of these stages has left its parts."""
        return all(self._is_done(stage) for stage in stages)

    def finish(self) -> Path:
        """Writes the family and its judges to <out>/family in bfloat16; every stage must be done."""
        return write_whole(self.out / "family", self._write, self.marker())

    def _write(self, folder: Path) -> None:
        family = Parts(
            tokenizer=self._tokenizer,
            text_encoder=self._half("language", "text_encoder"),
            vision_language=self._half("vision_language", "vision_language"),
            siglip=self._half("siglip", "siglip"),
            vae=self._half("vae", "vae"),
            transformers={BASE: self._half("transformer", "transformer")},
            shifts={BASE: self.recipe.shift},
            siglip_patches=self.recipe.sizes.siglip_patches,
            vision_language_pixels=self.recipe.reference_pixels,
        )
        write_repositories(folder, family)
        for name in ("content", *STYLE_JUDGES):
            save_judge(self._half("judges", name), folder / "judges", name)
        reports = {stage: json.loads((self.parts / f"{stage}.json").read_text()) for stage in STAGES}
        for report in reports.values():
            del report["made_from"]  # family.json says it
        (folder / "recipe.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")

    def marker(self) -> str:
        return json.dumps({stage: self._made_from(stage) for stage in STAGES}, indent=2) + "\n"

    def _made_from(self, stage: str) -> dict[str, Any]:
        """All that decides a stage's parts, as JSON gives it back."""
        recipe = asdict(self.recipe)
        about = {
            "world": self.world.name,
            "size": self.world.size,
            "seed": self.seed,
            "needs": {name: self._made_from(name) for name in _NEEDS.get(stage, ())},
            **{field: recipe[field] for field in ("sizes", "pictures", *_FIELDS[stage])},
        }
        return json.loads(json.dumps(about))

    # Building

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if not self._is_done("language"):
            raise InputError(f"{self.out}: this stage needs the stage language, which is not done; run it first")
        tokenizer = pretrained_tokenizer(self.parts / "tokenizer", Qwen2Tokenizer)
        for key in ("is_local", "local_files_only"):  # how it was loaded, which would be saved with it
            tokenizer.init_kwargs.pop(key, None)
        return tokenizer

    def _build(self, name: str) -> Any:
        sizes = self.recipe.sizes
        match name:
            case "vae":
                return build_vae(sizes)
            case "text_encoder":
                return build_text_encoder(sizes, self._tokenizer)
            case "vision_language":
                return build_vision_language(sizes, self._tokenizer)
            case "siglip":
                return build_siglip(sizes, vocab_size(self._tokenizer))
            case "transformer":
                return build_transformer(sizes, siglip=False)
            case "content":
                classes = self.world.content_classes | self.world.style_classes
                return ContentJudge({label: len(names) for label, names in classes.items()})
            case _:
                return StyleJudge()

    # Stages

    def _train_vae(self) -> Trained:
        vae = self._build("vae").to(self.device)
        fitted = train_vae(vae, self.gallery, self.recipe.vae, self.seed, self.recipe.augment_vae)
        facts = {key: vae.config[key] for key in ("shift_factor", "scaling_factor")}
        return {"vae": vae}, [fitted], facts

    def _train_language(self) -> Trained:
        # Of every content: a language model has read about more than anyone has drawn.
        gallery = self.world.gallery("all", self.recipe.pictures, self.seed, self.device)
        texts = sorted({*gallery.captions, *gallery.detailed[:_TOKENIZER_TEXTS]})
        self._tokenizer = build_tokenizer(self.recipe.sizes, [*texts, *_INSTRUCTIONS])
        with whole_folder(self.parts / "tokenizer") as building:
            self._tokenizer.save_pretrained(building)
            remove(self.parts / "tokenizer")
        model = self._build("text_encoder").to(self.device)
        fitted = train_language(model, self._tokenizer, gallery, self.recipe.language, self.seed)
        return {"text_encoder": model}, [fitted], {}

    def _train_vision_language(self) -> Trained:
        model = self._build("vision_language").to(self.device)
        fitted = train_vision_language(
            model,
            self._load("language", "text_encoder"),
            self._tokenizer,
            self.gallery,
            self.recipe.front_end,
            self.recipe.together,
            self.seed,
            self.recipe.reference_pixels[0],
            (self._partial("vision_language", "front_end"), self._partial("vision_language", "together")),
        )
        return {"vision_language": model}, fitted, {}

    def _train_siglip(self) -> Trained:
        model = self._build("siglip").to(self.device)
        return (
            {"siglip": model},
            [train_siglip(model, self._tokenizer, self.gallery, self.recipe.siglip, self.seed)],
            {},
        )

    def _train_judges(self) -> Trained:
        gallery = self.world.gallery("all", self.recipe.pictures, self.seed, self.device)
        modules, fitted = {"content": self._build("content").to(self.device)}, []
        fitted.append(train_content_judge(modules["content"], gallery, self.recipe.content_judge, self.seed))
        for name in STYLE_JUDGES:
            modules[name] = self._build(name).to(self.device)
            seed = zlib.crc32(f"{self.seed} {name}".encode())
            fitted.append(train_style_judge(modules[name], gallery, self.recipe.style_judge, seed))
        return modules, fitted, {}

    def _train_transformer(self) -> Trained:
        dit = self._build("transformer").to(self.device)
        max_tokens = EncodersConfig().max_sequence_length
        encoder = TextEncoder(self._load("language", "text_encoder").model, self._tokenizer, max_tokens)
        codec, recipe = LatentCodec(self._load("vae", "vae")), self.recipe
        partial = self._partial("transformer", "all")
        fitted = train_denoiser(
            dit, encoder, codec, self.gallery, recipe.transformer, recipe.density, self.seed, partial
        )
        return {"transformer": dit}, [fitted], {}

    # Parts on disk

    def _partial(self, stage: str, part: str) -> Partial:
        """What a stage keeps of one of its fits as it goes."""
        return Partial(
            path=self.parts / f"{stage}.{part}.partial.safetensors", made_from=json.dumps(self._made_from(stage))
        )

    def _is_done(self, stage: str) -> bool:
        report = self.parts / f"{stage}.json"
        if not report.is_file():
            return False
        if json.loads(report.read_text())["made_from"] != self._made_from(stage):
            raise InputError(f"{report} was made from another world, seed or recipe; remove it or choose another --out")
        return True

    def _save(self, stage: str, modules: dict[str, Any], fitted: list[Fitted], facts: dict, seconds: float) -> None:
        for name, module in modules.items():
            # Tied weights are stored once; loading ties them again.
            state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            if tied := state.keys() & {"lm_head.weight"}:
                del state[tied.pop()]
            with whole_file(self.parts / f"{name}.safetensors", sync=True) as building:
                save_file(state, building, metadata={"format": "pt"})
        on_gpu = self.device.type == "cuda"
        report = {
            "seconds": round(seconds, 1),
            "fits": [asdict(entry) for entry in fitted],
            "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
            "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "facts": facts,
            "made_from": self._made_from(stage),
        }
        write_json(self.parts / f"{stage}.json", report, sync=True)  # last: whoever finds it finds the parts
        for path in self.parts.glob(f"{stage}.*.partial.safetensors"):
            path.unlink()

    def _half(self, stage: str, name: str) -> Any:
        """The finished module in bfloat16; by torch's own cast, as diffusers' warns about precision at inference."""
        return nn.Module.to(self._load(stage, name), torch.bfloat16)

    def _load(self, stage: str, name: str) -> Any:
        if not self._is_done(stage):
            raise InputError(f"{self.out}: this stage needs the stage {stage}, which is not done; run it first")
        module = self._build(name)
        state = read_tensors(self.parts / f"{name}.safetensors", "remove the stage's files and run it again")
        if getattr(module, "lm_head", None) is not None:
            state["lm_head.weight"] = state[next(key for key in state if key.endswith("embed_tokens.weight"))]
        module.load_state_dict(state, strict=True)
        if facts := json.loads((self.parts / f"{stage}.json").read_text())["facts"]:
            module.register_to_config(**facts)
        return module.to(self.device).eval().requires_grad_(False)


_TOKENIZER_TEXTS = 20_000
_INSTRUCTIONS = ("user", "assistant", f"a {CONTENT}", f"a {DETAIL}") * 100
"""What every turn holds beside captions: often enough to become whole tokens."""


def pretrain(out: Path, world: World, recipe: Recipe, *, seed: int, stages: tuple[str, ...] = STAGES) -> Path | None:
    """Runs the stages that are not done; gives the family's folder once all are, else None. Raises InputError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    making = Pretraining(out, world, recipe, seed, device)
    making.run(stages)
    return making.finish() if making.is_done(STAGES) else None
