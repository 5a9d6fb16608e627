"""Uploading a model folder to a repository on the hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simseg_jax.runtime.errors import UserError, one_line, some


def refuse_existing(repository: str) -> None:
    """Raises a `UserError` unless `repository` is "owner/name" and is not there or is empty."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository} is no repository: --to=hub takes owner/name.")
    from huggingface_hub import HfApi  # Here, because it is slow.
    from huggingface_hub.errors import RepositoryNotFoundError

    with _errors(repository):
        try:
            files = HfApi().list_repo_files(repository)
        except RepositoryNotFoundError:
            return
    files = [name for name in files if name != ".gitattributes"]
    if files:
        raise UserError(
            f"{repository} holds files ({some(files)}): name another one, nothing is overwritten."
        )


def upload(folder: Path, repository: str, private: bool) -> str:
    """Makes a repository with the content of a model folder and returns its address."""
    from huggingface_hub import HfApi

    with _errors(repository):
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model of simseg_jax"
        )
    return str(address)


@contextmanager
def _errors(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The hub's client raises its own errors, httpx's and others.
        raise UserError(
            f"The hub did not take {repository} ({type(error).__name__}: {one_line(error)}): "
            'check its name, the network, and that you are logged in ("hf auth login").'
        ) from error
