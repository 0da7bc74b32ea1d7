"""The launch lines of the documentation, for hosts of these tests."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TOKENIZERS_PARALLELISM": "false",
}
# For launchers that start again by themselves. Every attempt gets a store of its own: in a shared one ranks find the
# addresses of those that were there before, and attempts fail or hang.
RESTARTS = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"


def accelerate_launch(
    argv: Sequence[str],
    *,
    address: str,
    port: int,
    number: int = 0,
    of: int = 1,
    each: int = 1,
    extra: Sequence[str] = (),
) -> list[str]:
    """``accelerate launch`` on host ``number`` of ``of`` with ``each`` ranks; address, port: of the first host."""
    flags = {
        "num_processes": of * each,
        "num_machines": of,
        "machine_rank": number,
        "main_process_ip": address,
        "main_process_port": port,
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        *words,
        *extra,
        SCRIPT,
        *argv,
    ]


def torchrun(
    argv: Sequence[str],
    *,
    address: str,
    port: int,
    number: int = 0,
    of: int = 1,
    each: int = 1,
    extra: Sequence[str] = (),
) -> list[str]:
    """``torchrun`` with the static rendezvous, as above."""
    flags = {
        "nproc-per-node": each,
        "nnodes": of,
        "node-rank": number,
        "master-addr": address,
        "master-port": port,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, *extra, SCRIPT, *argv]


def elastic(
    argv: Sequence[str], *, address: str, port: int, nodes: str, extra: Sequence[str] = ()
) -> list[str]:
    """``torchrun`` with the c10d rendezvous on ``address``, for any number of hosts in ``nodes`` (such as 1:3)."""
    flags = {
        "nproc-per-node": 1,
        "nnodes": nodes,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{address}:{port}",
        "rdzv-id": "glsd",
        "rdzv-conf": RENDEZVOUS,
        "max-restarts": 3,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, *extra, SCRIPT, *argv]
