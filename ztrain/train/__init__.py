"""One training run: the step, validation, the optimizer and what is logged. `python -m ztrain.train` starts it."""
