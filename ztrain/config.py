"""Every knob that is not an adapter's own: one YAML per experiment, checked whole before anything is loaded.

`load_config(files, overrides)`: later files win over earlier ones key by key (lists are replaced), dotted command-line
overrides win over files. Unknown keys, wrong types and impossible combinations are errors that name key, rule, value.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ztrain.adapters import AnyAdapterConfig, describe_list
from ztrain.adapters.splice import SpliceConfig
from ztrain.images import IMAGE_MULTIPLE, SmallTargets, check_reference
from ztrain.io.overrides import lay_over
from ztrain.io.yamls import PathText, Strict, load_yaml, merge, parse


class _Section(Strict, allow_inf_nan=False):
    """Of a config: no number in it is infinite."""


class ModelConfig(_Section):
    pretrained_model_name_or_path: PathText
    """A folder in the layout of the released repository, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""


class ModelsConfig(_Section):
    base: ModelConfig = ModelConfig(pretrained_model_name_or_path="Tongyi-MAI/Z-Image")
    """Z-Image, Z-Image-Turbo or Omni-Base. Turbo loses its few-step behaviour when trained on directly."""
    vision_language: ModelConfig = ModelConfig(pretrained_model_name_or_path="Qwen/Qwen3-VL-4B-Instruct")
    """Only its visual part and two embedding rows are read, and only if an adapter reads them."""
    siglip: ModelConfig = ModelConfig(pretrained_model_name_or_path="google/siglip2-so400m-patch16-naflex")
    """Read only if an adapter reads it."""
    transformer_file: PathText | None = None
    """A GGUF file with the base's transformer, quantised, in place of its own weights; config and all else stay the
    base's. For sampling and comparing on small cards; training needs the whole weights."""
    variant: Literal["auto", "base", "turbo"] = "auto"
    """Whose steps and guidance to sample with; auto tells by the scheduler's shift (3 Turbo, 6 Base)."""


class EncodersConfig(_Section):
    """Settings that change what the encoders give: they are part of a cache's and an adapter's identity."""

    hidden_index: int | None = Field(default=None, ge=1)
    """Hidden state of the spliced model that is read: k = the residual stream after k layers, the number of layers =
    after the final norm as well. None: the second to last, as for prompts (35 of 36 in Z-Image)."""
    text_hidden_index: int | None = Field(default=None, ge=1)
    """The same for the tokens of that sequence that are neither the image's nor its markers; None: hidden_index."""
    rope_theta: Literal["text_encoder", "vl"] = "text_encoder"
    """Rotary base of the spliced model: that of the weights it runs (1e6), or Qwen3-VL's (5e6)."""
    positions: Literal["mrope", "1d"] = "mrope"
    """Positions of image tokens: rows and columns as Qwen3-VL counts them, or one after the other."""
    deepstack: bool = True
    """Whether visual features are also added after the first language layers, as Qwen3-VL was trained."""
    marker_rows: Literal["text_encoder", "vl"] = "text_encoder"
    """Whose embeddings of vision_start and vision_end are used."""
    fused_order: Literal["reference_first", "prompt_first"] = "reference_first"
    """What comes first in one sequence; attention is causal, so the second sees the first and not the reverse."""
    min_reference_pixels: int = Field(default=65536, ge=1024)
    """Smaller references are enlarged to this area before the spliced model sees them."""
    max_reference_pixels: int = Field(default=262144, ge=1024)
    """Larger references are shrunk to this area; 1024 pixels are one token, so the default gives at most 256."""
    max_sequence_length: int = Field(default=512, ge=16)
    """Most tokens of a prompt with its chat turn; a longer one is an error, not cut."""

    @model_validator(mode="after")
    def _ordered(self) -> "EncodersConfig":
        if self.min_reference_pixels > self.max_reference_pixels:
            raise ValueError("min_reference_pixels is larger than max_reference_pixels")
        return self


