"""`alvts serve`: a model with selection behind OpenAI's interface."""

import sys
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server
from socket import socket as Socket
from typing import Annotated, Any

import typer

from ..errors import AlvtsError
from .options import (
    DeviceOption,
    DTypeOption,
    KeepOption,
    ModelOption,
    OtherWeightsOption,
    SelectorsOption,
    TrustOption,
    check_keep,
)

EPILOG = (
    "Example: `alvts serve --model llava-1.5-7b --keep 64`, then any OpenAI client with "
    '`base_url="http://localhost:8000/v1"`; `extra_body={"keep": 32}` for one request.'
)


def serve(
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: KeepOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")
    ] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Requests may name the files below it (file://...); default: none."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Images are fetched from it where a request has such a URL: example.com or "
            "example.com:8080; repeat for several. Default: nothing is fetched."
        ),
    ] = None,
    unload_after: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds without a request until the model leaves memory."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    other_weights: OtherWeightsOption = False,
) -> None:
    """Serve a model through OpenAI's chat completions, with selection. Needs alvts[serve]."""
    check_keep(keep)
    if not host.strip():
        raise typer.BadParameter("it is empty; 0.0.0.0 listens at all", param_hint="--host")
    if image_folder is not None and not image_folder.is_dir():
        raise typer.BadParameter(f"{image_folder} is not a folder", param_hint="--image-folder")

    from ..serve import require_serving

    require_serving()

    import uvicorn

    from ..answer import selectors_for
    from ..models import load_model
    from ..serve.app import Models, make_app
    from ..serve.pictures import Sources
    from ..terminal import say

    def read() -> tuple[Any, Any]:
        loaded = load_model(model, device, dtype, trust_remote_code)
        return loaded, selectors_for(loaded, selectors, other_weights)

    # Before the model is loaded: the port may be taken.
    with _listen(host, port) as socket:
        models = Models(model, read, keep, unload_after)
        sources = Sources(image_folder, tuple(name.lower() for name in allow_host or ()))
        server = uvicorn.Server(uvicorn.Config(make_app(models, sources)))
        say(f"serving {model} at http://{host}:{socket.getsockname()[1]}/v1")
        sys.stdout.flush()
        try:
            server.run(sockets=[socket])
        except KeyboardInterrupt:
            # That is how a server is stopped.
            return


def _listen(host: str, port: int) -> Socket:
    """A listening socket.

    Raises:
        AlvtsError: the address is not one of this machine's, or taken.
    """
    try:
        return create_server((host, port), family=AF_INET6 if ":" in host else AF_INET)
    except OSError as error:
        raise AlvtsError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
