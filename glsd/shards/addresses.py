"""Addresses of files on servers, as strings: which can be read, what of them may be shown, what makes two of them the same."""

import re

from glsd.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "hf")
# Parameters of a query that say who may read, not what: of Amazon, Google, Microsoft, CloudFront.
SIGNATURE = re.compile(
    "x-(amz|goog|ms)-.*|.*signature|.*token|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"
    "|s[vsprtieg]|sig|srt|spr|sk(oid|tid|t|e|s|v)|sdd",
    re.IGNORECASE,
)


def is_remote(address: str) -> bool:
    """Tell whether an address names a file on a server: ``scheme://...``."""
    return "://" in address


def check_scheme(address: str) -> str:
    """Return the scheme of an address; UserError if it is none that can be read."""
    scheme = address.split("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{shown(address)}: expected a local path or an address that begins with {known}")
    return scheme


def shown(address: str) -> str:
    """Return an address as it may stand in a log: without the password and the signature it may carry."""
    return re.sub(r"(?<=://)[^/@]*@", "", address.partition("?")[0]) if is_remote(address) else address


def identity(address: str) -> str:
    """Return what stays of an address when it is signed anew: without password and signature, with the rest of the query."""
    query = address.partition("?")[2].split("&") if is_remote(address) else []
    kept = [part for part in query if part and not SIGNATURE.fullmatch(part.partition("=")[0])]
    return "?".join([shown(address), "&".join(kept)]) if kept else shown(address)


def beside(address: str, suffix: str) -> str:
    """Return the address of the file whose name has ``suffix`` added."""
    path, mark, query = address.partition("?") if is_remote(address) else (address, "", "")
    return f"{path}{suffix}{mark}{query}"