class DataConfig(_Section):
    train_data_dir: PathText = "data"
    """A folder of data_tools.build or data_tools.pack, or a Hub data set with the same columns."""
    revision: str | None = None
    """Branch, tag or commit of train_data_dir where it is a Hub data set."""
    train_split: str = "train"
    validation_split: str = "validation"
    """Held-out triplets for validation and previews; read only if one of them is on."""
    text_only_data_dir: PathText | None = None
    """Pictures with prompts and without references, for `text_only_share`."""
    text_only_split: str = "train"
    text_only_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of training samples that come from text_only_data_dir, so that plain text-to-image is practised too."""
    resolution: int = Field(default=1024, ge=32)
    """Side in pixels of a square target, a multiple of 16; other aspects have as many tokens."""
    max_target_aspect: float = Field(default=2.0, ge=1.0)
    """Longest side over shortest side of the targets' buckets; 1 = squares only."""
    max_crop: float = Field(default=0.1, ge=0.0, le=1.0)
    """Largest share of a target that fitting it to its bucket may cut away; a target beyond it is refused."""
    small_targets: SmallTargets = "refuse"
    """What becomes of targets that would be enlarged by more than max_upscale. refuse: one is an error that names them;
    leave_out: they are counted and left out, without counting for max_bad_share; upscale: they are enlarged."""
    max_upscale: float = Field(default=1.25, ge=1.0)
    """How many times its own width and height a target may be enlarged to fill its bucket."""
    allow_reference_is_target: bool = False
    """Whether a triplet may have its target among its references, byte for byte, to learn to reconstruct."""
    reference_min_side: int = Field(default=32, ge=1)
    """Smallest side of a reference in pixels."""
    reference_max_aspect: float = Field(default=8.0, ge=1.0)
    """Longest side over shortest side of a reference."""
    reference_variants: int = Field(default=1, ge=1)
    """Pictures that stand for each reference of a training triplet: itself and N - 1 parts of it (60 to 100 % of its
    area, anywhere), so that it is not copied. All are encoded, a step takes one; 1: always itself."""
    reference_mirror: bool = False
    """Whether half of those parts are mirrored; letters and logos are then wrong."""
    balance: Literal["none", "style"] = "none"
    """style: triplets of all styles (their column `style`) are trained equally often, however many each has."""
    max_bad_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of triplets that may be refused (broken picture, prompt too long); they are counted and left out. 0: any
    is an error."""
    dataloader_num_workers: int = Field(default=2, ge=0)
    """Threads that read the cache ahead of training, and decode pictures when it is filled; 0 = none."""

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        if self.resolution % IMAGE_MULTIPLE:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {IMAGE_MULTIPLE}")
        if self.text_only_share and self.text_only_data_dir is None:
            raise ValueError(f"text_only_share {self.text_only_share} needs text_only_data_dir")
        if self.reference_mirror and self.reference_variants == 1:
            raise ValueError("reference_mirror true needs reference_variants of at least 2, as only parts are mirrored")
        return self

    @property
    def square_tokens(self) -> int:
        """Of a square target."""
        return (self.resolution // IMAGE_MULTIPLE) ** 2

    def check_reference(self, size: tuple[int, int], name: str) -> None:
        """Of (width, height). Raises InputError, starting with `name`, for one that carries no look."""
        check_reference(size, name, min_side=self.reference_min_side, max_aspect=self.reference_max_aspect)


class CacheConfig(_Section):
    """Encoded pictures and prompts on disk. Entries are named by what they were made from, so that data sets, runs and
    experiments share one folder and a stale entry cannot be found."""

    dir: PathText = "cache"
    entries_per_shard: int = Field(default=128, ge=1)
    """Entries of one kind that are written, and lost by an interruption, together."""
    verify_share: float = Field(default=0.02, gt=0.0, le=1.0)
    """Share of entries that `ztrain cache --verify` computes again; 1 = all."""


class FlowConfig(_Section):
    sigma_sampling: Literal["uniform", "logit_normal", "scheduler_table"] = "uniform"
    """How training sigmas are drawn before the shift; see flow.SigmaDensity."""
    shift: float | Literal["scheduler", "resolution"] | None = None
    """Moves sigmas towards noise: a number > 0 (1 = not at all), the base scheduler's own (3 Turbo, 6 Base), or by
    the target's number of tokens. None: 1 for logit_normal, scheduler for the others."""
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0.0)
    loss_weight: Literal["none", "bump"] = "none"

    @model_validator(mode="after")
    def _positive(self) -> "FlowConfig":
        if isinstance(self.shift, float | int) and self.shift <= 0:
            raise ValueError(f"shift {self.shift} must be above 0")
        return self


