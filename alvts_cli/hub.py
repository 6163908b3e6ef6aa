"""Selectors on the hub: taken from there, and put there.

A repo with selectors holds them in a file of its own name, `FILE`; a model's repo may, too.
"""

import re
from pathlib import Path

from .errors import AlvtsError

FILE = "selectors.safetensors"
"""Of the selectors, in a repo and in a folder."""


def selectors_file(named: str) -> Path:
    """The file that `--selectors` names, fetched if it is on the hub and not here yet.

    Args:
        named: a file, a folder that holds one, `user/repo[@revision]` or
            `hf://user/repo[@revision][/file]`.

    Returns:
        A path; that of a file that is named as such need not be there.

    Raises:
        AlvtsError: no name; a folder without selectors; no such repo, revision or file; no hub.
    """
    if not named:
        raise AlvtsError("the name of the selectors is empty; name a file, a folder or a repo")
    path = Path(named)
    if path.is_dir():
        return _in_folder(path)
    of_hub = named.startswith("hf://")
    if not of_hub and (path.exists() or path.suffix == ".safetensors"):
        return path
    if not of_hub and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", named) is None:
        return path
    from huggingface_hub import hf_hub_download, parse_hf_uri

    try:
        uri = parse_hf_uri(named if of_hub else f"hf://{named}")
    except ValueError as error:
        raise AlvtsError(f"no selectors {named!r}: {_line(error)}") from None
    try:
        found = hf_hub_download(
            uri.id,
            uri.path_in_repo or FILE,
            revision=uri.revision,
            # Where there is no hub, downloading would try again for half a minute.
            local_files_only=_files(uri.id, uri.revision) is None,
        )
    except Exception as error:
        # What the HTTP library in use raises, and half a dozen types of the hub's.
        raise AlvtsError(f"cannot get the selectors {named}: {_reason(error)}") from error
    return Path(found)


def offered(model_id: str, revision: str | None) -> Path | None:
    """The selectors in the repo of a model of the hub; None where there are none, or no network.

    Args:
        model_id: a hub id.
        revision: the commit of the model in use.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(model_id, FILE, revision=revision)
    if known is not None:
        # A string, or a mark that the repo has none.
        return Path(known) if isinstance(known, str) else None
    try:
        there = FILE in (_files(model_id, revision) or ())
        return Path(hf_hub_download(model_id, FILE, revision=revision)) if there else None
    except Exception:
        # As above; whatever it is, the selectors can still be named.
        return None


def _files(repo: str, revision: str | None) -> list[str] | None:
    """The files of a model's repo, or None where no hub answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=10)
    except HfHubHTTPError:
        raise
    except Exception:
        # Whatever the HTTP library in use raises.
        return None
    return [one.rfilename for one in info.siblings or ()]


def push(path: Path, repo: str, private: bool) -> tuple[str, bool]:
    """Put selectors and a card about them into a repo of the hub, which is made if need be.

    A README.md that is there and is not ours stays as it is: it may be the model's.

    Args:
        path: of the selectors.
        repo: `user/repo`.
        private: whether a new repo is to be.

    Returns:
        The address of the commit, and whether the card was written.

    Raises:
        AlvtsError: no selectors, not a repo's id, or a hub that refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    from .artifact import load_artifact
    from .card import LIBRARY, make_card

    card = make_card(load_artifact(path), repo)
    files: dict[str, bytes] = {FILE: path.read_bytes(), "README.md": card.encode()}
    try:
        api = HfApi(library_name=LIBRARY)
        api.create_repo(repo, private=private or None, exist_ok=True)
        if api.file_exists(repo, "README.md"):
            there = ModelCard.load(repo, ignore_metadata_errors=True).data
            if there.get("library_name") != LIBRARY:
                del files["README.md"]
        added = [CommitOperationAdd(name, data) for name, data in files.items()]
        done = api.create_commit(repo, added, commit_message="Selectors, by alvts push")
    except Exception as error:
        raise AlvtsError(f"cannot push to {repo}: {_reason(error)}") from error
    return str(done.commit_url), "README.md" in files


def _in_folder(folder: Path) -> Path:
    found = [folder / FILE] if (folder / FILE).is_file() else [*folder.glob("*.alvts.safetensors")]
    if len(found) != 1:
        many = "several files" if found else f"neither {FILE} nor a file"
        raise AlvtsError(f"the folder {folder} holds {many} *.alvts.safetensors; name a file")
    return found[0]


def _reason(error: Exception) -> str:
    """What is wrong, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for an agreement first; give it on the hub's page of the repo"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return "the hub has no such repo, or it asks for a login: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repo has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not on this machine, and the hub cannot be reached"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repo has no such file (by default {FILE})"
    return _line(error)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
