"""Frozen matrices side by side in one storage, so that one product serves all of them; each stays its own parameter.

Names, shapes, state dict and in-place loading do not change. What is moved or replaced later lies alone again:
`whole_of` then says None, and each matrix is multiplied by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def share_storage(parameters: Sequence[nn.Parameter]) -> None:
    """Lays frozen parameters that differ in their first dimension alone one after the other; trained ones stay."""
    if not parameters:
        return
    first = parameters[0]
    alike = all(p.shape[1:] == first.shape[1:] and p.dtype == first.dtype for p in parameters)
    if not alike or any(p.requires_grad for p in parameters) or whole_of(parameters) is not None:
        return
    whole = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part


def whole_of(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """All of them as one tensor, of the sum of their first dimensions, where they are frozen neighbours; else None."""
    first = parameters[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for parameter in parameters:
        if (
            parameter.requires_grad
            or parameter.storage_offset() != end
            or parameter.untyped_storage().data_ptr() != storage
            or parameter.dtype != first.dtype
            or not parameter.is_contiguous()
        ):
            return None
        end += parameter.numel()
    rows = sum(len(parameter) for parameter in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
