"""What the clients of servers raise, put into one form: an HTTP status where there is one, a reason, and whether to try again."""

import importlib
import re
from collections.abc import Iterator

from glsd.shards.addresses import shown

# What to install for a scheme, and the error types of its client that are no OSError.
CLIENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "http": ("fsspec[http]", ("aiohttp:ClientError",)),
    "https": ("fsspec[http]", ("aiohttp:ClientError",)),
    "s3": (
        "glsd[s3]",
        ("botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError", "aiohttp:ClientError"),
    ),
    "gs": (
        "glsd[gs]",
        ("gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError", "aiohttp:ClientError"),
    ),
    "hf": (
        "huggingface_hub",
        ("huggingface_hub.errors:HfHubHTTPError", "httpx:HTTPError", "httpx2:HTTPError"),
    ),
}
NOT_TO_MEND = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")


def error_types(scheme: str) -> tuple[type[Exception], ...]:
    """Return what the client of a scheme raises for what is not our bug."""
    types: list[type[Exception]] = [OSError, TimeoutError, ValueError, OverflowError]
    for name in CLIENTS[scheme][1]:
        module, _, attribute = name.partition(":")
        try:
            types.append(getattr(importlib.import_module(module), attribute))
        except ImportError:
            continue  # then it cannot be raised either
    return tuple(types)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: Exception) -> int | None:
    """Return the HTTP status behind an error; backends hide it in what they raise from, or in the type."""
    for link in _chain(error):
        answer = getattr(link, "response", None)
        if isinstance(answer, dict):  # botocore
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # Elsewhere ``code`` is something else: aiohttp's is 400 for an answer that was cut.
        code = getattr(link, "code", None) if type(link).__module__.startswith("gcsfs") else answer
        status = getattr(link, "status", code)
        number = getattr(status, "status_code", status)
        if isinstance(number, int) and 100 <= number < 600:
            return number
    # A backend calls a file missing whatever went wrong: believe it only where nothing else is behind it.
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404
    return 403 if any(isinstance(link, PermissionError) for link in _chain(error)) else None


def is_wrong(error: Exception) -> bool:
    """Tell whether the address itself is to blame, or missing credentials: what no server can mend."""
    names = {type(link).__name__ for link in _chain(error)}
    return isinstance(error, ValueError | OverflowError) or not names.isdisjoint(NOT_TO_MEND)


def reason_of(error: Exception) -> str:
    last = list(_chain(error))[-1]
    text = str(last).strip().splitlines() or [""]
    # Some clients quote the whole address, signature included.
    first = re.sub(r"\S+://\S+", lambda found: shown(found[0]), text[0])[:200]
    return f"{type(last).__name__}: {first}" if first else type(last).__name__
