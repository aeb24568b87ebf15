"""Distillation of multimodal teachers into small students that reason, classify and know their limits."""

__version__ = "0.1.0"
