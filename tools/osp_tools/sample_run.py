"""The work of `osp sample`: text, latents, pixels, files. One model is loaded at a time where memory asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from osp_shared import inpaint
from osp_shared.backend import Denoiser, VideoAutoencoder
from osp_shared.errors import OspError
from osp_shared.sampling import PhiloxNoise, TextEmbeddings, decode, denoise, encode_prompt, latent_size
from osp_shared.text.tokenizer import Tokenizer
from osp_shared.video.grid import image_grid, sample_name, video_grid
from osp_shared.video.reader import probe, read_frames, read_image
from osp_shared.video.writer import write_image, write_video
from osp_tools import options
from osp_tools.manifest import Manifest, finish, finished, run_path
from osp_tools.options import Selected
from osp_tools.sample import Job, Setup

OVERVIEW_LIMIT = 256  # clips in the grid of all prompts: each is an open file


Observer = Callable[[Job, np.ndarray, np.ndarray], None]


@dataclass
class Run:
    """A sampling run on a backend."""

    setup: Setup
    backend: Selected
    manifest: Manifest
    precisions: dict[str, str]
    observe: Observer | None = None

    def load_vae(self) -> VideoAutoencoder:
        with self.manifest.timed("load"):
            self.manifest.add_weights("ae", self.setup.vae.path)
            return self.setup.vae.load(self.backend, self.precisions["vae_precision"])

    def load_dit(self) -> Denoiser:
        with self.manifest.timed("load"):
            self.manifest.add_weights("transformer", self.setup.dit_path)
            return self.backend.module.load_dit(
                self.setup.dit_path, dtype=self.precisions["precision"], device=self.backend.device
            )


def sample(setup: Setup, todo: list[Job], observe: Observer | None = None) -> None:
    """Sample and write the jobs; what is finished stays when it is interrupted.

    observe(job, latents (B, C, T, h, w), videos (B, T, H, W, 3) uint8) sees every job before it is written.
    """
    args = setup.args
    if args.decode_latents:
        _require_latents(todo)
    backend = options.select_backend(args)
    wanted = {"precision": "bf16", "text_encoder_precision": "fp16", "vae_precision": "fp16"}
    precisions = {name: backend.precision(getattr(args, name), accelerated) for name, accelerated in wanted.items()}
    manifest = Manifest(run_path(setup.folder, setup.rank), "sample", args, backend, **precisions)
    run = Run(setup, backend, manifest, precisions, observe)
    try:
        kept = [job for job in todo if args.decode_latents or (args.resume and _kept_latents(job))]
        fresh = [job for job in todo if job not in kept]
        split = args.save_memory or args.save_latents
        _make_latents(run, fresh, decode_at_once=not split)
        if not args.save_latents:
            _decode_latents(run, todo if split else kept)
    except KeyboardInterrupt:
        done = sum(finished(job.output, job.key) is not None for job in setup.jobs)
        print(f"interrupted: {done} of {len(setup.jobs)} prompts are finished; go on with --resume", file=sys.stderr)
        manifest.write(wait=False)
        raise
    manifest.write()


# --------------------------------------------------------------------------------------------------------------- text


def _encode_prompts(run: Run, jobs: list[Job]) -> dict[int, TextEmbeddings]:
    """Embeddings of every prompt by its index; the text encoder is loaded for this alone."""
    args, request = run.setup.args, run.setup.request
    path = args.text_encoder_name_1
    tokenizer = Tokenizer.load(path)
    with run.manifest.timed("load"):
        encoder = run.backend.module.load_text_encoder(
            path, dtype=run.precisions["text_encoder_precision"], device=run.backend.device
        )
    run.manifest.add_weights("text_encoder", path)
    if tokenizer.vocabulary_size > encoder.spec.vocab_size:
        raise OspError(
            f"{path}: the tokenizer has {tokenizer.vocabulary_size} tokens, the embedding {encoder.spec.vocab_size}: "
            "they must belong together"
        )
    positive_only = replace(request, guidance_scale=1.0, guidance_rescale=0.0)
    embeddings: dict[int, TextEmbeddings] = {}
    with run.manifest.timed("text"):
        first = None
        for job in tqdm(jobs, desc="text", unit="prompt", disable=_quiet(run)):
            if first is None:
                embeddings[job.index] = first = encode_prompt(request, job.index, encoder, tokenizer)
            else:  # the negative prompt is the same for all
                text = encode_prompt(positive_only, job.index, encoder, tokenizer)
                embeddings[job.index] = replace(text, negative=first.negative, negative_mask=first.negative_mask)
    return embeddings


# ------------------------------------------------------------------------------------------------------------ latents


def _make_latents(run: Run, jobs: list[Job], decode_at_once: bool) -> None:
    """Denoise every job; its latents are decoded at once, or kept in a file so that the transformer can go first."""
    if not jobs:
        return
    text = _encode_prompts(run, jobs)
    run.backend.release()
    conditions = _conditions(run, jobs)
    run.backend.release()
    dit = run.load_dit()
    vae = run.load_vae() if decode_at_once else None
    steps = len(run.setup.request.table.steps)
    with tqdm(total=len(jobs), desc="prompts", unit="prompt", disable=_quiet(run)) as prompts:
        for job in jobs:
            with tqdm(total=steps, desc=f"prompt {job.index}", unit="step", leave=False, disable=_quiet(run)) as bar:
                with run.manifest.timed("denoise"):
                    latents, size = _denoise(run, dit, job, text[job.index], conditions.get(job.index), bar)
            if vae is not None:
                _decode(run, vae, job, latents, size)
            else:
                _keep_latents(job, latents, size)
            prompts.update()
    del dit, vae
    run.backend.release()


def _denoise(
    run: Run, dit: Denoiser, job: Job, text: TextEmbeddings, condition, bar
) -> tuple[np.ndarray, tuple[int, int]]:
    """(latents, (height, width) in pixels) of one prompt."""
    request, channels = run.setup.request, None
    if condition is not None:
        request, channels = request.resized(condition.height, condition.width), condition.channels
    latents = denoise(
        request,
        dit,
        text,
        latent_size(request, run.setup.vae),
        PhiloxNoise(request.seed, job.index),
        condition=channels,
        observer=lambda record: bar.update(),
    )
    return latents.astype(np.float32), (request.height, request.width)


def _conditions(run: Run, jobs: list[Job]) -> dict[int, inpaint.Condition]:
    """What the inpaint transformer is shown, by prompt index; empty for text to video."""
    setup = run.setup
    if setup.condition is None:
        return {}
    if setup.request.table.flow:
        raise OspError(f"sample_method {setup.request.sample_method}: not for inpainting; use a diffusion sampler")
    vae = run.load_vae()
    with run.manifest.timed("condition"):
        return {
            job.index: inpaint.build_condition(
                inpaint.load_clips(job.condition, setup.request.num_frames),
                inpaint.condition_kind(job.condition),
                setup.request,
                setup.condition,
                vae,
                index=job.index,
                dtype=run.precisions["precision"],
            )
            for job in jobs
        }


def _keep_latents(job: Job, latents: np.ndarray, size: tuple[int, int]) -> None:
    job.latents.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.latents.with_name(f".{job.latents.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            np.savez(file, latents=latents, size=size, key=job.latents_key)
        temporary.replace(job.latents)
    finally:
        temporary.unlink(missing_ok=True)


def _kept_latents(job: Job) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Latents that an earlier phase or run kept for exactly this job."""
    if not job.latents.is_file():
        return None
    try:
        with np.load(job.latents) as kept:
            same = str(kept["key"]) == job.latents_key
            return (kept["latents"], tuple(int(n) for n in kept["size"])) if same else None
    except (OSError, ValueError, KeyError):
        return None


