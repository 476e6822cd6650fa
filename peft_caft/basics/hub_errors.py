"""Files of the Hub, and its errors in words that tell a user what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .reading import is_file


@contextmanager
def explained(field: str, repo_id: str, revision: str | None = None, action: str = "read") -> Iterator[None]:
    """Turn huggingface_hub's errors into built-in ones that name the field and the way out.

    Args:
        field: name of the argument that gave ``repo_id``.
        revision: branch, tag or commit; None is ``main``.
        action: permission that the token needs, ``"read"`` or ``"write to"``.

    Raises:
        FileNotFoundError: if the repository, revision or file is missing, private or not cached.
        PermissionError: if the token is missing or unknown, or does not allow this.
        ConnectionError: if the Hub cannot be reached or fails, or the connection breaks off.
    """
    where = f"{field}: {repo_id!r} on {constants.ENDPOINT}"
    at = f"revision {revision or 'main'}"
    log_in = f"Log in with `hf auth login`, or set HF_TOKEN to a token that may {action} {repo_id!r}"
    retry = "No file was changed by halves: run the same again later."
    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{field}: {repo_id!r} is neither a folder nor a Hub repository id such as 'org/Llama-2-7b-hf-caft-heads'."
        ) from error
    except GatedRepoError as error:
        raise PermissionError(f"{where} is gated. Accept its terms on its page; then: {log_in}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no such repository, or it is private and the token is missing or not allowed to see it. Check "
            f"the name. If it is private: {log_in}."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no {at}. Give a branch, tag or full commit id that its page lists."
        ) from error
    except LocalEntryNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise FileNotFoundError(
                f"{field}: {repo_id!r}, {at}, is not in the local cache, and asking the Hub is switched off "
                "(HF_HUB_OFFLINE or local_files_only). Load it once online."
            ) from error
        raise ConnectionError(f"{where} cannot be reached ({first_line(error.__cause__)}). {retry}") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{where}, {at}, holds no such file ({first_line(error)}).") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(f"{where}: {first_line(error)} {log_in}.") from error
        if status == 412:
            raise ConnectionError(f"{where} was changed by someone else meanwhile. Run the same again.") from error
        if status < 500 and status not in (408, 429):
            raise
        raise ConnectionError(f"{where}: the Hub failed ({first_line(error)}). {retry}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{where}: no connection, or it broke off ({first_line(error)}). {retry}") from error
    except RuntimeError as error:
        # huggingface_hub wraps the error that stops the upload of a large file.
        reason = first_line(error.__cause__ or error)
        raise ConnectionError(f"{where}: the transfer failed ({reason}). {retry}") from error


def file_of(
    field: str, source: str, name: str, revision: str | None = None, *, subfolder: str | None = None, **hub: Any
) -> Path | None:
    """A file in a folder, or downloaded from the Hub; None if it is not there.

    Args:
        field: name of the argument that gave ``source``, for messages.
        source: folder, or repository id on the Hub.
        subfolder: folder inside of ``source``.
        hub: further arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `explained` says.
        ValueError: if the name is there, but no file.
    """
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        return folder / name if is_file(folder / name) else None
    with explained(field, source, revision):
        try:
            return Path(hf_hub_download(source, name, subfolder=subfolder, revision=revision, **hub))
        except LocalEntryNotFoundError:  # offline mode, and not in the cache
            raise
        except EntryNotFoundError:
            return None


def first_line(error: BaseException) -> str:
    """First line of the error's message, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
