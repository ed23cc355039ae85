"""Download one file of a remote folder: an object store or a folder. Every failure is a FetchError.

Amazon S3 and compatible stores are read by boto3 directly, so that a slow or silent connection can be cut. The other
stores are read by the downloaders of MosaicML streaming.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from sfd_scale.data.mosaic import streaming
from sfd_scale.runtime import environment

Cause = Literal["missing", "denied", "expired", "credentials", "network", "damaged", "busy", "disk", "unsupported"]
_TRANSIENT = ("network", "damaged")
SCHEMES = ("s3", "gs", "azure", "oci", "hf")
_PIECE = 1 << 20  # bytes of one read


class FetchError(ValueError):
    """A file of `data.remote` could not be downloaded. The message is one sentence that says what to do.

    Attributes:
        cause: the kind of failure.
    """

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(f"data.remote: {message}")
        self.cause = cause

    @property
    def is_transient(self) -> bool:
        """Whether another attempt may succeed."""
        return self.cause in _TRANSIENT


class Cancelled(Exception):
    """The download is no longer needed: its reader was closed."""


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Limits of a download.

    timeout_s: of a connection that sends nothing.
    min_rate: bytes per second. A connection that is slower than this on average after `timeout_s` is cut.
    attempts: downloads of one file before its error is raised.
    backoff_s: pause before the second attempt; doubled before each further one.
    wait_s: how long a process waits for another one that downloads the same file.
    """

    timeout_s: float = 60.0
    min_rate: float = 100_000.0
    attempts: int = 3
    backoff_s: float = 1.0
    wait_s: float = 600.0


class Store(Protocol):
    """A remote folder."""

    def pieces(self, name: str, scratch: Path) -> Iterator[bytes]:
        """The content of one of its files. `scratch` is a path for a temporary file, which the caller deletes.

        Raises:
            FetchError: if it cannot be read.
        """
        ...


def open_store(remote: str, limits: FetchLimits, connections: int = 10) -> Store:
    """The store of an address, or of a local folder.

    Raises:
        FetchError: for an address of an unknown kind.
    """
    scheme = urlparse(remote).scheme
    if scheme in ("", "file"):
        return FolderStore(Path(urlparse(remote).path if scheme else remote))
    if scheme == "s3":
        return S3Store(remote, limits, connections)
    if scheme in SCHEMES:
        return LibraryStore(remote, limits)
    raise FetchError(
        "unsupported", f"{remote}; allowed: a folder, or an address that begins with {', '.join(SCHEMES)} and ://"
    )


@dataclass(frozen=True)
class Expected:
    """The size and SHA-256 that a file has to have; None where they are not known."""

    bytes: int | None = None
    sha256: str | None = None


def download(
    store: Store, name: str, target: Path, expected: Expected, limits: FetchLimits,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Write a file of the store to `target`. Try again after a failure of the network or a damaged content.

    Raises:
        FetchError: after the last attempt, or at once where another attempt cannot help.
        Cancelled: if `cancelled` became true.
    """
    scratch = target.with_name(f"{target.name}.scratch")
    for attempt in range(1, limits.attempts + 1):
        try:
            _attempt(store, name, target, scratch, expected, limits, cancelled)
        except FetchError as error:
            target.unlink(missing_ok=True)
            if not error.is_transient or attempt == limits.attempts:
                raise
            _pause(limits.backoff_s * 2 ** (attempt - 1), cancelled)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        else:
            return
        finally:
            scratch.unlink(missing_ok=True)


def _attempt(
    store: Store, name: str, target: Path, scratch: Path, expected: Expected, limits: FetchLimits,
    cancelled: Callable[[], bool],
) -> None:  # fmt: skip
    digest, count, started = hashlib.sha256(), 0, time.monotonic()
    try:
        with target.open("wb") as file:
            for piece in store.pieces(name, scratch):
                file.write(piece)
                digest.update(piece)
                count += len(piece)
                if cancelled():
                    raise Cancelled
                passed = time.monotonic() - started
                if passed > limits.timeout_s and count < passed * limits.min_rate:
                    raise FetchError("network", f"{name} arrived at {count / passed:.0f} bytes/s, so it was cut off")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space, or set data.cache_limit"
            raise FetchError("disk", f"{target}: the disk is full; {advice}") from error
        raise
    if expected.bytes is not None and count != expected.bytes:
        raise FetchError("damaged", f"{store}/{name} has {count} bytes, expected {expected.bytes}")
    if expected.sha256 is not None and digest.hexdigest() != expected.sha256:
        raise FetchError("damaged", f"the SHA-256 of {store}/{name} does not match index.json")


def _pause(seconds: float, cancelled: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if cancelled():
            raise Cancelled
        time.sleep(min(0.1, seconds))


# ----------------------------------------------------------------------------------------------- stores


class FolderStore:
    """A folder, perhaps of a network file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def pieces(self, name: str, scratch: Path) -> Iterator[bytes]:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except FileNotFoundError as error:
            raise _missing(str(path)) from error
        except PermissionError as error:
            raise FetchError("denied", f"no permission to read {path}; change its mode or owner") from error


_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken")
_MISSING = ("NoSuchKey", "NoSuchBucket", "NotFound", "404")
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeTooSkewed", "InternalError")


class S3Store:
    """A folder in Amazon S3 or a compatible store. Threads share one client, which has a connection for each.

    Without credentials the requests are not signed, as public buckets allow.
    The environment variable S3_ENDPOINT_URL names another server than Amazon's. The buckets in
    MOSAICML_STREAMING_AWS_REQUESTER_PAYS (separated by commas) are paid by the reader.
    """

    def __init__(self, remote: str, limits: FetchLimits, connections: int) -> None:
        parts = urlparse(remote)
        self.remote, self.bucket, self.prefix = remote.rstrip("/"), parts.netloc, parts.path.strip("/")
        self.limits, self.connections = limits, connections
        self._client: tuple[int, Any, bool] | None = None  # process, client, whether it signs its requests

    def __str__(self) -> str:
        return self.remote

    def pieces(self, name: str, scratch: Path) -> Iterator[bytes]:
        import urllib3.exceptions
        from botocore import exceptions as boto

        address, signed = f"{self.remote}/{name}", True
        try:
            client, signed = self._own_client()
            paid = (environment.text("MOSAICML_STREAMING_AWS_REQUESTER_PAYS") or "").split(",")
            extra = {"RequestPayer": "requester"} if self.bucket in (bucket.strip() for bucket in paid) else {}
            key = f"{self.prefix}/{name}".lstrip("/")
            # The public methods of the body wait until a piece is full, however slowly it arrives.
            answer = client.get_object(Bucket=self.bucket, Key=key, **extra)
            stream, missing = answer["Body"]._raw_stream, answer["ContentLength"]
            try:
                while piece := stream.read1(_PIECE):
                    missing -= len(piece)
                    yield piece
            finally:
                stream.close()
            if missing > 0:
                raise ConnectionError(f"the connection ended {missing} bytes early")
        except boto.ClientError as error:
            raise _s3_error(address, error.response, signed) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
            raise FetchError("credentials", f"no valid credentials for {address} ({error})") from error
        except (boto.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _network(address, error) from error

    def _own_client(self) -> tuple[Any, bool]:
        """This process's client, and whether it signs. A forked process must not share connections with its parent."""
        with _CLIENT_LOCK:
            if self._client is None or self._client[0] != os.getpid():
                self._client = (os.getpid(), *self._new_client())
            return self._client[1:]

    def _new_client(self) -> tuple[Any, bool]:
        import botocore
        from boto3.session import Session
        from botocore.config import Config

        session = Session()
        signed = session.get_credentials() is not None
        config = Config(
            connect_timeout=min(10.0, self.limits.timeout_s),
            read_timeout=self.limits.timeout_s,
            retries={"total_max_attempts": 1},  # `download` tries again
            max_pool_connections=self.connections,
            response_checksum_validation="when_required",
            **({} if signed else {"signature_version": botocore.UNSIGNED}),
        )
        return session.client("s3", config=config, endpoint_url=environment.text("S3_ENDPOINT_URL")), signed


# One lock for all stores: creating a client takes a tenth of a second, and boto3's sessions are not thread-safe.
_CLIENT_LOCK = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_CLIENT_LOCK=threading.Lock()))