def _require_latents(jobs: list[Job]) -> None:
    for job in jobs:
        if _kept_latents(job) is None:
            raise OspError(
                f"no latents for prompt {job.index} in {job.latents.parent}: run with --save_latents and the same "
                "options first"
            )


# ------------------------------------------------------------------------------------------------------------- pixels


def _decode_latents(run: Run, jobs: list[Job]) -> None:
    """Decode kept latents, write the outputs and delete the latents."""
    if not jobs:
        return
    vae = run.load_vae()
    for job in tqdm(jobs, desc="decode", unit="prompt", disable=_quiet(run)):
        _decode(run, vae, job, *_kept_latents(job))
        job.latents.unlink()
    if not any(jobs[0].latents.parent.iterdir()):
        jobs[0].latents.parent.rmdir()


def _decode(run: Run, vae: VideoAutoencoder, job: Job, latents: np.ndarray, size: tuple[int, int]) -> None:
    with run.manifest.timed("decode"):
        videos_BTHWC = decode(vae, latents, run.setup.request.num_frames, *size)
    if run.observe is not None:
        run.observe(job, latents, videos_BTHWC)
    _write(run, job, videos_BTHWC)


def _write(run: Run, job: Job, videos_BTHWC: np.ndarray) -> None:
    """Write a prompt's samples, their grid and the entry that marks it as finished."""
    args, several = run.setup.args, len(videos_BTHWC) > 1
    files = []
    if several:
        for i, video_THWC in enumerate(videos_BTHWC):
            files.append(_write_clip(_sample_path(job, i), video_THWC, args.fps))
    whole = image_grid(videos_BTHWC[:, 0])[None] if videos_BTHWC.shape[1] == 1 else video_grid(videos_BTHWC)
    files.append(_write_clip(job.output, whole if several else videos_BTHWC[0], args.fps))
    facts = {"index": job.index, "prompt": job.prompt, "seed": args.seed, "samples": len(videos_BTHWC)}
    facts |= {"backend": run.backend.name, "device": run.backend.device, **run.precisions}
    run.manifest.add_output(finish(job.output, job.key, files, facts))