def _on_or_off(value: Any) -> Any:
    """true and false say the same, and are what tools with the words of YAML 1.1 make of a plain on or off."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


_word = BeforeValidator(_on_or_off)


class TrainConfig(_Section):
    learning_rate: float = Field(default=1e-4, gt=0.0)
    train_batch_size: int = Field(default=1, ge=1)
    """Triplets for each device and micro-step."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    group_by_tokens: bool = True
    """Whether samples are exchanged among 32 optimizer steps so that those of a step have about as many tokens, and no
    process waits for another. false: the plain random order, as runs had it that began before there was this key."""
    max_train_steps: int = Field(default=2000, ge=1)
    """Optimizer steps."""
    gradient_checkpointing: Annotated[Literal["on", "off", "budget"], _word] = "on"
    """What is computed again in the backward pass to save memory. on: every block; off: nothing; budget: what does not
    fit into memory.budget_gib, measured before the first step (on a CPU: nothing)."""
    compile: Annotated[Literal["auto", "on", "off"], _word] = "auto"
    """Whether the blocks are compiled (torch.compile), which takes a minute or two at the start; their gradients are
    compared with the blocks' as they are. auto: on a GPU, and without where they differ; on: also on a CPU, and an
    error where they differ."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the frozen models and of the products; trained weights are float32 either way."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its two moments in 8 bits (bitsandbytes): 2.6 GiB less for [siglip], nothing for a LoRA."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    lr_warmup_steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    lr_num_cycles: int = Field(default=1, ge=1)
    """Restarts of cosine_with_restarts."""
    lr_power: float = Field(default=1.0, gt=0.0)
    """Exponent of polynomial."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    adam_weight_decay: float = Field(default=1e-2, ge=0.0)
    adam_epsilon: float = Field(default=1e-8, gt=0.0)
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Highest decay of the moving average of the trained weights, reached as (1 + step) / (10 + step); 0 = off. When
    on, the average is what is validated, shown and exported."""
    dropout_text: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of samples trained without the prompt. The three shares exclude each other and add up to at most 1. None,
    here and in the next three keys: what the list of adapters needs for guidance (resolve.py); nothing where none of
    them acts without a reference, for such a sample would teach nothing."""
    dropout_reference: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share trained without the reference."""
    dropout_both: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share trained with neither."""
    prior_weight: float | None = Field(default=None, ge=0.0, le=1.0)
    """On samples without a reference the loss is (1 - w) of the data's and w of the distance to the base's own
    velocity, so that plain text-to-image does not drift: 0 = off (no second forward), 1 = stay with the base."""
    logging_steps: int = Field(default=10, ge=1)
    """Optimizer steps between two printed lines; every step is written to metrics.jsonl."""
    hang_timeout_minutes: float = Field(default=10.0, gt=0.0)
    """Of several processes: minutes after which all end where none has moved, with a sentence that names who is behind
    (watchdog.py). Shorter than one step, it ends a sound run; filling the cache and other long tasks do not count."""
    checkpointing_steps: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints; the last step always has one."""
    checkpoints_total_limit: int = Field(default=3, ge=2)
    """Newest checkpoints that are kept, and beside them that of the best step that best.json names; an older one goes
    only after a newer one is verified."""

    @model_validator(mode="after")
    def _shares(self) -> "TrainConfig":
        total = sum(share or 0.0 for share in (self.dropout_text, self.dropout_reference, self.dropout_both))
        if total > 1:
            raise ValueError(f"dropout_text + dropout_reference + dropout_both is {total:g}, more than 1")
        return self


class MemoryConfig(_Section):
    budget_gib: float | None = Field(default=None, gt=0.0)
    """GiB of the GPU that each process may take, all counted (weights, optimizer, activations, CUDA itself); None: what
    is free when training starts. For train.gradient_checkpointing budget."""


class ValidationConfig(_Section):
    validation_steps: int = Field(default=500, ge=0)
    """Optimizer steps between two validations, the first at step 0; 0 = never."""
    num_samples: int = Field(default=32, ge=2)
    """Held-out triplets, spread evenly over the split."""
    sigmas: tuple[float, ...] | Literal["auto"] = "auto"
    """Noise levels at which the loss is measured, each with the same noise every time. auto: where the run trains, at
    five quantiles of its own sigmas (10, 30, 50, 70, 90 %), and pure noise, where nothing but prompt and reference
    tell what is to come."""
    preview_steps: int = Field(default=500, ge=0)
    """Optimizer steps between two preview grids, the first at step 0; 0 = never."""
    num_previews: int = Field(default=4, ge=1)
    """Rows of the grid: held-out triplets, spread evenly."""
    score_steps: int = Field(default=0, ge=0)
    """Optimizer steps between two scorings of what the list draws, by the models of `judges`; 0 = never. The best step
    so far is written to `<output_dir>/best.json`, by the rule of compare.keep_adherence."""
    num_scored: int = Field(default=16, ge=2)
    """Held-out triplets that are drawn and scored, spread evenly."""

    @model_validator(mode="after")
    def _inside(self) -> "ValidationConfig":
        if self.sigmas != "auto" and not (self.sigmas and all(0.0 < sigma <= 1.0 for sigma in self.sigmas)):
            raise ValueError(f"sigmas {self.sigmas} must be auto, or one or more numbers above 0 and at most 1")
        return self


class TrackingConfig(_Section):
    """Where metrics go besides metrics.jsonl, which is always written first."""

    report_to: Literal["none", "wandb"] = "none"
    """The key comes from `wandb login` or WANDB_API_KEY, never from here."""
    mode: Literal["online", "offline"] = "online"
    """Both write a folder of the run. online: a second process uploads it while it grows, and goes on when a server
    that was lost comes back; what is not uploaded at the end waits for `wandb sync`."""
    project: str = "ztrain"
    entity: str | None = None
    name: str | None = None
    """Name of the run; None: that of output_dir."""
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    notes: str | None = None
    log_adapter: bool = False
    """Whether the exported adapter is uploaded as an artifact."""
    log_data_manifest: bool = False
    """Whether the list of triplets (names, prompts, hashes; no pictures) is uploaded as an artifact."""


Negative = Literal["neither", "reference", "base"]
"""What text guidance leads away from."""

Aspect = Literal["21:9", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16", "9:21"]


class SampleConfig(_Section):
    num_inference_steps: int | None = Field(default=None, ge=1)
    """None: as the base was released (8 Turbo, 50 Base)."""
    guidance_scale: float | None = Field(default=None, ge=0.0)
    """Text guidance in diffusers' convention, 0 = off; None: as the base was released (0 Turbo, 4 Base)."""
    negative: Negative = "neither"
    """What text guidance leads away from: the list with neither prompt nor reference; the list with its reference and
    without the prompt, as diffusers' ZImageOmniPipeline; or the base without the prompt, all adapters off."""
    negative_prompt: str = ""
    """Stands in the place of the empty prompt there."""
    shift: float | None = Field(default=None, gt=0.0)
    """Moves the steps' sigmas towards noise, 1 = not at all; None: the base scheduler's own (3 Turbo, 6 Base)."""
    image_guidance_scale: float = Field(default=0.0, ge=0.0)
    """Guidance away from the same prompt without the reference, 0 = off."""
    guidance_normalization: float = Field(default=0.0, ge=0.0)
    """The guided velocity is at most this many times as long as the unguided one; 0 = off."""
    guidance_window: tuple[float, float] = (0.0, 1.0)
    """Low and high: guidance acts where low < sigma <= high, so of zero width never, and (0, 1) is every step."""
    scales: float | list[float] = 1.0
    """Of every adapter, or one for each: 1 = as trained, 0 = as if it were not in the list."""
    strength: float = Field(default=1.0, gt=0.0, le=1.0)
    """How far from the start image, which `ztrain sample` is given and which is the reference elsewhere: 1 = from noise
    alone, without one."""
    reference_window: tuple[float, float] = (0.0, 1.0)
    """The same for the whole list; elsewhere the base is alone with the prompt, all adapters off."""
    aspect: Aspect | None = None
    """Width to height, at about as many pixels as a square of data.resolution; in place of height and width."""
    height: int | None = Field(default=None, ge=32)
    """Pixels; None: data.resolution."""
    width: int | None = Field(default=None, ge=32)
    batch_size: int = Field(default=1, ge=1)
    """Pictures that are sampled together."""

    @model_validator(mode="after")
    def _sizes(self) -> "SampleConfig":
        if self.aspect is not None and (self.height, self.width) != (None, None):
            raise ValueError(f"aspect {self.aspect} decides height and width; leave those out, or aspect")
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and side % IMAGE_MULTIPLE:
                raise ValueError(f"{name} {side} is not a multiple of {IMAGE_MULTIPLE}")
        for name in ("guidance_window", "reference_window"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} must be two sigmas, 0 <= low <= high <= 1")
        return self


