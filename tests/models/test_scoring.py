"""Label scoring: whole labels in one forward pass, compared with one sequence per label and with generation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.data.corpus import Corpus
from distill.models import scoring, tiny
from distill.models.backbone import Backbone, LoraSettings, ModelSettings, create
from distill.models.local import Local, label_log_probabilities, normalise_labels, score_labels
from distill.models.packing import shared_prefix_length
from distill.models.reasoner import Sampling
from distill.models.scoring import score_and_prefill
from distill.task.labels import LabelSpace, Scale
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample
from tests.models.test_backbone import build_idefics3, build_llava

PREFIX = '"Prediction":'

SCALE = LabelSpace.from_scale(Scale())
NESTED = LabelSpace(("qqq one", "qqq", "qqq one two", "negative"), (1, 0, 1, -1))
"""The tokens of one label are a prefix of another's, which are a prefix of a third's."""


@pytest.fixture(scope="module")
def posts(postcards: Corpus) -> list[Sample]:
    """Posts of different lengths with one image, no image and two images."""
    a, b, c, d = postcards.test[:4]
    return [a, replace(b, images=()), replace(c, images=c.images + a.images), replace(d, text=d.text * 3)]


def with_labels(backbone: Backbone, labels: LabelSpace, **settings: Any) -> Backbone:
    return Backbone(backbone.model, backbone.processor, labels, replace(backbone.settings, **settings))


Make = Callable[..., Backbone]


@pytest.fixture(scope="module", params=["qwen", "qwen with eager attention", "qwen with adapter", "llava", "idefics3"])
def made(
    request: pytest.FixtureRequest, make_backbone: Make, tokenizer_folder: Path, model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Backbone:  # fmt: skip
    """Tiny models with random weights."""
    torch.manual_seed(0)
    folder = model_folder
    if request.param in ("llava", "idefics3"):
        folder = tmp_path_factory.mktemp(request.param)
        build = {"llava": build_llava, "idefics3": build_idefics3}[request.param]
        build(folder, tiny.load_tokenizer(tokenizer_folder))
    settings = ModelSettings(
        str(folder),
        image_size=56,
        attention="eager" if "eager" in request.param else "sdpa",
        lora=LoraSettings(r=4) if "adapter" in request.param else None,
    )
    backbone = create(settings, SCALE, Path("unused"))
    backbone.model.eval()
    return backbone


def separate_score(backbone: Backbone, sample: Sample, label: str) -> torch.Tensor:
    """Log-probability of a label and its end token, from a forward pass over the whole text of one sample."""
    features = backbone.encode([sample], "classify", [f"{PREFIX} {label}"])
    labels = features.pop("labels")
    prompt = backbone.encode([sample], "classify")["input_ids"].shape[1]
    logits = backbone.model(**features).logits.log_softmax(-1)
    tokens = labels[0, prompt:]
    return logits[0, prompt - 1 : -1].gather(1, tokens[:, None]).sum()


@pytest.mark.parametrize("space", [SCALE, NESTED, LabelSpace()], ids=["scale", "nested", "words"])
def test_branches_score_like_separate_sequences(made: Backbone, posts: list[Sample], space: LabelSpace) -> None:
    backbone = with_labels(made, space)
    with torch.inference_mode():
        found = label_log_probabilities(backbone, backbone.encode(posts, "classify"))
        expected = [[separate_score(backbone, sample, name) for name in space.names] for sample in posts]
    assert found.shape == (len(posts), len(space))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-6)


def test_samples_without_images_score_like_separate_sequences(made: Backbone, posts: list[Sample]) -> None:
    bare = [replace(sample, images=()) for sample in posts]
    with torch.inference_mode():
        found = label_log_probabilities(made, made.encode(bare, "classify"))
        expected = [[separate_score(made, sample, name) for name in SCALE.names] for sample in bare]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_gradients_are_those_of_separate_sequences(made: Backbone, posts: list[Sample]) -> None:
    """Gradients of the cross-entropy with random targets, as in training on a scale."""
    made.model.double()  # norms and rotary embeddings stay in single precision
    targets = torch.rand(len(posts), len(SCALE), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = [w for w in made.model.parameters() if w.requires_grad]

    def gradients(scores: torch.Tensor) -> list[torch.Tensor]:
        loss = -(targets * scores.log_softmax(-1)).sum() - scores.sum()
        return [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]

    try:
        found = gradients(label_log_probabilities(made, made.encode(posts, "classify")))
        rows = [torch.stack([separate_score(made, sample, name) for name in SCALE.names]) for sample in posts]
        expected = gradients(torch.stack(rows))
    finally:
        made.model.float()
    assert len(found) == len(expected) > 10 and any(bool(g.abs().max() > 1e-3) for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


class LogitPositions(TorchDispatchMode):
    """Records the number of positions for which logits are computed."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function in MATRIX_PRODUCTS and found.shape[-1] == self.vocabulary:
            self.seen.add(found.numel() // self.vocabulary)
        return found


def test_images_are_encoded_once_and_logits_computed_once_where_labels_branch(
    backbone: Backbone, posts: list[Sample]
) -> None:
    calls: list[int] = []
    labels = with_labels(backbone, SCALE).label_tokens
    branches = {tuple(label[:length]) for label in labels for length in range(len(label))}
    assert len(branches) < sum(map(len, labels))
    for space, tokens in ((SCALE, len(branches)), (LabelSpace(), 1)):
        scored = with_labels(backbone, space)
        hook = scored.model.model.visual.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
        features = scored.encode(posts, "classify")
        with torch.no_grad(), LogitPositions(768) as positions:
            score_labels(scored, features)
        hook.remove()
        assert positions.seen == {len(posts) * tokens}
    assert len(calls) == 2


def test_labels_that_share_tokens_are_scored_whole_and_others_by_their_first_token(
    backbone: Backbone, posts: list[Sample]
) -> None:
    scaled = with_labels(backbone, SCALE)
    features = scaled.encode(posts, "classify")
    with torch.inference_mode():
        whole = label_log_probabilities(scaled, features).double()
        probabilities, mass = score_labels(scaled, features)
        torch.testing.assert_close(
            probabilities.double(), whole.exp() / whole.exp().sum(1, keepdim=True), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(mass.double(), whole.exp().sum(1), atol=0, rtol=1e-4)
        logits = backbone.model(**backbone.encode(posts[:1], "classify")).logits[:, -1]
        first = normalise_labels(logits, backbone.label_ids)
        torch.testing.assert_close(score_labels(backbone, backbone.encode(posts[:1], "classify")), first)


def test_an_underflowing_mass_still_counts_as_an_answer(make_backbone: Make, posts: list[Sample]) -> None:
    scaled = with_labels(make_backbone(), SCALE)
    with torch.no_grad():
        for weights in scaled.model.parameters():
            weights.mul_(20)
    scores = Local(scaled, "").classify(posts)
    assert scores.answered.all() and scores.label_mass.min() < 1e-30
    np.testing.assert_allclose(scores.probabilities.sum(1), 1, atol=1e-5)


WORDS = ("dreadful", "poor", "so so", "well", "fine", "great", "perfect")


def with_value(sample: Sample, index: int) -> Sample:
    """A post whose first word determines its value on the scale."""
    return replace(sample, text=f"{WORDS[index % 7]} weather, {sample.text.split()[-1]}", label=SCALE.names[index % 7])


@pytest.fixture(scope="module")
def trained(make_backbone: Make, postcards: Corpus) -> Backbone:
    """A model trained to map the words to their values on the scale."""
    scaled = with_labels(make_backbone(seed=1), SCALE)
    samples = [replace(with_value(sample, i), images=()) for i, sample in enumerate(postcards.train[:28])]
    features = scaled.encode(samples, "classify", [f"{PREFIX} {sample.label}" for sample in samples])
    optimizer = torch.optim.AdamW(scaled.model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = scaled.model(**features).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scaled.model.eval()
    return scaled


def test_the_most_probable_label_is_the_generated_one(trained: Backbone, postcards: Corpus) -> None:
    samples = [with_value(sample, i) for i, sample in enumerate([*postcards.test, *postcards.validation])]
    reasoner = Local(trained, "")
    scores = reasoner.classify(samples)
    assert scores.label_mass.min() > 0.5  # the model keeps the format
    answers = [answer.text.strip() for _, answer in reasoner.reason(samples, "classify", Sampling(max_new_tokens=6))]
    assert len(set(answers)) > 4
    most_probable = [SCALE.names[i] for i in scores.probabilities.argmax(1)]
    equal = np.mean([one == other for one, other in zip(most_probable, answers, strict=True)])
    assert equal >= 0.99


def test_each_review_is_scored_with_its_own_prompt(trained: Backbone, posts: list[Sample]) -> None:
    earlier = [EarlierAnswers("-3", 0.9, name, 0.5) for name in SCALE.names[:4]]
    reasoner = Local(trained, "")
    scores = reasoner.classify(posts, earlier)
    for row, (sample, pair) in enumerate(zip(posts, earlier, strict=True)):
        single = reasoner.classify([sample], [pair])
        np.testing.assert_allclose(scores.probabilities[row], single.probabilities[0], atol=1e-5)
        assert scores.costs[row].prompt_tokens == single.costs[0].prompt_tokens
    assert abs(scores.probabilities - reasoner.classify(posts).probabilities).max() > 1e-4


# ---- joint prefill of two prompts ----


def generate(backbone: Backbone, prompt: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily generated sequences of five tokens, and the logits [5, B, V] of each step."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "output_logits": True}
    output = backbone.model.generate(**prompt, **options, return_dict_in_generate=True)  # type: ignore[operator]
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("space", [SCALE, LabelSpace()], ids=["scale", "words"])
@pytest.mark.parametrize("template", ["reason", "predict"])
def test_a_joint_prefill_scores_and_generates_like_separate_prompts(
    made: Backbone, posts: list[Sample], template: Template, space: LabelSpace
) -> None:
    backbone = with_labels(made, space)
    for samples in (posts, [replace(sample, images=()) for sample in posts[:2]], posts[2:3]):
        classify, other = backbone.encode(samples, "classify"), backbone.encode(samples, template, padding_side="left")
        with torch.inference_mode():
            prefill = score_and_prefill(backbone, samples, template)
            expected = score_labels(backbone, classify)
            torch.testing.assert_close((prefill.probabilities, prefill.mass), expected, atol=1e-5, rtol=1e-4)
            sequences, logits = generate(backbone, other)
            found = generate(backbone, prefill.prompt)
        torch.testing.assert_close(found[1], logits, atol=2e-5, rtol=1e-5)
        assert torch.equal(found[0], sequences)
        assert torch.equal(prefill.classify_lengths, classify["attention_mask"].sum(1))


def test_a_joint_prefill_processes_images_and_common_tokens_once(backbone: Backbone, posts: list[Sample]) -> None:
    """Each generation step processes one token."""
    image_calls: list[int] = []
    lengths: list[int] = []
    inner = backbone.model.model  # type: ignore[union-attr]
    hooks = [
        inner.visual.register_forward_hook(lambda *_: image_calls.append(1)),
        inner.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    found = list(Local(backbone, "").classify_and_reason(posts[:1], "reason", Sampling(max_new_tokens=4)))
    check = 2  # forward passes of the check for joint prefill support
    for hook in hooks:
        hook.remove()
    (_, scores, answer) = found[0]
    prompts = [backbone.encode(posts[:1], template)["input_ids"][0].tolist() for template in ("classify", "reason")]
    shared = shared_prefix_length(prompts)
    assert shared > 0.6 * len(prompts[0])
    assert len(image_calls) == check + 1
    assert lengths[check:] == [sum(map(len, prompts)) - shared] + [1] * 4
    assert scores.costs[0].prompt_tokens == len(prompts[0])
    assert answer.prompt_tokens == len(prompts[1]) - shared


def test_chunks_of_logits_give_the_same_scores(
    backbone: Backbone, posts: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = with_labels(backbone, SCALE)
    features = scaled.encode(posts, "classify")
    with torch.no_grad():
        whole = label_log_probabilities(scaled, features)
        monkeypatch.setattr(scoring, "_LOGITS", 1)  # one post at a time
        with LogitPositions(768) as positions:
            torch.testing.assert_close(label_log_probabilities(scaled, features), whole)
    branches = {tuple(label[:length]) for label in scaled.label_tokens for length in range(len(label))}
    assert positions.seen == {len(branches)}
