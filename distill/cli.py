"""The command line: `distill COMMAND --config RECIPE`."""

import os
import sys
import traceback
from collections.abc import Sequence

from distill import logs
from distill.errors import RunError, SettingsError
from distill.masking import describe, mask
from distill.training.shutdown import INTERRUPTED, Terminated, raise_on_sigterm

COMMANDS = {
    "run": "run all stages that are not up to date; resumes after an interruption",
    "plan": "estimate data sizes, memory, teacher requests and cost, and check what can be checked; runs nothing",
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
"""The commands that read a recipe."""

SHIPPED = {
    "recipes": "list the recipes that come with distill",
    "init": "write one of them into this folder: distill init quickstart",
}
"""The commands about recipes that come with the package."""

_USAGE = """usage: distill COMMAND --config RECIPE [--FIELD VALUE ...]

Distil a multimodal teacher into a small student that reasons and classifies.

commands:
{commands}

Any field of the recipe can be overridden by its dotted name: --student.distillation.weight 0.5
`distill COMMAND --help` documents the fields, `distill COMMAND --student.help` those of one stage;
--print_config prints the resolved recipe.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 (failure while running), 2 (settings or data), 130 (interrupted), 143 (SIGTERM).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    listed = "\n".join(f"  {name:<10} {description}" for name, description in (COMMANDS | SHIPPED).items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(commands=listed))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from distill import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS | SHIPPED:
        names = ", ".join(COMMANDS | SHIPPED)
        print(f"distill: {arguments[0]} is not a command; the commands are {names}", file=sys.stderr)
        return 2
    is_main = int(os.environ.get("LOCAL_RANK", "0")) == 0  # no other process of a training
    logs.configure(main=is_main)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    try:
        if arguments[0] in SHIPPED:
            _shipped(arguments[0], arguments[1:])
        else:
            _command(arguments[0], arguments[1:])
        sys.stdout.flush()
    except (SettingsError, RunError) as error:
        print(f"distill: {describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt as interruption:
        if is_main:
            print(INTERRUPTED, file=sys.stderr)
        return 143 if isinstance(interruption, Terminated) else 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - a bug: print the traceback and one line
        print(mask(traceback.format_exc()), file=sys.stderr, end="")
        print(f"distill: {describe(error)}", file=sys.stderr)
        return 1
    return 0


def _shipped(command: str, arguments: Sequence[str]) -> None:
    from distill import shipped

    names = f"the recipes are {', '.join(shipped.recipes())}"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: distill {command}{' RECIPE' * (command == 'init')}\n\n{SHIPPED[command]}\n{names}")
    elif command == "recipes" and not arguments:
        for name, purpose in shipped.recipes().items():
            print(f"{name:<16} {purpose}")
    elif command == "init" and len(arguments) == 1:
        path = shipped.write(arguments[0])
        print(f"wrote {path}; its first line is the command that runs it")
    else:
        takes = "one recipe" if command == "init" else "no arguments"
        raise SettingsError(f"{command} takes {takes}; {names}")


def _command(command: str, arguments: Sequence[str]) -> None:
    from distill import chain, recipe  # imported here, so that `distill --help` does not import torch
    from distill.planning.tables import plan_text
    from distill.stages import report, serve

    options = recipe.parser(command)
    if command == "run":
        options.add_argument("--until", type=str, default=None, help="Stop after this stage.")
    if command == "plan":
        options.add_argument("--probe", action="store_true", help="Ask each endpoint one question of the run.")
    settings, parsed = recipe.load(options, arguments)
    if command == "plan":
        print(plan_text(settings, probes=parsed.probe))
        return
    if command == "report":
        chain.check_outputs(settings)
        report.run(settings)
        print(report.summary(settings))
        return
    if command == "serve":
        serve.run(settings, chain.input_fingerprints(settings, command, ("teacher", "student", "calibrate")))
        return
    with raise_on_sigterm():
        ran = chain.run(settings, until=parsed.get("until"), only=None if command == "run" else command)
    if not ran:
        print(f"{settings.folder}: nothing to do, all stages are up to date")
    elif command == "run":
        print(f"ran {', '.join(ran)}")
    if command in ("run", "evaluate", "cascade", "export") and report.is_available(settings):
        if ran or not report.is_current(settings):
            report.run(settings)
        print(report.summary(settings))
