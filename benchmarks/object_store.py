"""An S3 server on this machine, behind a proxy that is as slow and as faulty as it is told to be.

moto serves the S3 protocol. The proxy adds latency and limits of bandwidth, counts requests and bytes, and injects
faults, as real stores have them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "data"
_PIECE = 16384
# What a fault does with a request for an object.
KINDS = (
    "error-500", "slow-down", "reset", "silence", "trickle", "truncated", "wrong", "denied", "expired", "missing",
)  # fmt: skip
_ERRORS = {
    "error-500": (500, "InternalError"), "slow-down": (503, "SlowDown"), "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"), "missing": (404, "NoSuchKey"),
}  # fmt: skip


@dataclass
class Traffic:
    """The requests that the proxy answered, counted by object name; and the bytes sent.

    by_client: bytes sent to each client, by its AWS_SDK_UA_APP_ID.
    """

    requests: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    by_client: dict[str, int] = field(default_factory=dict)
    times: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class ObjectStore:
    """The proxy.

    Attributes:
        address: of the proxy, as S3_ENDPOINT_URL.
        fault: object name, number of the request for it (0, 1, …) → one of KINDS or None.
    """

    address: str
    server: str
    latency_s: float = 0.0
    connection_rate: float | None = None
    total_rate: float | None = None
    fault: Callable[[str, int], str | None] = lambda name, number: None
    traffic: Traffic = field(default_factory=Traffic)
    lock: Any = field(default_factory=threading.Lock)
    free_at: float = 0.0

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload the files of a folder; returns the address of the copy."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.server, **credentials())
        for file in sorted(folder.iterdir()):
            if file.is_file():
                client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes(), ACL="public-read")
        return f"s3://{BUCKET}/{prefix}"

    def pace(self, size: int, started: float, sent: int) -> None:
        """Wait until the limits of bandwidth allow `size` more bytes."""
        wait = 0.0
        if self.connection_rate is not None:
            wait = started + sent / self.connection_rate - time.monotonic()
        if self.total_rate is not None:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + size / self.total_rate
                wait = max(wait, self.free_at - time.monotonic())
        if wait > 0:
            time.sleep(wait)


def credentials() -> dict[str, str]:
    return {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}


def variables(address: str, client: str = "reader") -> dict[str, str]:
    """Environment variables for a process that reads from the proxy, which counts its bytes under `client`."""
    return {
        "AWS_SDK_UA_APP_ID": client, "S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip


@contextmanager
def object_store(**settings: Any) -> Iterator[ObjectStore]:
    """A running server with an empty bucket, and its proxy."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = ObjectStore("", f"http://{host}:{port}", **settings)
    boto3.client("s3", endpoint_url=store.server, **credentials()).create_bucket(Bucket=BUCKET)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            serve(store, self.connection, (host, port))

    proxy = _Proxy(("127.0.0.1", 0), Handler)
    store.address = f"http://127.0.0.1:{proxy.server_address[1]}"
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


class _Proxy(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is no error here."""


def serve(store: ObjectStore, client: socket.socket, server: tuple[str, int]) -> None:
    """Answer the requests of one connection. GET requests have no body."""
    reader = client.makefile("rb")
    while request := _head(reader):
        started = time.monotonic()
        found = re.match(rb"(\w+) /(\S*)", request)
        assert found is not None
        name = found[2].split(b"?")[0].decode().rpartition("/")[2]
        client_id = re.search(rb"\bapp/(\S+)", request)
        reader_name = "" if client_id is None else client_id[1].decode()
        with store.lock:
            number = store.traffic.requests.get(name, 0)
            store.traffic.requests[name] = number + 1
            store.traffic.times.append((started, name))
        time.sleep(store.latency_s)
        fault = store.fault(name, number)
        if fault in _ERRORS:
            _send_error(client, *_ERRORS[fault], name)
            continue
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            return
        if fault == "silence":
            time.sleep(3600)
        head, body = _ask(server, request)
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "truncated":
            body = body[: len(body) // 2]
        client.sendall(head)
        step, sent = 1 if fault == "trickle" else _PIECE, time.monotonic()
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            client.sendall(piece)
            with store.lock:
                store.traffic.bytes += len(piece)
                store.traffic.by_client[reader_name] = store.traffic.by_client.get(reader_name, 0) + len(piece)
            store.pace(len(piece), sent, start + len(piece))
            if fault == "trickle":
                time.sleep(0.05)
        if fault == "truncated":
            return


def _head(reader: Any) -> bytes:
    lines = []
    while (line := reader.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join(lines)


def _ask(server: tuple[str, int], request: bytes) -> tuple[bytes, bytes]:
    """The answer of the real server, as head and body."""
    kept = [line for line in request.splitlines() if not line.lower().startswith(b"connection:")]
    with socket.create_connection(server) as connection:
        connection.sendall(b"\r\n".join([*kept, b"Connection: close", b"", b""]))
        with connection.makefile("rb") as reader:
            head = [line for line in _head(reader).splitlines() if not line.lower().startswith(b"connection:")]
            body = reader.read()
    if not any(line.lower().startswith(b"content-length:") for line in head):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"", b""]), body


def _send_error(client: socket.socket, status: int, code: str, name: str) -> None:
    text = (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message><Key>{name}</Key></Error>".encode()
    )
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
    client.sendall(head.encode() + text)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}
