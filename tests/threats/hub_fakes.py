"""Exceptions of the Hub's library, with a token and control characters in their messages."""

from __future__ import annotations

import sys

from moectl.errors import InputError, MachineError, MoectlError

SECRET = "hf_" + "S3cr3t" * 5


def hub_failures() -> dict[str, tuple[Exception, type[MoectlError]]]:
    from huggingface_hub import errors

    httpx = sys.modules[errors.HTTPError.__module__.split(".")[0]]  # httpx or httpx2

    def answer(status: int, kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
        request = httpx.Request("GET", "https://huggingface.co/x", headers={"authorization": f"Bearer {SECRET}"})
        text = f"{status} Client Error for Bearer {SECRET}\nmore \x1b[31mlines"
        return kind(text, response=httpx.Response(status, request=request))

    return {
        "offline": (errors.LocalEntryNotFoundError("Cannot find it; outgoing traffic is disabled."), MachineError),
        "gated": (answer(403, errors.GatedRepoError), InputError),
        "no such repository": (answer(404, errors.RepositoryNotFoundError), InputError),
        "no such revision": (answer(404, errors.RevisionNotFoundError), InputError),
        "too many requests": (answer(429, errors.HfHubHTTPError), MachineError),
        "server": (answer(500, errors.HfHubHTTPError), MachineError),
        "reset": (httpx.ReadTimeout(f"timed out with {SECRET}"), MachineError),
        "no connection": (ConnectionError("[Errno 101] Network is unreachable"), MachineError),
    }
