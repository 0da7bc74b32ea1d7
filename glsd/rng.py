"""Counter-based random draws: each is a function of numbers that name it, never of what was drawn before."""

import hashlib


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random draws that a rank makes inside a step (stochastic depth)."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes signed 64-bit seeds
