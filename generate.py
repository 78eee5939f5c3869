"""Generate images from a checkpoint (REG, arXiv 2507.01467; sampling after SiT, arXiv 2401.08740).

    accelerate launch generate.py --ckpt CHECKPOINT --num-fid-samples 50000

An image's noise and label come from the seed and the image's number alone, so the images do not depend on the number
of processes, and an interrupted folder is completed by the same command. SAMPLE_DIR/NAME/ holds images/, samples.npz
(arr_0, as evaluators read it), grid.png and samples.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from common.cli import AUTO
from common.distributed import largest_batch, long_collective_timeout, to_host
from common.io import InputError, run_cli, write_json
from evaluations.coherence import CoherenceReport
from generation.config import check_against_checkpoint, default_name, image_labels, parse_args, warn_of_idle_scale
from generation.sample_set import DIGEST, SampleSet
from models.autoencoder import Codec, LatentFormat, load_codec
from models.checkpoint import build_model, checkpoint_digest, load_checkpoint, saved_settings, steps_done
from models.inference import NETWORK_DTYPES, CudaGraphs, compile_blocks, convert
from models.interpolant import Interpolant
from models.sit import SiT
from samplers import Guidance, image_seeds, sample_images

WRITER_THREADS = 4
LARGEST_BATCH = 256  # that --per-proc-batch-size auto tries: more makes no GPU faster
CPU_BATCH = 8
PUBLISHED_VAES = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}


def main() -> None:
    """Generate as the command line says."""
    args = parse_args()
    if args.local_rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(args.local_rank)
    accelerator = Accelerator(
        cpu=args.device == "cpu", mixed_precision=args.mixed_precision, kwargs_handlers=[long_collective_timeout()]
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32

    checkpoint = load_checkpoint(args.ckpt)
    saved = saved_settings(checkpoint, args.ckpt)
    model = build_model(checkpoint, args.weights, accelerator.device, args.fused_attn, source=args.ckpt)
    latent_format = LatentFormat.from_json(saved.get("codec"))
    args.path_type = args.path_type or saved.get("path_type", "linear")
    check_against_checkpoint(args, checkpoint, model, latent_format)
    codec = load_decoder(args, latent_format, accelerator.device)
    coherence = None
    if args.coherence is not None:
        coherence = CoherenceReport(
            checkpoint, args.coherence, args.enc_weights, accelerator.device, args.ckpt, args.num_fid_samples
        )

    folder = Path(args.sample_dir) / (args.name or default_name(args, checkpoint))
    labels = image_labels(args, model.num_classes)
    convert(model, NETWORK_DTYPES[args.network_dtype])
    if args.per_proc_batch_size == AUTO:
        args.per_proc_batch_size = find_batch_size(args, accelerator, model, codec)
    samples = SampleSet(folder, args.num_fid_samples, model.input_size * codec.format.factor)

    def prepare() -> list[range]:
        steps, digest = steps_done(checkpoint, args.ckpt), checkpoint_digest(args.ckpt)
        samples.claim({**vars(args), "steps": steps, DIGEST: digest})
        warn_of_idle_scale(args)
        return samples.missing_batches(args.per_proc_batch_size, args.save_cls)

    batches = decided_by_main(accelerator, prepare)
    generate(args, accelerator, model, codec, labels, samples, batches)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        samples.finish(labels, args.label_sampling == "balanced", args.save_cls, args.npz)
        if coherence is not None:
            samples.check_images()
            write_json(folder / "coherence.json", coherence(samples.image_paths, samples.read_cls_tokens(), labels))
        samples.release()
        print(folder / "samples.npz" if args.npz else folder / "images")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def decided_by_main(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """Return, or raise as InputError, on every process what `decide` gives on the main one.

    What is missing must be seen once: a process that looked a little later would find the others' first images.
    """
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = decide()
        except InputError as error:
            outcome = error
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list([outcome])[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def generate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: SiT,
    codec: Codec,
    labels: list[int],
    samples: SampleSet,
    batches: list[range],
) -> None:
    """Write the images of `batches`, which are the same for any number of processes; each takes its own.

    While a batch is sampled, the images of the one before are copied, compressed and written.
    """
    interpolant = Interpolant(args.path_type)
    guidance = Guidance(args.cfg_scale, args.cls_cfg_scale, args.guidance_low, args.guidance_high)
    if args.compile:
        compile_blocks(model)
    network = CudaGraphs(model) if args.cuda_graphs else model
    # A smaller last batch would be compiled or captured for a single use: it is filled up.
    rows = args.per_proc_batch_size if args.compile or args.cuda_graphs else 1
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(total=sum(map(len, mine)), unit="img", disable=not accelerator.is_main_process, desc="generating")
    with ThreadPoolExecutor(WRITER_THREADS) as pool, bar:
        writing: list[Future] = []
        for numbers in mine:
            drawn = [*numbers, *[numbers[-1]] * (rows - len(numbers))]
            with accelerator.autocast():
                latents, cls_tokens = sample_images(
                    model,
                    [labels[number] for number in drawn],
                    image_seeds(args.global_seed, drawn),
                    interpolant,
                    guidance,
                    args.mode,
                    args.solver,
                    args.num_steps,
                    network=network,
                )
            latents = latents[: len(numbers)].float()
            images = if_finite(latents, to_host(codec.decode(latents)), args.ckpt)
            bar.update(sum(future.result() for future in writing))  # of the batch before
            writing = [pool.submit(write_image, samples, images, row, number) for row, number in enumerate(numbers)]
            if args.save_cls:
                cls_tokens = cls_tokens[: len(numbers)].float()
                arriving = if_finite(cls_tokens, to_host(cls_tokens), args.ckpt)
                writing.append(pool.submit(write_cls_tokens, samples, arriving, numbers))
        bar.update(sum(future.result() for future in writing))


def if_finite(sampled: Tensor, arriving: Callable[[], np.ndarray], source: str) -> Callable[[], np.ndarray]:
    """Return `arriving`, which waits for what was made of the samples, so that it raises InputError for NaN in these.

    The samples are looked at on their device, which nobody waits for before.
    """
    finite = to_host(sampled.isfinite().all())

    def arrived() -> np.ndarray:
        if not finite():
            raise InputError(
                f"{source}: samples of it are not finite (NaN, infinity): its weights are spoilt, or overflow in fp16"
            )
        return arriving()

    return arrived


def find_batch_size(args: argparse.Namespace, accelerator: Accelerator, model: SiT, codec: Codec) -> int:
    """Return how many images at a time fit into every process's GPU, guidance and decoding included."""
    if accelerator.device.type != "cuda":
        return CPU_BATCH

    guidance = Guidance(args.cfg_scale, args.cls_cfg_scale)

    def attempt(count: int) -> None:
        network = CudaGraphs(model) if args.cuda_graphs else model
        numbers = [0] * count
        with accelerator.autocast():
            latents, _ = sample_images(model, numbers, numbers, Interpolant(), guidance, num_steps=1, network=network)
        codec.decode(latents.float())

    found = torch.tensor([largest_batch(attempt, LARGEST_BATCH)], device=accelerator.device)
    return int(accelerator.gather(found).min())


