"""Generate images from a checkpoint (REG, arXiv 2507.01467; sampling after SiT, arXiv 2401.08740).

    accelerate launch generate.py --ckpt CHECKPOINT --num-fid-samples 50000

An image's noise and label come from the seed and the image's number alone, so the images do not depend on the number
of processes, and an interrupted folder is completed by the same command. SAMPLE_DIR/NAME/ holds images/, samples.npz
(arr_0, as evaluators read it), grid.png and samples.json.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from devices import AUTO, batch_size, check_batch_size, largest_batch, patient_processes, to_host
from evaluations.coherence_report import CoherenceReport
from evaluations.npz import write_npz
from files import InputError, atomic_write, read_json, run_cli, write_json
from models.autoencoder import Codec, LatentFormat, load_codec
from models.checkpoint import build_model, is_legacy, load_checkpoint
from models.inference import NETWORK_DTYPES, CudaGraphs, compile_blocks, convert
from models.interpolant import PATHS, Interpolant
from models.sit import PATCH_SIZES, PRESETS, SiT
from pictures import image_grid, save_png
from samplers import MODES, SOLVERS, Guidance, derive_seed, sample_images

LABEL_STREAM = 2  # keeps the draw of an image's label apart from its noise, whose key is (seed, number)
GRID_ROWS, GRID_COLUMNS = 8, 12  # at most; of balanced labels, a column a class where there is room
WRITER_THREADS = 4
LARGEST_BATCH = 256  # that --per-proc-batch-size auto tries: more makes no GPU faster
CPU_BATCH = 8
PUBLISHED_VAES = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}
# What may differ when an interrupted folder is completed: none of it changes an image.
MAY_CHANGE = {
    "sample_dir", "name", "per_proc_batch_size", "num_fid_samples", "device", "local_rank", "npz", "fused_attn",
    "coherence", "enc_weights",
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings; names and meanings of the published flags are kept."""
    parser = argparse.ArgumentParser(description="Generate images from a checkpoint.", allow_abbrev=False)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("files").add_argument
    add("--ckpt", required=True, help="checkpoint, of this or of the published code")
    add("--weights", default="ema", choices=["ema", "model"], help="which weights of it (%(default)s)")
    add("--sample-dir", default="samples", help="folder of all sets of samples (%(default)s)")
    add("--name", help="folder of this set in --sample-dir; default: made of the settings")
    add("--npz", action=switch, default=True, help="also write samples.npz")
    add("--save-cls", action=switch, default=False, help="also write the generated class tokens, cls_tokens.npy (N, D)")
    add("--coherence", help="training data: also write how well class tokens agree with their images, coherence.json")
    add("--enc-weights", help="weights file of the encoder that --coherence asks; default: the run's")

    add = parser.add_argument_group("what to generate").add_argument
    add("--num-fid-samples", type=int, default=50_000, help="number of images (%(default)s)")
    add(
        "--label-sampling", default="random", choices=["random", "balanced"], help="how labels are chosen (%(default)s)"
    )
    add("--classes", help="only these classes, comma-separated; default: all")
    add("--global-seed", type=int, default=0, help="of noise and labels (%(default)s)")

    add = parser.add_argument_group("sampler").add_argument
    add("--mode", default="sde", choices=MODES, help="SDE (Euler-Maruyama) or ODE (%(default)s)")
    add("--num-steps", type=int, default=250, help="steps of the solver (%(default)s)")
    add("--solver", default="euler", choices=SOLVERS, help="of the ODE; dopri5 chooses its steps itself (%(default)s)")
    add("--heun", action=switch, default=False, help="the same as --solver heun")
    add("--cfg-scale", type=float, default=1.0, help="guidance of the image; 1: none (%(default)s)")
    add("--cls-cfg-scale", type=float, help="guidance of the class token; 0: none; default: as --cfg-scale")
    add("--guidance-low", type=float, default=0.0, help="guidance from this time on, 0 is data (%(default)s)")
    add("--guidance-high", type=float, default=1.0, help="guidance up to this time, 1 is noise (%(default)s)")

    add = parser.add_argument_group("machine").add_argument
    add(
        "--per-proc-batch-size",
        type=batch_size,
        default=32,
        help="images at a time on each process (%(default)s); auto: as many as the GPU's memory holds",
    )
    add("--mixed-precision", default="no", choices=["no", "fp16", "bf16"], help="autocast of the network (%(default)s)")
    add(
        "--network-dtype",
        default="float32",
        choices=NETWORK_DTYPES,
        help="the network's weights and arithmetic; the sampler's state is float64 (%(default)s)",
    )
    add("--compile", action=switch, default=False, help="compile the network's blocks; takes a minute at first")
    add("--cuda-graphs", action=switch, default=False, help="replay network calls as CUDA graphs: for small batches")
    add("--tf32", action=switch, default=True, help="TF32 in matrix products of CUDA")
    add("--fused-attn", action=switch, default=True, help="attention through scaled_dot_product_attention")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where; auto: CUDA if there is one")
    add("--local-rank", type=int, help="index of the process on its machine, as old launchers pass it; picks its GPU")

    add = parser.add_argument_group("known from the checkpoint; given, they are checked against it").add_argument
    add("--model", help="SiT-XL/2 and so on")
    add("--num-classes", type=int, help="number of classes")
    add("--encoder-depth", type=int, help="the block the projectors read after")
    add("--resolution", type=int, help="image size in px")
    add("--qk-norm", action=switch, help="LayerNorm on queries and keys")
    add("--projector-embed-dims", help="widths of the aligned encoders, comma-separated")
    add("--cls", type=int, help="width of the class token; 0: no class slot")
    add("--path-type", choices=PATHS, help="path between data and noise")
    add("--legacy", action=switch, help="the older REPA layout")
    add(
        "--vae",
        help="codec that decodes, or ema, mse for Stable Diffusion's; default: the latents' own (for these, ema)",
    )
    args = parser.parse_args(argv)
    _check_args(args)
    return args


