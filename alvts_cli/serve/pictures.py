"""Where the pictures of a request may come from, and reading them."""

from base64 import b64decode
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import httpx
from PIL import Image

from ..data import inside
from ..errors import AlvtsError
from ..models import first_line
from ..prompts import read_image

_MOST_MB = 50


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
        with suppress(ValueError):
            parts = urlsplit(url)
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
            # A redirect is an error: a host that is allowed must not lead to one that is not.
            with httpx.stream("GET", url, timeout=10) as reply:
                reply.raise_for_status()
                data = b"".join(islice(reply.iter_bytes(1_000_000), _MOST_MB + 1))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AlvtsError(f"{name} cannot be fetched: {first_line(error)}") from None
        if len(data) > _MOST_MB * 1_000_000:
            raise AlvtsError(f"{name} has more than {_MOST_MB} MB")
        return data


def _embedded(url: str, name: str) -> bytes:
    try:
        return b64decode(url.split(";base64,", 1)[1], validate=True)
    except (IndexError, ValueError):
        raise AlvtsError(
            f"{name} is not data:image/png;base64,... or its base64 is broken"
        ) from None
