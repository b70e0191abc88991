"""URIs without the secrets that they may hold. Messages, logs and records use this form."""

import re

# Options of pyarrow's file systems that name places and behaviour, and never hold a key or a token
_PLAIN_OPTIONS = (
    *("region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion"),
    *("allow_delayed_open", "background_writes", "force_virtual_addressing", "smart_defaults"),
    *("tls_verify_certificates", "tls_ca_file_path", "tls_ca_dir_path", "check_directory_existence_before_creation"),
    *("blob_storage_authority", "dfs_storage_authority", "blob_storage_scheme", "dfs_storage_scheme"),
    *("enable_tls", "default_bucket_location", "retry_limit_seconds", "project_id", "anonymous"),
    *("replication", "buffer_size", "default_block_size", "mode"),
)
_CONTAINERS_BEFORE_AT = ("abfs", "abfss", "wasb", "wasbs")  # Azure's: container[:password]@account
_NOT_A_PORT = re.compile(r"(?<!\[):(?!\d{1,5}$)(?![^\[]*\])")
# A comma or the like at its end belongs to the sentence: it would turn a port into a secret
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+(?<![,;:.)])")


def shown(uri: str) -> str:
    """Return the URI without users, passwords, keys and tokens. Return a text that is no URI unchanged.

    Of the query, only options that never hold a secret stay. A secret may contain an unescaped "/", "?" or "@" (they
    should be written %2F, %3F and %40): then everything before the last "@" is removed.
    """
    scheme, mark, remainder = uri.partition("://")
    if not mark:
        return uri
    authority, user, host = _authority(remainder)
    if _NOT_A_PORT.search(host):  # the secret continues after what looks like the authority's end, or stands alone
        user, _, remainder = remainder.rpartition("@") if "@" in remainder else (remainder, "", authority.split(":")[0])
    elif user or _is_ambiguous(remainder):
        user = remainder.partition("?")[0].rpartition("@")[0]
        remainder = remainder[len(user) + 1 :]
    container = user.partition(":")[0] if scheme in _CONTAINERS_BEFORE_AT else ""
    path, mark, query = remainder.partition("?")
    options = [
        option
        for option in query.split("&")
        if option.partition("=")[0] in _PLAIN_OPTIONS and "@" not in option and "%40" not in option
    ]
    return f"{scheme}://{container}{'@' if container else ''}{path}{mark if options else ''}{'&'.join(options)}"


def _authority(remainder: str) -> tuple[str, str, str]:
    """Return what precedes the path, and its parts before and after the last "@"."""
    authority = re.split(r"[/?#]", remainder, maxsplit=1)[0]
    user, _, host = authority.rpartition("@")
    return authority, user, host


def _is_ambiguous(remainder: str) -> bool:
    """Return True if the first "/" may be part of a secret: an "@" follows it, and a ":" comes before that "@"."""
    path = remainder.partition("?")[0]
    return "@" in path.partition("/")[2] and ":" in path.rpartition("@")[0]


def refuse_ambiguous(uri: str) -> None:
    """Raise a ValueError, which does not show the secret, if the URI's secret contains an unescaped delimiter."""
    remainder = uri.partition("://")[2]
    if _is_ambiguous(remainder) or _NOT_A_PORT.search(_authority(remainder)[2]):
        raise ValueError(f"{shown(uri)}: in its user, password and path write / as %2F, ? as %3F, @ as %40, : as %3A")


def holds_secret(uri: object) -> bool:
    """Return True if the value is a URI from which shown() removes something."""
    return isinstance(uri, str) and shown(uri) != uri


def without_secrets(text: str) -> str:
    """Return the text with every URI in it as shown() returns it."""
    return _IN_TEXT.sub(lambda match: shown(match[0]), text)