class ExportConfig(_Section):
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported weights: float32 loads again bit for bit, bfloat16 is half as large and loses 16 bits."""


class JudgesConfig(_Section):
    """Models that score pictures; each is optional, and scores that need one that is missing are left out. The more,
    the less a result hangs on one opinion."""

    siglip: ModelConfig | None = None
    """SigLIP2, or CLIP, with its text tower: likeness to the reference, and adherence to the prompt."""
    dino: ModelConfig | None = None
    """DINOv2: likeness to the reference, and diversity."""
    style: ModelConfig | None = None
    """A style descriptor: any vision model that gives one vector for a picture, such as CSD."""
    truth: PathText | None = None
    """Folder of a miniature family (miniature/weights): its judges know content and style of painted triplets."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures that a judge looks at together."""


class CompareConfig(_Section):
    """What `ztrain compare` draws: columns (lists of adapters) on the same rows (prompt and references) and seeds."""

    adapters: list[PathText] = Field(default_factory=list)
    """Exported adapter folders or folders of finished runs, a column each."""
    presets: list[PathText] = Field(default_factory=list)
    """YAML files with encoders and adapters of further splices, a column each; `ztrain sweep` writes one too."""
    splice: SpliceConfig = SpliceConfig()
    """The splice that is always shown."""
    shuffled: bool = False
    """The control: every list that reads references is shown once more with another row's."""
    drift: bool = True
    """Whether trained lists are also drawn without any reference and compared with the base, on the first seed."""
    split: str = "validation"
    num_samples: int = Field(default=16, ge=1)
    """Rows: triplets of the split, spread evenly over it."""
    prompts: PathText | None = None
    """A text file, a prompt a line: rows are each of these with each of `references`, in place of triplets."""
    references: PathText | None = None
    """A folder of pictures, for `prompts`."""
    prompt: Literal["own", "none"] = "own"
    """none: rows are drawn without their prompts, to see what a reference alone says."""
    num_seeds: int = Field(default=1, ge=1)
    """Pictures of a row and column, each from noise of its own; diversity needs 2."""
    keep_adherence: float = Field(default=0.95, ge=0.0, le=1.0)
    """The best is the list with most style among those that keep this share of the adherence to the prompt that
    pictures without a reference have above chance."""
    output_dir: PathText = "out/compare"
    """Pictures that are there already and were made from the same are not drawn again."""

    @model_validator(mode="after")
    def _rows(self) -> "CompareConfig":
        if (self.prompts is None) != (self.references is None):
            raise ValueError("prompts and references go together: a file of prompts and a folder of pictures")
        return self