def _check_args(args: argparse.Namespace) -> None:
    check_batch_size("--per-proc-batch-size", args.per_proc_batch_size)
    for name in ("num_fid_samples", "num_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or greater")
    if args.global_seed < 0:
        raise InputError(f"--global-seed {args.global_seed}: must be 0 or greater")
    if args.guidance_low > args.guidance_high:
        raise InputError(f"--guidance-low {args.guidance_low} is above --guidance-high {args.guidance_high}")
    if args.heun and args.solver == "dopri5":
        raise InputError("--heun contradicts --solver dopri5")
    args.solver = "heun" if args.heun else args.solver
    args.save_cls = args.save_cls or args.coherence is not None
    if args.mode == "sde" and args.solver != "euler":
        raise InputError(f"--solver {args.solver} is a solver of the ODE; add --mode ode")
    if args.cls_cfg_scale is None:
        args.cls_cfg_scale = args.cfg_scale
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; allowed here: cpu, auto")
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    for name, full in (("mixed_precision", "no"), ("network_dtype", "float32")):
        if getattr(args, name) == "fp16" and not on_cuda:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} fp16 needs a CUDA device; allowed on the CPU: {full}, bf16")
    if args.cuda_graphs and not on_cuda:
        raise InputError("--cuda-graphs needs a CUDA device")
    if args.mixed_precision != "no" and (args.network_dtype != "float32" or args.cuda_graphs):
        other = "--cuda-graphs" if args.cuda_graphs else f"--network-dtype {args.network_dtype}"
        raise InputError(f"--mixed-precision {args.mixed_precision} does not go with {other}; allowed with it: no")


