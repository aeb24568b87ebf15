"""The command line: `distill COMMAND --config RECIPE`."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distill import commands, logs
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
    "refine": "train the student on its own rationales, with trl",
    "evaluate": "evaluate teacher, assistant and student on the test split",
    "calibrate": "fit the cascade's temperatures and thresholds on the validation split",
    "cascade": "run the cascade of student and teacher on the test split",
    "export": "export the student as a folder that transformers can load",
    "report": "write report.html again and print the table of results",
    "serve": "serve the cascade with an OpenAI-compatible API",
    "simulate": "simulate the served cascade under a day's load; find the replicas for a deadline",
    "batches": "list the batches of a run that are not answered yet, or cancel them",
    "review": "look through the reasoning data in a browser; keep, edit, drop or relabel posts",
}
"""The commands that read a recipe."""

OTHERS = commands.PURPOSES | {
    "recipes": "list the recipes that come with distill",
    "init": "write one of them into this folder: distill init quickstart",
    "completion": "print the completion script of a shell: bash, zsh or tcsh",
}
"""The commands that read no recipe."""

_USAGE = """usage: distill COMMAND --config RECIPE [--FIELD VALUE ...]

Distil a multimodal teacher into a small student that reasons and classifies.

commands:
{commands}

Any field of the recipe can be overridden by its dotted name: --student.distillation.weight 0.5
`distill COMMAND --help` documents the fields, `distill COMMAND --student.help` those of one stage;
--print_config prints the resolved recipe. Every command takes --log-format json: one JSON object a line on stderr.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 (failure while running), 2 (settings or data), 130 (interrupted), 143 (SIGTERM).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        form, arguments = logs.split_format(arguments)
    except SettingsError as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    listed = "\n".join(f"  {name:<10} {description}" for name, description in (COMMANDS | OTHERS).items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(commands=listed))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from distill import __version__

        print(__version__)
        return 0
    is_main = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"  # no other process of a training
    logs.configure(form, main=is_main)
    if arguments[0] not in COMMANDS | OTHERS:
        logs.fail(f"{arguments[0]} is not a command; the commands are {', '.join(COMMANDS | OTHERS)}")
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    try:
        if arguments[0] in OTHERS:
            _other(arguments[0], arguments[1:])
        else:
            _command(arguments[0], arguments[1:])
        sys.stdout.flush()
    except (SettingsError, RunError) as error:
        logs.fail(describe(error))
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt as interruption:
        if is_main:
            print(INTERRUPTED, file=sys.stderr)
        return 143 if isinstance(interruption, Terminated) else 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - a bug: print the traceback and one line
        logs.fail(describe(error), mask(traceback.format_exc()))
        return 1
    return 0


def _other(command: str, arguments: Sequence[str]) -> None:
    try:
        parsed, rest = _parsed(_options(command), arguments, rest=command == "compare")
    except argparse.ArgumentError as error:
        raise SettingsError(f"{command}: {error}") from None
    if command == "predict":
        commands.predict(parsed)
    elif command == "compare":
        commands.compare(parsed, rest)
    elif command == "push":
        commands.push(parsed)
    elif command == "copy":
        commands.copy(parsed)
    elif command == "sync":
        commands.sync(parsed.run)
    elif command == "completion":
        from distill import completion

        print(completion.script(parsed.shell, {name: _options(name) for name in COMMANDS | OTHERS}))
    else:
        _shipped(command, parsed)


def _options(command: str) -> Any:
    """The parser of a command: a `RecipeParser`, or one of argparse."""
    if command in COMMANDS:
        from distill import recipe  # imported here, so that `distill --help` does not import torch

        reads = recipe.parser(command)
        if command == "run":
            reads.add_argument("--until", type=str, default=None, help="Stop after this stage.")
        if command in ("plan", "simulate"):
            from distill.planning import commands as planning

            planning.add_options(command, reads)
        if command == "batches":
            reads.add_argument("--cancel", action="store_true", help="Cancel them at the service.")
        if command == "review":
            reads.add_argument("--host", type=str, default="127.0.0.1", help="Address that the page is served on.")
            reads.add_argument("--port", type=int, default=8100, help="Port of the page; 0: any free port.")
        return reads
    options = argparse.ArgumentParser(
        prog=f"distill {command}", description=OTHERS[command], exit_on_error=False, allow_abbrev=False
    )
    if command == "completion":
        options.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    elif command == "predict":
        commands.add_predict(options)
    elif command == "compare":
        commands.add_compare(options)
    elif command == "push":
        commands.add_push(options)
    elif command == "copy":
        commands.add_copy(options)
    elif command == "sync":
        options.add_argument("run", type=Path, help="folder of a run, such as runs/quickstart")
    else:
        from distill import shipped

        options.epilog = f"the recipes are {', '.join(shipped.recipes())}"
        if command == "init":
            options.add_argument("recipe", help="name of the recipe")
    return options


def _shipped(command: str, parsed: argparse.Namespace) -> None:
    from distill import shipped

    if command == "init":
        path = shipped.write(parsed.recipe)
        one = path.is_file()
        print(f"wrote {path}; {'its first line' if one else 'the first line of its files'} is the command that runs "
              f"{'it' if one else 'them'}")  # fmt: skip
        return
    for name, purpose in shipped.recipes().items():
        print(f"{name:<16} {purpose}")


def _parsed(
    options: argparse.ArgumentParser, arguments: Sequence[str], rest: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """The parsed arguments, and with `rest` those that are not known.

    Raises:
        argparse.ArgumentError: also where argparse would end the process.
    """

    def fail(message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    options.error = fail  # type: ignore[method-assign]
    return options.parse_known_args(arguments) if rest else (options.parse_args(arguments), [])


def _command(command: str, arguments: Sequence[str]) -> None:
    from distill import chain, recipe, review
    from distill.stages import batches, report, serve

    settings, parsed = recipe.load(_options(command), arguments)
    if command in ("plan", "simulate"):
        from distill.planning import commands as planning

        print(planning.output(command, settings, parsed))
        return
    if command == "report":
        chain.check_outputs(settings)
        report.run(settings)
        print(report.summary(settings))
        return
    if command == "serve":
        serve.run(
            settings, chain.input_fingerprints(settings, command, ("teacher", settings.student_stage, "calibrate"))
        )
        return
    if command == "batches":
        print(*batches.listing(settings, cancel=parsed.cancel), sep="\n")
        return
    if command == "review":
        review.run(settings, parsed.host, parsed.port)
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
