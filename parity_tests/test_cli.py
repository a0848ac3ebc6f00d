"""The `osp` command: its options, what it says to bad input, resuming, sharing out, and one video on both backends."""

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cli_support as support
from osp_shared.sampling import SampleRequest
from osp_shared.schedules import METHODS
from osp_shared.video.reader import probe, read_frames, read_image
from osp_shared.video.writer import write_image, write_video
from osp_tools import cli, demo_weights, options, rec_folder, rec_video, sample_run

BACKENDS = ("torch", "mindspore")
AGREE = 0.999  # share of pixels that may be one grey level apart


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return support.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return support.write_clip(tmp_path_factory.mktemp("clip") / "moving.mp4")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: on a busy machine, threads would wait for each other most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "RANK_ID", "RANK_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exact_files(monkeypatch):
    """Videos keep their exact pixels, so that files can be compared."""
    for module in (sample_run, rec_video, rec_folder):
        monkeypatch.setattr(module, "write_video", functools.partial(write_video, lossless=True))


def sample_options(models: Path, output: Path, **changes) -> dict:
    return {
        "model_path": models / "transformer",
        "ae_path": models / "vae",
        "text_encoder_name_1": models / "text_encoder",
        "text_prompt": ["a red fox"],
        "save_img_path": output,
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "sample_method": "EulerAncestralDiscrete",
        "num_sampling_steps": 3,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "max_sequence_length": 16,
        "seed": 7,
        "backend": "torch",
        **changes,
    }


def rec_options(models: Path, clip: Path, output: Path, **changes) -> dict:
    return {
        "video_path": clip,
        "rec_path": "rec.mp4",
        "output_path": output,
        "ae_path": models / "vae",
        "num_frames": 9,
        "height": 48,
        "width": 64,
        "backend": "torch",
        **changes,
    }


def sample(models, output, **changes) -> int:
    return support.osp("sample", *support.flags(sample_options(models, output, **changes)))


def rec(models, clip, output, **changes) -> int:
    return support.osp("rec-video", *support.flags(rec_options(models, clip, output, **changes)))


def frames(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path, range(probe(path).frames))))


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b)


# ---------------------------------------------------------------------------------------------------- options

FLAGS = {
    "sample": """--model_path --ms_checkpoint --version --model_type --text_encoder_name_1 --precision
        --text_encoder_precision --vae_precision --save_memory --ae --ae_path --enable_tiling --tiling_mode
        --tile_sample_min_size --tile_overlap_factor --text_prompt --num_frames --height --width --guidance_scale
        --guidance_rescale --sample_method --num_sampling_steps --prediction_type --rescale_betas_zero_snr
        --v1_5_scheduler --max_sequence_length --num_samples_per_prompt --seed --conditional_pixel_values_path
        --mask_type --crop_for_hw --max_hxw --noise_strength --save_img_path --fps --video_extension --resume
        --save_latents --decode_latents --backend --device""",
    "rec-video": """--video_path --rec_path --output_path --num_frames --sample_rate --height --width --fps --grid --ae
        --ae_path --enable_tiling --tiling_mode --tile_sample_min_size --tile_overlap_factor --ms_checkpoint
        --model_config --precision --seed --backend --device""",
    "rec-video-folder": """--real_video_dir --generated_video_dir --data_file_path --video_column --num_frames
        --sample_rate --sample_fps --height --width --dynamic_start_index --batch_size --num_workers --output_origin
        --resume --ae --ae_path --enable_tiling --tiling_mode --tile_sample_min_size --tile_overlap_factor
        --ms_checkpoint --model_config --precision --seed --backend --device""",
    "rec-image": """--image_path --rec_path --output_path --short_size --grid --ae --ae_path --enable_tiling
        --tile_sample_min_size --tile_overlap_factor --ms_checkpoint --model_config --precision --seed --backend
        --device""",
    "demo": "--output",
}


def options_of(command: str) -> list[str]:
    choices = cli.build_parser(cli.find(command))._subparsers._group_actions[0].choices
    return [o for action in choices[command]._actions for o in action.option_strings if o not in ("-h", "--help")]


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_what_users_type(command):
    """Frozen: a flag that goes away or changes its name breaks somebody's script."""
    assert options_of(command) == FLAGS[command].split()


