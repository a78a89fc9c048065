"""Takes a folder for one run, and finds the checkpoint that it goes on from: the main process decides, for all."""

from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ztrain import checkpoint, files
from ztrain.config import Config
from ztrain.errors import InputError
from ztrain.together import together


def enter_folder(config: Config, accelerator: Accelerator, held: ExitStack) -> checkpoint.Checkpoint | None:
    """Takes the run's folder for this run, and finds where to go on: the main process decides, for all."""
    folder, found = Path(config.output_dir), None
    passed: list[str] = []
    with together(accelerator):
        if accelerator.is_main_process:
            held.enter_context(checkpoint.run_lock(folder))
            files.sweep(folder)
            files.sweep(folder / "checkpoints")
            used = (folder / "metrics.jsonl").exists() or (folder / "export").exists()
            if used and config.resume_from_checkpoint == "none":
                raise InputError(
                    f"output_dir {folder} already holds a run; continue it with --resume_from_checkpoint latest, name "
                    "another folder, or remove it"
                )
            found, passed = checkpoint.find(config.resume_from_checkpoint, folder / "checkpoints")
    [chosen] = broadcast_object_list([found and found.path])
    with together(accelerator):
        if chosen is not None and found is None:
            try:
                found = checkpoint.read(chosen)
            except InputError as error:
                raise InputError(f"{error} (output_dir must be on a file system that all processes share)") from error
    for reason in passed:
        accelerator.print(f"passed over: {reason}")
    if found is not None:
        accelerator.print(f"resuming from {found.path} at step {found.step}")
    elif config.resume_from_checkpoint == "latest":
        accelerator.print(f"no checkpoint in {folder / 'checkpoints'}: starting at step 0")
    return found
