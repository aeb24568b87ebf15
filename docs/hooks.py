"""mkdocs hook: adds the page of all recipe fields, made from the settings dataclasses at build time."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from distill.recipe import Recipe
from distill.settings_reference import page

INTRO = """Every field of a recipe, with its type, its default and its help text, made from the code at build time.

A field is written in YAML below its sections, or given on the command line by its dotted name, such as
`--student.distillation.weight 0.5`. `distill run --help` prints the same texts, and `distill run --student.help` those
of one optional section. [Recipes](recipes.md) explains how recipes are composed and overridden. A stage runs if its
section is in the recipe, even if it is empty (`cascade: {}`)."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `settings.md` to the pages."""
    files.append(File.generated(config, "settings.md", content=page(Recipe, "Settings", INTRO)))
    return files
