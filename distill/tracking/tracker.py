"""Starts the wandb runs of a chain, and applies the table of what each stage uses and logs."""

import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from distill.masking import mask
from distill.tracking.lineage import OUTPUTS
from distill.tracking.run import Guard, StageRun
from distill.tracking.settings import TrackingSettings, shorten, wanted_mode

_INIT_SECONDS, _FINISH_SECONDS = 30, 300
_GROUP_LENGTH = 80  # leaves room in a name of wandb for the name of a stage or artifact

_log = logging.getLogger(__name__)


class Tracker:
    """Starts the wandb runs of one chain. Local files of wandb are written to `<folder>/wandb`."""

    def __init__(self, settings: TrackingSettings, folder: Path, name: str) -> None:
        """Initialise the tracker.

        Args:
            folder: the chain's folder.
            name: name of the recipe, the default group.
        """
        self.settings = settings
        self.folder = folder.absolute()  # wandb records the paths of files, and may be asked for them elsewhere
        self.group = shorten(settings.group or name, _GROUP_LENGTH)

    @contextmanager
    def stage(self, stage: str, config: Mapping[str, Any], reads: Collection[str] = ()) -> Iterator[StageRun]:
        """Start a wandb run for one stage; it ends with the block, and is marked as failed if the block raises.

        The run uses the artifacts of the stages in `reads`, and logs that of its own stage at the end.
        """
        guard = Guard(stage)
        with local_files(self.folder / "wandb"):
            with _masked_arguments():
                run = guard(self._start, stage, config) if getattr(rank_zero_only, "rank", 0) == 0 else None
            tracked = StageRun(run, guard, self.settings, self.group, self.folder)
            try:
                for name in reads:
                    if name in OUTPUTS:
                        tracked.use_artifact(OUTPUTS[name].name)
                yield tracked
                if (output := OUTPUTS.get(stage)) is not None:
                    # normalised: the report has no folder
                    paths = [Path(os.path.normpath(self.folder / stage / file)) for file in output.files]
                    tracked.log_artifact(output.name, output.type, paths)
            except BaseException:
                tracked.finish(exit_code=1)
                raise
            tracked.finish()

    def _start(self, stage: str, config: Mapping[str, Any]) -> Any:
        mode = wanted_mode(self.settings)
        if mode == "disabled":
            return None
        import wandb

        if mode not in ("offline", "dryrun"):
            logged_in = wandb.login(prompt=False, verify=False)
            if mode == "online" and not logged_in:
                _log.warning("wandb: not logged in (wandb login, or WANDB_API_KEY); stage %s runs offline", stage)
            mode = "online" if logged_in else "offline"
        else:
            mode = "offline"
        self.folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self.settings.project,
            entity=self.settings.entity or None,
            group=self.group,
            job_type=stage,
            name=f"{self.group}-{stage}",
            config=dict(config),
            dir=str(self.folder),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                console="off",
                reinit="create_new",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,  # limits the wait without network; `distill sync` uploads later
            ),
        )


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Mask passwords in the command line, which wandb records; worker processes start with the real one."""
    arguments, sys.argv = sys.argv, mask(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def local_files(folder: Path) -> Iterator[None]:
    """Set variables that silence wandb and keep its files in the run's folder; variables already set are kept."""
    variables = {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
