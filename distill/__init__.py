"""Knowledge distillation of multimodal teachers into small students that reason, classify and defer when uncertain."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.api import Cascade, Recipe, Run, Student, load_recipe, plan, run
    from distill.comparison import compare
    from distill.errors import RunError, SettingsError
    from distill.training.fused_loss import HiddenTargets, answer_loss

__version__ = "0.1.0"

__all__ = [
    "Cascade", "HiddenTargets", "Recipe", "Run", "RunError", "SettingsError", "Student", "__version__", "answer_loss",
    "compare", "load_recipe", "plan", "run",
]  # fmt: skip

_MODULES = {
    "HiddenTargets": "distill.training.fused_loss",
    "RunError": "distill.errors",
    "SettingsError": "distill.errors",
    "answer_loss": "distill.training.fused_loss",
    "compare": "distill.comparison",
}
"""Modules of the names that distill.api does not define."""


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is used, since torch and transformers take seconds to import."""
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "distill.api")), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