def _s3_error(address: str, response: dict[str, Any], signed: bool) -> FetchError:
    code, status = str(response["Error"].get("Code")), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _EXPIRED:
        return FetchError(
            "expired", f"the credentials for {address} have expired ({code}); renew them and give the command again"
        )
    if code in _MISSING or status == 404:
        return FetchError("missing", f"{address} does not exist ({code}); upload a complete encoded folder")
    if code in _BUSY or status >= 500:
        return _network(address, f"{status} {code}")
    if status in (401, 403) and not signed:
        return FetchError(
            "credentials",
            f"no credentials were found, and {address} is not public ({status} {code}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if status in (401, 403):
        return FetchError(
            "denied",
            f"no permission to read {address} ({status} {code}); check the credentials and the bucket's policy",
        )
    return FetchError("unsupported", f"{address}: {status} {code}, {response['Error'].get('Message')}")


class LibraryStore:
    """A folder in another store, read by MosaicML streaming. Each thread has a client of its own."""

    def __init__(self, remote: str, limits: FetchLimits) -> None:
        self.remote, self.limits = remote.rstrip("/"), limits
        self._own = _OwnClient()

    def __str__(self) -> str:
        return self.remote

    def pieces(self, name: str, scratch: Path) -> Iterator[bytes]:
        address = f"{self.remote}/{name}"
        try:
            if self._own.process != os.getpid():
                self._own.client = streaming("streaming.base.storage").CloudDownloader.get(self.remote)
                self._own.process = os.getpid()
            self._own.client.download(address, str(scratch), self.limits.timeout_s)
        except ImportError as error:
            raise FetchError("unsupported", f"{address} needs a package that is not installed ({error})") from error
        except FileNotFoundError as error:
            raise _missing(address) from error
        except Exception as error:  # each library raises its own types
            raise _library_error(address, error) from error
        with scratch.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece


class _OwnClient(threading.local):
    """The client of a thread, and the process that made it."""

    process: int = 0
    client: Any = None


def _library_error(address: str, error: Exception) -> FetchError:
    """Tell errors apart by their HTTP status, or by their type's name."""
    status = next((v for n in ("status_code", "status", "code") if isinstance(v := getattr(error, n, None), int)), 0)
    kind = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if status == 404 or "NotFound" in type(error).__name__:
        return _missing(address)
    if status in (401, 403) or "Forbidden" in type(error).__name__:
        return FetchError("denied", f"no permission to read {address} ({kind}); check the credentials")
    if "Credential" in type(error).__name__ or "Authentication" in kind:
        return FetchError("credentials", f"no valid credentials for {address} ({kind})")
    return _network(address, kind)


def _missing(address: str) -> FetchError:
    return FetchError("missing", f"{address} does not exist; upload a complete encoded folder")


def _network(address: str, error: object) -> FetchError:
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return FetchError("network", f"{address} could not be read ({text.splitlines()[0][:300]})")