def _sample_path(job: Job, i: int) -> Path:
    return job.output.with_name(f"{job.output.stem}_i{i}{job.output.suffix}")


def _write_clip(path: Path, frames_THWC: np.ndarray, fps: int) -> Path:
    return write_image(path, frames_THWC[0]) if path.suffix == ".jpg" else write_video(path, frames_THWC, fps)


# ----------------------------------------------------------------------------------------------------------- overview


def write_overview(setup: Setup, fresh: bool) -> None:
    """The grid of all prompts, by whichever process finds that all of them are finished.

    It is made from the written files, so that resumed runs and several processes give it too. fresh: anything new was
    sampled; otherwise an overview that is there is kept.
    """
    request, jobs = setup.request, setup.all_jobs
    suffix = jobs[0].output.suffix
    name = sample_name(request.sample_method, request.guidance_scale, request.num_sampling_steps, suffix)
    path = setup.folder / name
    if (path.is_file() and not fresh) or not all(finished(job.output, job.key) for job in jobs):
        return
    samples = request.num_samples_per_prompt
    clips = [_sample_path(job, i) if samples > 1 else job.output for job in jobs for i in range(samples)]
    if len(clips) > OVERVIEW_LIMIT:
        print(f"note: no grid of all prompts: {len(clips)} samples are more than {OVERVIEW_LIMIT}")
        return
    if suffix == ".jpg":
        pictures = [read_image(clip) for clip in clips]
        if len({p.shape for p in pictures}) == 1:
            write_image(path, image_grid(np.stack(pictures)))
    elif len({(info.height, info.width) for info in map(probe, clips)}) == 1:
        write_video(path, _grid_frames(clips, request.num_frames), setup.args.fps)
    if path.is_file():
        print(path)


def _grid_frames(clips: list[Path], frames: int) -> Iterator[np.ndarray]:
    """Frames of the grid, one at a time: memory does not grow with the length of the clips."""
    readers = [read_frames(clip, range(frames)) for clip in clips]
    for pictures in zip(*readers, strict=True):
        yield video_grid(np.stack(pictures)[:, None])[0]


def _quiet(run: Run) -> bool:
    """One process shows progress."""
    return run.setup.rank != 0
