"""`alvts serve`: transformers' own OpenAI-compatible server, with selection.

- `pictures` where the pictures of a request may come from, and reading them
- `request`  what a request must look like, checked before anything runs
- `app`      transformers' model manager, handler and app, changed where they must be

All but `pictures` need the extra `serve`; `require_serving` says so where it is not there.
"""

from ..errors import AlvtsError


def require_serving() -> None:
    """Refuse where transformers' server is not there, or is not as `app` knows it.

    Raises:
        AlvtsError: the extra is not installed, or another release of transformers is.
    """
    import transformers

    try:
        import uvicorn  # noqa: F401

        from . import app  # noqa: F401
    except (ImportError, AttributeError) as error:
        name = error.name or ""
        if isinstance(error, ModuleNotFoundError) and not name.startswith("transformers"):
            raise AlvtsError(f"the server needs {name}; run: pip install 'alvts[serve]'") from None
        raise AlvtsError(
            f"the server of transformers {transformers.__version__} is not one that alvts knows: "
            f"{error}"
        ) from None