def main() -> None:
    """Generate as the command line says."""
    args = parse_args()
    if args.local_rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(args.local_rank)
    accelerator = Accelerator(
        cpu=args.device == "cpu", mixed_precision=args.mixed_precision, kwargs_handlers=[patient_processes()]
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32

    checkpoint = load_checkpoint(args.ckpt)
    model = build_model(checkpoint, args.weights, accelerator.device, args.fused_attn, source=args.ckpt)
    saved = vars(checkpoint["args"]) if "args" in checkpoint else {}
    latent_format = LatentFormat.from_json(saved.get("codec"))
    args.path_type = args.path_type or saved.get("path_type", "linear")
    check_against_checkpoint(args, checkpoint, model, latent_format)
    codec = load_decoder(args, latent_format, accelerator.device)
    coherence = None
    if args.coherence is not None:
        coherence = CoherenceReport(checkpoint, args.coherence, args.enc_weights, accelerator.device, args.ckpt)

    convert(model, NETWORK_DTYPES[args.network_dtype])
    if args.per_proc_batch_size == AUTO:
        args.per_proc_batch_size = find_batch_size(args, accelerator, model, codec)
    folder = Path(args.sample_dir) / (args.name or default_name(args, checkpoint))
    labels = image_labels(args, model.num_classes)
    settings = {**vars(args), "steps": checkpoint.get("steps"), "checkpoint_bytes": Path(args.ckpt).stat().st_size}
    check_folder(folder, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(folder / "samples.json", settings)
    generate(args, accelerator, model, codec, labels, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(args, folder, labels)
        if coherence is not None:
            tokens = np.load(folder / "cls_tokens.npy", allow_pickle=False)
            images = [image_path(folder, number) for number in range(args.num_fid_samples)]
            write_json(folder / "coherence.json", coherence(images, tokens, labels))
        print(folder / "samples.npz" if args.npz else folder / "images")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def generate(
    args: argparse.Namespace, accelerator: Accelerator, model: SiT, codec: Codec, labels: list[int], folder: Path
) -> None:
    """Write the images that are not there yet. Batches are the same for any number of processes; each takes its own.

    While a batch is sampled, the images of the one before are copied, compressed and written.
    """
    interpolant = Interpolant(args.path_type)
    guidance = Guidance(args.cfg_scale, args.cls_cfg_scale, args.guidance_low, args.guidance_high)
    if args.compile:
        compile_blocks(model)
    network = CudaGraphs(model) if args.cuda_graphs else model
    # A smaller last batch would be compiled or captured for a single use: it is filled up.
    rows = args.per_proc_batch_size if args.compile or args.cuda_graphs else 1
    batches = missing_batches(args, folder)
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
                    [derive_seed(args.global_seed, number) for number in drawn],
                    interpolant,
                    guidance,
                    args.mode,
                    args.solver,
                    args.num_steps,
                    network=network,
                )
            images = to_host(codec.decode(latents[: len(numbers)].float()))
            bar.update(sum(future.result() for future in writing))  # of the batch before
            writing = [pool.submit(write_image, folder, images, row, number) for row, number in enumerate(numbers)]
            if args.save_cls:
                writing.append(pool.submit(write_cls, folder, to_host(cls_tokens[: len(numbers)].float()), numbers))
        bar.update(sum(future.result() for future in writing))


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


def write_image(folder: Path, images: Callable[[], np.ndarray], row: int, number: int) -> int:
    """Write image `number`, which is `row` of the images that are arriving; return 1, the images written."""
    save_png(image_path(folder, number), Image.fromarray(images()[row].transpose(1, 2, 0)))
    return 1


def write_cls(folder: Path, cls_tokens: Callable[[], np.ndarray], numbers: range) -> int:
    """Write the class tokens of a batch; return 0, the images written."""
    with atomic_write(cls_part(folder, numbers)) as file:
        np.save(file, cls_tokens())
    return 0


def image_labels(args: argparse.Namespace, num_classes: int) -> list[int]:
    """Return the label of each image: by its number alone, so that more images do not change the first ones."""
    pool = list(range(num_classes))
    if args.classes:
        try:
            pool = [int(text) for text in args.classes.split(",")]
        except ValueError as error:
            raise InputError(f"--classes {args.classes}: expected whole numbers, comma-separated") from error
        if outside := [label for label in pool if not 0 <= label < num_classes]:
            raise InputError(f"--classes {outside[0]}: the checkpoint has classes 0 .. {num_classes - 1}")
    numbers = range(args.num_fid_samples)
    if args.label_sampling == "balanced":
        return [pool[number % len(pool)] for number in numbers]
    return [pool[derive_seed(args.global_seed, LABEL_STREAM, number) % len(pool)] for number in numbers]


def missing_batches(args: argparse.Namespace, folder: Path) -> list[range]:
    """Return the batches, as image numbers, of which anything is not on the disk yet."""
    size, total = args.per_proc_batch_size, args.num_fid_samples
    batches = [range(first, min(first + size, total)) for first in range(0, total, size)]

    def complete(numbers: range) -> bool:
        has_cls = not args.save_cls or cls_part(folder, numbers).exists() or (folder / "cls_tokens.npy").exists()
        return has_cls and all(image_path(folder, number).exists() for number in numbers)

    return [numbers for numbers in batches if not complete(numbers)]


def image_path(folder: Path, number: int) -> Path:
    """Return where image `number` lies."""
    return folder / "images" / f"{number:06d}.png"


def cls_part(folder: Path, numbers: range) -> Path:
    """Return where the class tokens of a batch lie until all are there."""
    return folder / "cls" / f"{numbers.start:06d}-{numbers.stop:06d}.npy"


def check_against_checkpoint(
    args: argparse.Namespace, checkpoint: dict[str, Any], model: SiT, latent_format: LatentFormat
) -> None:
    """Raise InputError, naming both values, for a flag that contradicts the checkpoint."""
    saved = checkpoint.get("args")
    shape = (len(model.blocks), model.pos_embed.shape[-1])
    presets = {f"SiT-{size}/{patch}": (*PRESETS[size][:2], patch) for size in PRESETS for patch in PATCH_SIZES}
    if args.model is not None and presets.get(args.model) != (*shape, model.patch_size):
        name = getattr(saved, "model", f"depth {shape[0]}, width {shape[1]}, patch {model.patch_size}")
        raise InputError(f"--model is {args.model}, but {args.ckpt} holds {name}")
    found = {
        "num_classes": model.num_classes,
        "encoder_depth": model.encoder_depth if len(model.projectors) else None,
        "resolution": model.input_size * latent_format.factor,
        "qk_norm": isinstance(model.blocks[0].attn.q_norm, torch.nn.LayerNorm),
        "projector_embed_dims": ",".join(str(projector[-1].out_features) for projector in model.projectors),
        "cls": model.cls_token_dim or 0,
        "path_type": getattr(saved, "path_type", None),
        "legacy": is_legacy(checkpoint),
    }
    for name, value in found.items():
        given = getattr(args, name)
        if given is not None and value is not None and given != value:
            raise InputError(f"--{name.replace('_', '-')} is {given}, but {args.ckpt} has {value}")
    if args.save_cls and model.cls_token_dim is None:
        raise InputError(f"--save-cls: {args.ckpt} has no class slot")


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


def default_name(args: argparse.Namespace, checkpoint: dict[str, Any]) -> str:
    """Return a folder name made of what distinguishes sets of samples."""
    run = getattr(checkpoint.get("args"), "exp_name", None) or Path(args.ckpt).stem
    steps = "" if args.solver == "dopri5" else f"-{args.num_steps}"
    solver = args.mode if args.mode == "sde" else f"ode-{args.solver}"
    interval = f"{args.guidance_low:g}-{args.guidance_high:g}"
    guidance = f"cfg-{args.cfg_scale:g}-cls-{args.cls_cfg_scale:g}-at-{interval}" if args.cfg_scale > 1 else "no-cfg"
    weights = f"{run}-{checkpoint.get('steps', 0):07d}-{args.weights}"
    return f"{weights}-{solver}{steps}-{guidance}-{args.label_sampling}-labels-seed-{args.global_seed}"


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise InputError, naming both values, if the folder holds images of other settings."""
    if not (folder / "samples.json").exists():
        if (folder / "images").exists():
            raise InputError(f"{folder} holds images but no samples.json; choose another --name")
        return
    for name, value in read_json(folder / "samples.json").items():
        if name not in MAY_CHANGE and settings.get(name) != value:
            raise InputError(
                f"{folder} holds images made with {name} {value}, not {settings.get(name)}; choose another --name"
            )


def finish(args: argparse.Namespace, folder: Path, labels: list[int]) -> None:
    """Write labels, grid, class tokens and the .npz of a complete set."""
    names = [image_path(folder, number).name for number in range(args.num_fid_samples)]
    listed = [[name, label] for name, label in zip(names, labels, strict=True)]
    write_json(folder / "images" / "dataset.json", {"labels": listed})
    classes = len(set(labels))
    columns = classes if args.label_sampling == "balanced" and 1 < classes <= GRID_COLUMNS else GRID_COLUMNS
    first = [np.array(Image.open(folder / "images" / name)) for name in names[: GRID_ROWS * columns]]
    save_png(folder / "grid.png", image_grid(np.stack(first), min(columns, len(first))))
    if args.save_cls:
        join_cls_tokens(folder, args.num_fid_samples)
    if args.npz:
        with ThreadPoolExecutor(WRITER_THREADS) as pool, atomic_write(folder / "samples.npz") as file:
            images = pool.map(lambda name: np.array(Image.open(folder / "images" / name)), names)
            write_npz(file, images, (len(names), *first[0].shape))


def join_cls_tokens(folder: Path, total: int) -> None:
    """Write the class tokens of all batches as one cls_tokens.npy (N, D), float32, in the order of the images."""
    rows: dict[int, np.ndarray] = {}
    joined = folder / "cls_tokens.npy"
    if joined.exists():
        rows.update(enumerate(np.load(joined, allow_pickle=False)))
    parts = sorted((folder / "cls").glob("*.npy"))
    for part in parts:
        rows.update(enumerate(np.load(part, allow_pickle=False), start=int(part.stem.split("-")[0])))
    with atomic_write(joined) as file:
        np.save(file, np.stack([rows[number] for number in range(total)]))
    shutil.rmtree(folder / "cls", ignore_errors=True)


if __name__ == "__main__":
    run_cli(main)
