"""The command ``python -m recipes.autograd``."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.autograd._expression import SCALARS, evaluate
from recipes.autograd._pitfalls import PITFALLS, Pitfall, by_scalars, by_torch
from recipes.autograd._scalar import backward, variable
from recipes.autograd._tree import expression_tree, number

DESCRIPTION = """\
Where bad gradients are born: expressions whose value is harmless and whose gradient
is infinite or NaN, by a small scalar reverse-mode differentiator and by
torch.autograd, each above its cure. Also draws any expression as a tree with the
value and the gradient at every node."""

EXAMPLES = f"""\
examples:
  python -m recipes.autograd --case where
  python -m recipes.autograd --expression "x*y + exp(x)" --at x=1 y=2

functions in an expression: {", ".join(SCALARS.functions)}; a comparison may be the first
argument of where, as in "where(x > 0, sqrt(x), 0)"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line and return the exit code."""
    parser = ArgumentParser(
        "python -m recipes.autograd",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--case",
        default="all",
        choices=["all", *PITFALLS],
        metavar="NAME",
        help=f"one failure with its tree, or all of them in a table (default: all): {', '.join(PITFALLS)}",
    )
    what.add_argument("--expression", metavar="TEXT", help="draw this expression instead")
    parser.add_argument(
        "--at", nargs="+", default=[], metavar="NAME=NUMBER", help="the expression's variables, such as x=1 y=-inf"
    )
    options = parser.parse_args(argv)
    if options.at and options.expression is None:
        parser.error("--at needs an --expression")

    console = Console()
    if options.expression is not None:
        try:
            _draw(options.expression, _point(options.at), console)
        except ValueError as error:
            parser.error(str(error))
    elif options.case == "all":
        _compare(PITFALLS.values(), console)
    else:
        pitfall = PITFALLS[options.case]
        _compare([pitfall], console)
        console.print()
        _draw(pitfall.expression, pitfall.at, console)
    return 0


def _compare(pitfalls: Iterable[Pitfall], console: Console) -> None:
    table = Table("case", "expression and cure", "value", "gradient", "by torch", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].no_wrap = table.columns[2].no_wrap = True
    reasons = Table.grid(padding=(0, 2))
    for pitfall in pitfalls:
        ours, torchs, cured = (
            by_scalars(pitfall.expression, pitfall.at),
            by_torch(pitfall.expression, pitfall.at),
            by_torch(pitfall.cure, pitfall.at),
        )
        table.add_row(
            pitfall.name,
            pitfall.expression,
            number(ours.value),
            _numbers(ours.gradient.values()),
            _numbers(torchs.gradient.values()),
        )
        table.add_row(
            _named(pitfall.at),
            Text(pitfall.cure, style="green"),
            number(cured.value),
            "",
            _numbers(cured.gradient.values()),
        )
        table.add_section()
        reasons.add_row(pitfall.name, pitfall.why)
    console.print(table, reasons)


def _draw(expression: str, at: Mapping[str, float], console: Console) -> None:
    variables = {name: variable(name, value) for name, value in at.items()}
    output = evaluate(expression, variables, SCALARS)
    gradients = backward(output)
    console.print(f"{expression}   ", _named(at), highlight=False, markup=False)
    console.print(expression_tree(output, gradients))
    if at:
        console.print("gradient by torch: ", _named(by_torch(expression, at).gradient), highlight=False)


def _point(assignments: Iterable[str]) -> dict[str, float]:
    point = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            point[name] = float(value)
        except ValueError:
            raise ValueError(f"--at must be NAME=NUMBER, such as x=1, got {assignment!r}") from None
        if not name.isidentifier():
            raise ValueError(f"--at must name a variable, such as x=1, got {assignment!r}")
    return point


def _numbers(values: Iterable[float]) -> Text:
    return Text(", ").join(map(number, values))


def _named(values: Mapping[str, float]) -> Text:
    return Text(", ").join(Text(f"{name}=").append_text(number(value)) for name, value in values.items())


if __name__ == "__main__":
    raise SystemExit(main())
