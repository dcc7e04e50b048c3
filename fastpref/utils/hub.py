"""Uploads of exported models to the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastpref.utils.errors import UserError, first_line

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class UploadError(UserError):
    """A model cannot be uploaded; its folder is as it was."""


def check(field: str, repository: str) -> None:
    """Raise UserError where an upload would certainly fail: by the name, or without a login.

    field: the option, for the message.
    """
    if _NAME.fullmatch(repository) is None:
        raise UserError(f"{field}: must be ORG/NAME on the Hub, got {repository!r}")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{field}: the Hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; remove it"
        )
    if get_token() is None:
        raise UserError(
            f"{field}: nobody is logged in on the Hub; run `hf auth login`, or set HF_TOKEN"
        )


def upload(folder: Path, repository: str, private: bool | None, retry: str) -> str:
    """Upload the files of a folder and return the address of the repository.

    private: of a repository that is not there yet; None is the default of the organization.
    retry: command that does the same, for the message.

    Raises UploadError in one line.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model trained with fastpref"
        )
    except Exception as error:  # huggingface_hub, httpx and xet raise unrelated types
        raise UploadError(
            f"cannot upload to {repository}: {first_line(error)}; {folder} is complete, upload it "
            f"by {retry}"
        ) from None
    return str(address)
