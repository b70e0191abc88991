"""URIs without the secrets that they may hold: what is shown, logged, recorded and passed on."""

import re

# Options of pyarrow's file systems that say where and how, and never who
_PLAIN_OPTIONS = frozenset(
    (
        *("region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion"),
        *("allow_delayed_open", "background_writes", "force_virtual_addressing", "smart_defaults"),
        *(
            "tls_verify_certificates",
            "tls_ca_file_path",
            "tls_ca_dir_path",
            "check_directory_existence_before_creation",
        ),
        *("blob_storage_authority", "dfs_storage_authority", "blob_storage_scheme", "dfs_storage_scheme"),
        *("enable_tls", "default_bucket_location", "retry_limit_seconds", "project_id", "anonymous"),
        *("replication", "buffer_size", "default_block_size", "mode"),
    )
)
_CONTAINERS_BEFORE_AT = ("abfs", "abfss", "wasb", "wasbs")  # Azure's: container[:password]@account
_NOT_A_PORT = re.compile(r"(?<!\[):(?!\d{1,5}$)(?![^\[]*\])")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")


def shown(uri: str) -> str:
    """The URI without users, passwords, keys and tokens; what is no URI as it is.

    Of a query only options are left that are known to hold none. Secrets with a "/", "?" or "@" of their own, which
    should have been written %2F, %3F and %40, go with all that comes before the last "@".
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, host = _divided(authority)
    if _NOT_A_PORT.search(host):  # the secret goes on behind what looks like the authority's end, or stands alone
        user, rest = _divided(rest) if "@" in rest else (rest, authority.partition(":")[0])
    elif _is_ambiguous(rest) or user:
        path = rest.partition("?")[0]
        user = path.rpartition("@")[0]
        rest = rest[len(user) + 1 :]
    container = user.partition(":")[0] if scheme in _CONTAINERS_BEFORE_AT else ""
    path, mark, query = rest.partition("?")
    options = [
        option
        for option in query.split("&")
        if option.partition("=")[0] in _PLAIN_OPTIONS and "@" not in option and "%40" not in option
    ]
    return f"{scheme}://{container}{'@' if container else ''}{path}{mark if options else ''}{'&'.join(options)}"


def _divided(text: str) -> tuple[str, str]:
    """(before, after) the last "@"; ("", text) where there is none."""
    before, _, after = text.rpartition("@")
    return before, after


def _is_ambiguous(rest: str) -> bool:
    """Whether a "/" may be the end of the authority or stand in a secret: an "@" comes after it, and a ":" before."""
    first, slash, later = rest.partition("?")[0].partition("/")
    return "@" in later and ":" in (first + slash + later).rpartition("@")[0]


def refuse_ambiguous(uri: str) -> None:
    """ValueError, without the secret, where one has characters that end it before its end."""
    rest = uri.partition("://")[2]
    if _is_ambiguous(rest) or _NOT_A_PORT.search(_divided(re.split(r"[/?#]", rest, maxsplit=1)[0])[1]):
        raise ValueError(f"{shown(uri)}: in its user, password and path write / as %2F, ? as %3F, @ as %40, : as %3A")


def holds_secret(uri: object) -> bool:
    """Whether it is a URI of which shown() leaves something out."""
    return isinstance(uri, str) and shown(uri) != uri


def without_secrets(text: str) -> str:
    """A text with its URIs as they are shown."""
    return _IN_TEXT.sub(lambda match: shown(match[0]), text)
