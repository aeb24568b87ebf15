"""`distill serve`: serves the student of a chain and its teacher on one address."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from distill.errors import SettingsError, in_section
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Reasoner
from distill.recipe import Recipe
from distill.serving.settings import endpoint_for_serving
from distill.serving.tracing import Tracing
from distill.stages.cascade import calibrated_policy
from distill.stages.context import Context

if TYPE_CHECKING:
    from distill.serving.gateway import Gateway


def run(recipe: Recipe, fingerprints: dict[str, str]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        fingerprints: fingerprints of the stages, from `chain.input_fingerprints`.

    Raises:
        SettingsError: the calibration was made with another student, or the web libraries or Ray are not installed.
    """
    try:
        from distill.serving.ray_serve import check_ray, serve_on_ray
        from distill.serving.server import serve
    except ImportError as error:
        raise SettingsError(f"serve needs {error.name}: pip install 'distill[serve]'") from None
    if recipe.engine == "ray":
        check_ray(recipe.serve)
        Tracing.to(recipe.serve, recipe.name).close()
        calibrated_policy(Context(recipe, fingerprints))
        serve_on_ray(partial(gateway, recipe, fingerprints), recipe.serve, recipe.name)
    else:
        serve(gateway(recipe, fingerprints))


def gateway(recipe: Recipe, fingerprints: dict[str, str]) -> "Gateway":
    """The gateway of a chain. Raises SettingsError if its calibration was made with another student."""
    from distill.serving.gateway import Gateway

    tracing = Tracing.to(recipe.serve, recipe.name)
    assert recipe.student is not None  # `serve` requires the stage
    settings = replace(recipe.serve, rationale=recipe.serve.rationale and "reason" in recipe.student.tasks)
    context = Context(recipe, fingerprints)
    policy = calibrated_policy(context)
    student: Reasoner
    if settings.student is not None:
        endpoint = endpoint_for_serving(settings.student, settings.deadline_s)
        endpoint = replace(endpoint, json_schema=False)  # the student has learned to write rationales as text
        model = recipe.student.model
        size = (model.image_size or None) if model.images else 0
        with in_section("serve.student"):
            student = Endpoint(
                endpoint, context.labels, recipe.data.max_pixels, context.clips, forced_prefix=True, image_size=size
            )
    else:
        student = context.reasoner(recipe.student_stage)
    teacher = recipe.cascade_teacher
    if isinstance(teacher, EndpointSettings):
        teacher = endpoint_for_serving(teacher, settings.deadline_s)
    with in_section(recipe.section_of(recipe.cascade_teacher)):
        reasoner = context.teacher(teacher)
    return Gateway(settings, policy, student, reasoner, recipe.name, recipe.data.max_pixels, context.clips, tracing)
