"""`distill plan --probe`: one question of the run to each of its endpoints, and what the answer says about the server.

The question is one that the run asks anyway, and its answer is kept in the run's ledger, so nothing is paid twice.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distill import chain
from distill.annotation.cached_teacher import CachedTeacher, TeacherQuery
from distill.annotation.ledger import Ledger
from distill.data.clips import ClipReader
from distill.errors import RunError, SettingsError, in_section
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.reasoner import Answer, Sampling
from distill.planning.workload import ChainForecast
from distill.task import prompts
from distill.task.rationale import InvalidRationale, check
from distill.task.sample import Sample


@dataclass(frozen=True)
class _Question:
    """Posts about which a stage asks the same, and the stage whose ledger has the answers."""

    ledger: str
    query: TeacherQuery
    posts: Sequence[Sample]


def probe(forecast: ChainForecast) -> list[str]:
    """Ask each endpoint of the stages that would run one question. Returns lines of text.

    Raises:
        RunError: another process uses the run, or an answer cannot be written to its ledger.
    """
    recipe, lines = forecast.recipe, []
    teachers = [recipe.annotating_teacher, recipe.cascade_teacher]
    endpoints = {recipe.section_of(teacher): teacher for teacher in teachers if isinstance(teacher, EndpointSettings)}
    with chain.locked(recipe.folder):
        for section, endpoint in endpoints.items():
            questions = list(_questions(forecast, endpoint))
            if questions:
                lines.append(f"probe of {section} ({endpoint.model} at {endpoint.address}):")
                lines += [f"  {line}" for line in _ask(forecast, section, endpoint, questions)]
    return lines or ["probe: no stage that would run asks an endpoint."]


def _questions(forecast: ChainForecast, endpoint: EndpointSettings) -> Iterator[_Question]:
    """What the stages that would run ask an endpoint, in their order."""
    recipe, corpus, pending = forecast.recipe, forecast.corpus, forecast.pending
    labels = TeacherQuery("classify")
    if endpoint == recipe.annotating_teacher:
        settings = recipe.annotate
        if settings is not None and "annotate" in pending:
            # a post with a recorded rationale has another prompt, or none
            posts = [p for p in corpus.train if p.label is not None and not (settings.recorded and p.rationale)]
            sampling = Sampling(round(settings.temperature, 6), settings.max_new_tokens)
            yield _Question("annotate", TeacherQuery("predict", sampling), posts)
            if settings.unlabelled == "keep_confident":
                yield _Question("annotate", labels, [post for post in corpus.train if post.label is None])
        yield _Question("annotate", labels, forecast.posts_for_label_teacher())
        if recipe.evaluate is not None and recipe.evaluate.teacher and "evaluate" in pending:
            yield _Question("evaluate", labels, corpus.test)
    if endpoint == recipe.cascade_teacher:
        if "calibrate" in pending:
            yield _Question("evaluate", labels, corpus.validation)
        if "cascade" in pending:
            yield _Question("evaluate", labels, corpus.test)


def _ask(
    forecast: ChainForecast, section: str, settings: EndpointSettings, questions: Sequence[_Question]
) -> list[str]:
    recipe = forecast.recipe
    others = recipe.other_servers(for_cascade=settings != recipe.annotating_teacher)
    try:
        with in_section(section):
            clips = ClipReader(recipe.data.video)
            endpoint = Endpoint(replace(settings, max_attempts=1), forecast.labels, recipe.data.max_pixels, clips)
    except SettingsError as error:
        return [str(error)]
    for question in questions:
        with Ledger(recipe.folder / question.ledger / "ledger.jsonl") as ledger:
            teacher = CachedTeacher(endpoint, forecast.labels, ledger, 1, others)
            post = next((post for post in question.posts if not teacher.knows(post, question.query)), None)
            if post is None:
                continue
            lines = [f"one question, {question.query.template}, about post {post.id}"]
            try:
                answer = _answer(teacher, endpoint, post, question.query)
            except RunError as error:
                return [*lines, str(error)]
        if answer.error is not None:
            return [*lines, f"no answer: {answer.error}"]
        lines += _findings(endpoint, question.query, answer, post, forecast)
        return [*lines, *_duration(forecast, settings, answer), f"the answer is in {ledger.path} and is not paid again"]
    return ["nothing is asked: the ledgers of the run have the answers"]


def _answer(teacher: CachedTeacher, endpoint: Endpoint, post: Sample, query: TeacherQuery) -> Answer:
    """The answer, which is in the ledger unless it has an error."""
    message = endpoint.message(post)
    if query.template in prompts.SCORED:
        return teacher.ask(message, query, threading.Event())
    answer = endpoint.ask(message, query.template, query.sampling, threading.Event(), logprobs=True)
    return teacher.keep(post, query, answer)


def _findings(
    endpoint: Endpoint, query: TeacherQuery, answer: Answer, post: Sample, forecast: ChainForecast
) -> list[str]:
    tokens = f"{answer.prompt_tokens:,} prompt and {answer.completion_tokens:,} answer tokens"
    lines = [f"answered in {answer.seconds:.1f} s with {tokens}"]
    if query.template not in prompts.SCORED:
        try:
            check(answer.text, forecast.labels, finished=answer.finished, post=post.text)
            lines.append("the answer is a valid rationale")
        except InvalidRationale as invalid:
            lines.append(f"the answer is not a valid rationale: {invalid}")
    if endpoint.returns_logprobs:
        lines.append("log-probabilities are returned")
    elif endpoint.settings.agreement_samples > 1:
        samples = endpoint.settings.agreement_samples
        lines.append(
            f"no log-probabilities: each label takes {samples} requests, and their agreement is its confidence"
        )
    else:
        lines.append(
            "no log-probabilities, and agreement_samples is 1: the confidence of labels is unknown, and the cascade "
            "compares polarities alone"
        )
    of_annotate = endpoint.settings.address == getattr(forecast.recipe.annotating_teacher, "address", None)
    if of_annotate and not endpoint.returns_logprobs and forecast.posts_for_label_teacher():
        lines.append("student.distillation.label_teacher must be assistant: there is no label distribution to learn")
    return lines + [f"server: {change}" for change in endpoint.given_up if "log-probabilities" not in change]


def _duration(forecast: ChainForecast, settings: EndpointSettings, answer: Answer) -> list[str]:
    """The time of all requests to an endpoint, if each took as long as this one."""
    requests = [request for request, teacher in forecast.teacher_requests() if teacher == settings]
    calls = max(answer.calls, 1)
    low, high = (
        sum(getattr(request, name) for request in requests) * answer.seconds / calls / settings.concurrency / 60
        for name in ("minimum", "maximum")
    )
    return [f"at this speed, {settings.concurrency} at a time, all requests take {low:,.1f} to {high:,.1f} minutes"]