class SweepConfig(_Section):
    """What `ztrain sweep` varies around compare.splice; rows, seeds and rule are compare's."""

    axes: dict[str, list[bool | int | float | str | None]] = Field(default_factory=dict)
    """Values by key: any key of `encoders.`, `splice.` or `sample.`. All combinations are drawn."""
    output_dir: PathText = "out/sweep"


class Config(_Section):
    """One experiment."""

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    output_dir: PathText = "runs/ztrain"
    resume_from_checkpoint: PathText = "none"
    """none: a fresh run; latest: the newest whole checkpoint of output_dir, or a fresh run where it has none; or the
    folder of a checkpoint."""
    init_from: PathText | None = None
    """An exported adapter, or the folder of a checkpoint, whose weights a fresh run starts from: each of its adapters
    gives them to the one of its kind, adapters of other kinds start fresh. Optimizer, schedule and step start anew;
    base and settings must be the same. A run that goes on from its own checkpoint does not read it again."""
    models: ModelsConfig = ModelsConfig()
    encoders: EncodersConfig = EncodersConfig()
    adapters: list[AnyAdapterConfig] = Field(default_factory=list)
    """An ordered list; conditioning flows through it as through a pipe. Empty: plain text-to-image."""
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    flow: FlowConfig = FlowConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
    sample: SampleConfig = SampleConfig()
    export: ExportConfig = ExportConfig()
    judges: JudgesConfig = JudgesConfig()
    compare: CompareConfig = CompareConfig()
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _possible_list(self) -> "Config":
        check_list(self.adapters)
        if self.train.prior_weight and self.adapters and not self.reads:
            raise ValueError(
                f"train.prior_weight {self.train.prior_weight:g} holds samples without a reference at the base, and "
                f"{describe_list(list(self.adapters))} reads no reference: it would hold all of them; set it to 0"
            )
        return self

    @property
    def reads(self) -> frozenset[str]:
        """Encoded states that the adapters read besides the text."""
        return list_reads(self.adapters)


