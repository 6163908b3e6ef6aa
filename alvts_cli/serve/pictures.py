"""Where the pictures of a request may come from, and reading them."""

from base64 import b64decode
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

from PIL import Image

from ..data import inside
from ..errors import AlvtsError
from ..prompts import read_image

_MOST_BYTES = 50_000_000
_SECONDS = 10


class _NoRedirect(HTTPRedirectHandler):
    """A host that is allowed must not lead to one that is not."""

    def redirect_request(self, *args: Any) -> None:
        """Never: the reply is an error."""


@dataclass(frozen=True)
class Sources:
    """Where pictures may come from, beside the request itself.

    Attributes:
        folder: of the files that `file://` may name; None for none.
        hosts: that http and https URLs may name: `example.com`, with the port where it is not the
            usual one.
    """

    folder: Path | None = None
    hosts: tuple[str, ...] = ()

    def read(self, url: str, name: str) -> Image.Image:
        """The picture at `url`, RGB and upright; `name` is what a message calls it.

        Raises:
            AlvtsError: not allowed here, not to be had, or no picture.
        """
        # First: `urlsplit` would keep the whole picture in a cache of its own.
        if url.startswith("data:"):
            return read_image(BytesIO(_embedded(url, name)), name)
        try:
            parts = urlsplit(url)
        except ValueError:
            raise AlvtsError(f"{name} has no URL that can be read") from None
        if parts.scheme == "file":
            return read_image(self._file(unquote(parts.path), name), name)
        if parts.scheme in ("http", "https"):
            return read_image(BytesIO(self._fetched(url, parts.netloc.lower(), name)), name)
        raise AlvtsError(f"{name} needs a URL: data:image/png;base64,... always works")

    def _file(self, path: str, name: str) -> Path:
        try:
            assert self.folder is not None
            folder = self.folder.resolve()
            return inside(folder, str(Path(path).relative_to(folder)))
        except (AssertionError, ValueError, AlvtsError):
            raise AlvtsError(f"{name} is a file that this server does not give out") from None

    def _fetched(self, url: str, host: str, name: str) -> bytes:
        if host not in self.hosts:
            raise AlvtsError(f"{name} is at a host that this server does not fetch from")
        try:
            with build_opener(_NoRedirect).open(url, timeout=_SECONDS) as reply:
                data: bytes = reply.read(_MOST_BYTES + 1)
        except (OSError, ValueError, HTTPException) as error:
            raise AlvtsError(f"{name} cannot be fetched: {error}") from None
        if len(data) > _MOST_BYTES:
            raise AlvtsError(f"{name} has more than {_MOST_BYTES // 1_000_000} MB")
        return data


def _embedded(url: str, name: str) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return b64decode(data, validate=True)
    except ValueError:
        raise AlvtsError(
            f"{name} is not data:image/png;base64,... or its base64 is broken"
        ) from None
