"""A hub that does not answer is named within seconds; one that answers, and a full cache, are left to timm."""

import http.server
import re
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from glsd.errors import UserError
from glsd.models import hub
from glsd.models.backbone import build_backbone

NAME = "vit_small_patch16_224.dino"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function that asks a hub at an address, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)

    def call(endpoint: str) -> float:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            hub, "hf_hub_url", lambda repository, file, revision: f"{endpoint}/{repository}/{file}"
        )
        start = time.monotonic()
        try:
            hub.check_hub(NAME)
        finally:
            assert time.monotonic() - start < 3
        return time.monotonic() - start

    return call


def test_a_refused_connection_is_one_line(ask):
    with pytest.raises(
        UserError,
        match=r"'vit_small_patch16_224.dino' are not in .*cache and http.*:1 does .*refused",
    ):
        ask("http://127.0.0.1:1")


def test_an_unknown_host_is_one_line(ask):
    with pytest.raises(
        UserError,
        match=r"no-such-host.invalid does not answer \(.*check the connection .*HF_ENDPOINT",
    ):
        ask("http://no-such-host.invalid")


def test_silence_ends_after_the_patience(ask, monkeypatch):
    """A firewall that drops packets: nothing comes back."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    says = r"does not answer \((nothing within 1 s|.*timed out)"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match=says):
        ask(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_a_hub_that_answers_is_left_to_timm(ask, status):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            ask(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_a_full_cache_asks_nobody(monkeypatch, tmp_path):
    file = tmp_path / "model.safetensors"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name, revision: str(file))
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("asked"))
    hub.check_hub(NAME)


def test_a_backbone_is_not_built_before_the_hub_answers(monkeypatch):
    def silent(name):
        raise UserError(f"the weights of {name!r} ...")

    monkeypatch.setattr("glsd.models.backbone.check_hub", silent)
    with pytest.raises(UserError, match=re.escape(f"the weights of {NAME!r}")):
        build_backbone(NAME, image_size=224, init="timm")