def check_list(adapters: Sequence[Any]) -> None:
    """Raises ValueError for a list of adapter settings that cannot work together."""
    kinds = [adapter.kind for adapter in adapters]
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"adapters {describe_list(list(adapters))}: {twice[0]} stands twice; keep one")
    composing = [adapter.kind for adapter in adapters if adapter.composes_reference]
    if len(composing) > 1:
        raise ValueError(
            f"adapters {describe_list(list(adapters))}: {' and '.join(composing)} both compose the caption"
        )
    if composing and any(adapter.has_stock_layout for adapter in adapters):
        raise ValueError(
            f"adapters {describe_list(list(adapters))}: the stock siglip layout has its own caption segments"
        )


def list_reads(adapters: Sequence[Any]) -> frozenset[str]:
    return frozenset().union(*(adapter.reads for adapter in adapters))


def load_config(
    files: Sequence[Path], overrides: Sequence[str] = (), prog: str = "ztrain", also: Sequence[str] = ()
) -> Config:
    """The experiment of one or more YAML files with dotted overrides such as --train.learning_rate 3e-4.

    `prog`, `also`: whose words they are, and which options it has besides. Raises InputError; --help lists all keys.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, load_yaml(file))
    config = parse(Config, merged, " + ".join(str(file) for file in files) or "defaults")
    if {"-h", "--help"} & set(overrides):
        import tyro  # here, for it takes its time

        tyro.cli(Config, default=config, args=["--help"], prog=prog, config=(tyro.conf.AvoidSubcommands,))
    if not overrides:
        return config
    return parse(Config, lay_over(Config, config.model_dump(mode="json"), overrides, also), "command line")