def test_sample_defaults_are_the_request_s():
    args = cli.build_parser(cli.find("sample")).parse_args(["sample", "--text_prompt", "x"])
    request = SampleRequest(("x",))
    for name in vars(request):
        if name != "text_prompt":
            assert getattr(args, name) == getattr(request, name), name


COMMANDS_OF_THE_PORT = [
    """rec-video --ae WFVAEModel_D8_4x8x8 --ae_path vae --video_path test.mp4 --rec_path rec.mp4 --device Ascend
    --sample_rate 1 --num_frames 65 --height 512 --width 512 --fps 30 --enable_tiling --grid""",
    """rec-video-folder --batch_size 1 --real_video_dir UCF-101/ --data_file_path ucf101_test.csv --generated_video_dir
    out/ --device Ascend --sample_fps 30 --sample_rate 1 --num_frames 25 --height 256 --width 256 --num_workers 8
    --ae WFVAEModel_D8_4x8x8 --ae_path vae --ms_checkpoint some.ckpt""",
    """sample --model_path any93x640x640 --version v1_3 --num_frames 93 --height 352 --width 640 --text_encoder_name_1
    google/mt5-xxl --text_prompt examples/sora.txt --ae WFVAEModel_D8_4x8x8 --ae_path vae --save_img_path out --fps 18
    --guidance_scale 7.5 --num_sampling_steps 100 --max_sequence_length 512 --sample_method EulerAncestralDiscrete
    --seed 1234 --num_samples_per_prompt 1 --rescale_betas_zero_snr --prediction_type v_prediction --precision bf16""",
]


@pytest.mark.parametrize("line", COMMANDS_OF_THE_PORT, ids=lambda line: line.split()[0])
def test_the_documented_command_lines_are_accepted(line):
    argv = line.split()
    args = cli.build_parser(cli.find(argv[0])).parse_args(argv)
    assert args.ae == "WFVAEModel_D8_4x8x8"


