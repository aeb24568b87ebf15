"""The commands `predict`, `compare`, `copy`, `push` and `sync`, which read no recipe: their options, and what they run.

The modules that they need are imported when they run, so that `distill --help` does not import torch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from distill.errors import SettingsError
from distill.training.shutdown import raise_on_sigterm
from distill.workers.settings import RaySettings

PURPOSES = {
    "predict": "label the posts of a file with the student of a run, or with student and teacher",
    "compare": "compare runs on the same test posts, or run a recipe and its variants and compare them",
    "copy": "copy a run or an export to an object store, such as s3://bucket/runs/x, or back",
    "push": "upload the exported student of a run, or its reasoning data, to the Hugging Face hub",
    "sync": "send the offline runs of a run to wandb, with the lineage of their artifacts",
}


def add_predict(options: argparse.ArgumentParser) -> None:
    options.add_argument("--run", type=Path, required=True, help="folder of a run, such as runs/quickstart")
    options.add_argument("--input", required=True, help="JSONL, CSV, Parquet, a folder of pictures, or a URL of shards")
    options.add_argument("--output", required=True, help="a file or URL that ends in .jsonl, .csv or .parquet")
    options.add_argument("--cascade", action="store_true", help="ask the teacher where the student is not certain")
    options.add_argument("--rationales", action="store_true", help="generate the student's rationales")
    options.add_argument(
        "--explain", choices=("student", "teacher", "none"),
        help="who explains the label if the student's rationale is invalid or argues for another one "
        "(default: with --cascade, serve.explain of the recipe, otherwise the student; teacher: one more call)",
    )  # fmt: skip
    options.add_argument("--max_new_tokens", type=int, default=512, help="limit of a rationale (default: 512)")
    options.add_argument("--images", help="folder or URL of the images (default: that of the input)")
    options.add_argument("--device", help="of torch, for the student alone (default: the first GPU, or the CPU)")
    options.add_argument(
        "--engine", choices=("local", "ray"), help="where the student labels the posts (default: that of the run)"
    )
    for field in fields(RaySettings):
        options.add_argument(f"--ray.{field.name}", type=type(field.default), help="as in recipes (default: the run's)")


def predict(parsed: argparse.Namespace) -> None:
    from distill.predict import predict

    options = {field.name: getattr(parsed, f"ray.{field.name}") for field in fields(RaySettings)}
    given = {name: value for name, value in options.items() if value is not None}
    with raise_on_sigterm():
        written = predict(
            parsed.run, parsed.input, parsed.output, cascade=parsed.cascade, rationales=parsed.rationales,
            explain=parsed.explain, images=parsed.images, max_new_tokens=parsed.max_new_tokens,
            device=parsed.device, engine=parsed.engine, ray=given,
        )  # fmt: skip
    print(f"wrote {written.rows} rows to {parsed.output}")
    if written.dropped:
        print(f"{written.dropped} rows cannot be used; the reasons are in {written.quarantine}")


def add_compare(options: argparse.ArgumentParser) -> None:
    options.usage = (
        "distill compare RUN RUN ... [--output FILE]\n"
        "       distill compare --config RECIPE --variants FILE ... [--seeds SEED ...] [--output FILE]\n"
        "                       [--FIELD VALUE ...]"
    )
    options.description = (
        f"{PURPOSES['compare']}; the first is the baseline, and runs that differ in their seed alone are one"
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


def compare(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
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


def add_copy(options: argparse.ArgumentParser) -> None:
    options.add_argument("source", help="folder of a run or an export, or the URL of a copy")
    options.add_argument("target", help="URL of the copy, or a new folder")


def copy(parsed: argparse.Namespace) -> None:
    from distill.copying import copy

    with raise_on_sigterm():
        count = copy(parsed.source, parsed.target)
    done = f"copied {count} files to {parsed.target}"
    print(done if count else f"{parsed.target}: nothing to do, it is this copy already")


def add_push(options: argparse.ArgumentParser) -> None:
    options.add_argument("--run", type=Path, required=True, help="folder of a run, such as runs/quickstart")
    options.add_argument("--to", required=True, metavar="USER/NAME", help="repository; it is made if it does not exist")
    options.add_argument("--data", action="store_true", help="upload the reasoning data with its pictures instead")
    options.add_argument("--private", action="store_true", help="make a new repository private")
    options.add_argument("--language", help="code of the language of the posts for the card, such as en")
    options.add_argument(
        "--datasets", nargs="+", default=[], metavar="ID", help="datasets on the hub that the student was trained on"
    )


def push(parsed: argparse.Namespace) -> None:
    from distill import push

    target = push.Target(parsed.to, parsed.private, parsed.language, parsed.datasets)
    print(f"uploaded to {(push.push_data if parsed.data else push.push_student)(parsed.run, target)}")


def sync(folder: Path) -> None:
    from distill import chain
    from distill.runs import Run
    from distill.tracking.sync import sync

    with chain.locked(Run(folder).folder), raise_on_sigterm():
        sent = sync(folder)
    print(f"{folder}: {sent.runs} runs sent, {sent.links} uses of artifacts linked" if any(sent)
          else f"{folder}: nothing to do, all offline runs are sent")  # fmt: skip
