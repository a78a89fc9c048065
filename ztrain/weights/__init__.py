"""What a run leaves on disk: checkpoints and exported adapters, and how a run or export starts from them."""
