"""Why a run of several ranks ends: noted by the first rank that knows, read by all others."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ADVICE = "start again (training: with --resume auto, the last checkpoint is whole)"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What ends a run; without ``missing`` and ``seconds`` the rank that found it says why itself."""

    by: int  # the rank that found it
    code: int  # exit code of all ranks
    missing: tuple[int, ...] = ()  # ranks that are gone
    seconds: float = 0.0  # without a sign of life of the missing; if none is, without a step of any rank
    since: float = 0.0  # seconds since the epoch, when these seconds began

    def line(self, rank: int, hosts: Sequence[str]) -> str:
        """Return what a rank says when it ends, "" for nothing; hosts: of all ranks."""
        if not self.seconds:
            return ""
        stops = f"rank {rank} on {hosts[rank]} stops"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        if not self.missing:
            return (
                f"{stops}: all ranks are alive, but none has finished a step since {since} ({self.seconds:.1f} s): the network "
                f"between two of their hosts is down, or one hangs; {ADVICE}"
            )
        seconds = f"{self.seconds:.1f} s without a sign of life"
        if rank in self.missing:
            return f"{stops}: the others gave it up, they had not heard of it since {since} ({seconds}); {ADVICE}"
        who = " and ".join(f"rank {lost} on {hosts[lost]}" for lost in self.missing[:8])
        more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        are = "is" if len(self.missing) == 1 else "are"
        return (
            f"{stops}: {who}{more} {are} missing since {since} ({seconds}): killed, or the host or its network is down; "
            f"{ADVICE}"
        )


def propose(notes: Any, verdict: Verdict) -> Verdict:
    """Note why the run ends, unless another rank was first; return what holds."""
    notes.compare_set("end", "", json.dumps(asdict(verdict)))
    return read(notes)


def read(notes: Any) -> Verdict:
    """Return what was noted."""
    values = json.loads(notes.get("end"))
    return Verdict(**{**values, "missing": tuple(values["missing"])})
