"""What hostile and damaged files, and a power cut, must not be able to do."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import checkpoint_fuzz
from checkpoint_support import SPECS, config, osp, weights
from osp_shared.checkpoints import open_checkpoint
from osp_shared.errors import OspError
from osp_shared.specs.auxiliary import DiscriminatorSpec, LlamaSpec, LPIPSSpec
from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec

HERE = Path(__file__).parent
FORMS = ("safetensors", "index", "zip", "legacy", "protobuf")


def harness(name: str, *arguments) -> dict:
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------ fuzzing


@pytest.mark.parametrize("form", FORMS)
def test_mutated_files(form):
    """4,000 mutants a format, 20,000 in all: read or refused in one line, in 256 MiB beyond the imports."""
    found = harness("checkpoint_fuzz.py", form, 4000, 0)
    assert not found["faults"], found["faults"][:5]
    assert found["read"] + found["refused"] == 4000
    assert found["refused"] > 2000 and found["read"] > 20  # neither all broken at once nor untouched
    assert found["grown_mib"] < 64


def test_fuzzing_notices_faults(tmp_path, monkeypatch):
    """The harness lets through only OspErrors of one line."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(checkpoint_fuzz.safetensors_file())

    def broken(error):
        def opened(_):
            raise error

        return opened

    for error in (KeyError("x"), MemoryError(), OspError("two\nlines"), RecursionError()):
        monkeypatch.setattr(checkpoint_fuzz, "open_checkpoint", broken(error))
        with pytest.raises((KeyError, MemoryError, ValueError, RecursionError)) as e:
            checkpoint_fuzz.trial(path)
        assert not isinstance(e.value, OspError)


@pytest.mark.parametrize("kind", ("wfvae", "dit", "inpaint", "t5", "llama", "discriminator", "lpips"))
def test_specs_survive_hostile_shapes(kind):
    """Names and shapes from a hostile header: a spec says no, in bounded time, whatever they are."""
    import random

    spec_class = {
        "wfvae": WFVAESpec, "dit": DiTSpec, "inpaint": DiTSpec, "t5": T5Spec, "llama": LlamaSpec,
        "discriminator": DiscriminatorSpec, "lpips": LPIPSSpec,
    }[kind]  # fmt: skip
    base = {n: tuple(a.shape) for n, a in weights(kind).items()}
    rng, refused = random.Random(kind), 0
    for name in base:  # a number inside a name must not decide how much work there is
        far = ".".join("9" * 15 if p.isdigit() else p for p in name.split("."))
        if far != name:
            with pytest.raises(OspError):
                spec_class.derive(moved := {far if n == name else n: s for n, s in base.items()}).check(moved)
    for _ in range(300):
        shapes = dict(base)
        for _ in range(rng.choice((1, 1, 2, 6))):
            name = rng.choice(list(shapes))
            action = rng.randrange(4)
            if action == 0:
                del shapes[name]
            elif action == 1:
                number = rng.choice(("0", "9" * 15, "-1", "x", "07"))
                parts = [number if p.isdigit() else p for p in name.split(".")]
                shapes[".".join(parts)] = shapes[name]
            else:
                dims = list(shapes[name]) or [1]
                dims[rng.randrange(len(dims))] = rng.choice((0, 1, 2**20, 2**47))
                shapes[name] = tuple(dims[: rng.randrange(len(dims) + 1)]) if action == 2 else tuple(dims)
        try:
            spec_class.derive(shapes).check(shapes)
        except OspError as e:
            refused += "\n" not in str(e)
    assert refused > 200


# ------------------------------------------------------------------------------------------------ allocation


