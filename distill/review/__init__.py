"""`distill review`: a local page to look through the reasoning data of a run and to decide about posts."""

from distill.errors import SettingsError
from distill.recipe import Recipe


def run(recipe: Recipe, host: str, port: int) -> None:
    """Serve the page until SIGTERM or SIGINT.

    Raises:
        SettingsError: see `server.serve`, or the web libraries are not installed.
    """
    try:
        from distill.review.server import serve
    except ImportError as error:
        raise SettingsError(f"review needs {error.name}: pip install 'distill[serve]'") from None
    serve(recipe, host, port)
