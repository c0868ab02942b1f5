"""Uploading: one repository, one commit, the whole directory; a failure leaves the checkpoint whole and says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from trees import dense_llama

from moectl.checkpoint.hub import check_repo_id, upload
from moectl.errors import InputError, MachineError, MoectlError, UsageError


class FakeApi:
    """Records what it is asked to do; fails with `error` if there is one."""

    calls: list[tuple[str, Any]]
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, exist_ok: bool) -> None:
        self.calls.append(("create", (repo_id, repo_type, exist_ok)))
        if self.error:
            raise self.error

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self.calls.append(("upload", (repo_id, sorted(path.name for path in folder_path.iterdir()))))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/abc")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [], raising=False)
    monkeypatch.setattr(FakeApi, "error", None)
    return FakeApi


def test_uploads_the_directory_in_one_commit(api: type[FakeApi], tmp_path: Path) -> None:
    path = dense_llama(tmp_path / "m")
    assert upload(path, "org/name") == "https://huggingface.co/org/name/commit/abc"
    assert [kind for kind, _ in api.calls] == ["create", "upload"]
    assert api.calls[1][1] == ("org/name", sorted(p.name for p in path.iterdir()))


@pytest.mark.parametrize(("status", "kind"), [(401, InputError), (403, InputError), (500, MachineError)])
def test_failures_name_the_checkpoint_that_is_safe(
    status: int, kind: type[MoectlError], api: type[FakeApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dense_llama(tmp_path / "m")
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    monkeypatch.setattr(api, "error", HfHubHTTPError(f"{status} from the Hub", response=response))
    with pytest.raises(kind) as caught:
        upload(path, "org/name")
    assert str(path) in caught.value.what and "could not be uploaded to hf://org/name" in caught.value.what
    assert path.exists()


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "org/na me", "-x", "org/name--x"])
def test_impossible_names_are_refused_first(repo_id: str) -> None:
    with pytest.raises(UsageError, match="is not a Hub id"):
        check_repo_id(repo_id)
