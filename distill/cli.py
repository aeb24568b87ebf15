"""The command line: `distill COMMAND --config RECIPE`."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from distill.errors import RunError, SettingsError
from distill.masking import mask

COMMANDS = {
    "run": "run all stages that are not up to date; resumes after an interruption",
    "plan": "estimate data sizes, memory, teacher requests and cost; runs nothing",
    "teacher": "fine-tune a local teacher on gold rationales and labels",
    "annotate": "write rationales for the training posts with the teacher",
    "assistant": "train the assistant on the teacher's rationales",
    "augment": "write further rationales with the assistant; keep the correct ones",
    "student": "train the student with knowledge distillation",
    "evaluate": "evaluate teacher, assistant and student on the test split",
    "calibrate": "fit the cascade's temperatures and thresholds on the validation split",
    "cascade": "run the cascade of student and teacher on the test split",
    "export": "export the student as a folder that transformers can load",
    "report": "write report.html again and print the table of results",
    "serve": "serve the cascade with an OpenAI-compatible API",
}

_USAGE = """usage: distill COMMAND --config RECIPE [--FIELD VALUE ...]

Distil a multimodal teacher into a small student that reasons and classifies.

commands:
{commands}

Any field of the recipe can be overridden by its dotted name: --student.distillation.weight 0.5
`distill COMMAND --help` documents the fields, `distill COMMAND --student.help` those of one stage;
--print_config prints the resolved recipe.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (failure while running), 2 (settings or data), 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    listed = "\n".join(f"  {name:<10} {description}" for name, description in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(commands=listed))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from distill import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"distill: {arguments[0]} is not a command; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _configure_logging()
    try:
        _command(arguments[0], arguments[1:])
        sys.stdout.flush()
    except (SettingsError, RunError) as error:
        print(f"distill: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        print("distill: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - a bug: print the traceback and one line
        print(mask(traceback.format_exc()), file=sys.stderr, end="")
        print(f"distill: unexpected {type(error).__name__}: {mask(str(error))}", file=sys.stderr)
        return 1
    return 0


def _command(command: str, arguments: Sequence[str]) -> None:
    from distill import chain, recipe  # imported here, so that `distill --help` does not import torch
    from distill.planning.tables import plan_text
    from distill.stages import report, serve

    options = recipe.parser(command)
    if command == "run":
        options.add_argument("--until", type=str, default=None, help="Stop after this stage.")
    settings, parsed = recipe.load(options, arguments)
    if command == "plan":
        print(plan_text(settings))
        return
    if command == "report":
        chain.check_outputs(settings)
        report.run(settings)
        print(report.summary(settings))
        return
    if command == "serve":
        serve.run(settings, chain.input_fingerprints(settings, command, ("teacher", "student", "calibrate")))
        return
    ran = chain.run(settings, until=parsed.get("until"), only=None if command == "run" else command)
    if not ran:
        print(f"{settings.folder}: nothing to do, all stages are up to date")
    elif command == "run":
        print(f"ran {', '.join(ran)}")
    if command in ("run", "evaluate", "cascade", "export") and report.is_available(settings):
        if ran or not report.is_current(settings):
            report.run(settings)
        print(report.summary(settings))


def _one_line(error: BaseException) -> str:
    return " ".join(str(mask(str(error))).splitlines())


class _MaskingFormatter(logging.Formatter):
    """Masks passwords in the lines of another formatter."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return str(mask(self._inner.format(record)))


def _configure_logging() -> None:
    """Show info messages of distill; hide the routine messages and warnings of the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _MaskingFormatter):
            handler.setFormatter(_MaskingFormatter(handler.formatter))
    logging.getLogger("distill").setLevel(logging.INFO)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchdata|transformers|peft)\..*")
