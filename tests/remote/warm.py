"""Starts training processes within a second, by the warm python of all tests."""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).with_name("small_pieces.py")


@dataclass
class Started:
    """A run that was started."""

    process: subprocess.Popen
    log: Path

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, seconds: float) -> int:
        """Return the exit code; AssertionError with what the run said if it takes longer (it is killed then)."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as problem:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said()}") from problem

    def kill(self) -> None:
        """Kill -9 the run and its loader processes, and wait for the end of it."""
        if self.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(20)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Warm:
    """Starts runs; python: the warm one."""

    python: str
    started: list[Started] = field(default_factory=list)

    def start(self, argv: list[str], log: Path, environment: dict[str, str] | None = None) -> Started:
        """Start a run; what it says goes to ``log``, anew."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [self.python, str(SCRIPT), *argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        self.started.append(Started(process, log))
        return self.started[-1]

    def start_ranks(
        self, argv: list[str], log: Path, environments: list[dict[str, str]], port: int
    ) -> list[Started]:
        """Start the ranks of a run as torchrun would, one for each environment."""
        world = str(len(environments))
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(
                argv,
                log.with_name(f"{log.name}.{rank}"),
                {**environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, environment in enumerate(environments)
        ]

    def end(self) -> None:
        """Kill whatever still runs."""
        for started in self.started:
            started.kill()
