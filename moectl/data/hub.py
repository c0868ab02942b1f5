"""Reader of Hub datasets: streamed by the `datasets` library, which runs no code from the Hub; never stored whole."""

from __future__ import annotations

from collections.abc import Iterator

from moectl.errors import InputError, MachineError
from moectl.text import escape, reason


def read_hub(dataset: str, split: str) -> Iterator[str]:
    """The `text` column of one split of the Hub dataset `org/name`.

    Raises:
        InputError: there is no such dataset or split, or a row has no text.
        MachineError: the Hub cannot be reached, or `datasets` is missing.
    """
    shown = f"{dataset}:{split}"
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise MachineError(
            f"{shown} cannot be read without the `datasets` library.",
            "It was taken for a Hub dataset, since there is no such path.",
            "pip install 'moectl[data]'",
        ) from None
    try:
        for number, row in enumerate(load_dataset(dataset, split=split, streaming=True), start=1):
            if not isinstance(row.get("text"), str):
                fields = ", ".join(escape(str(name)) for name in list(row)[:8])
                raise InputError(
                    f"{shown}, row {number}, has no `text` string (fields: {fields}).",
                    "Documents are read from the column `text`.",
                    "Write the column you mean as `text` into a .jsonl or .parquet file, and give that.",
                )
            yield row["text"]
    except InputError:
        raise
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise InputError(
            f"{shown} cannot be read from the Hub.",
            reason(error, 200),
            "Check the spelling (org/name or org/name:split); for a private dataset set HF_TOKEN.",
        ) from error
    except OSError as error:
        raise MachineError(
            f"{shown} could not be fetched.",
            reason(error, 200),
            "Check the network and HF_HUB_OFFLINE, or give a local file.",
        ) from error
