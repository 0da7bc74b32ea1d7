"""Parameters in parts (cluster.parallel fsdp) give what whole ones (ddp) give, for every option of a step."""

import json
from pathlib import Path

import pytest
import torch
from tests.dist.rank_processes import HERE, close, run_ranks

CASES = {
    "geometric": ["--matching=geometric"],
    "both": ["--matching=both", "--optim.micro_batch=2", "--optim.clip_grad=0", "--model.drop_path=0.3"],
    "sinkhorn": ["--matching=similarity", "--loss.centering=sinkhorn", "--optim.clip_mode=global"],
    "shared": [
        "--head.shared=true",
        "--head.trainable_gain=true",
        "--model.activation_checkpointing=true",
        "--loss.local_mean=accepted",
    ],
    "none": ["--matching=none", "--data.num_local=0", "--optim.freeze_prototypes_epochs=4"],
}




def ddp_and_fsdp(world: int, cases: dict, folder: Path, argv: list[str]) -> dict:
    out = folder / "out.pt"
    run_ranks(world, HERE / "sharded_batch.py", str(out), json.dumps(cases), *argv)
    found = torch.load(out, weights_only=True)
    assert found["world"] == world
    for results in found["cases"].values():
        assert (results["ddp"]["sharded"], results["fsdp"]["sharded"]) == (False, True)
    return found["cases"]


@pytest.mark.slow
def test_parts_equal_whole_in_every_way_of_training(tiny_run, tmp_path):
    argv = tiny_run(
        model__drop_path=0.0,
        optim__freeze_prototypes_epochs=0,
        optim__warmup_epochs=0,
        optim__clip_grad=0.05,
    )
    for name, results in ddp_and_fsdp(2, CASES, tmp_path, argv).items():
        ddp, fsdp = results["ddp"], results["fsdp"]
        assert len(ddp["gradients"]) == len(fsdp["gradients"]) == 3
        compared = 0
        for first, second in zip(ddp["gradients"], fsdp["gradients"], strict=True):
            largest = max(float(gradient.abs().max()) for gradient in first.values())
            compared += close(first, second, f"{name} gradients", 1e-9, floor=1e-9 * largest)
        for part in ("values", "centers", "student", "teacher"):
            compared += close(ddp[part], fsdp[part], f"{name} {part}", 1e-9)
        assert compared > 100, name