def write_image(samples: SampleSet, images: Callable[[], np.ndarray], row: int, number: int) -> int:
    """Write image `number`, which is `row` of the images that are arriving; return 1, the images written."""
    samples.write_image(number, images()[row].transpose(1, 2, 0))
    return 1


def write_cls_tokens(samples: SampleSet, cls_tokens: Callable[[], np.ndarray], numbers: range) -> int:
    """Write the class tokens of a batch; return 0, the images written."""
    samples.write_cls_tokens(numbers, cls_tokens())
    return 0


def load_decoder(args: argparse.Namespace, latent_format: LatentFormat, device: torch.device) -> Codec:
    """Return the codec that decodes, which must have the latents' channels and factor."""
    name = PUBLISHED_VAES.get(args.vae, args.vae) or latent_format.codec
    if args.vae is None and name == PUBLISHED_VAES["mse"]:
        name = PUBLISHED_VAES["ema"]
    args.vae = name
    codec = load_codec(name, device).to(memory_format=torch.channels_last)
    for what in ("channels", "factor"):
        ours, needed = getattr(codec.format, what), getattr(latent_format, what)
        if ours != needed:
            raise InputError(f"--vae {name} has {what} {ours}, but the latents of {args.ckpt} have {needed}")
    return codec


if __name__ == "__main__":
    run_cli(main)
