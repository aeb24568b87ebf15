"""`distill serve`: serves the student of a chain and its teacher on one address."""

from dataclasses import replace

from distill.cascade.cascade import Calibration, CascadePolicy
from distill.errors import SettingsError
from distill.models.endpoint import Endpoint
from distill.models.reasoner import Reasoner
from distill.recipe import Recipe
from distill.serving.settings import endpoint_for_serving
from distill.stages.context import Context


def run(recipe: Recipe, fingerprints: dict[str, str]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        fingerprints: fingerprints of the stages, from `chain.input_fingerprints`.

    Raises:
        SettingsError: the calibration was made with another student, or the web libraries are not installed.
    """
    try:
        from distill.serving.gateway import Gateway
        from distill.serving.server import serve
    except ImportError as error:
        raise SettingsError(f"serve needs {error.name}: pip install 'distill[serve]'") from None
    assert recipe.student is not None  # `serve` requires the stage
    settings = replace(recipe.serve, rationale=recipe.serve.rationale and "reason" in recipe.student.tasks)
    for name in ("annotate", "calibrate"):
        section = getattr(recipe, name)
        if section is not None and section.endpoint is not None:
            endpoint = endpoint_for_serving(section.endpoint, settings.deadline_s)
            recipe = replace(recipe, **{name: replace(section, endpoint=endpoint)})
    context = Context(recipe, fingerprints)
    calibration = Calibration.read(
        context.folder / "calibrate" / "calibration.json", f"student-{fingerprints['student']}"
    )
    policy = CascadePolicy(context.labels, calibration, recipe.cascade.on_agreement if recipe.cascade else "teacher")
    student: Reasoner
    if settings.student is not None:
        endpoint = endpoint_for_serving(settings.student, settings.deadline_s)
        student = Endpoint(endpoint, context.labels, recipe.data.max_pixels)
    else:
        student = context.reasoner("student")
    teacher = context.teacher(for_cascade=True)
    serve(Gateway(settings, policy, student, teacher, recipe.name, recipe.data.max_pixels))
