"""Upload a finished checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from moectl.errors import InputError, MachineError, UsageError
from moectl.text import escape, reason


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository, before any work is done for it.

    Raises:
        UsageError: it is not of the form org/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{escape(repo_id)} is not a Hub id.", escape(str(error)), "Write org/name.") from None


def upload(checkpoint: Path, repo_id: str) -> str:
    """Make the model repository if need be and upload the directory in one commit; returns the commit's address.

    Raises:
        InputError: no such organisation, or no right to write there.
        MachineError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=checkpoint, commit_message="Upload a checkpoint made by moectl"
        )
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        denied = isinstance(error, RepositoryNotFoundError) or status in (401, 403)
        kind = InputError if denied else MachineError
        raise kind(
            f"{escape(str(checkpoint))} is whole, but it could not be uploaded to hf://{repo_id}.",
            reason(error),
            "Set HF_TOKEN to a token that may write there." if denied else "The same command tries the upload again.",
        ) from error
    return str(commit.commit_url)
