"""Quantised weights of GGUF files: reading them, and what of them has to be unpacked.

In: a file in diffusers' or ComfyUI's names. Out: tensors by diffusers' names, which diffusers' GGUFLinear keeps as they
are in the file and unpacks whenever it runs. Needs the package gguf (`pip install 'ztrain[gguf]'`).
"""

import copy
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from ztrain.errors import InputError
from ztrain.io.files import check_regular

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What gguf's reader and numpy raise about bytes that are no whole GGUF file.
_BROKEN = (
    ValueError, LookupError, ArithmeticError, MemoryError, OSError, TypeError, RecursionError, struct.error,
)  # fmt: skip
_QUOTED = 200


def read_gguf(file: Path) -> dict[str, Any]:
    """Every tensor of a GGUF of a Z-Image transformer by diffusers' name; those of fewer bits are still packed.

    Raises InputError where the file is missing or damaged, or the package gguf is not there.
    """
    if not file.exists():
        raise InputError(f"models.transformer_file {file} does not exist; give a .gguf file")
    check_regular(file)
    try:
        from diffusers.models.model_loading_utils import load_gguf_checkpoint

        _check_size(file)
        weights = load_gguf_checkpoint(str(file), return_tensors=True)
    except ImportError as error:
        raise InputError(f"{file}: reading a GGUF needs the package gguf: pip install 'ztrain[gguf]'") from error
    except InputError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:_QUOTED] or type(error).__name__
        raise InputError(f"{file} is no whole GGUF file that can be read: {reason}; download it again") from error
    if not weights:
        raise InputError(f"{file} has no tensors; give the GGUF file of a Z-Image transformer")
    if not any(".attention.qkv." in name for name in weights):
        return weights
    # Files for ComfyUI hold q, k and v as one tensor, under names of their own.
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    return convert_z_image_transformer_checkpoint_to_diffusers(weights)


def _check_size(path: Path) -> None:
    """Compares a GGUF file's header with its size. Raises InputError where it is cut off, one of _BROKEN where it is no
    GGUF file: the package would walk through a header's counts however large they are."""
    from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

    with path.open("rb") as file:
        header = _Header(file)
        magic, version = header.take("<4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as a GGUF file does")
        tensors, settings = header.take("<QQ")
        alignment = GGUF_DEFAULT_ALIGNMENT
        for _ in range(settings):
            key, value = header.text(), header.value(*header.take("<I"))
            alignment = value if key == b"general.alignment" else alignment
        ends = [0]
        for _ in range(tensors):
            header.text()
            dimensions = header.take(f"<{min(*header.take('<I'), _MOST_DIMENSIONS)}Q")
            kind, offset = header.take("<IQ")
            elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            ends.append(offset + math.prod(dimensions) // elements * size)
        promised = math.ceil(file.tell() / alignment) * alignment + max(ends)
    if header.size < promised:
        raise InputError(
            f"{path}: is cut off: {header.size:,} bytes are there, its header promises {promised:,}; download it again"
        )


_MOST_DIMENSIONS = 4  # of ggml


class _Header:
    """Reads a GGUF header piece by piece; ValueError where the file ends before the piece does."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size

    def take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.file.read(self._there(struct.calcsize(form))))

    def text(self) -> bytes:
        return self.file.read(self._there(*self.take("<Q")))

    def value(self, kind: int) -> Any:
        """A number; None for what is skipped, texts and arrays."""
        if kind == 8:
            self.text()
        elif kind == 9:
            of, count = self.take("<IQ")
            if of in _FORMS:
                self.file.seek(self._there(count * struct.calcsize(_FORMS[of])), os.SEEK_CUR)
            else:
                for _ in range(count):
                    self.value(of)
        else:
            return self.take(_FORMS[kind])[0]
        return None

    def _there(self, count: int) -> int:
        if count > self.size - self.file.tell():
            raise ValueError(f"it ends after {self.size:,} bytes, inside its header")
        return count


_FORMS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
"""Of GGUF's kinds of numbers; 8 is a text, 9 an array."""


def is_quantised(module: nn.Module) -> bool:
    """Whether any weight is stored as packed integers."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of `read_gguf` as plain numbers."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(weight).to(dtype)


def unpack_rest(model: nn.Module, packed: tuple[str, ...], dtype: torch.dtype) -> None:
    """Leaves only the linear layers below the modules of these names packed: norms, biases, pad tokens and embedders
    are small, and read in other ways than by running a layer."""
    for name, module in list(model.named_modules()):
        is_linear = isinstance(module, nn.Linear)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if hasattr(parameter, "quant_type") and not (is_linear and key == "weight"):
                setattr(module, key, nn.Parameter(unpacked(parameter, dtype), requires_grad=False))
        if is_linear and name.split(".")[0] not in packed and hasattr(module.weight, "quant_type"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _plain(module))


def plain_copy(module: ModuleT) -> ModuleT:
    """A deep copy whose linear layers hold plain weights; such a copy can be trained and loaded into."""
    packed = [layer for layer in module.modules() if hasattr(getattr(layer, "weight", None), "quant_type")]
    return copy.deepcopy(module, {id(layer): _plain(layer) for layer in packed})


@torch.no_grad()
def _plain(layer: Any) -> nn.Linear:
    weight = unpacked(layer.weight, layer.compute_dtype)
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone().to(weight.dtype), requires_grad=False)
    return plain.eval()
