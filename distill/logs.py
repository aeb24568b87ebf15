"""What a command logs: its own info messages; the routine messages and warnings of the libraries are hidden."""

import logging
import warnings

from distill.masking import mask


def configure(*, main: bool = True) -> None:
    """Show info messages of distill; hide the routine messages and warnings of the libraries.

    Args:
        main: False in the other processes of a training, whose messages are those of the main process again.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _MaskingFormatter):
            handler.setFormatter(_MaskingFormatter(handler.formatter))
    logging.getLogger("distill").setLevel(logging.INFO if main else logging.ERROR)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.ERROR)
    for name in ("rank_zero", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchdata|transformers|peft)\..*")


class _MaskingFormatter(logging.Formatter):
    """Masks passwords in the lines of another formatter."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return str(mask(self._inner.format(record)))
