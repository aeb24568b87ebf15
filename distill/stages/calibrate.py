"""Stage `calibrate`: fits temperatures and thresholds of the cascade on both models' validation predictions."""

from distill.annotation.cached_teacher import TeacherQuery
from distill.cascade.calibration import calibrate
from distill.cascade.cascade import modalities_of
from distill.files import write_json
from distill.stages.batches import fill
from distill.stages.context import Context
from distill.stages.prefill import asking
from distill.tracking import StageRun


def run(context: Context, tracked: StageRun) -> None:
    settings, samples = context.recipe.calibrate, context.corpus.validation
    assert settings is not None
    student = context.reasoner(context.recipe.student_stage)
    scores = student.classify(samples)
    with context.cached_teacher("calibrate") as teacher:
        assert teacher is not None  # guaranteed by the validation of the recipe
        batches = fill(context, "calibrate", settings.batch, teacher, samples, [asking(TeacherQuery("classify"))])
        teacher_scores = teacher.classify(samples)
        if batches is not None:
            batches.close()
    content = calibrate(
        [sample.label for sample in samples if sample.label is not None],
        scores,
        teacher_scores,
        (student.name, teacher.name),
        context.labels,
        settings,
        modalities=modalities_of(samples),
        reviews=context.recipe.teacher_learned("review"),
    )
    write_json(context.folder / "calibrate" / "calibration.json", content)
    tracked.log({"calibrate": content})
