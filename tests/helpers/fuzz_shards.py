"""Tar shards of many kinds, and a seeded mutator that damages them and the indices beside them."""

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.helpers import fuzz_images
from tests.helpers.small_shards import noise_image

BLOCK = 512
FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "time": (136, 148), "kind": (156, 157)}
FIELDS |= {"sum": (148, 156), "link": (157, 257), "magic": (257, 265), "prefix": (345, 500)}


def field(value: int | bytes, width: int) -> bytes:
    """A number in octal digits, where they do not suffice in binary; bytes as they are."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (b"\xff" if value < 0 else b"\x80") + (value % 256 ** (width - 1)).to_bytes(width - 1)


def header(name: bytes, size: int | bytes, kind: bytes = b"0", **changes: int | bytes) -> bytes:
    """One header block with a right checksum, unless ``sum`` is among the changes. Source: POSIX.1, pax."""
    values: dict[str, int | bytes] = {
        "name": name,
        "mode": 0o644,
        "size": size,
        "time": 0,
        "kind": kind,
        "magic": b"ustar\x0000",
    }
    block = bytearray(BLOCK)
    for key, value in (values | changes).items():
        first, last = FIELDS[key]
        block[first:last] = field(value, last - first)[: last - first]
    return bytes(block) if "sum" in changes else with_sum(bytes(block))


def with_sum(block: bytes) -> bytes:
    first, last = FIELDS["sum"]
    total = sum(block[:first]) + sum(block[last:]) + 8 * ord(" ")
    return block[:first] + b"%06o\0 " % total + block[last:]


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", **changes: int | bytes) -> bytes:
    return header(name, len(data), kind, **changes) + data + bytes(-len(data) % BLOCK)


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    """An extended header: every record begins with its own length."""
    data = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while length != len(b"%d" % length) + len(rest):
            length += 1
        data += b"%d" % length + rest
    return member(b"PaxHeaders/x", data, kind)


def tar(*members: bytes, end: bytes = bytes(2 * BLOCK)) -> bytes:
    return b"".join(members) + end


def by_tarfile(
    form: int, count: int = 3, name: str = "{:04d}", others: Mapping[str, bytes] | None = None
) -> bytes:
    """What Python's tarfile writes: images with their labels, then other members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for number in range(count):
            key = name.format(number)
            for kind, data in (("jpg", noise_image(number)), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for other, data in (others or {}).items():
            info = tarfile.TarInfo(other)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def originals() -> dict[str, bytes]:
    """Whole shards; each can be indexed and read."""
    long = "folder/" * 30 + "{:04d}" + "y" * 90
    mixed = sorted(fuzz_images.originals().items())[::6]
    return {
        "ustar": by_tarfile(tarfile.USTAR_FORMAT),
        "gnu": by_tarfile(tarfile.GNU_FORMAT),
        "pax": by_tarfile(tarfile.PAX_FORMAT, name="ümläut {:d}"),
        "gnu long names": by_tarfile(tarfile.GNU_FORMAT, name=long),
        "pax long names": by_tarfile(tarfile.PAX_FORMAT, name=long),
        "other members": by_tarfile(
            tarfile.PAX_FORMAT, others={"a.pkl": b"cos\nsystem\n", "b.pth": b"import os"}
        ),
        "mixed": tar(*(member(b"%04d.png" % n, raw) for n, (_, raw) in enumerate(mixed))),
        "links": tar(
            member(b"a.jpg", kind=b"2", link=b"/etc/passwd"),
            member(b"folder/", kind=b"5"),
            pax({"comment": b"none"}, b"g") + pax({"path": b"b.jpg"}) + member(b"other", noise_image(1)),
            member(b"c.jpg", noise_image(2), mode=0o4777),
        ),
    }


# (shard, generator) -> shard.


def spoil_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    return fuzz_images.MUTATIONS[int(rng.integers(0, len(fuzz_images.MUTATIONS)))](raw, raw[::-1], rng)


def headers_of(raw: bytes) -> list[int]:
    """Where there is a header, wherever it came from."""
    return [n for n in range(0, len(raw) - BLOCK + 1, BLOCK) if raw[n + 257 : n + 262] == b"ustar"]


def edit_header(raw: bytes, rng: np.random.Generator) -> bytes:
    """Another value in one field of one header, whose checksum is made right again."""
    places = headers_of(raw)
    if not places:
        return raw
    place = int(rng.choice(places))
    size = int(raw[place + 124 : place + 135] or b"0", 8) if raw[place + 124 : place + 135].isdigit() else 0
    values: dict[str, Sequence[int | bytes]] = {
        "name": [
            b"/etc/passwd.jpg",
            b"../../up.jpg",
            b"\xff\xfe.jpg",
            b"",
            b"a.b.c.d",
            b"x" * 100,
            b"0000.jpg",
        ],
        "mode": [0, b"no digit", -1],
        "size": [0, size + 1, size - 1, size + BLOCK, 8**11 - 1, 2**62, -1, -(2**70), b"1_0", b"0x10", b""],
        "time": [b"tomorrow", -5, 2**60],
        "kind": [bytes([n]) for n in b"0123456\x007xgLKSXVDZ"],
        "sum": [b"", b"777777", b"zzz"],
        "link": [b"/etc/passwd"],
        "magic": [b"", b"ustar  \0"],
        "prefix": [b"../..", b"/abs", b"\xe4"],
    }
    key = str(rng.choice(list(values)))
    value = values[key][int(rng.integers(0, len(values[key])))]
    first, last = FIELDS[key]
    block = bytearray(raw[place : place + BLOCK])
    block[first:last] = field(value, last - first)[: last - first]
    made = bytes(block) if key == "sum" else with_sum(bytes(block))
    return raw[:place] + made + raw[place + BLOCK :]


def shuffle_blocks(raw: bytes, rng: np.random.Generator) -> bytes:
    """A few blocks removed, doubled or exchanged, as broken disks and transfers do."""
    blocks = [raw[n : n + BLOCK] for n in range(0, len(raw), BLOCK)]
    for _ in range(int(rng.integers(1, 4))):
        one, other = (int(n) for n in rng.integers(0, len(blocks), 2))
        choice = int(rng.integers(0, 3))
        if choice == 0 and len(blocks) > 1:
            del blocks[one]
        elif choice == 1:
            blocks.insert(one, blocks[other])
        else:
            blocks[one], blocks[other] = blocks[other], blocks[one]
    return b"".join(blocks)


def put_in(raw: bytes, rng: np.random.Generator) -> bytes:
    """A member that nobody expects before one that is there."""
    strange = (
        pax({"path": b"/abs/" + b"n" * 4000 + b".jpg"}),
        pax({"size": b"9" * 30}),
        pax({"GNU.sparse.major": b"1", "GNU.sparse.name": b"s.jpg"}),
        member(b"L", b"x" * 5000 + b"\0", b"L"),
        header(b"L", 2**40, b"L"),
        header(b"x", 2**40, b"x"),
        member(b"p", b"0 path=x\n", b"x"),
        member(b"p", b"9" * 3000, b"x"),
        header(b"s.jpg", 0, b"S")[:482] + b"\1" + bytes(29),
        member(b"n.tar", by_tarfile(tarfile.USTAR_FORMAT)),
        b"".join(member(b"%d.txt" % n) for n in range(2000)),
        member(b"0000.jpg"),
        member(b"0000.cls", b"cat"),
    )
    places = headers_of(raw) or [0]
    place = int(rng.choice(places))
    return raw[:place] + strange[int(rng.integers(0, len(strange)))] + raw[place:]


def spoil_end(raw: bytes, rng: np.random.Generator) -> bytes:
    body = raw.rstrip(b"\0")
    ends = (b"", bytes(BLOCK), bytes(4 * BLOCK) + b"garbage", raw, bytes(100_000), b"\xff" * BLOCK)
    return body + bytes(-len(body) % BLOCK) + ends[int(rng.integers(0, len(ends)))]


def compress(raw: bytes, rng: np.random.Generator) -> bytes:
    return gzip.compress(raw, int(rng.integers(1, 10)), mtime=0)


MUTATIONS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    edit_header,
    edit_header,
    edit_header,
    spoil_bytes,
    shuffle_blocks,
    put_in,
    spoil_end,
    compress,
)


