"""Models that are never trained: where they come from, the encoders, the splice's language model."""
