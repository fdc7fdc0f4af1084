"""The command ``python -m recipes.gradient_flow``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recipes.gradient_flow._digits import IMAGES
from recipes.gradient_flow._figures import draw_depths, draw_initializations
from recipes.gradient_flow._network import ActivationName
from recipes.gradient_flow._records import write_records
from recipes.gradient_flow._study import Observation, Setting, StudyName, observe, settings
from recipes.gradient_flow._summary import Summary, summarize
from recipes.gradient_flow._tables import depth_sheets, initialization_sheet
from recipes.gradient_flow._tensorboard import write_tensorboard
from recipes.gradient_flow._verdict import RULE
from recipes.runner import from_command_line
from stability_callbacks._atomic import atomic_path
from stability_callbacks.initialization import Policy

__all__ = ["GradientFlow", "main"]

CONFIG = Path(__file__).parents[2] / "configs" / "gradient_flow.yaml"
INTERRUPTED = 130  # what shells report after Ctrl-C

ACTIVATIONS: dict[StudyName, tuple[ActivationName, ...]] = {
    "initializations": ("relu", "tanh", "sigmoid"),
    "depths": ("relu", "tanh", "sigmoid", "gelu"),
}

LEGEND = f"""\
first, last: gradient norm of the weights of the layer next to the input, and of
the one that makes the logits. ratio: first to last. inner: the same from the
second layer to the last but one, which have one shape. signal: std over the
batch at the last hidden layer. ↓ vanishing, ↑ exploding, on most seeds.
Verdicts: {RULE}."""

POINTERS = """
Summary      {output}/summary.md
Figures      {figures}
Results      {output}/results.json
TensorBoard  tensorboard --logdir {output}/tensorboard
"""


class GradientFlow:
    """Measure signals and gradients of deep networks at initialization, on a batch of scikit-learn's digits.

    Nothing is trained, and digits are the only data.

    Args:
        study: Which study: the initializations side by side on one network, or ever deeper networks.
        seed: The first seed, for weights and batches.
        seeds: How many seeds, from the first one on.
        layers: Linear layers of the network in the study of initializations.
        depths: Linear layers of the networks in the study of depths.
        width: Units of each hidden layer.
        batch_size: Images to measure on; as many others are for initializations that look at data.
        precision: Bits of a number in the network: 32, as in training, or 64, which shows what underflows in 32.
        initializations: Policies to compare on one network, by name; null for PyTorch's own initialization.
        depth_initializations: Policies to compare over the depths, by name; null for PyTorch's own initialization.
        output: Folder for tables, figures, records and TensorBoard's files.
        threads: Threads of PyTorch; more than one slow networks of this size down.

    Raises:
        ValueError: If there are not enough digits for the batches, or nothing to compare.
    """

    def __init__(
        self,
        study: Literal["initializations", "depths", "all"],
        seed: NonNegativeInt,
        seeds: PositiveInt,
        layers: PositiveInt,
        depths: list[PositiveInt],
        width: PositiveInt,
        batch_size: PositiveInt,
        precision: Literal[32, 64],
        initializations: dict[str, Policy | None],
        depth_initializations: dict[str, Policy | None],
        output: Path,
        threads: PositiveInt,
    ) -> None:
        if not 2 <= batch_size <= IMAGES // 2:
            raise ValueError(f"`batch_size` must be from 2 to {IMAGES // 2}, half of the digits, got {batch_size}")
        self.policies: dict[StudyName, dict[str, Policy | None]] = {
            "initializations": initializations,
            "depths": depth_initializations,
        }
        self.depths: dict[StudyName, list[int]] = {"initializations": [layers], "depths": sorted(set(depths))}
        self.studies: list[StudyName] = [name for name in self.policies if study in (name, "all")]
        for name in self.studies:
            if not (self.policies[name] and self.depths[name]):
                raise ValueError(f"the study of {name} must have something to compare, got an empty list")
        self.seeds = range(seed, seed + seeds)
        self.width = width
        self.batch_size = batch_size
        self.dtype = torch.float32 if precision == 32 else torch.float64
        self.output = output
        self.threads = threads
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self, console: Console) -> Iterator[Observation]:
        """Observe every setting of the chosen studies with every seed."""
        torch.set_num_threads(self.threads)
        todo = [setting for study in self.studies for setting in self.settings(study)]
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("networks", total=len(todo) * len(self.seeds))
            for setting in todo:
                for seed in self.seeds:
                    yield self.observe(setting, seed)
                    progress.advance(task)

    def settings(self, study: StudyName) -> list[Setting]:
        """The networks of a study."""
        return settings(study, ACTIVATIONS[study], self.policies[study], self.depths[study])

    def observe(self, setting: Setting, seed: int) -> Observation:
        """Make and measure one network."""
        policy = self.policies[setting.study][setting.initialization]
        return observe(setting, policy, seed, width=self.width, batch_size=self.batch_size, dtype=self.dtype)


def report(observations: Sequence[Observation], output: Path, console: Console) -> None:
    """Print the tables; write ``results.json``, ``summary.md``, the figures and TensorBoard's files."""
    summaries = summarize(observations)
    sheets, figures = [], []
    if compared := _of("initializations", summaries):
        sheets.append(initialization_sheet(compared))
        figures.append(output / "initializations.png")
        draw_initializations(compared, figures[-1])
    if compared := _of("depths", summaries):
        sheets += depth_sheets(compared)
        figures.append(output / "depths.png")
        draw_depths(compared, figures[-1])
    write_records(observations, output / "results.json")
    write_tensorboard(summaries, figures, output / "tensorboard")
    pictures = [f"![{figure.stem}]({figure.name})" for figure in figures]
    parts = ["# Gradient flow at initialization", LEGEND, *(sheet.markdown() for sheet in sheets), *pictures]
    with atomic_path(output / "summary.md") as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for sheet in sheets:
        console.print()
        console.print(sheet.table())
    console.print()
    console.print(LEGEND, highlight=False, markup=False)
    console.print(POINTERS.format(output=output, figures=", ".join(map(str, figures))), highlight=False, soft_wrap=True)


def _of(study: StudyName, summaries: Sequence[Summary]) -> list[Summary]:
    return [each for each in summaries if each.setting.study == study]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    console = Console()
    recipe = from_command_line(GradientFlow, CONFIG, argv)
    observations: list[Observation] = []
    code = 0
    try:
        for observation in recipe.run(console):
            observations.append(observation)  # noqa: PERF402 - an interruption must leave those so far
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted: this is what was measured so far.")
        code = INTERRUPTED
    report(observations, recipe.output, console)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
