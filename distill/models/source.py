"""Where a local model comes from: what another process needs to load it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from distill.data.clips import ClipReader, VideoSettings
from distill.errors import RunError, in_section
from distill.models import backbone
from distill.models.backbone import ModelSettings
from distill.models.local import Local
from distill.models.reasoner import Answer, ClassScores, Sampling
from distill.task.labels import LabelSpace
from distill.task.prompts import EarlierAnswers, Template
from distill.task.sample import Sample


def pretrained_name(settings: ModelSettings, *more: str) -> str:
    """The name of a model without training in ledgers, which says what its answers depend on.

    Args:
        more: what else they depend on.
    """
    images = f"{settings.image_size} px" if settings.images else "no images"
    layers = [] if settings.keep_layers is None else [f"layers {settings.keep_layers}"]
    return " ".join([f"{settings.path}@{settings.revision} ({images}, {settings.dtype})", *layers, *more])


@dataclass
class ModelSource:
    """A local model that is not loaded here. A ledger knows it by its name, but it cannot answer.

    Attributes:
        folder: what `Backbone.save` wrote for a trained model, otherwise the tokenizer of tiny models.
        section: of the recipe, for messages.
    """

    name: str
    settings: ModelSettings
    labels: LabelSpace
    folder: Path
    section: str
    trained: bool
    video: VideoSettings = field(default_factory=VideoSettings)

    def load(self, device: str, clips: ClipReader | None = None) -> Local:
        """Load the model.

        Args:
            clips: what decodes videos and sounds; None: a reader of its own.

        Raises:
            SettingsError: the folder is missing or broken, or the model cannot be loaded.
        """
        clips = clips or ClipReader(self.video)
        with in_section(self.section):
            if self.trained:
                model = backbone.load(self.settings, self.labels, self.folder, clips=clips)
            else:
                model = backbone.create(self.settings, self.labels, self.folder, train=False, clips=clips)
        return Local(model, self.name, device)

    def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
        """Raises RunError."""
        self._refuse(samples)

    def reason(
        self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
    ) -> Iterator[tuple[int, Answer]]:
        """Raises RunError."""
        self._refuse(samples)

    def _refuse(self, samples: Sequence[Sample]) -> NoReturn:
        posts = ", ".join(post.id for post in samples[:3])
        raise RunError(f"{self.name}: the workers have not answered {len(samples)} questions, such as about {posts}")
