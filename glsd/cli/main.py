"""The console command ``glsd COMMAND ...``. Each command is a file of this folder, imported when it is called."""

import importlib
import sys

from glsd.errors import UserError, pick

# Command -> module of this folder with main(argv), and one line of help.
COMMANDS = {
    "pack": (
        "pack",
        "pack a folder, a list, a Parquet file, a torchvision set or other shards into tar shards",
    ),
    "audit": ("audit", "read every image of some shards and report what is wrong"),
    "pretrain": ("pretrain", "pretrain a Vision Transformer on images without labels"),
    "finetune": ("finetune", "fine-tune a backbone for retrieval with labels"),
    "evaluate": ("evaluate", "measure a frozen network: k-NN, linear probe or retrieval"),
    "show": ("use.show", "draw attention, patch colors or a map of the embeddings"),
    "report": ("use.report", "write one HTML page about a run: curves, evaluations, pictures"),
    "embed": ("use.embed", "write one vector for each image of a folder, a list or shards"),
    "search": ("use.search", "find the most similar images among those that were embedded"),
    "export": ("use.export", "write a trained network for timm, transformers, ONNX or torch, with a proof"),
    "doctor": ("doctor", "check this machine or cluster before a run"),
    "submit": ("submit", "submit a stage, a sweep or a pipeline to SLURM"),
    "demo": ("demo", "pack, pretrain, evaluate and fine-tune on embedded images, in a few minutes"),
}


def main() -> None:
    """Run the command that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from glsd import __version__

        print(f"glsd {__version__}")
        return
    try:
        pick(COMMANDS, words[0], "command")
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    run(words[0], words[1:])


def run(command: str, words: list[str] | None = None) -> None:
    """Run one command and exit with its code. Unset words are those of the process."""
    module = importlib.import_module(f"glsd.cli.{COMMANDS[command][0]}")
    if command == "doctor":
        module.exit_with(module.main(sys.argv[1:] if words is None else words))
    from glsd.cli.door import run as pass_door

    pass_door(module.main, words)


def overview() -> str:
    """Return the one screen of ``glsd --help``."""
    lines = ["usage: glsd COMMAND ...", "", *(f"  {name:10} {says}" for name, (_, says) in COMMANDS.items())]
    lines += [
        "",
        "glsd COMMAND --help explains a command. On several GPUs: accelerate launch -m glsd pretrain ...",
    ]
    return "\n".join(lines)