def mutated(number: int, shards: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """Damaged shard ``number`` of a seed: one or two mutations of one of the shards."""
    rng = np.random.default_rng([seed, number])
    name = sorted(shards)[number % len(shards)]
    raw, made = shards[name], []
    for _ in range(int(rng.integers(1, 3))):
        mutation = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))]
        raw = mutation(raw, rng) if raw else raw
        made.append(mutation.__name__)
    return f"{name}: {', '.join(made)}", raw


NUMBERS = (b"true", b"1e999", b"-1", b"8.0", b"null", b"[[]]", b"999999999999999999999", b"3")


def mutated_index(number: int, raw: bytes, seed: int) -> bytes:
    """A damaged index: bytes as in images, another number in its JSON, or digits exchanged in its spans."""
    rng = np.random.default_rng([seed, 1, number])
    kind = int(rng.integers(0, 3))
    if kind == 0:
        mutation = fuzz_images.MUTATIONS[int(rng.integers(0, len(fuzz_images.MUTATIONS)))]
        return mutation(raw, raw[::-1], rng)
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    digits = [n for n in range(length) if text[n : n + 1].isdigit()]
    place = int(rng.choice(digits))
    if kind == 1:
        text = text[:place] + NUMBERS[int(rng.integers(0, len(NUMBERS)))] + text[place + 1 :]
        return len(text).to_bytes(8, "little") + text + data
    changed = bytearray(text)
    other = int(rng.choice(digits))
    changed[place], changed[other] = changed[other], changed[place]
    return raw[:8] + bytes(changed) + data
