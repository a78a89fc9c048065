"""The trained transformer: its forward, the flow-matching loss and the sampler."""
