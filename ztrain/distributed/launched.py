"""What a launcher's environment says: accelerate follows it in silence, so what differs from the experiment is refused.

In: an experiment and the variables by which `accelerate launch`, torchrun, job scripts and shells speak to accelerate
(all that accelerate 1.15 reads where an Accelerator is made). Out: an Accelerator that does what the experiment says.
"""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import str_to_bool

from ztrain.config import TrainConfig
from ztrain.errors import InputError
from ztrain.io.files import read_text

_SHARING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_UNKNOWN = ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER")
_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FILES = "launch with a file of configs/accelerate: one_gpu, ddp, fsdp2, zero2, zero3 or cpu"


def start_accelerator(**settings: Any) -> Accelerator:
    """An Accelerator without a precision of its own: AdaptedDiT owns it.

    Raises InputError for what the environment asks for and accelerate or this machine cannot do.
    """
    check_processes(os.environ)
    check_sharing(os.environ)
    try:
        accelerator = Accelerator(mixed_precision="no", **settings)
    except dist.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"the processes cannot meet at {place}: {' '.join(str(error).split())}; where the port is in use, choose"
            " another one (accelerate launch --main_process_port 0 finds one)"
        ) from error
    except (ImportError, NotImplementedError, ValueError) as error:  # of plugins that read the environment
        raise InputError(
            f"accelerate cannot start as its launcher asks: {' '.join(str(error).split())}; {_FILES}"
        ) from error
    asked = _number(os.environ, "WORLD_SIZE", 1)
    if asked != accelerator.num_processes:
        raise InputError(
            f"WORLD_SIZE is {asked}, and accelerate runs {accelerator.num_processes} process on"
            f" {accelerator.device.type}: without a GPU set ACCELERATE_USE_CPU=true; left over of another job: unset it"
        )
    return accelerator


def check_environment(t: TrainConfig, environ: Mapping[str, str]) -> None:
    """Raises InputError where accelerate would do something else than the experiment says; `no` and what is not set
    contradict nothing, as `accelerate launch` always sets a precision and a compiler."""
    # variable -> key, what the experiment says, and what contradicts nothing besides
    said: dict[str, tuple[str, object, tuple[str, ...]]] = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "train.gradient_accumulation_steps", t.gradient_accumulation_steps, ()),
        "ACCELERATE_MIXED_PRECISION": ("train.mixed_precision", t.mixed_precision, ("no", "")),
        "ACCELERATE_DYNAMO_BACKEND": ("train.compile", t.compile, ("no",)),
    }  # fmt: skip
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        said["ACCELERATE_GRADIENT_CLIPPING"] = ("train.max_grad_norm", t.max_grad_norm, ("auto",))
    for variable, (key, ours, harmless) in said.items():
        theirs = environ.get(variable)
        if theirs is None or theirs.lower() in harmless or _is_same(theirs, ours):
            continue
        raise InputError(
            f"{variable} is {theirs or 'empty'} in the environment (of a job script, or made by accelerate launch from"
            f" its own config), and {key} is {ours}: the experiment decides; unset the variable, or leave that setting"
            " out of accelerate's config"
        )


def check_sharing(environ: Mapping[str, str]) -> None:
    """Raises InputError for plugins of accelerate that ztrain does not know, that exclude each other, or whose library
    or file is not there."""
    for variable in _UNKNOWN:
        if _is_on(environ, variable):
            raise InputError(f"{variable} is {environ[variable]}, which ztrain does not know; {_FILES}")
    asked = [variable for variable in _SHARING if _is_on(environ, variable)]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are both true, and a run can have one of them; {_FILES}")
    if "ACCELERATE_USE_DEEPSPEED" not in asked:
        return
    if find_spec("deepspeed") is None:
        raise InputError(
            "ACCELERATE_USE_DEEPSPEED is true, and DeepSpeed is not installed: pip install 'ztrain[deepspeed]', or"
            " launch with configs/accelerate/ddp.yaml"
        )
    name = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        return
    try:
        settings = json.loads(read_text(Path(name), "json"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"ACCELERATE_DEEPSPEED_CONFIG_FILE: cannot read {name} ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise InputError(f"ACCELERATE_DEEPSPEED_CONFIG_FILE: {name} has no zero_optimization; see configs/deepspeed")


def check_processes(environ: Mapping[str, str]) -> None:
    """Raises InputError where a process group would be made that cannot come about, or on a device that is not
    there."""
    on_cpu, cards = _is_on(environ, "ACCELERATE_USE_CPU"), torch.cuda.device_count()
    rank, count, place = (_number(environ, name, none) for name, none in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", -1)))  # fmt: skip
    if place != -1 or (on_cpu and count > 1):
        given = [name for name in _GROUP if environ.get(name)]
        if missing := [name for name in _GROUP if name not in given]:
            raise InputError(
                f"{_listed(given)} in the environment, without {' and '.join(missing)}: left over of another job?"
                f" Then: unset {' '.join(given)}; otherwise start it by accelerate launch or torchrun"
            )
        if not 0 <= rank < count:
            raise InputError(f"RANK is {rank} and WORLD_SIZE is {count}: ranks are 0 to {count - 1}")
        _number(environ, "MASTER_PORT", 0)
        if cards and not on_cpu and place >= cards:
            raise InputError(f"LOCAL_RANK is {place}, and this machine has {cards} GPUs: launch one process a GPU")
    if name := environ.get("ACCELERATE_TORCH_DEVICE"):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"ACCELERATE_TORCH_DEVICE is {name}, which is no device; unset it") from error
        if device.type == "cuda" and (device.index or 0) >= cards:
            raise InputError(f"ACCELERATE_TORCH_DEVICE is {name}, and torch finds {cards} GPUs here; unset it")


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} set"


def _is_same(said: str, ours: object) -> bool:
    """Whether a variable says what a key does; numbers by value."""
    if not isinstance(ours, int | float):
        return said.lower() == str(ours).lower()
    try:
        return float(said) == ours
    except ValueError:
        return False


def _is_on(environ: Mapping[str, str], variable: str) -> bool:
    """As accelerate reads it: all but ACCELERATE_USE_CPU are on by `true` alone. Raises InputError for a word that
    would silently mean something else than it says."""
    said = environ.get(variable, "false").lower()
    try:
        meant = bool(str_to_bool(said or "false"))
    except ValueError:
        raise InputError(f"{variable} is {said} in the environment: write true or false, or unset it") from None
    if meant and said != "true" and variable != "ACCELERATE_USE_CPU":
        raise InputError(f"{variable} is {said} in the environment, which accelerate takes for false: write true")
    return meant


def _number(environ: Mapping[str, str], variable: str, otherwise: int) -> int:
    said = environ.get(variable) or str(otherwise)
    try:
        return int(said)
    except ValueError:
        raise InputError(f"{variable} is {said} in the environment, which is no number; unset it") from None
