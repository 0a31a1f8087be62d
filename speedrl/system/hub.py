"""Files of the Hugging Face hub: fetched on first use, cached, and in one clear line where that fails."""

from collections.abc import Callable
from pathlib import Path

from speedrl.system.errors import one_line


def from_hub(fetch: Callable[[], str], what: str, *, instead: str) -> Path:
    """The path that `fetch` gives, a download through huggingface_hub of `what`.

    FileNotFoundError in one line with the cause, and `instead`, what the user can do.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(fetch())
    except Exception as error:  # the hub's errors have no common class
        causes = (
            (GatedRepoError, "is gated on the hub: accept its terms there and run `hf auth login`"),
            (RepositoryNotFoundError, "is not on the hub, or is private"),
            (LocalEntryNotFoundError, "is not cached and the hub cannot be reached"),
            (EntryNotFoundError, "is not in that repository of the hub"),
            (OSError, "is not cached and the hub cannot be reached"),
        )
        cause = next((text for kind, text in causes if isinstance(error, kind)), one_line(error))
        raise FileNotFoundError(f"{what} {cause}; {instead}") from error


def hub_file(repository: str, name: str, *, kind: str = "model", instead: str) -> Path:
    """A file of a hub repository, `kind` "model" or "dataset"."""
    from huggingface_hub import hf_hub_download

    fetch = lambda: hf_hub_download(repository, name, repo_type=kind)  # noqa: E731
    return from_hub(fetch, f"{name} of {repository}", instead=instead)
