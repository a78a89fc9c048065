"""A new encoded state is an entry of the table and a field of `Encoded`: everything else follows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.triplets import tiny_config, write_triplets
from ztrain.cache.cache import Cache, Needs
from ztrain.cache.fill import fill, verify
from ztrain.cache.samples import needs_of, read_samples
from ztrain.conditioning import Encoded, concatenate
from ztrain.frozen import states
from ztrain.frozen.states import STATES, TEXT_ENCODER, VAE, Encoders, Model, State, assemble, files_of, models_of
from ztrain.images import open_image


class Palette(nn.Module):
    """The encoder: the mean colour of a picture, (3,), times what it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.weight = {"colours": 3}, nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.from_numpy(np.asarray(images[0], dtype=np.float32)).mean((0, 1)) * self.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class WithColour(Encoded):
    colour: list[list[Tensor]] = field(default_factory=list, metadata={"absent": []})


PALETTE: Model[Palette] = Model(
    "palette", "siglip", ("pillow",), lambda source: files_of(source, "*.json"),
    load=lambda *_: Palette(), module=lambda palette: palette, settings="colours",
)  # fmt: skip
COLOUR = State(
    models=(PALETTE,),
    encode=lambda by, images, text, settings: by[PALETTE].encode(images),
    fields=lambda batch: {"colour": batch.each("colour")},
)


def test_a_new_state_is_an_entry_and_a_field(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATES, "colour", COLOUR)
    monkeypatch.setattr(states, "Encoded", WithColour)
    reads, config = frozenset({"colour"}), tiny_config(family, write_triplets(tmp_path / "data"), tmp_path / "cache")
    cache, needs = Cache(config), Needs()
    samples = read_samples(config, cache).train.samples
    needs_of(samples, reads, needs)
    assert models_of(reads) == [TEXT_ENCODER, PALETTE]
    assert fill(cache, needs, "cpu", progress=False).computed == {"latents": 6, "text": 7, "colour": 7}
    assert "states are whole" in verify(cache, needs, "cpu")
    assert set(cache.identities(["latents", "colour"])) == {VAE.role, PALETTE.role}

    prompts, references = [each.prompt for each in samples], [each.references for each in samples]
    read = assemble(Cache(config).states(), prompts, references, reads)
    images = [[open_image(known.picture) for known in each] for each in references]
    live = Encoders.load(config, reads, torch.float32, "cpu").encode(prompts, images, reads, config.encoders)
    assert isinstance(read, WithColour) and isinstance(live, WithColour)
    for ours, theirs, pictures in zip(read.colour, live.colour, references, strict=True):
        assert len(ours) == len(pictures) and torch.equal(torch.stack(ours), torch.stack(theirs))

    both = concatenate([read, read.without_reference()]).select([0, len(samples)])
    assert both.with_reference == [True, False] and isinstance(both, WithColour) and both.colour[1] == []
