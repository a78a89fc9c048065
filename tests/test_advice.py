"""What a run says at its end of when to stop: of image use that rises, stays or falls, and of loss that turns."""

from collections.abc import Sequence

import pytest

from ztrain.train.advice import Row, advice


def recorded(uses: Sequence[float], losses: Sequence[float], half: float = 0.01) -> list[Row]:
    """A run that validates every 100 steps, among rows of steps alone."""
    rows: list[Row] = []
    for i, (use, loss) in enumerate(zip(uses, losses, strict=True)):
        values = {"val/loss": loss, "val/image_use": use, "val/loss_sigma_0.5": loss, "val/other_style": 1.0}
        rows.append({"step": 100 * i, **values, "val/image_use_low": use - half, "val/image_use_high": use + half})
        rows.append({"step": 100 * i + 1, "train/loss": 1.0})
    return rows


FALLS = [1.0, 0.9, 0.8, 0.7, 0.6]
TURNS = [1.0, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("uses", "losses", "told"),
    [
        ([0.0, 0.02, 0.04, 0.06, 0.08], FALLS, "Image use at the end: +0.08000 [+0.07000, +0.09000]. It still rose over"
         " the last 3 validations: train longer. The most image use was at step 400."),
        ([0.0, 0.02, 0.04, 0.06, 0.08], TURNS, "train longer, though validation loss was least at step 100: see"),
        ([0.0, 0.08, 0.08, 0.083, 0.082], FALLS, "It no longer rose, while validation loss still fell: longer training"
         " gains what no reference shows. The most image use was at step 300."),
        ([0.0, 0.08, 0.06, 0.05, 0.04], TURNS, "It no longer rose, and validation loss no longer fell over the last 3"
         " validations (least at step 100): longer training gains nothing. The most image use was at step 100."),
        ([0.0, 0.0, 0.001, 0.0, 0.002], FALLS, "at the end: +0.00200 [-0.00800, +0.01200], not surely above 0:"
         " the image is hardly used. It still rose"),
        ([-0.02, -0.02, -0.03, -0.01, -0.01], TURNS, "the image is hardly used. It no longer rose"),
        ([0.0, 0.05, 0.08], FALLS[:3], "After 3 validations nothing can be said of a trend: 4 are needed. The most"
         " image use was at step 200."),
    ],
)  # fmt: skip
def test_the_rule_reads_the_record(uses: Sequence[float], losses: Sequence[float], told: str) -> None:
    assert told in advice(recorded(uses, losses), None, reads=True)


def test_the_judged_step_is_the_best_one_where_there_is_one() -> None:
    assert advice(recorded(FALLS, FALLS), 300, reads=True).endswith(" The best step is 300 (best.json).")


def test_a_list_that_reads_nothing_goes_by_the_loss_alone() -> None:
    still = advice(recorded([0.0] * 5, FALLS), None, reads=False)
    assert still == "Validation loss still fell: train longer. The least validation loss was at step 400."
    assert advice(recorded([0.0] * 5, TURNS), None, reads=False) == (
        "Validation loss no longer fell over the last 3 validations (least at step 100): longer training gains nothing."
        " The least validation loss was at step 100."
    )


def test_what_was_measured_otherwise_or_not_at_all_says_nothing() -> None:
    assert advice([{"step": 1, "train/loss": 1.0}], None, reads=True) == advice([], 3, reads=True) == ""
    earlier = [{**row, "val/loss_sigma_0.9": 9.0} for row in recorded([9.0] * 4, [0.1] * 4) if "val/loss" in row]
    rows = [*earlier, *({**row, "step": row["step"] + 400} for row in recorded([0.0, 0.05, 0.08], FALLS[:3]))]
    assert advice(rows, None, reads=True).endswith("4 are needed. The most image use was at step 600.")
    single = {"step": 0, "val/loss": 1.0, "val/image_use": 0.5}  # one triplet has no interval
    assert advice([single], None, reads=True).startswith("Image use at the end: +0.50000. After 1 validation ")
