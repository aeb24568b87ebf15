"""The `distill` command."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from distill.errors import RunError, SettingsError

COMMANDS = {
    "run": "the whole chain; a second call resumes or does nothing",
    "plan": "what would run, sizes, memory, teacher calls and cost; runs nothing",
    "teacher": "fine-tune a local teacher on gold rationales",
    "annotate": "the teacher writes reasoning data",
    "assistant": "train the assistant on it",
    "augment": "the assistant writes more, kept when right",
    "student": "distil the student",
    "evaluate": "judge every role on the test split",
    "calibrate": "fit temperatures and thresholds on the validation split",
    "cascade": "student and teacher share the test split, in three stages",
    "export": "write the student as a folder that transformers loads",
    "report": "write report.html anew and print the table",
    "serve": "put student and teacher into service behind one OpenAI-compatible address",
}

_USAGE = """usage: distill COMMAND --config RECIPE [--FIELD VALUE ...]

From a multimodal teacher to a small student that reasons and classifies.

commands:
{commands}

Any field of the recipe can be given by its dotted name: --student.distillation.weight 0.5
`distill COMMAND --help` documents every field, --print_config prints the resolved recipe.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status 0, 1 (failure while running), 2 (settings and data), 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    listed = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
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
    _quieten()
    try:
        _command(arguments[0], arguments[1:])
        sys.stdout.flush()
    except (SettingsError, RunError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        print("distill: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - a fault of ours: one sentence, and the trace for whoever mends it
        traceback.print_exc()
        print(f"distill: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _command(command: str, arguments: Sequence[str]) -> None:
    from distill import chain, recipe  # imported late: `distill --help` needs no torch
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
        report.run(settings)
        print(report.summary(settings))
        return
    if command == "serve":
        serve.run(settings, chain.ready(settings, command, ("teacher", "student", "calibrate")))
        return
    ran = chain.run(settings, until=parsed.get("until"), only=None if command == "run" else command)
    if not ran:
        print(f"{settings.folder}: nothing to do, every stage is up to date")
    elif command == "run":
        print(f"ran {', '.join(ran)}")
    if command in ("run", "evaluate", "cascade", "export") and (settings.folder / "evaluate" / "metrics.json").exists():
        if ran or not (settings.folder / "report.html").exists():
            report.run(settings)
        print(report.summary(settings))


def _quieten() -> None:
    """This house's own messages, and of the libraries' only what matters."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("distill").setLevel(logging.INFO)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchdata|transformers|peft)\..*")
