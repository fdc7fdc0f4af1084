"""The command line: ``python -m stability_callbacks report | replay``."""

from __future__ import annotations

import json
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = ["main"]

_DESCRIPTION = """\
Look at what training left behind.

  report   one self-contained HTML page: curves of loss, gradient norm and learning rate with incidents marked, a heat
           map of gradient norms by layer, the incidents, and what to change
  replay   run the step of an incident once more from its bundle, and name the operation in which it began
"""

_EPILOG = """\
examples:
  python -m stability_callbacks report lightning_logs/version_3
  python -m stability_callbacks report runs --output runs.html
  python -m stability_callbacks replay lightning_logs/version_3/flight_record/bundles/step=412-nonfinite \\
      --model package.model:Transformer --model-args '{"layers": 6}'

`python -m stability_callbacks COMMAND --help` explains a command.
"""

_REPORT = """\
Write one HTML page about the runs that left files in RUN_DIR or below: TensorBoard's event files, metrics.csv of
CSVLogger, and the flight_record of FlightRecorder. The page needs no network and no other file. Each run has a section,
the newest first; of more than ten the newest ten are shown. Exits with 2 if nothing of a run is found.
"""

_REPLAY = """\
Run the step of an incident once more from the bundle that FlightRecorder kept of it: the batch, the weights before the
step, the random state, and the precision. Names the module, the operation and the line of source in which it began; of
a step whose numbers were finite, such as a spike, compares loss and gradient norm.

Exits with 0 if what the record tells was reproduced, with 1 if it was not or the cause is another, and with 2 if the
bundle is damaged or the model can't be built.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its arguments. Default: those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # each damaged line is named, whatever filters the process has
        warnings.showwarning = _show_warning
        status: int = chosen.command(chosen)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m stability_callbacks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report = commands.add_parser("report", help="write an HTML page about a run", description=_REPORT)
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of a run, or one above several")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    report.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="a module to import first, such as one that registers kinds of your own; the working directory is "
        "searched too; may be repeated",
    )
    report.set_defaults(command=_report)
    replay = commands.add_parser(
        "replay",
        help="run the step of an incident once more",
        description=_REPLAY,
        formatter_class=RawDescriptionHelpFormatter,
    )
    replay.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory of a bundle")
    replay.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:CLASS",
        help="the model's class, or a function that builds it; the working directory is searched too",
    )
    replay.add_argument(
        "--model-args",
        metavar="JSON",
        type=_object,
        help="its arguments, as a JSON object (default: the recorded hyper-parameters)",
    )
    replay.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    replay.add_argument(
        "--allow-classes",
        action="store_true",
        help="import the classes of named tuples and dataclasses that the bundle names; only for bundles you trust",
    )
    replay.set_defaults(command=_replay)
    return parser


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"must be a JSON object such as '{{\"layers\": 6}}', got {text}")
    return value


def _report(chosen: Namespace) -> int:
    from stability_callbacks.report import write_report

    _search_working_directory()
    try:
        for module in chosen.modules:
            import_module(module)
        path = write_report(chosen.run_dir, chosen.output)
    except (ImportError, OSError) as error:
        return _refuse(error)
    print(f"Wrote {path}")
    return 0


def _replay(chosen: Namespace) -> int:
    from stability_callbacks.diagnosis import BundleError, read_bundle
    from stability_callbacks.replay import ReplayError, build_model, import_factory, replay

    _search_working_directory()
    try:
        bundle = read_bundle(chosen.bundle, allow_classes=chosen.allow_classes)
        if chosen.model is None:
            known = bundle.meta.get("model")
            raise ReplayError("--model is missing" + (f": the bundle is of --model {known}" if known else ""))
        model = build_model(import_factory(chosen.model), bundle, chosen.model_args)
        result = replay(bundle, model, chosen.device)
    except (BundleError, ReplayError) as error:
        return _refuse(error)
    incident = bundle.incident
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    if result.found is not None:
        rows.add_row("cause", Text(result.found.explanation))
        facts = ("phase", "module", "module_type", "operation", "source")
        for name in facts:
            value = getattr(result.found, name)
            if value is not None:
                rows.add_row(name.replace("_", " "), Text(value or "the model itself"))
    for name, (recorded, now) in result.numbers.items():
        rows.add_row(name.replace("_", " "), Text(f"{now:.6g}, on record {recorded:.6g}"))
    color = "green" if result.reproduced else "yellow"
    title = Text(f"Step {incident.step}, {incident.kind}")
    Console().print(
        Panel(Group(rows, Text(result.verdict, style=color)), title=title, border_style=color, expand=False)
    )
    return 0 if result.reproduced else 1


def _search_working_directory() -> None:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
