"""Knowledge distillation of multimodal teachers into small students that reason, classify and defer when uncertain."""

__version__ = "0.1.0"
