"""Tracking with wandb: one group per chain, one run per stage, artifacts between them. Its errors stop no chain."""

from distill.tracking.run import StageRun
from distill.tracking.settings import TrackingSettings, not_logged_in
from distill.tracking.tracker import Tracker

__all__ = ["StageRun", "Tracker", "TrackingSettings", "not_logged_in"]
