"""A web page of the package, and the policy under which a browser shows it."""

import base64
from hashlib import sha256
from importlib import resources


def load_page(package: str, images: str, media: str = "'none'") -> tuple[str, str]:
    """The `page.html` of a package, and a content security policy that allows only its own style and script.

    Args:
        images: where images may come from, such as `'self'`.
        media: where videos and sounds may come from.
    """
    page = (resources.files(package) / "page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"

    return page, (
        f"default-src 'none'; style-src {digest('style')}; script-src {digest('script')}; img-src {images}; "
        f"media-src {media}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
