"""The command line: `distill COMMAND --config RECIPE`."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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

OTHERS = {
    "predict": "label the posts of a file with the student of a run, or with student and teacher",
    "compare": "compare runs on the same test posts, or run a recipe and its variants and compare them",
    "push": "upload the exported student of a run, or its reasoning data, to the Hugging Face hub",
    "sync": "send the offline runs of a run to wandb, with the lineage of their artifacts",
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
    is_main = int(os.environ.get("LOCAL_RANK", "0")) == 0  # no other process of a training
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
        _predict(parsed)
    elif command == "compare":
        _compare(parsed, rest)
    elif command == "push":
        _push(parsed)
    elif command == "sync":
        _sync(parsed.run)
    elif command == "completion":
        from distill import completion

        print(completion.script(parsed.shell, {name: _options(name) for name in COMMANDS | OTHERS}))
    else:
        _shipped(command, parsed)


def _options(command: str) -> Any:
    """The parser of a command: a `RecipeParser`, or one of argparse."""
    if command in COMMANDS:
        from distill import recipe  # imported here, so that `distill --help` does not import torch
        from distill.planning import commands

        reads = recipe.parser(command)
        if command == "run":
            reads.add_argument("--until", type=str, default=None, help="Stop after this stage.")
        if command in ("plan", "simulate"):
            commands.add_options(command, reads)
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
        _add_predict(options)
    elif command == "compare":
        _add_compare(options)
    elif command == "push":
        _add_push(options)
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


def _add_predict(options: argparse.ArgumentParser) -> None:
    options.add_argument("--run", type=Path, required=True, help="folder of a run, such as runs/quickstart")
    options.add_argument("--input", type=Path, required=True, help="JSONL, CSV, Parquet, or a folder of pictures")
    options.add_argument("--output", type=Path, required=True, help="a file that ends in .jsonl, .csv or .parquet")
    options.add_argument("--cascade", action="store_true", help="ask the teacher where the student is not certain")
    options.add_argument("--rationales", action="store_true", help="generate the student's rationales")
    options.add_argument(
        "--explain", choices=("student", "teacher", "none"),
        help="who explains the label if the student's rationale is invalid or argues for another one "
        "(default: with --cascade, serve.explain of the recipe, otherwise the student; teacher: one more call)",
    )  # fmt: skip
    options.add_argument("--max_new_tokens", type=int, default=512, help="limit of a rationale (default: 512)")
    options.add_argument("--images", type=Path, help="folder of the images (default: that of the input)")
    options.add_argument("--device", help="of torch, for the student alone (default: the first GPU, or the CPU)")


def _predict(parsed: argparse.Namespace) -> None:
    from distill.predict import predict

    with raise_on_sigterm():
        written = predict(
            parsed.run, parsed.input, parsed.output, cascade=parsed.cascade, rationales=parsed.rationales,
            explain=parsed.explain, images=parsed.images, max_new_tokens=parsed.max_new_tokens,
            device=parsed.device,
        )  # fmt: skip
    print(f"wrote {written.rows} rows to {parsed.output}")
    if written.dropped:
        print(f"{written.dropped} rows cannot be used; the reasons are in {written.quarantine}")


def _add_compare(options: argparse.ArgumentParser) -> None:
    options.usage = (
        "distill compare RUN RUN ... [--output FILE]\n"
        "       distill compare --config RECIPE --variants FILE ... [--seeds SEED ...] [--output FILE]\n"
        "                       [--FIELD VALUE ...]"
    )
    options.description = (
        f"{OTHERS['compare']}; the first is the baseline, and runs that differ in their seed alone are one"
    )
    options.add_argument("--config", type=Path, help="a recipe that is run first, as the baseline")
    options.add_argument(
        "--variants",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="recipes with the fields alone that differ from it, such as recipes/ablations/*.yaml",
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[], metavar="SEED", help="run each with these seeds")
    options.add_argument("--output", type=Path, action="append", default=[], metavar="FILE",
                         help="a file that ends in .csv or .html; may be given twice")  # fmt: skip


def _compare(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from distill import comparison, variants
    from distill.evaluation.comparison_page import text_table

    for path in parsed.output:
        comparison.check_output(path)
    folders: Sequence[str | Path] = rest
    if parsed.config is not None:
        if not parsed.variants:
            raise SettingsError("compare: --config needs --variants")
        with raise_on_sigterm():
            folders = variants.run_variants(parsed.config, parsed.variants, parsed.seeds, rest)
    elif unknown := [item for item in rest if item.startswith("-")]:
        raise SettingsError(f"compare: {unknown[0]} is no option without --config")
    elif parsed.variants or parsed.seeds:
        raise SettingsError(f"compare: {'--variants' if parsed.variants else '--seeds'} needs --config")
    frame = comparison.compare(folders)
    print(text_table(frame))
    for path in parsed.output:
        comparison.write(frame, path)


def _add_push(options: argparse.ArgumentParser) -> None:
    options.add_argument("--run", type=Path, required=True, help="folder of a run, such as runs/quickstart")
    options.add_argument("--to", required=True, metavar="USER/NAME", help="repository; it is made if it does not exist")
    options.add_argument("--data", action="store_true", help="upload the reasoning data with its pictures instead")
    options.add_argument("--private", action="store_true", help="make a new repository private")
    options.add_argument("--language", help="code of the language of the posts for the card, such as en")
    options.add_argument(
        "--datasets", nargs="+", default=[], metavar="ID", help="datasets on the hub that the student was trained on"
    )


def _push(parsed: argparse.Namespace) -> None:
    from distill import push

    target = push.Target(parsed.to, parsed.private, parsed.language, parsed.datasets)
    print(f"uploaded to {(push.push_data if parsed.data else push.push_student)(parsed.run, target)}")


def _sync(folder: Path) -> None:
    from distill import chain
    from distill.runs import Run
    from distill.tracking.sync import sync

    with chain.locked(Run(folder).folder), raise_on_sigterm():
        sent = sync(folder)
    print(f"{folder}: {sent.runs} runs sent, {sent.links} uses of artifacts linked" if any(sent)
          else f"{folder}: nothing to do, all offline runs are sent")  # fmt: skip


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
    from distill.planning import commands
    from distill.stages import batches, report, serve

    settings, parsed = recipe.load(_options(command), arguments)
    if command in ("plan", "simulate"):
        print(commands.output(command, settings, parsed))
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
