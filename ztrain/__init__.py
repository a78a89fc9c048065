"""Teaches Z-Image to see: the splice, trained adapters and their comparison.

`ztrain.load_adapter(pipeline, path)` puts an exported adapter on a diffusers pipeline.
"""

from typing import Any

from ztrain.version import VERSION as __version__

__all__ = ["__version__", "load_adapter"]


def load_adapter(pipeline: Any, path: Any, **options: Any) -> Any:
    """See `ztrain.sampling.pipeline.load_adapter`; importing ztrain alone loads no library."""
    from ztrain.sampling import pipeline as ours

    return ours.load_adapter(pipeline, path, **options)