def test_headers_cannot_make_it_allocate(tmp_path):
    """Headers that claim gigabytes are refused before anything of that size exists."""
    import tracemalloc

    def header(entry: dict) -> bytes:
        return checkpoint_fuzz.pack_safetensors(json.dumps({"a": entry}).encode(), b"")

    huge = 2**34
    files = {
        "length.safetensors": (2**40).to_bytes(8, "little") + b"{}",
        "offsets.safetensors": header({"dtype": "F32", "shape": [huge], "data_offsets": [0, huge * 4]}),
        "shape.safetensors": header({"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 0]}),
        "text.bin": checkpoint_fuzz.zip_file(b"\x80\x02X\xff\xff\xff\x7f."),
        "bytes.bin": checkpoint_fuzz.zip_file(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"."),
        "memo.bin": checkpoint_fuzz.zip_file(b"\x80\x02Nr\xff\xff\xff\xff."),
        "long.bin": checkpoint_fuzz.zip_file(b"\x80\x02\x8b\xff\xff\xff\x7f."),
        "content.ckpt": b"\x0a\xff\xff\xff\xff\x7f\x0a\x01a\x12\xff\xff\xff\xff\x7f",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(OspError):
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 << 20, name


def test_expanded_tensor_cannot_multiply_a_file(tmp_path):
    import torch

    torch.save({"a": torch.ones(1).expand(2**20, 2**12)}, tmp_path / "a.bin")
    with pytest.raises(OspError, match="out of a storage of"):
        open_checkpoint(tmp_path / "a.bin")


@pytest.mark.parametrize("use", ("in a list", "as a key", "as a shape", "as a storage key"))
def test_shared_parts_do_not_blow_up(tmp_path, use):
    """A tuple of a tuple of ... with shared parts: 2^60 elements in 200 bytes, if anybody walks or hashes it."""
    bomb = b")" + b"2\x86" * 60
    program = {
        "in a list": b"\x80\x02]" + bomb + b"a.",
        "as a key": b"\x80\x02}" + bomb + b"Ns.",
        "as a shape": b"\x80\x02ctorch\nSize\n" + bomb + b"\x85R.",
        "as a storage key": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + bomb + b"NK\x01tQ.",
    }[use]
    path = tmp_path / "a.bin"
    path.write_bytes(checkpoint_fuzz.zip_file(program))
    with pytest.raises(OspError):
        open_checkpoint(path)


# ------------------------------------------------------------------------------------------------ malicious pickles


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def gadgets() -> dict[str, tuple[bytes, str]]:
    """Pickle programs by form, each with the name that it asks for."""
    import shutil

    import torch

    def reduced(function, *arguments) -> bytes:
        return pickle.dumps({"state_dict": {"w": Call(function, *arguments)}}, 2)

    system = b"cposix\nsystem\n"
    return {
        "os.system": (reduced(os.system, "touch pwned"), "posix.system"),
        "builtins.eval": (reduced(eval, "1+1"), "__builtin__.eval"),
        "builtins.exec, protocol 4": (pickle.dumps(Call(exec, "x=1"), 4), "builtins.exec"),
        "subprocess": (reduced(subprocess.Popen, ["touch", "pwned"]), "commands.Popen"),  # Python 2's name
        "getattr": (reduced(getattr, "x", "upper"), "__builtin__.getattr"),
        "rmtree": (reduced(shutil.rmtree, "/nonexistent"), "shutil.rmtree"),
        "torch.load": (reduced(torch.load, "x.bin"), "torch.serialization.load"),
        "torch.hub.load": (b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00xtR.", "torch.hub.load"),
        "nested pickle": (b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x00tR.", "torch.storage._load_from_bytes"),
        "torch.jit": (b"\x80\x02ctorch.jit\nload\n(X\x01\x00\x00\x00xtR.", "torch.jit.load"),
        "numpy loads": (b"\x80\x02cnumpy\nload\n(X\x01\x00\x00\x00xtR.", "numpy.load"),
        "named, not called": (b"\x80\x02" + system + b"0}.", "posix.system"),
        "INST": (b"\x80\x02(S'touch pwned'\niposix\nsystem\n.", "posix.system"),
        "OBJ": (b"\x80\x02(" + system + b"S'touch pwned'\no.", "posix.system"),
        "NEWOBJ": (b"\x80\x02" + system + b"S'touch pwned'\n\x85\x81.", "posix.system"),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85R.", "posix.system"),
        "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0bos.path.exe\x93.", "torch.os.path.exe"),
        "module like an allowed one": (b"\x80\x02ctorch._utils\nos.system\n)R.", "torch._utils.os.system"),
        "object of an allowed class": (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "of class torch.FloatStorage"),
        "call of an allowed class": (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
        "BUILD on a function": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "attributes of torch._utils"),
        "extension code": (b"\x80\x02\x82\x01.", "opcode b'\\x82'"),
        "text persistent id": (b"\x80\x02Pos.system\n.", "opcode b'P'"),
        "rebuilding through a type": (
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"ctorch\nTensor\n)}tR.", "posix.system",
        ),
        "unicode look-alike": ("\x80\x04".encode("latin-1") + b"\x8c\x06t\xc3\xb6rch\x8c\x04load\x93.", "törch.load"),
    }  # fmt: skip


@pytest.mark.parametrize("name", gadgets())
def test_gadgets_are_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    program, asked = gadgets()[name]
    head = checkpoint_fuzz.legacy_file()
    prefix = head[: head.index(b"\x80\x02}q\x00(")]
    for file, content in (("a.ckpt", checkpoint_fuzz.zip_file(program)), ("b.pth", prefix + program)):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(OspError) as e:
            open_checkpoint(tmp_path / file)
        assert asked in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert not (tmp_path / "pwned").exists()


COMMANDS = (
    ("inspect", "{evil}"),
    ("convert", "--src", "{evil}", "--target", "out"),
    ("convert", "wfvae", "--src", "{evil}", "--target", "out.safetensors"),
    ("convert", "torch-bin", "--src", "{evil}", "--target", "out.ckpt"),
    ("convert", "discriminator", "--src", "{evil}", "--target", "out"),
    ("convert", "i2v", "--src", "{evil}", "--target", "out"),
    ("convert", "release", "--src", "{folder}", "--target", "../out"),
    ("merge", "-i", "{folder}", "-o", "out.safetensors", "-f", "{index}"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
def test_every_checkpoint_command_refuses(tmp_path, monkeypatch, command):
    folder = tmp_path / "download"
    folder.mkdir()
    evil = folder / "pytorch_model.bin"
    evil.write_bytes(checkpoint_fuzz.zip_file(pickle.dumps({"w": Call(os.system, "touch pwned")}, 2)))
    index = folder / "pytorch_model.bin.index.json"
    if command[0] == "merge":
        index.write_text(json.dumps({"weight_map": {"w": evil.name}}))
    monkeypatch.chdir(folder)
    status, out, err = osp(*(a.format(evil=evil, folder=folder, index=index) for a in command))
    assert status == 2 and "posix.system" in err and err.count("\n") == 1, err
    assert not (folder / "pwned").exists()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(p.name for p in folder.iterdir())


LOADING = (
    ("sample", "--ae_path", "{evil}", "--model_path", "{dit}", "--text_encoder_name_1", "{t5}", "--text_prompt", "x"),
    ("sample", "--ae_path", "{vae}", "--model_path", "{evil}", "--text_encoder_name_1", "{t5}", "--text_prompt", "x"),
    ("sample", "--ae_path", "{vae}", "--model_path", "{dit}", "--text_encoder_name_1", "{evil}", "--text_prompt", "x"),
    ("rec-video", "--ae_path", "{evil}", "--video_path", "x.mp4", "--rec_path", "y.mp4"),
    (
        "rec-video",
        "--ae_path",
        "{vae}",
        "--ms_checkpoint",
        "{evil}/m.ckpt",
        "--video_path",
        "x.mp4",
        "--rec_path",
        "y.mp4",
    ),
    ("rec-video-folder", "--ae_path", "{evil}", "--real_video_dir", ".", "--generated_video_dir", "y"),
    ("rec-image", "--ae_path", "{evil}", "--image_path", "x.png", "--rec_path", "y.png"),
    ("trace", "capture", "y", "--model", "wfvae-encode", "--weights", "{evil}", "--backend", "torch"),
)


@pytest.mark.parametrize("command", LOADING, ids=lambda c: f"{c[0]} {c.index(next(a for a in c if 'evil' in a)) - 1}")
def test_every_loading_command_refuses(tmp_path, monkeypatch, command):
    """Whatever loads weights refuses the same file: a gadget in a checkpoint that is otherwise in order."""
    from osp_shared.checkpoints import write_safetensors

    small = {"dit": {"caption_channels": 8}, "wfvae": {}, "t5": {}}
    places = {"evil": tmp_path / "evil"}
    for name, kind in (("vae", "wfvae"), ("dit", "dit"), ("t5", "t5")):
        spec = dataclasses.replace(SPECS[kind], **small[kind])
        places[name] = tmp_path / name
        write_safetensors(places[name], ((n, np.zeros(s, np.float32)) for n, s in spec.parameters().items()))
        (places[name] / "config.json").write_text(json.dumps(spec.to_config()))
    places["evil"].mkdir()
    gadget = pickle.dumps({"state_dict": {"w": Call(os.system, "touch pwned")}}, 2)
    (places["evil"] / "m.ckpt").write_bytes(checkpoint_fuzz.zip_file(gadget))
    (places["evil"] / "config.json").write_text(json.dumps(config("wfvae")))
    monkeypatch.chdir(tmp_path)
    status, _, err = osp(*(a.format(**places) for a in command))
    assert status == 2 and "posix.system" in err, err
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "y").exists()


# ------------------------------------------------------------------------------------------------ kills


def test_killed_at_a_hundred_moments():
    """SIGKILL anywhere in conversions to a folder, a safetensors file, a .ckpt, and in place beside the download.

    In memory if possible: what a kill leaves does not depend on the disk, and waiting for it is most of the time.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = harness("checkpoint_kill.py", folder, 100, 7)
    assert not found["faults"], found["faults"]
    assert found["kills"] >= 100 and found["old"] > 0 and found["new"] > 0 and found["continued"] > 0


def test_kill_check_notices_a_torn_state(tmp_path):
    """The check behind the kill test fails for a shard of the old state among those of the new one."""
    import checkpoint_kill

    (a, _), (b, wanted) = checkpoint_kill.make_sources(tmp_path)
    target = tmp_path / "target"
    for source in (a, b):
        checkpoint_kill.work(source, target)
        if source == a:
            old = {p.name: p.read_bytes() for p in target.glob("*.safetensors")}
    assert checkpoint_kill.state(target) == wanted
    name = sorted(old)[0]
    (target / name).write_bytes(old[name])
    assert checkpoint_kill.state(target) != wanted
    (target / name).unlink()
    with pytest.raises(OspError):
        checkpoint_kill.state(target)


def test_unreadable_source_leaves_nothing(tmp_path):
    """A tensor that turns out damaged in the middle of a conversion: an error, and no trace at the target."""
    from osp_shared.checkpoints import convert, write_safetensors

    arrays = weights("discriminator")
    write_safetensors(tmp_path / "s", arrays.items())
    file = next((tmp_path / "s").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for target in ("folder", "a.safetensors", "a.ckpt"):
        with open_checkpoint(tmp_path / "s") as source, pytest.raises(OspError, match="fingerprint"):
            convert(source, tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
