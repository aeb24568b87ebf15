"""Forecast of a chain for any number of posts: requests, tokens, device hours, money and wall time of each stage.

Counts are those of the recipe's data times the ratio of the posts; rates are stated in `scale`, or measured in the
run's folder. What is neither is None, with a note of what would fill it. No speed and no price is assumed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distill.models.endpoint import BatchSettings, EndpointSettings
from distill.models.endpoint.settings import cost
from distill.planning import measured
from distill.planning.plan import TrainingForecast, forecast_trainings
from distill.planning.teacher_requests import RequestForecast
from distill.planning.workload import ChainForecast, Teacher
from distill.training.processes import process_count

Range = tuple[float, float]
"""The least and the most; equal if it is known."""

NOTHING: Range = (0.0, 0.0)


@dataclass
class StageScale:
    """One row: a stage for N posts. None is unknown.

    Attributes:
        requests: answers that a model generates, or posts that it labels.
        prompt_tokens, completion_tokens: tokens read (in a training: trained on, in all epochs) and written.
        device_hours: hours of one device, without those of an endpoint that is paid by tokens.
        money: in the currency of the prices.
        hours: wall time.
        sources: where the figures come from.
        unknown: what would fill the figures that are None, each with the names of the figures.
    """

    name: str
    requests: Range | None = NOTHING
    prompt_tokens: Range | None = None
    completion_tokens: Range | None = None
    device_hours: Range | None = None
    money: Range | None = None
    hours: Range | None = None
    sources: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    def lacks(self, figure: str, remedy: str) -> None:
        """Note what would fill a figure that is not known."""
        self.unknown[figure] = remedy


def forecast_scale(forecast: ChainForecast, posts: int, problems: list[str]) -> list[StageScale]:
    """The rows of a chain for N posts in the order of its stages, the service last.

    Args:
        problems: gets a message for each model that cannot be loaded.
    """
    return _Scale(forecast, posts).rows(problems)


class _Scale:
    def __init__(self, forecast: ChainForecast, posts: int) -> None:
        self.forecast, self.posts, self.recipe = forecast, posts, forecast.recipe
        self.settings, self.folder = forecast.recipe.scale, forecast.recipe.folder
        self.factor = posts / len(forecast.corpus.train)

    def rows(self, problems: list[str]) -> list[StageScale]:
        """All rows."""
        recipe = self.recipe
        trainings = {one.name: one for one in forecast_trainings(self.forecast, problems, self.factor)}
        rows = [self._training(trainings["teacher"])] if "teacher" in trainings else []
        if recipe.annotate is not None and self.forecast.teacher() is not None:
            rows.append(self._annotate())
        if "assistant" in trainings:
            rows.append(self._training(trainings["assistant"]))
        if recipe.augment is not None and recipe.assistant is not None:
            rows.append(self._augment())
        rows += [self._training(trainings[name]) for name in ("student", "hard labels") if name in trainings]
        if recipe.student is not None:
            rows.append(self._serve_student())
        if recipe.calibrate is not None and self.forecast.teacher(for_cascade=True) is not None:
            rows.append(self._serve_teacher())
        return rows

    # ---- reasoning data ----

    def _ran(self, stage: str) -> bool:
        """Whether a stage has run with this recipe, so that the run's folder has its measurements."""
        return self.forecast.done.get(stage, False)

    def _annotate(self) -> StageScale:
        teacher, row = self.forecast.teacher(), StageScale("annotate")
        assert teacher is not None and self.recipe.annotate is not None
        found = measured.summary(self.folder, "annotate") if self._ran("annotate") else None
        paid = found["paid"] if found else {}
        if found is not None and paid.get("answers"):
            names = ("answers", "prompt_tokens", "completion_tokens")
            figures = [_exact(self.posts * paid[name] / found["n"]) for name in names]
            row.sources.append(f"tokens measured on {found['n']:,} posts of {self.folder}")
        else:
            requests = [one for one, _ in self.forecast.annotate_requests()]
            figures = [
                self._bounds(requests, lambda one: (1.0, 1.0)),
                self._bounds(requests, lambda one: (one.prompt_tokens, one.prompt_tokens)),
                self._bounds(requests, lambda one: one.answer_tokens),
            ]
            row.sources.append("requests and tokens forecast from the data")
        row.requests, row.prompt_tokens, row.completion_tokens = figures
        answers = measured.ledger_answers(self.folder / "annotate" / "ledger.jsonl") if found else None
        self._generate(row, teacher, answers, self.recipe.annotate.batch)
        return row

    def _bounds(self, requests: list[RequestForecast], each: Callable[[RequestForecast], Range]) -> Range:
        """The least and the most of a figure, from that of each request."""
        low = sum(one.minimum * each(one)[0] for one in requests)
        return self.factor * low, self.factor * sum(one.maximum * each(one)[1] for one in requests)

    def _augment(self) -> StageScale:
        row, ran = StageScale("augment"), self._ran("augment")
        found = measured.summary(self.folder, "augment") if ran else None
        answers = measured.ledger_answers(self.folder / "augment" / "ledger.jsonl") if ran else None
        assert self.recipe.assistant is not None
        if found is not None and answers is not None:
            count, tokens = self.factor * found["n"], (answers.prompt_tokens, answers.completion_tokens)
            row.sources.append(f"tokens measured on {found['n']:,} posts of {self.folder}")
        else:
            request = self.forecast.augment_request()
            count, tokens = self.factor * request.maximum, (request.prompt_tokens, request.answer_tokens[0])
            row.sources.append("requests and tokens forecast from the data")
        row.requests, row.prompt_tokens, row.completion_tokens = (_exact(count * one) for one in (1.0, *tokens))
        self._generate(row, self.recipe.assistant.model, answers, None)
        return row

    def _generate(
        self, row: StageScale, model: Teacher, answers: measured.Answers | None, batch: BatchSettings | None
    ) -> None:
        """Device hours, money and time of generated answers."""
        stage, endpoint = row.name, isinstance(model, EndpointSettings)
        rate, seconds = self.settings.tokens_per_second.get(stage), answers.seconds if answers else None
        setting = f"scale.tokens_per_second.{stage}"
        if rate is not None and row.completion_tokens is not None:
            row.device_hours = _map(row.completion_tokens, lambda tokens: tokens / rate / 3600)
            row.sources.append(f"{setting} {rate:,g}")
        elif not endpoint and seconds is not None and row.requests is not None:
            row.device_hours = _map(row.requests, lambda count: count * seconds / 3600)
            row.sources.append(f"{seconds:.3g} s an answer measured in {self.folder}")
        elif isinstance(model, EndpointSettings) and _has_prices(batch or model):
            row.device_hours = NOTHING
        else:
            row.lacks("device hours", setting + ("" if endpoint else f", or a first run of {stage}"))
        if isinstance(model, EndpointSettings):
            row.money = _price(row, batch or model)
            if row.money is None:
                row.money = self._rent(row)
            if row.money is None:
                section = self.recipe.section_of(model) if batch is None else f"{stage}.batch"
                row.lacks("money", f"{section}.prompt_price and .completion_price, or {setting} and scale.device_price")
            if rate is None:
                self._latency(row, seconds, model.concurrency, f"{self.recipe.section_of(model)}.concurrency")
                return
        else:
            row.money = self._rent(row, note=True)
        row.hours = self._on_devices(row)

    def _latency(self, row: StageScale, seconds: float | None, at_once: int, name: str) -> None:
        """Wall time of requests of which so many are in flight."""
        if seconds is None or row.requests is None:
            row.lacks("wall time", "a first run, whose answers are not from batches")
            return
        row.hours = _map(row.requests, lambda count: count * seconds / at_once / 3600)
        row.sources.append(f"{seconds:.3g} s a request measured in {self.folder}, {at_once} at once ({name})")

    # ---- trainings ----

    def _training(self, training: TrainingForecast) -> StageScale:
        row, baseline = StageScale(training.name), training.name == "hard labels"
        section = "student" if baseline else training.name
        row.completion_tokens = NOTHING
        if training.tokens is not None and math.isfinite(training.epochs):
            row.prompt_tokens = _exact(training.rows * training.epochs * training.tokens[1].tokens)
        else:
            row.lacks("tokens", "a model that can be loaded, and a limit of epochs or steps")
        stated = self.settings.tokens_per_second.get(section)
        flops, reached = training.total_flops, self.settings.flops_per_second
        folder = self.folder / section / ("hard_labels" if baseline else "")
        speed = measured.training_speed(folder) if self._ran(section) else None
        if stated is not None and row.prompt_tokens is not None:
            row.device_hours = _map(row.prompt_tokens, lambda tokens: tokens / stated / 3600)
            row.sources.append(f"scale.tokens_per_second.{section} {stated:,g}")
        elif reached is not None and flops is not None:
            row.device_hours = _exact(flops[1] / reached / 3600)
            row.sources.append(f"{flops[1]:.3g} FLOP at scale.flops_per_second {reached:.3g}")
        elif speed is not None and row.prompt_tokens is not None:
            processes = process_count(self.forecast.context.trainer_arguments(training.settings))
            row.device_hours = _map(row.prompt_tokens, lambda tokens: tokens / speed * processes / 3600)
            row.sources.append(f"{speed:,.0f} tokens a second measured in {self.folder}")
        else:
            row.lacks(
                "device hours", "scale.flops_per_second or scale.tokens_per_second, or a first run of the training"
            )
        row.money = self._rent(row, note=True)
        row.hours = self._on_devices(row)
        return row

    # ---- service ----

    def _serve_student(self) -> StageScale:
        recipe, row = self.recipe, StageScale("service, student", _exact(self.posts))
        assert recipe.student is not None
        served = recipe.serve.student
        rationale = recipe.serve.rationale and "reason" in recipe.student.tasks
        prompt, completion = self.forecast.served_tokens(served or recipe.student.model, rationale)
        row.prompt_tokens, row.completion_tokens = _exact(self.posts * prompt), _exact(self.posts * completion)
        row.sources.append("tokens forecast from the data")
        found = measured.cascade(self.folder) if self._ran("cascade") else None
        student, rate = found["stages"]["student"] if found else None, self.settings.posts_per_second
        if rate is not None:
            row.device_hours = _exact(self.posts / rate / 3600)
            row.sources.append(f"scale.posts_per_second {rate:,g}")
        elif served is not None and _has_prices(served):
            row.device_hours = NOTHING
        elif student is not None and student["cost"].get("seconds") and not rationale and served is None:
            seconds = student["cost"]["seconds"] / student["asked"]
            row.device_hours = _exact(self.posts * seconds / 3600)
            row.sources.append(f"{seconds:.3g} s a label measured in {self.folder}")
        else:
            why = " (a run measures labels alone, not the rationales)" if rationale else ", or a first run of cascade"
            row.lacks("device hours", f"scale.posts_per_second{why}")
        if served is not None and _has_prices(served):
            row.money = _price(row, served)
            row.lacks("wall time", "distill simulate, from the times of its endpoint")
            return row
        row.money, row.hours = self._rent(row, note=True), self._on_devices(row)
        return row

    def _serve_teacher(self) -> StageScale:
        recipe, row, teacher = self.recipe, StageScale("service, teacher"), self.forecast.teacher(for_cascade=True)
        assert recipe.calibrate is not None and teacher is not None
        found = measured.cascade(self.folder) if self._ran("cascade") else None
        asked = [found["stages"][name] for name in ("teacher_first", "teacher_review")] if found else []
        calls, answers = sum(one["asked"] for one in asked), None
        if found is not None and calls:
            per_post, total = found["teacher_calls_per_sample"], [one["cost"] for one in asked]
            sums = {name: sum(cost[name] or 0 for cost in total) for name in ("prompt_tokens", "completion_tokens")}
            seconds = sum(cost["seconds"] or 0.0 for cost in total) / calls or None
            answers = measured.Answers(sums["prompt_tokens"] / calls, sums["completion_tokens"] / calls, seconds)
            row.sources.append(f"{per_post:.3g} calls a post measured on {found['n']:,} posts of {self.folder}")
        elif recipe.calibrate.by == "budget":
            per_post = recipe.calibrate.budget
            request = self.forecast.service_request()
            answers = measured.Answers(request.prompt_tokens, request.answer_tokens[0], None)
            row.sources.append(f"calibrate.budget {per_post:g} calls a post, tokens forecast from the data")
        else:
            row.requests = None
            for name in ("requests", "device hours", "money", "wall time"):
                row.lacks(name, "a first run of cascade, or calibrate.by budget")
            return row
        count = self.posts * per_post
        row.requests = _exact(count)
        row.prompt_tokens, row.completion_tokens = (
            _exact(count * tokens) for tokens in (answers.prompt_tokens, answers.completion_tokens)
        )
        if isinstance(teacher, EndpointSettings):
            paid = _has_prices(teacher)
            row.device_hours, row.money = (NOTHING, _price(row, teacher)) if paid else (None, None)
            if not paid:
                row.lacks("money", f"{recipe.section_of(teacher)}.prompt_price and .completion_price")
                row.lacks("device hours", "the same prices: its devices are not known here")
            at_once = recipe.serve.teacher_concurrency * (self.settings.devices or 1)
            replicas = "serve.teacher_concurrency" + (" times scale.devices" if self.settings.devices else "")
            self._latency(row, answers.seconds, at_once, replicas)
        else:
            if answers.seconds is not None:
                row.device_hours = _exact(count * answers.seconds / 3600)
                row.sources.append(f"{answers.seconds:.3g} s a call measured in {self.folder}")
            else:
                row.lacks("device hours", "a first run of cascade")
            row.money, row.hours = self._rent(row, note=True), self._on_devices(row)
        return row

    # ---- money and time of devices ----

    def _rent(self, row: StageScale, *, note: bool = False) -> Range | None:
        price = self.settings.device_price
        if price is None and note and row.device_hours != NOTHING:
            row.lacks("money", "scale.device_price")
        if price is None or row.device_hours is None:
            return None
        return _map(row.device_hours, lambda hours: hours * price)

    def _on_devices(self, row: StageScale) -> Range | None:
        devices = self.settings.devices
        if devices is None:
            row.lacks("wall time", "scale.devices")
        if devices is None or row.device_hours is None:
            return None
        return _map(row.device_hours, lambda hours: hours / devices)


def total(rows: list[StageScale], name: str) -> Range | None:
    """The sum of a figure over the rows; None if one of them is unknown."""
    values: list[Any] = [getattr(row, name) for row in rows]
    return None if None in values else (sum(low for low, _ in values), sum(high for _, high in values))


def _has_prices(prices: EndpointSettings | BatchSettings) -> bool:
    return prices.prompt_price is not None or prices.completion_price is not None


def _price(row: StageScale, prices: EndpointSettings | BatchSettings) -> Range | None:
    if row.prompt_tokens is None or row.completion_tokens is None:
        return None
    low, high = (cost(prices, *tokens) for tokens in zip(row.prompt_tokens, row.completion_tokens, strict=True))
    return None if low is None or high is None else (low, high)


def _exact(value: float) -> Range:
    return value, value


def _map(pair: Range, function: Callable[[float], float]) -> Range:
    return function(pair[0]), function(pair[1])