def test_contents_without_any_framework():
    """`osp --help` lists every command, and needs none of the large packages."""
    code = (
        "import sys; from osp_tools.cli import main; main(['--help'])\n"
        "assert not {'torch', 'mindspore', 'transformers', 'av', 'PIL'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(re.search(rf"^  {c.name} ", result.stdout, re.M) for c in cli.COMMANDS)


def test_every_listed_command_exists(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as status:
            cli.main([command.name, "--help"])
        assert status.value.code == 0
    assert "usage: osp" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- bad input


def corrupt(models: Path, root: Path, part: str, how) -> Path:
    """A copy of the models with one of them damaged by `how(folder)`."""
    copy = root / "damaged"
    shutil.copytree(models, copy)
    how(copy / part)
    return copy


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size // 2)


def edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


SAMPLE_FAULTS = {
    "height": ({"height": 40}, r"height 40: must be a multiple of 16 pixels"),
    "width": ({"width": 100}, r"width 100: must be a multiple of 16 pixels"),
    "frames": ({"num_frames": 8}, r"num_frames 8: must be 4n\+1, such as 5 or 9"),
    "steps": ({"num_sampling_steps": 2000}, r"2000"),
    "method": ({"sample_method": "Euler"}, r"'Euler' \(choose from .*" + ".*".join(METHODS)),
    "prediction": ({"prediction_type": "x0"}, r"v_prediction"),
    "no prompt": ({"text_prompt": None}, r"no prompt: give --text_prompt"),
    "no vae": ({"ae_path": None}, r"no autoencoder: give --ae_path"),
    "no dit": ({"model_path": None}, r"no transformer: give --model_path"),
    "no text encoder": ({"text_encoder_name_1": None}, r"no text encoder: give --text_encoder_name_1"),
    "missing path": ({"ae_path": "/nowhere/vae"}, r"/nowhere/vae"),
    "other vae": ({"ae": "WFVAEModel_D16_4x8x8"}, r"the weights are a WFVAEModel_D8_4x8x8"),
    "old vae": ({"ae": "CausalVAEModel_4x8x8"}, r"must be one of WFVAEModel_D8_4x8x8"),
    "model type": ({"model_type": "i2v"}, r"the weights in .* are t2v"),
    "condition": ({"mask_type": "i2v"}, r"--mask_type does nothing with a text-to-video transformer"),
    "seed": ({"seed": -1}, r"seed -1"),
    "fps": ({"fps": 0}, r"fps 0: must be at least 1"),
    "device": ({"device": "Ascend"}, r"device Ascend: the torch backend runs on cpu or cuda"),
    "tiling mode": ({"tiling_mode": "exact"}, r"--tiling_mode does nothing without --enable_tiling"),
    "tile overlap": ({"tile_overlap_factor": 0.25}, r"does nothing without --tile_sample_min_size"),
    "memory": ({"save_memory": True, "enable_tiling": True}, r"--enable_tiling does nothing with --save_memory"),
    "latents": ({"save_latents": True, "decode_latents": True}, r"one run writes latents, another decodes"),
    "no latents": ({"decode_latents": True}, r"no latents for prompt 0 .*: run with --save_latents"),
    "left out": ({"mode": "0"}, r"--mode: there is no graph mode here"),
    "sequence": ({"sp_size": "8"}, r"--sp_size: the sequence is not split"),
    "misspelt": ({"num_frame": "5"}, r"unknown argument --num_frame; did you mean --num_frames\?"),
}


def assert_one_line_error(status: int, capsys, message: str, output: Path) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(error) == 1 and error[0].startswith("osp: error: "), error
    assert re.search(message, error[0]), error[0]
    assert not output.exists() or not any(p.is_file() for p in output.rglob("*")), "something was written"


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_bad_input_of_sample(fault, models, tmp_path, capsys):
    changes, message = SAMPLE_FAULTS[fault]
    assert_one_line_error(sample(models, tmp_path / "out", **changes), capsys, message, tmp_path / "out")


DAMAGED = {
    "missing shard": ("transformer", remove_shard, r"00002-of-0000\d\.safetensors"),
    "truncated": ("vae", truncate, r"vae/diffusion_pytorch_model\.safetensors"),
    "transformer config": ("transformer", edit_config(num_layers=3), r"num_layers 3, the weights 4"),
    "vae config": ("vae", edit_config(base_channels=16), r"base_channels 16, the weights 8"),
    "text width": ("text_encoder", edit_config(d_model=4096), r"d_model 4096, the weights 8"),
    "unknown key": ("transformer", edit_config(num_experts=8), r"num_experts"),
    "tokenizer": ("text_encoder", lambda folder: (folder / "tokenizer.json").unlink(), r"holds no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights(damage, models, tmp_path, capsys):
    part, how, message = DAMAGED[damage]
    copy = corrupt(models, tmp_path, part, how)
    assert_one_line_error(sample(copy, tmp_path / "out"), capsys, message, tmp_path / "out")


def test_models_that_do_not_belong_together(models, tmp_path, capsys):

    other = dataclasses.replace(support.DIT, caption_channels=12)
    support.write_transformer(tmp_path / "other", other)
    status = sample(models, tmp_path / "out", model_path=tmp_path / "other")
    assert_one_line_error(status, capsys, r"width 8 \(d_model\), the transformer takes 12", tmp_path / "out")


def test_prompt_files(models, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    status = sample(models, tmp_path / "out", text_prompt=[tmp_path / "empty.txt"])
    assert_one_line_error(status, capsys, r"empty\.txt holds no prompt", tmp_path / "out")
    status = sample(models, tmp_path / "out", text_prompt=[tmp_path / "absent.txt"])
    assert_one_line_error(status, capsys, r"absent\.txt does not exist", tmp_path / "out")


def test_unwritable_output(models, clip, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert_one_line_error(sample(models, out), capsys, r"cannot write to folder", tmp_path / "none")
    assert_one_line_error(rec(models, clip, out), capsys, r"cannot write to folder", tmp_path / "none")


REC_FAULTS = {
    "frames": ({"num_frames": 10}, r"num_frames 10: must be 4n\+1, e\.g\. 9 or 13"),
    "height": ({"height": 50}, r"height 50, width 64: both must be multiples of 8"),
    "short": ({"num_frames": 13}, r"has 12 frames, but 13"),
    "rate": ({"sample_rate": 2}, r"has 12 frames, but 9 frames at sample rate 2"),
    "suffix": ({"rec_path": "rec.mov"}, r"must end in \.mp4 or \.gif"),
    "no video": ({"video_path": "/nowhere.mp4"}, r"/nowhere\.mp4 does not exist"),
    "ae": ({"ae": "WFVAEModel_D32_8x8x8"}, r"the weights are a WFVAEModel_D8_4x8x8"),
    "tile": ({"tile_sample_min_size": 20}, r"multiple of 8"),
    "config": ({"model_config": "/nowhere.json"}, r"/nowhere\.json: No such file"),
}


@pytest.mark.parametrize("fault", REC_FAULTS)
def test_bad_input_of_rec_video(fault, models, clip, tmp_path, capsys):
    changes, message = REC_FAULTS[fault]
    assert_one_line_error(rec(models, clip, tmp_path / "out", **changes), capsys, message, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"this is no video"], ids=["empty", "text"])
def test_unreadable_video(content, models, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(content)
    status = rec(models, tmp_path / "bad.mp4", tmp_path / "out")
    assert_one_line_error(status, capsys, r"bad\.mp4 (is empty|cannot be decoded)", tmp_path / "out")


def test_unknown_command(capsys, tmp_path):
    assert_one_line_error(support.osp("rec-vido"), capsys, r"did you mean rec-video\?", tmp_path / "none")
    assert_one_line_error(support.osp("bake"), capsys, r"one of sample, rec-video", tmp_path / "none")


# ------------------------------------------------------------------------------------------- one video, two backends


def test_same_seed_same_video_on_both_backends(models, tmp_path, exact_files):
    """Two prompts, two samples each, guided: the real command on both backends."""
    for backend in BACKENDS:
        changes = {"backend": backend, "text_prompt": ["a red fox", "snow on the moon"], "num_samples_per_prompt": 2}
        assert sample(models, tmp_path / backend, **changes) == 0
    names = sorted(p.name for p in (tmp_path / "torch").glob("*.mp4"))
    stem = "EulerAncestralDiscrete"
    expected = [f"{stem}_{k}_gs7.5_s3{i}.mp4" for k in (0, 1) for i in ("", "_i0", "_i1")] + [f"{stem}_gs7.5_s3.mp4"]
    assert names == sorted(expected)
    for name in names:
        a, b = (frames(tmp_path / backend / name) for backend in BACKENDS)
        assert (apart(a, b) <= 1).mean() >= AGREE, name
    one, two = (frames(tmp_path / "torch" / f"{stem}_{k}_gs7.5_s3.mp4") for k in (0, 1))
    assert one.shape == (5, 67, 34, 3) and not np.array_equal(one, two)
    assert frames(tmp_path / "torch" / f"{stem}_gs7.5_s3.mp4").shape == (5, 67, 67, 3)
    i0, i1 = (frames(tmp_path / "torch" / f"{stem}_0_gs7.5_s3_i{i}.mp4") for i in (0, 1))
    assert i0.shape == (5, 32, 32, 3) and not np.array_equal(i0, i1)


def test_same_reconstruction_on_both_backends(models, clip, tmp_path, exact_files, capsys):
    for backend in BACKENDS:
        assert rec(models, clip, tmp_path / backend, backend=backend, grid=True, enable_tiling=True) == 0
        assert re.search(r"PSNR \d\d\.\d\d dB, SSIM 0\.\d{4}", capsys.readouterr().out)
    a, b = (frames(tmp_path / backend / "rec.mp4") for backend in BACKENDS)
    assert a.shape == (9, 48, 128, 3)
    assert (apart(a, b) <= 1).mean() >= AGREE
    original = support.moving_clip()[:9]
    assert apart(a[:, :, :64], original).max() <= 1, "the left half is the original"
    assert apart(a[:, :, 64:], original).mean() < 25, "the right half resembles it"


# ------------------------------------------------------------------------------------------------ reconstruction


def test_tiling_changes_nothing_but_memory(models, clip, tmp_path, exact_files):
    variants = {
        "whole": {},
        "chunks": {"enable_tiling": True},
        "tiles": {"tile_sample_min_size": 32, "tile_overlap_factor": 0.5},
    }
    videos = {}
    for name, changes in variants.items():
        assert rec(models, clip, tmp_path / name, **changes) == 0
        videos[name] = frames(tmp_path / name / "rec.mp4")
    assert apart(videos["chunks"], videos["whole"]).max() <= 1
    assert 0 < apart(videos["tiles"], videos["whole"]).mean() < 4, "tiles are an approximation"


def test_one_frame_and_the_manifest(models, clip, tmp_path):
    assert rec(models, clip, tmp_path, num_frames=1, rec_path="still.mp4") == 0
    assert read_image(tmp_path / "still.jpg").shape == (48, 64, 3)
    facts = json.loads((tmp_path / "still.jpg.json").read_text())
    assert facts["backend"] == "torch" and facts["precision"] == "fp32" and facts["arguments"]["seed"] == 4
    assert re.fullmatch(r"[0-9a-f]{64}", facts["weights"]["ae"]["fingerprint"])
    assert facts["versions"]["torch"] and facts["outputs"][0]["psnr"] > 15


def test_rec_image(models, tmp_path, capsys):
    write_image(tmp_path / "wide.png", support.moving_clip(1, 50, 83)[0])
    options = {"image_path": tmp_path / "wide.png", "ae_path": models / "vae", "backend": "torch", "short_size": 40}
    options |= {"output_path": tmp_path, "rec_path": "rec.png", "grid": True}
    assert support.osp("rec-image", *support.flags(options)) == 0
    assert read_image(tmp_path / "rec.png").shape == (40, 128, 3), "40 x 66.4, cut to 40 x 64, twice"
    tiles = options | {"rec_path": "tiles.png", "enable_tiling": True, "tile_sample_min_size": 32}
    assert support.osp("rec-image", *support.flags(tiles)) == 0
    assert not np.array_equal(read_image(tmp_path / "tiles.png"), read_image(tmp_path / "rec.png"))
    capsys.readouterr()
    dead = options | {"rec_path": "x.png", "tile_sample_min_size": 32}
    status = support.osp("rec-image", *support.flags(dead))
    assert_one_line_error(status, capsys, r"does nothing without --enable_tiling", tmp_path / "x.png")


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "real"
    for i, name in enumerate(("b.mp4", "sub/a.mp4", "c.mp4")):
        support.write_clip(root / name, shift=10 * i)
    return root


def folder_options(models: Path, folder: Path, output: Path, **changes) -> list[str]:
    options = {"real_video_dir": folder, "generated_video_dir": output, "ae_path": models / "vae", "num_frames": 5}
    return support.flags(options | {"height": 32, "width": 48, "backend": "torch"} | changes)


def test_rec_folder(models, folder, tmp_path, exact_files, capsys):
    one, three = tmp_path / "one", tmp_path / "three"
    assert support.osp("rec-video-folder", *folder_options(models, folder, one, output_origin=True)) == 0
    assert "mean of 3 videos: PSNR" in capsys.readouterr().out
    assert sorted(p.name for p in one.glob("*.mp4")) == ["a.mp4", "b.mp4", "c.mp4"]
    assert frames(one / "origin" / "a.mp4").shape == (5, 32, 48, 3)
    assert support.osp("rec-video-folder", *folder_options(models, folder, three, batch_size=2, num_workers=3)) == 0
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        assert apart(frames(one / name), frames(three / name)).max() <= 1, "the batch size changes nothing"


def test_rec_folder_lists_and_random_starts(models, folder, tmp_path, exact_files):
    (tmp_path / "list.csv").write_text('"clip"\nsub/a.mp4\n')
    options = {"data_file_path": tmp_path / "list.csv", "video_column": "clip"}
    assert support.osp("rec-video-folder", *folder_options(models, folder, tmp_path / "first", **options)) == 0
    assert [p.name for p in (tmp_path / "first").glob("*.mp4")] == ["a.mp4"]
    starts = options | {"dynamic_start_index": True, "output_origin": True}
    for name, seed in {"again": 1, "1": 1, "2": 2, "3": 3, "4": 4}.items():
        argv = folder_options(models, folder, tmp_path / name, **starts, seed=seed)
        assert support.osp("rec-video-folder", *argv) == 0
    again, *others = (frames(tmp_path / name / "origin" / "a.mp4") for name in ("again", "1", "2", "3", "4"))
    assert np.array_equal(again, others[0]) and not all(np.array_equal(again, other) for other in others)


def test_rec_folder_leaves_a_bad_video_out_and_resumes(models, folder, tmp_path, capsys):
    (folder / "broken.mp4").write_bytes(b"no video")
    output = tmp_path / "out"
    assert support.osp("rec-video-folder", *folder_options(models, folder, output)) == 2
    errors = capsys.readouterr().err
    assert "left out" in errors and "osp: error: 1 of 4 videos could not be read" in errors
    (folder / "broken.mp4").unlink()
    before = {p: p.stat().st_mtime_ns for p in output.glob("*.mp4")}
    support.write_clip(folder / "d.mp4", shift=50)
    assert support.osp("rec-video-folder", *folder_options(models, folder, output, resume=True)) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}, "finished videos were made again"
    assert (output / "d.mp4").is_file()
    support.write_clip(folder / "x" / "d.mp4")
    assert support.osp("rec-video-folder", *folder_options(models, folder, output)) == 2
    assert "would both be written" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- sampling runs

PROMPTS = ["a red fox", "snow on the moon", "the moon"]
QUICK = {"text_prompt": PROMPTS, "num_frames": 1, "num_sampling_steps": 1}


def times(folder: Path) -> dict[str, int]:
    """Time of change of each prompt's file."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*_?_gs*.jpg")}


def test_resume(models, tmp_path, capsys):
    run = functools.partial(sample, models, tmp_path, **QUICK)
    assert run() == 0
    first = times(tmp_path)
    names = sorted(first)
    assert len(names) == 3
    assert run(resume=True) == 0 and times(tmp_path) == first
    assert "3 of 3 prompts are finished already" in capsys.readouterr().out

    (tmp_path / names[0]).unlink()
    with (tmp_path / names[1]).open("ab") as file:
        file.write(b"tampered")
    assert run(resume=True) == 0
    second = times(tmp_path)
    assert [second[n] == first[n] for n in names] == [False, False, True], (
        "the deleted and the changed file are made again"
    )

    assert run(resume=True, seed=8) == 0
    assert all(times(tmp_path)[n] != second[n] for n in names), "another seed is another video"
    assert run() == 0
    third = times(tmp_path)
    assert run() == 0 and all(times(tmp_path)[n] != third[n] for n in names), "without --resume all is made"


def test_interrupt_keeps_what_is_finished(models, tmp_path, monkeypatch, capsys):
    real, calls = sample_run.denoise, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample_run, "denoise", interrupted)
    assert sample(models, tmp_path, **QUICK) == 130
    assert "1 of 3 prompts are finished; go on with --resume" in capsys.readouterr().err
    assert len(times(tmp_path)) == 1 and json.loads((tmp_path / "manifest/run.json").read_text())["outputs"]
    assert sample(models, tmp_path, **QUICK, resume=True) == 0
    assert len(times(tmp_path)) == 3 and len(calls) == 4
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".part", ".tmp"))]


def test_shared_out_over_processes(models, tmp_path, monkeypatch):
    assert sample(models, tmp_path / "alone", **QUICK) == 0
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert sample(models, tmp_path / "two", **QUICK) == 0
        assert len(times(tmp_path / "two")) == (1 if rank else 3)
    pictures = sorted(p.name for p in (tmp_path / "alone").glob("*.jpg"))
    assert len(pictures) == 4, "three prompts and the grid of all"
    for name in pictures:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert (tmp_path / "two/manifest/run-rank1.json").is_file()


def test_bad_ranks(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_line_error(sample(models, tmp_path / "out"), capsys, r"RANK=2 WORLD_SIZE=2", tmp_path / "out")


def test_saving_memory_and_two_phases_give_the_same_video(models, tmp_path, exact_files):
    name = "EulerAncestralDiscrete_0_gs7.5_s3.mp4"
    assert sample(models, tmp_path / "plain") == 0
    assert sample(models, tmp_path / "memory", save_memory=True) == 0
    assert sample(models, tmp_path / "phases", save_latents=True) == 0
    assert not list((tmp_path / "phases").glob("*.mp4"))
    assert sample(models, tmp_path / "phases", decode_latents=True) == 0
    plain, memory, phases = (frames(tmp_path / n / name) for n in ("plain", "memory", "phases"))
    assert np.array_equal(plain, phases) and apart(plain, memory).max() <= 1
    assert not (tmp_path / "phases" / "latents").exists()


def test_images(models, tmp_path):
    assert sample(models, tmp_path, num_frames=1, num_samples_per_prompt=3, guidance_scale=1.0) == 0
    names = sorted(p.name for p in tmp_path.glob("*.jpg"))
    stem = "EulerAncestralDiscrete"
    assert names == sorted([f"{stem}_0_gs1.0_s3{i}.jpg" for i in ("", "_i0", "_i1", "_i2")] + [f"{stem}_gs1.0_s3.jpg"])
    assert read_image(tmp_path / f"{stem}_0_gs1.0_s3.jpg").shape == (70, 70, 3)


def test_from_a_picture(models, tmp_path, exact_files, capsys):
    """The inpaint transformer: its own weights, a picture to start from, on both backends."""
    support.write_transformer(tmp_path / "i2v", support.INPAINT)
    write_image(tmp_path / "start.png", support.moving_clip(1)[0])
    (tmp_path / "conditions.txt").write_text(f"{tmp_path / 'start.png'}\n")
    changes = {"model_path": tmp_path / "i2v", "model_type": "i2v", "crop_for_hw": True}
    changes |= {"conditional_pixel_values_path": tmp_path / "conditions.txt"}
    for backend in BACKENDS:
        assert sample(models, tmp_path / backend, backend=backend, **changes) == 0
    a, b = (frames(tmp_path / n / "EulerAncestralDiscrete_0_gs7.5_s3.mp4") for n in BACKENDS)
    assert a.shape == (5, 32, 32, 3) and (apart(a, b) <= 1).mean() >= AGREE
    capsys.readouterr()
    status = sample(models, tmp_path / "out", model_path=tmp_path / "i2v")
    assert_one_line_error(status, capsys, r"need --conditional_pixel_values_path", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- backends


def test_default_backend_is_the_one_installed(models, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "installed", lambda name: name == "torch")
    assert rec(models, clip, tmp_path / "a", backend=None) == 0
    assert json.loads((tmp_path / "a/rec.mp4.json").read_text())["backend"] == "torch"
    status = rec(models, clip, tmp_path / "b", backend="mindspore")
    assert_one_line_error(status, capsys, r"pip install -e '\.\[mindspore\]'", tmp_path / "b")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_model_gives_its_memory_back(backend, tmp_path):
    """The text encoder is gone before the transformer is loaded (MindSpore's executor would keep it)."""
    spec = dataclasses.replace(support.T5, vocab_size=250_112, d_model=64)
    support.write_model(tmp_path / "encoder", spec, demo_weights.filled(spec))
    table = spec.vocab_size * spec.d_model * 4
    selected = options.select_backend(argparse.Namespace(backend=backend, device="cpu"))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def use() -> int:
        encoder = selected.module.load_text_encoder(tmp_path / "encoder")
        encoder(np.ones((1, 8), np.int64), np.ones((1, 8), np.int64))
        return resident()

    before = resident()
    assert use() - before > 0.7 * table
    selected.release()
    assert resident() - before < 0.5 * table
