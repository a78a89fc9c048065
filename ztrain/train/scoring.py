"""How good a run's list is while it trains: held-out samples drawn every so many steps, judged, the best step marked.

In: a model at a step, the cache, the judges. Out: metrics under score/, pictures in `<output_dir>/scored`, and
`best.json`, which says by which rule a step is the best so far. The columns are those of a comparison: no image, the
splice, this list; so are scores and rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from ztrain.compare.judging import Judging, Sheet, TruthLoader
from ztrain.compare.ranking import Standing, pick, ranked, stand
from ztrain.compare.record import Choice, read_best, write_best
from ztrain.config import Config
from ztrain.data.digests import digest_json
from ztrain.distributed.agreement import together
from ztrain.errors import InputError
from ztrain.images import PictureFile
from ztrain.model.adapted_dit import AdaptedDiT
from ztrain.train.validate import Previews
from ztrain.weights.checkpoint import BEST_NAME

_PLAIN, _SPLICE, _OURS = range(3)


@dataclass(slots=True)
class Scoring:
    """Draws and judges. `judging` is loaded on the main process alone."""

    config: Config
    previews: Previews
    accelerator: Accelerator
    judging: Judging | None

    @classmethod
    def of(cls, config: Config, previews: Previews, accelerator: Accelerator, truth: TruthLoader | None) -> "Scoring":
        """Raises InputError where nothing judges."""
        judges = config.judges
        if not any((judges.siglip, judges.dino, judges.style, judges.truth)):
            raise InputError(
                f"validation.score_steps {config.validation.score_steps} needs someone who judges: set judges.siglip,"
                " judges.dino or judges.style, or score_steps to 0"
            )
        judging = None
        with together(accelerator):
            if accelerator.is_main_process:
                judging = Judging(judges, accelerator.device, truth)
        return cls(config, previews, accelerator, judging)

    def score(self, model: AdaptedDiT, step: int) -> dict[str, float]:
        """`score/<name>` of the list, and of the headline's likeness its paired difference to the splice with interval.
        Every process calls it; the main one judges, the others get nothing."""
        drawn = self.previews.draw(model, step)
        values: dict[str, float] = {}
        with together(self.accelerator):
            if self.judging is not None:
                values = self._judge(self.judging, drawn, step)
        return values

    def _judge(self, judging: Judging, drawn: Sequence[Path], step: int) -> dict[str, float]:
        columns = [self.previews.base("no_image"), self.previews.base("splice"), drawn]
        rows = self.previews.rows
        sheet = Sheet(
            cases=rows,
            pictures=[[[PictureFile(path)] for path in column] for column in columns],
            plain=_PLAIN,
        )
        verdicts = judging.score(sheet)
        clusters = [row.prompt for row in rows], [row.look for row in rows]
        values: dict[str, float] = {}
        for metric in (ranked(score, _SPLICE, clusters) for score in verdicts.scores):
            mean, above = metric.means[_OURS], metric.differences[_OURS]
            values |= {f"score/{metric.name}": mean.mean} if mean is not None else {}
            if metric.name == verdicts.style and above is not None:
                values[f"score/{metric.name}_above_splice"] = above.mean
                if limits := above.limits:
                    values |= {f"score/{metric.name}_above_splice_low": limits[0]}
                    values |= {f"score/{metric.name}_above_splice_high": limits[1]}
        standing = stand(verdicts, _PLAIN, self.config.compare.keep_adherence, clusters)
        self._mark(standing, step)
        return values

    def _mark(self, standing: Standing | Choice, step: int) -> None:
        """Writes the best step so far, the first not counted where nothing is trained there yet. What an earlier life
        of the run found beyond this step, or of other rows or by other judges, does not count."""
        path, by = Path(self.config.output_dir) / BEST_NAME, self._by
        known = read_best(path, by)
        if path.is_file() and not known and step > self.config.validation.score_steps:
            tqdm.write(f"{path} is of other rows or judges, or damaged: the best step is marked from step {step} on")
        steps = {number: values for number, values in known.items() if int(number) < step}
        if isinstance(standing, Choice) or (step == 0 and self.config.init_from is None):
            nothing = Choice(column=None, rule=standing.rule, found="Nothing is trained yet.")
            write_best(path.parent, standing if isinstance(standing, Choice) else nothing, None, steps, by)
            return
        kept = None if standing.kept is None else standing.kept[_OURS]
        steps[str(step)] = [standing.styles[_OURS], kept]
        numbers = list(steps)
        shares = [1.0 if values[1] is None else values[1] for values in steps.values()]
        so_far = Standing([values[0] or 0.0 for values in steps.values()], shares, standing.rule)
        keep = self.config.compare.keep_adherence
        best = pick(so_far, range(len(numbers)), keep, [f"step {number}" for number in numbers])
        write_best(path.parent, best, None if best.column is None else int(numbers[best.column]), steps, by)

    @property
    def _by(self) -> str:
        """What figures of different steps must share to be compared."""
        rows = [[row.prompt, [known.digest for known in row.references]] for row in self.previews.rows]
        parts = (self.config.judges, self.config.sample, self.config.compare)
        judges, sample, compare = (part.model_dump(mode="json") for part in parts)
        # As before there were such keys, where they change nothing: a run that goes on keeps its best step.
        del sample["negative"], sample["negative_prompt"]
        if sample["shift"] is None:
            del sample["shift"]
        return digest_json([rows, judges, sample | self.previews.settings.later, compare])
