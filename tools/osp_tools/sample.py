"""`osp sample`: text to video or image. Options and checks that need no framework; sample_run.py does the work."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.inpaint import MASK_TYPES, MAX_HXW, ConditionRequest, condition_kind
from osp_shared.loading import Weights
from osp_shared.sampling import RECOMMENDED_MULTIPLE, SampleRequest
from osp_shared.schedules import METHODS, PREDICTION_TYPES
from osp_shared.specs.dit import DiTSpec, InpaintSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec
from osp_shared.text.prompts import read_prompts
from osp_shared.video.grid import sample_name
from osp_shared.video.writer import check_writable
from osp_tools import options
from osp_tools.manifest import finished, identity, weights_identity
from osp_tools.rec import Plan

HELP = "text to video or image, from a prompt or a file of prompts"
LEFT_OUT = {
    "text_encoder_name_2": "the v1.3 transformer ignores a second text encoder: leave it out",
    "text_encoder_name": "the text encoder is --text_encoder_name_1",
    "caption_refiner": "prompts are not refined here: give refined prompts to --text_prompt",
    "refine_caption": "prompts are not refined here: give refined prompts to --text_prompt",
    "enhance_video": "there is no enhancer: leave it out",
    "sp_size": "the sequence is not split over devices here: " + options.RANKS,
    "sp": "the sequence is not split over devices here: " + options.RANKS,
    "batch_size": "samples of a prompt are a batch: use --num_samples_per_prompt",
    "num_videos_per_prompt": "use --num_samples_per_prompt",
    "max_device_memory": "set OSP_MAX_DEVICE_MEMORY, e.g. 59GB",
    "config": "give the options themselves",
    "model_3d": "leave it out: v1.3 has one transformer",
    "udit": "leave it out: v1.3 has one transformer",
}
KINDS = {"t2v": DiTSpec, "dit": DiTSpec, "inpaint": InpaintSpec, "i2v": InpaintSpec}
SAVE_MEMORY_CHUNKS = (8, 4)  # pixel frames a chunk in the encoder, latent frames in the decoder


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("sample", help=HELP, description=HELP)
    _add_models(parser)
    _add_request(parser)
    _add_condition(parser.add_argument_group("image or video to start from (inpaint / I2V weights)"))
    _add_output(parser.add_argument_group("output"))
    options.add_backend(parser)
    options.add_left_out(parser, **LEFT_OUT)
    parser.set_defaults(run=run)


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--model_path", metavar="PATH", help="transformer: folder (sharded or not) or file, any format of osp inspect")
    add("--ms_checkpoint", metavar="FILE", help="transformer weights instead of those in --model_path, any format")
    add("--version", choices=("v1_3",), default="v1_3", help="of the transformer")
    add(
        "--model_type", choices=tuple(KINDS), help="check that the transformer is of this kind; default: as its weights"
    )
    add("--text_encoder_name_1", metavar="PATH", help="folder of mT5-xxl (or another gated T5) with its tokenizer")
    add("--precision", choices=options.PRECISIONS, help="of the transformer; default: bf16; fp32 on a CPU")
    add("--text_encoder_precision", choices=options.PRECISIONS, help="default: fp16; fp32 on a CPU")
    add("--vae_precision", choices=options.PRECISIONS, help="default: fp16; fp32 on a CPU")
    add("--save_memory", action="store_true", help="one model at a time, and the autoencoder in chunks of frames")
    options.add_autoencoder(parser)


def _add_request(parser: argparse.ArgumentParser) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(SampleRequest)}
    group = parser.add_argument_group("what to sample")

    def add(name: str, **kwargs):
        group.add_argument(f"--{name}", default=defaults[name], **kwargs)

    group.add_argument(
        "--text_prompt",
        nargs="+",
        metavar="TEXT",
        help="prompts, or one .txt (a prompt a line) or .csv (column cap) file",
    )
    add("num_frames", type=int, help="4n+1, e.g. 93, 77, 61, 45, 29; 1: an image")
    add("height", type=int, help="a multiple of 16, best of 32")
    add("width", type=int, help="a multiple of 16, best of 32")
    add("guidance_scale", type=float, help="1 or less: no guidance")
    add("guidance_rescale", type=float, help="share of the excess contrast of guidance that is taken back, 0 to 1")
    add("sample_method", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("num_sampling_steps", type=int, help="steps of the sampler")
    add("prediction_type", choices=PREDICTION_TYPES, help="released weights: v_prediction")
    add("rescale_betas_zero_snr", action="store_true", help="zero terminal SNR, trailing timesteps: released weights")
    add("v1_5_scheduler", action="store_true", help="betas of v1.5")
    add("max_sequence_length", type=int, help="text tokens")
    add("num_samples_per_prompt", type=int, help="sampled as one batch")
    add("seed", type=int, help="the same seed is the same video on every backend, device and number of processes")


def _add_condition(group) -> None:
    add = group.add_argument
    add("--conditional_pixel_values_path", metavar="TXT", help="a line for each prompt: pictures (a,b,c) or one video")
    add("--mask_type", choices=MASK_TYPES, help="which frames are given; default: by what is given")
    add("--crop_for_hw", action="store_true", help="crop to --height and --width; default: keep the given aspect ratio")
    add("--max_hxw", type=int, help=f"most pixels of a frame when not --crop_for_hw (default {MAX_HXW[1]})")
    add("--noise_strength", type=float, help="noise on what is given, 0 to 1 (default 0)")


def _add_output(group) -> None:
    add = group.add_argument
    add("--save_img_path", default="./sample_videos/t2v", metavar="FOLDER", help="outputs and manifest")
    add("--fps", type=int, default=24, help="frames a second")
    add("--video_extension", choices=("mp4", "gif"), default="mp4", help="of videos; images are jpg")
    add("--resume", action="store_true", help="skip prompts that an earlier run with the same options finished")
    add("--save_latents", action="store_true", help="stop before decoding; go on later with --decode_latents")
    add("--decode_latents", action="store_true", help="only decode what --save_latents kept, then delete it")


# ------------------------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Job:
    """One prompt of this process. output: its video or picture, or grid of samples. key: identity of all inputs."""

    index: int
    prompt: str
    condition: tuple[str, ...]
    output: Path
    latents: Path
    latents_key: str
    key: str


@dataclass(frozen=True)
class Setup:
    """A run whose inputs were checked against each other; no framework is imported yet.

    jobs: the prompts of this process, finished ones included. all_jobs: of all processes.
    """

    args: argparse.Namespace
    request: SampleRequest
    vae: Plan
    dit_path: str
    condition: ConditionRequest | None
    all_jobs: list[Job]
    rank: int = 0
    world: int = 1

    @property
    def jobs(self) -> list[Job]:
        return self.all_jobs[self.rank :: self.world]

    @property
    def folder(self) -> Path:
        return Path(self.args.save_img_path)


def run(args: argparse.Namespace) -> None:
    setup = prepare(args)
    todo = [job for job in setup.jobs if not (args.resume and finished(job.output, job.key))]
    if len(todo) < len(setup.jobs):
        print(f"{len(setup.jobs) - len(todo)} of {len(setup.jobs)} prompts are finished already")
    from osp_tools import sample_run

    if todo:
        sample_run.sample(setup, todo)
    if not args.save_latents:
        sample_run.write_overview(setup, fresh=bool(todo))


def prepare(args: argparse.Namespace) -> Setup:
    """Check everything that can be known from arguments and file headers.

    Raises:
        OspError: the first thing that is wrong.
    """
    request = _request(args)
    if args.fps < 1:
        raise OspError(f"fps {args.fps}: must be at least 1")
    if args.save_latents and args.decode_latents:
        raise OspError("--save_latents and --decode_latents: one run writes latents, another decodes them")
    if args.save_memory:
        if args.enable_tiling:
            raise OspError("--enable_tiling does nothing with --save_memory, which includes it")
        args.enable_tiling = True
    folder = check_writable(args.save_img_path)
    vae = _autoencoder(args)
    dit_path = args.ms_checkpoint or args.model_path
    dit = _transformer(args, dit_path, vae.spec)
    condition, lines = _condition(args, dit, len(request.text_prompt))
    if (request.num_frames - 1) % vae.spec.stride[0]:
        raise OspError(f"num_frames {request.num_frames}: this autoencoder needs {vae.spec.stride[0]}n+1 frames")
    _text_encoder(args, dit)
    for name in ("height", "width"):
        if getattr(request, name) % RECOMMENDED_MULTIPLE and options.ranks()[0] == 0:
            print(f"note: {name} {getattr(request, name)} is not a multiple of 32, which the weights were trained on")
    jobs = _jobs(args, request, folder, vae, dit_path, lines)
    return Setup(args, request, vae, dit_path, condition, jobs, *options.ranks())


def _request(args: argparse.Namespace) -> SampleRequest:
    if not args.text_prompt:
        raise OspError("no prompt: give --text_prompt, one or more prompts or a .txt or .csv file")
    own = {f.name for f in dataclasses.fields(SampleRequest)} - {"text_prompt"}
    return SampleRequest(tuple(read_prompts(args.text_prompt)), **{name: getattr(args, name) for name in own})


def _autoencoder(args: argparse.Namespace) -> Plan:
    if not args.ae_path:
        raise OspError("no autoencoder: give --ae_path, the folder with its config.json and weights")
    spec = Weights(args.ae_path, WFVAESpec).spec
    options.check_ae_name(args.ae, spec)
    chunks = SAVE_MEMORY_CHUNKS if args.save_memory else (8, 2)
    return Plan(args.ae_path, None, spec, options.tiling(args, chunks=chunks))


def _transformer(args: argparse.Namespace, path: str | None, vae: WFVAESpec) -> DiTSpec:
    if not path:
        raise OspError("no transformer: give --model_path, the folder with its config.json and weights")
    spec = Weights(path, DiTSpec).spec
    if args.model_type and isinstance(spec, InpaintSpec) != (KINDS[args.model_type] is InpaintSpec):
        found = "inpaint (i2v)" if isinstance(spec, InpaintSpec) else "t2v (dit)"
        raise OspError(f"--model_type {args.model_type}: the weights in {path} are {found}")
    if spec.in_channels != vae.latent_dim:
        raise OspError(
            f"{path} takes latents of {spec.in_channels} channels (in_channels), {args.ae_path} makes {vae.latent_dim} "
            "(latent_dim): transformer and autoencoder must belong together"
        )
    return spec


def _text_encoder(args: argparse.Namespace, dit: DiTSpec) -> None:
    if not args.text_encoder_name_1:
        raise OspError("no text encoder: give --text_encoder_name_1, the folder with mT5's weights and tokenizer")
    spec = Weights(args.text_encoder_name_1, T5Spec).spec
    if spec.d_model != dit.caption_channels:
        raise OspError(
            f"{args.text_encoder_name_1} gives text of width {spec.d_model} (d_model), the transformer takes "
            f"{dit.caption_channels} (caption_channels): it was trained with another text encoder"
        )


def _condition(args, dit: DiTSpec, prompts: int) -> tuple[ConditionRequest | None, list[tuple[str, ...]]]:
    """(how, the paths for each prompt): None and empty paths for text to video."""
    path = args.conditional_pixel_values_path
    if not isinstance(dit, InpaintSpec):
        named = {"--conditional_pixel_values_path": path, "--mask_type": args.mask_type, "--max_hxw": args.max_hxw}
        named |= {"--crop_for_hw": args.crop_for_hw or None, "--noise_strength": args.noise_strength}
        given = [flag for flag, value in named.items() if value is not None]
        if given:
            raise OspError(f"{given[0]} does nothing with a text-to-video transformer: it needs inpaint (i2v) weights")
        return None, [()] * prompts
    if not path or not path.endswith(".txt"):
        raise OspError("inpaint (i2v) weights need --conditional_pixel_values_path, a .txt with a line for each prompt")
    if args.crop_for_hw and args.max_hxw is not None:
        raise OspError("--max_hxw does nothing with --crop_for_hw, which fixes the size")
    lines = [tuple(line.split(",")) for line in read_prompts([path])]
    if len(lines) != prompts:
        raise OspError(f"{path} has {len(lines)} lines for {prompts} prompts: there must be one for each")
    for line in lines:
        condition_kind(line)
        if missing := [p for p in line if not Path(p).is_file()]:
            raise OspError(f"{path}: {missing[0]} does not exist")
    given = {"mask_type": args.mask_type, "max_hxw": args.max_hxw, "noise_strength": args.noise_strength}
    given = {name: value for name, value in given.items() if value is not None}
    return ConditionRequest(crop_for_hw=args.crop_for_hw, **given), lines


def _jobs(args, request: SampleRequest, folder: Path, vae: Plan, dit_path: str, lines) -> list[Job]:
    """A job for each prompt, with the hash of everything that decides its output."""
    shared = {f.name: getattr(request, f.name) for f in dataclasses.fields(request) if f.name != "text_prompt"}
    for name in (
        "precision",
        "text_encoder_precision",
        "vae_precision",
        "backend",
        "device",
        "mask_type",
        "crop_for_hw",
    ):
        shared[name] = getattr(args, name)
    shared |= {"max_hxw": args.max_hxw, "noise_strength": args.noise_strength}
    shared["weights"] = [weights_identity(p) for p in (dit_path, args.text_encoder_name_1)]
    decoding = {"weights": weights_identity(vae.path), "tiling": str(vae.tiling), "fps": args.fps}
    extension = "jpg" if request.num_frames == 1 else args.video_extension
    jobs = []
    for index, prompt in enumerate(request.text_prompt):
        name = sample_name(
            request.sample_method, request.guidance_scale, request.num_sampling_steps, extension, index=index
        )
        files = [weights_identity(p) for p in lines[index]]
        latents_key = identity({**shared, "prompt": prompt, "index": index, "condition": [lines[index], files]})
        key = identity({"latents": latents_key, **decoding, "extension": extension})
        latents = folder / "latents" / f"{Path(name).stem}.npz"
        jobs.append(Job(index, prompt, lines[index], folder / name, latents, latents_key, key))
    return jobs
