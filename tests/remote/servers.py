"""Real servers of shards on loopback: nginx, and an S3-compatible one; our own children, with their own folders."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BUCKET = "shards"
CONFIGURATION = """
daemon off;
master_process off;
pid {work}/pid;
error_log {work}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format plain '$request_method $uri $status $body_bytes_sent $http_range';
  access_log {work}/access.log plain;
  client_body_temp_path {work}/body;
  proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi;
  scgi_temp_path {work}/scgi;
  client_max_body_size 0;
  default_type application/x-tar;
  sendfile on;
  sendfile_max_chunk 16k;
  server {{
    listen 127.0.0.1:{port};
    location / {{ {serve} {limit} }}
  }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server: where the shards are, what a client needs in its environment, the log of its requests."""

    url: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def requests(self, name: str = "") -> list[list[str]]:
        """Return method, path, status, bytes of body and range of the requests for a file (of all by default)."""
        lines = (line.split(" ", 4) for line in self.log.read_text().splitlines())
        return [line for line in lines if line[1].endswith(name)]


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _child(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server until the block ends; it has begun to listen when the block starts."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, f"{command[0]} ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"{command[0]} does not listen: {log.read_text()}"
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def nginx(work: Path, *, folder: Path | None = None, upstream: str = "", rate: int = 0) -> Iterator[Served]:
    """Serve a folder, or what another server has (``upstream``), at most ``rate`` bytes a second per request (0 = no limit)."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip(
            "nginx is not installed (apt-get install nginx-light): the tests on a real web server are left out"
        )
    work.mkdir(parents=True)
    port = free_port()
    # S3 signatures cover the host that the client has called.
    serve = (
        f"proxy_pass {upstream}; proxy_set_header Host $http_host;"
        if upstream
        else f"root {folder}; autoindex on;"
    )
    limit = f"limit_rate {rate};" if rate else ""
    text = CONFIGURATION.format(work=work, port=port, serve=serve, limit=limit)
    (work / "nginx.conf").write_text(text)
    command = [program, "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")]
    with _child(command, port, work / "output.log"):
        yield Served(url=f"http://127.0.0.1:{port}", log=work / "access.log")


@contextlib.contextmanager
def s3(work: Path, *, folder: Path, rate: int = 0) -> Iterator[Served]:
    """Serve the files of a folder as s3://shards/..., through nginx, which writes the log and limits the rate."""
    boto3 = pytest.importorskip("boto3", reason="boto3 (extra dev) fills the bucket")
    for package in ("moto", "flask", "s3fs"):
        pytest.importorskip(package, reason=f"{package} (extras dev and s3) is part of the S3 tests")
    work.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    inside = f"http://127.0.0.1:{port}"
    with (
        _child(command, port, work / "moto.log"),
        nginx(work / "nginx", upstream=inside, rate=rate) as outside,
    ):
        client = boto3.client(
            "s3",
            endpoint_url=inside,
            region_name="us-east-1",
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), BUCKET, path.name)
        yield Served(
            url=f"s3://{BUCKET}",
            log=outside.log,
            environment={**environment, "AWS_ENDPOINT_URL": outside.url},
        )
