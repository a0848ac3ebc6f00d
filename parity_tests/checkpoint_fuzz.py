"""Mutated checkpoints of every format, fed to the readers in a process of its own with little memory.

Run as `python checkpoint_fuzz.py FORMAT COUNT SEED`; prints one JSON object. Every file must either be read or be
refused with a one-line OspError; anything else is reported as a fault with the seed that makes it.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import open_checkpoint
from osp_shared.errors import OspError

MEMORY = 256 << 20  # bytes of address space beyond what the imports took
SLOW = 2.0  # seconds that one file may take on a busy machine
HOSTILE = (0, 1, -1, 2, 255, 256, 2**31 - 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64, 2**70, 10**400)
JUNK = (None, True, "", "x" * 5000, [], {}, [[]], {"a": 1}, 1.5, 1e308, "F32", "../../etc/passwd", "\0", [1] * 70)


# ------------------------------------------------------------------------------------------------ valid seeds


def safetensors_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt", "osp_fingerprints": '{"main.0.weight":"00"}'},
        "main.0.weight": {"dtype": "F32", "shape": [2, 3, 3, 3, 3], "data_offsets": [0, 648]},
        "main.0.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [648, 652]},
        "main.2.weight": {"dtype": "I64", "shape": [], "data_offsets": [652, 660]},
    }
    return pack_safetensors(json.dumps(header).encode(), bytes(660))


def pack_safetensors(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


class Pickler:
    """Writes the opcodes that torch.save writes for a state dict, without torch."""

    def __init__(self, legacy: bool) -> None:
        self.out, self.legacy = bytearray(b"\x80\x02"), legacy

    def text(self, value: str) -> None:
        self.out += b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(self, value: int) -> None:
        self.out += b"J" + struct.pack("<i", value)

    def tensor(self, name: str, key: str, numel: int, shape: tuple[int, ...]) -> None:
        self.text(name)
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        self.text(key)
        self.text("cpu")
        self.number(numel)
        self.out += (b"Nt" if self.legacy else b"t") + b"QK\x00("
        strides = np.cumprod((1, *shape[:0:-1]))[::-1] if shape else ()
        for n in shape:
            self.number(n)
        self.out += b"t("
        for n in strides:
            self.number(int(n))
        self.out += b"t\x89ccollections\nOrderedDict\n)RtR"

    def state_dict(self) -> bytes:
        self.out += b"}q\x00("
        self.text("state_dict")
        self.out += b"}q\x01("
        self.tensor("main.0.weight", "0", 162, (2, 3, 3, 3, 3))
        self.tensor("main.0.bias", "1", 2, (2,))
        self.out += b"u"
        self.text("epoch")
        self.out += b"K\x03u."
        return bytes(self.out)


def zip_file(pickle_bytes: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", pickle_bytes or Pickler(False).state_dict())
        z.writestr("archive/byteorder", b"little")
        z.writestr("archive/data/0", bytes(648))
        z.writestr("archive/data/1", bytes(8))
        z.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def legacy_file() -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    head += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)
    body = Pickler(True).state_dict() + pickle.dumps(["0", "1"], 2)
    return head + body + struct.pack("<q", 162) + bytes(648) + struct.pack("<q", 2) + bytes(8)


def protobuf_file() -> bytes:
    def field(number: int, data: bytes) -> bytes:
        length, out = len(data), bytearray([number << 3 | 2])
        while length > 127:
            out.append(length & 127 | 128)
            length >>= 7
        return bytes(out) + bytes([length]) + data

    def value(tag: str, dims: tuple[int, ...], kind: str, data: bytes) -> bytes:
        tensor = b"".join(b"\x08" + bytes([n]) for n in dims) + field(2, kind.encode()) + field(3, data)
        return field(1, field(1, tag.encode()) + field(2, tensor))

    weight = value("main.0.weight", (2, 3, 3, 3, 3), "Float32", bytes(324)) * 2
    return weight + value("main.0.bias", (2,), "BFloat16", bytes(4)) + value("epoch_num", (), "Int64", bytes(8))


INDEX = {
    "metadata": {"total_size": 660},
    "weight_map": {"main.0.weight": "a.safetensors", "main.0.bias": "a.safetensors", "main.2.weight": "a.safetensors"},
}


# ------------------------------------------------------------------------------------------------ mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats and hostile lengths."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, action = rng.randrange(max(len(out), 1)), rng.randrange(7)
        if action == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1 and out:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 2:
            del out[at:]
        elif action == 3:
            del out[at : at + rng.randrange(1, 16)]
        elif action == 4:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif action == 5:
            out[at : at + 8] = struct.pack("<Q", rng.choice(HOSTILE[:-2]) & (2**64 - 1))
        else:
            other = rng.randrange(max(len(out), 1))
            out[at:at] = out[other : other + rng.randrange(1, 64)]
    return bytes(out)


def mutate_json(value, rng: random.Random):
    """The same JSON with one place in it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, copy = rng.choice(list(value)), dict(value)
        action = rng.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.2:
            copy[rng.choice(("", "\0", "x" * 600, "main.0.weight", "a" * 20, "__metadata__", "9" * 400))] = value[key]
        else:
            copy[key] = mutate_json(value[key], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, copy = rng.randrange(len(value)), list(value)
        if rng.random() < 0.2:
            copy.insert(at, rng.choice(HOSTILE))
        else:
            copy[at] = mutate_json(value[at], rng)
        return copy
    return rng.choice(HOSTILE + JUNK)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Byte mutations, and opcodes put where they do not belong."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    at = rng.randrange(2, len(data))
    extra = rng.choice(OPCODES)
    return data[:at] + extra * rng.choice((1, 1, 1, 3, 40)) + data[at + rng.choice((0, 0, 1, len(extra))) :]


OPCODES = [
    b"cposix\nsystem\n(S'true'\ntR", b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R", b"itorch\nload\n", b"\x82\x01",
    b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"o", b"\x81", b"\x92", b"b", b"R", b"Q", b"Pid\n", b"\x97", b"\x98",
    b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"h\xff", b"g9999999999\n", b"p-1\n", b"L" + b"9" * 3000 + b"\n",
    b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\x7f" * 8, b"\x96\x00\x00\x00\x00\x01\x00\x00\x00", b"\x95" + b"\xff" * 8, b"B\xff\xff\xff\x7f",
    b"T\xff\xff\xff\x7f", b"(", b"1", b"0", b"2", b"t", b"l", b"d", b"e", b"u", b"s", b"a", b"\x90", b"\x91", b"\x8f",
    b"\x85" * 50, b"]" * 50, b"2\x86" * 40, b"\x94", b"I" + b"1" * 5000 + b"\n", b"F1e999\n", b"Snot quoted\n",
    b"V\\ud800\n", b"\x93", b"c\xff\n\xff\n", b".", b"K", b"ctorch\nfloat32\n", b"ctorch\nSize\n(K\x01tR",
    b"ccollections\nOrderedDict\n(]tR", b"ctorch\nFloatStorage\n)R",
]  # fmt: skip


def make(form: str, folder: Path, rng: random.Random) -> Path:
    """Write one mutated checkpoint; returns the path to open."""
    path = folder / {"protobuf": "x.ckpt", "zip": "x.bin", "legacy": "x.pth"}.get(form, "a.safetensors")
    if form == "safetensors":
        data = safetensors_file()
        n = int.from_bytes(data[:8], "little")
        if rng.random() < 0.6:
            header = mutate_json(json.loads(data[8 : 8 + n]), rng)
            data = pack_safetensors(json.dumps(header).encode(), data[8 + n :])
            data = mutate_bytes(data, rng) if rng.random() < 0.1 else data
        else:
            data = mutate_bytes(data[: 8 + n], rng) + data[8 + n :]
    elif form == "index":
        (folder / "a.safetensors").write_bytes(safetensors_file().replace(b'weight\\":\\"00', b'missed\\":\\"00'))
        path, text = folder / "model.safetensors.index.json", json.dumps(INDEX).encode()
        data = mutate_bytes(text, rng) if rng.random() < 0.4 else json.dumps(mutate_json(INDEX, rng)).encode()
    elif form == "zip":
        whole = rng.random() < 0.4
        data = mutate_bytes(zip_file(), rng) if whole else zip_file(mutate_pickle(Pickler(False).state_dict(), rng))
    elif form == "legacy":
        data = mutate_pickle(legacy_file(), rng)
    else:
        data = mutate_bytes(protobuf_file(), rng)
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------ the trial


def trial(path: Path) -> str:
    """Open, read everything, derive the spec. "read" or "refused"; whatever else is raised is a fault."""
    outcome = ""
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.shapes:
                checkpoint.read(name)
            outcome = "read"
            checkpoint.spec()
    except OspError as e:
        if "\n" in str(e) or len(str(e)) > 1000:
            raise ValueError(f"not one clear line: {str(e)[:200]!r}") from None
        outcome = outcome or "refused"
    return outcome


def run(form: str, count: int, seed: int, memory: int = MEMORY) -> dict:
    """`count` mutants; the outcome counts, the faults (seeds and errors), the slowest and the peak memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = {"read": 0, "refused": 0, "faults": [], "slowest": 0.0}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        for k in range(seed, seed + count):
            path, started = make(form, Path(name), random.Random(f"{form}{k}")), time.perf_counter()
            try:
                outcome[trial(path)] += 1
            except Exception as e:  # noqa: BLE001 - this is what the harness looks for
                outcome["faults"].append(f"seed {k}: {type(e).__name__}: {str(e)[:300]}")
            took = time.perf_counter() - started
            outcome["slowest"] = max(outcome["slowest"], took)
            if took > SLOW:
                outcome["faults"].append(f"seed {k}: took {took:.1f} s")
    outcome["grown_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return outcome


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
