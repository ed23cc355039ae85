"""Waits for servers end: a silent server, one that trickles, and a download that another process holds."""

from __future__ import annotations

import hashlib
import http.server
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from eval.features import downloads
from sfd_scale import config
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.limits import limit_s, within
from sfd_scale.tokenizers import texture_vae

BODY = bytes(range(256)) * 40


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends a file; as the path says, at once, a byte now and then, or nothing after the head."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("ETag", f'"{self.path[-12:-5]}"')  # the hub's client asks for these
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        end = self.server.end  # type: ignore[attr-defined]
        if "silent" in self.path:
            end.wait(60)
        elif "trickle" in self.path:
            for number in range(len(BODY)):
                if end.wait(0.05):
                    return
                self.wfile.write(BODY[number : number + 1])
        else:
            self.wfile.write(BODY)

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as own:
        own.daemon_threads, own.end = True, threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=own.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{own.server_address[1]}"
        own.end.set()  # type: ignore[attr-defined]
        own.shutdown()


def test_within_gives_the_result_or_the_error_or_ends() -> None:
    assert within(5, lambda: 7, "late") == 7
    with pytest.raises(KeyError):
        within(5, lambda: {}[1], "late")
    held, began = threading.Event(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 3 holds it \(after 0 s\)"):
        within(0.2, held.wait, "rank 3 holds it")
    assert time.monotonic() - began < 30
    held.set()


def test_a_limit_is_a_whole_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_s("SFD_WORK_TIMEOUT") == 3600
    monkeypatch.setenv("SFD_WORK_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="SFD_WORK_TIMEOUT: 'soon'; allowed: a whole number from 1 to 31536000"):
        limit_s("SFD_WORK_TIMEOUT")


@pytest.mark.parametrize(("how", "cause"), [("silent", "timed out"), ("trickle", "raise SFD_DOWNLOAD_TIMEOUT")])
def test_a_slow_server_does_not_hold_the_weights_of_an_extractor(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str, cause: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(downloads, "SILENCE_S", 0.5)
    monkeypatch.setenv("SFD_DOWNLOAD_TIMEOUT", "1")
    digest, began = hashlib.sha256(BODY).hexdigest(), time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=f"the path of a download of {server}/{how}"):
        downloads.fetch(None, f"{server}/{how}.pth", digest)
    assert time.monotonic() - began < 45
    assert cause in caplog.text
    assert not list((tmp_path / "checkpoints").iterdir())
    path = tmp_path / "checkpoints" / f"{digest[:8]}-whole.pth"
    assert downloads.fetch(None, f"{server}/whole.pth", digest) == path and path.read_bytes() == BODY


def test_a_slow_hub_does_not_hold_a_tokenizer(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{server}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SFD_DOWNLOAD_TIMEOUT", "1")
    with pytest.raises(ValueError, match=r"hub: a/b/trickle.ckpt is not downloaded; .*raise SFD_DOWNLOAD_TIMEOUT"):
        texture_vae._from_hub("a/b/trickle.ckpt")
    assert texture_vae._from_hub("a/b/whole.ckpt").read_bytes() == BODY


def test_a_wait_of_more_than_a_year_is_refused_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python, gloo and NCCL fail for such numbers in their own ways: `timestamp out of range for platform time_t`."""
    for key in ("train.timeout_s", "wandb.finish_timeout_s"):
        for value in ("1e12", "1e300"):
            with pytest.raises(config.ConfigError, match=rf"^{key}: .*; allowed: 1 to 31536000 seconds, a year"):
                config.load("train/sfd_xl", TrainRecipe, [f"{key}={value}"])
        config.load("train/sfd_xl", TrainRecipe, [f"{key}=31536000"])
    monkeypatch.setenv("SFD_WATCH_TIMEOUT", "99999999999999999")
    with pytest.raises(ValueError, match="SFD_WATCH_TIMEOUT: .*; allowed: a whole number from 1 to 31536000"):
        limit_s("SFD_WATCH_TIMEOUT")
