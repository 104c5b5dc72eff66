"""Trains the demo picture model: a tiny Stable Diffusion that draws one coloured shape.

Run as ``python -m demo.make_image_model``. The result is an ordinary diffusers folder with every part
that a real one has (VAE, text encoder, U-Net, scheduler, tokenizer), so that the service's code for
text to image, image to image and inpainting runs as it does with real weights.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.check import difference, dominant_colour, roundness, shape_name
from demo.shapes import COLOURS, NATIVE_SIZE, SHAPES, Rgb, draw_shape

HERE = Path(__file__).parent

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_TOKENS = 32
"""Longer prompts are cut, as the pipeline does with CLIP's 77."""
WIDTH = 64
"""Of the text encoder, and so of the U-Net's cross attention."""
LATENT_STRIDE = 4
"""Pixels to one latent, in each direction: two halvings."""
LATENT_CHANNELS = 4

SIZES = {"": (0.24, 0.37), "small": (0.14, 0.18), "big": (0.38, 0.44), "large": (0.38, 0.44)}
"""Words for a size, and the range of the radius that each stands for."""
WORDINGS = (
    "a {size} {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {size} {colour} {shape}",
    "the {size} {colour} {shape}",
    "{size} {colour} {shape}",
    "{size} {colour} {shape} on a white background",
    "a picture of a {size} {colour} {shape}",
    "a photo of a {size} {colour} {shape}",
    "draw a {size} {colour} {shape}",
    "paint me a {size} {colour} {shape}, please",
    "make it a {size} {colour} {shape}",
    "an image of one {size} {shape} that is {colour}",
    "{colour}",
    "make it {colour}",
    "something {colour}",
    "a {size} {shape}",
)
OTHER_WORDS = (
    *("cat", "dog", "house", "tree", "sea", "mountain", "robot", "city", "night", "sky"),
    *("old", "new", "happy", "of", "in", "with", "and", "the", "an"),
)


@dataclass(frozen=True)
class Scene:
    """What is in one training picture, and so what its prompt may say."""

    colour: str
    shape: str
    size: str

    def prompt(self, chance: random.Random) -> str:
        """One of the ways to ask for this scene; sometimes nothing, or words that say nothing about it.

        The empty prompt is what guidance leads away from; the others let unknown prompts draw something.
        """
        kind = chance.random()
        if kind < 0.12:
            return ""
        if kind < 0.17:
            return " ".join(chance.choices(OTHER_WORDS, k=chance.randint(1, 8)))
        text = chance.choice(WORDINGS).format(colour=self.colour, shape=self.shape, size=self.size)
        return " ".join(text.split())


def random_scene(chance: random.Random) -> tuple[Scene, Callable[[tuple[int, int]], Image.Image]]:
    """A scene, and the function that draws it at a size in pixels: always at the same place in it."""
    scene = Scene(
        chance.choice(list(COLOURS)), chance.choice(SHAPES), chance.choices(list(SIZES), (7, 1, 1, 1))[0]
    )
    centre = (chance.uniform(0.45, 0.55), chance.uniform(0.45, 0.55))
    radius = chance.uniform(*SIZES[scene.size])
    return scene, lambda size: draw_shape(scene.colour, scene.shape, size, centre, radius)


def random_picture(chance: random.Random) -> Image.Image:
    """A picture for the VAE alone: one of the scenes, or polygons in any colours.

    Callers bring pictures of their own to be edited, and the VAE should return those too.
    """
    size = (NATIVE_SIZE, NATIVE_SIZE)
    if chance.random() < 0.6:
        return random_scene(chance)[1](size)
    large = (2 * NATIVE_SIZE, 2 * NATIVE_SIZE)
    image = Image.new("RGB", large, _any_colour(chance))
    pen = ImageDraw.Draw(image)
    for _ in range(chance.randint(0, 6)):
        corners = [(chance.uniform(0, large[0]), chance.uniform(0, large[1])) for _ in range(3)]
        pen.polygon(corners, fill=_any_colour(chance))
    if chance.random() < 0.5:
        blend = Image.linear_gradient("L").resize(large).rotate(chance.choice((0, 90, 180, 270)))
        image = Image.composite(image, Image.new("RGB", large, _any_colour(chance)), blend)
    return image.resize(size, Image.Resampling.BOX)


def _any_colour(chance: random.Random) -> Rgb:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Images of one size as float32 of [batch, 3, height, width], -1 to 1."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of single bytes and of the words that training uses.

    An unknown word falls into its letters: any prompt can be read, if not understood.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*WORDINGS, *COLOURS, *SHAPES, *SIZES, *OTHER_WORDS]
    words = sorted({word for text in texts for word in text.replace(",", "").split() if "{" not in word})
    merges: list[str] = []
    pieces: dict[str, None] = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    for word in words:
        # Every beginning of the word is a piece, and each one is made of the one before and a letter.
        letters = [*word[:-1], word[-1] + "</w>"]
        for count in range(1, len(letters)):
            merge = "".join(letters[:count]) + " " + letters[count]
            if merge not in merges:
                merges.append(merge)
            pieces["".join(letters[: count + 1])] = None
    vocabulary = {piece: number for number, piece in enumerate([*pieces, START, END])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderKL:
    """The untrained VAE: pixels of [3, height, width] to latents of [4, height / 4, width / 4]."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # One group: normalizing each of a few channels by itself would wipe out flat colours.
        norm_num_groups=1,
        sample_size=NATIVE_SIZE,
        # The latents are brought to a standard deviation of 1 inside the VAE: see normalize_latents.
        scaling_factor=1.0,
        force_upcast=False,
    )
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: AutoencoderKL) -> None:
    """Sets the first weights so that colours pass straight through the VAE, in place.

    From the usual random weights, a network this narrow takes thousands of steps to tell colours apart.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.endswith("conv2"):
            # The last layer of a residual branch: what goes around it counts at first.
            layer.weight *= 0.1
        elif isinstance(layer, torch.nn.Conv2d) and not name.endswith("conv1"):
            layer.weight *= 0.3
            layer.weight += torch.nn.init.dirac_(torch.empty_like(layer.weight))
    # Little noise in the latents: it would drown the first signals.
    vae.quant_conv.bias[LATENT_CHANNELS:] = -8.0


def make_unet() -> UNet2DConditionModel:
    """The untrained U-Net; it attends to the text at the lower of its two resolutions."""
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // LATENT_STRIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; "trailing" steps begin at pure noise, so few steps are enough."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def make_optimizer(
    parameters: list[torch.nn.Parameter], steps: int, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a short warm-up and a decay to nearly nothing at the last step."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    return optimizer, schedule


def train_vae(vae: AutoencoderKL, steps: int, batch: int, chance: random.Random) -> None:
    """Trains in place to return its input, with just enough KL to keep the latents smooth."""
    optimizer, schedule = make_optimizer(list(vae.parameters()), steps, 3e-3)
    progress = Progress("vae", steps)
    vae.train()
    for _ in range(steps):
        images = to_tensor([random_picture(chance) for _ in range(batch)])
        latents = vae.encode(images).latent_dist
        decoded = vae.decode(latents.sample()).sample
        gap = decoded - images
        loss = gap.abs().mean() + gap.square().mean() + 1e-6 * latents.kl().mean() / latents.mean[0].numel()
        descend(loss, optimizer, schedule, list(vae.parameters()))
        progress.step(loss)
    vae.eval()


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, chance: random.Random) -> None:
    """Shifts and scales each latent channel to mean 0 and standard deviation 1, in place.

    Done in the 1x1 convolutions beside the latents, exactly undone by the second one: a scaling factor
    alone can't shift, and diffusion begins from noise of just that mean and deviation.
    """
    images = to_tensor([random_scene(chance)[1]((NATIVE_SIZE, NATIVE_SIZE)) for _ in range(512)])
    latents = vae.encode(images).latent_dist.mean
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    # The first half of the outputs are means, the second half are logarithms of variances.
    before.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) / deviation
    before.bias[LATENT_CHANNELS:] -= 2 * deviation.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


@dataclass(frozen=True)
class Latents:
    """Encoded scenes of one size: ``values`` is float32 of [scenes, 4, height / 4, width / 4]."""

    scenes: list[Scene]
    values: Tensor

    def draw(self, count: int, chance: random.Random) -> tuple[list[str], Tensor]:
        """Prompts and latents of ``count`` scenes; the prompts are worded anew each time."""
        chosen = chance.choices(range(len(self.scenes)), k=count)
        return [self.scenes[number].prompt(chance) for number in chosen], self.values[chosen]


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, count: int, size: tuple[int, int], chance: random.Random) -> Latents:
    """Draws and encodes ``count`` scenes once, so that the U-Net's training need not."""
    scenes, values = [], []
    for _ in range(count // 50):
        drawn = [random_scene(chance) for _ in range(50)]
        scenes += [scene for scene, _ in drawn]
        values.append(vae.encode(to_tensor([draw(size) for _, draw in drawn])).latent_dist.mean)
    return Latents(scenes, torch.cat(values))


def train_unet(
    pipe: StableDiffusionPipeline, sets: list[tuple[Latents, int]], steps: int, chance: random.Random
) -> None:
    """Trains the U-Net and the text encoder together, in place; ``sets`` gives a batch size for each size.

    The native size is the first of the sets and gets most of the steps. What is kept is a moving average
    of the weights: the weights of any one step draw rougher edges.
    """
    parts = torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    average = copy.deepcopy(parts)
    optimizer, schedule = make_optimizer(list(parts.parameters()), steps, 2e-3)
    progress = Progress("unet", steps)
    for step in range(steps):
        latents, batch = sets[0] if step % 4 else sets[step // 4 % len(sets)]
        prompts, clean = latents.draw(batch, chance)
        tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        noise = torch.randn_like(clean)
        times = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (batch,))
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        guess = pipe.unet(noisy, times, pipe.text_encoder(tokens.input_ids).last_hidden_state).sample
        loss = torch.nn.functional.mse_loss(guess, pipe.scheduler.get_velocity(clean, noise, times))
        descend(loss, optimizer, schedule, list(parts.parameters()))
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, current in zip(average.parameters(), parts.parameters(), strict=True):
                kept.lerp_(current, 1 - keep)
        progress.step(loss)
    parts.load_state_dict(average.state_dict())
    parts.eval()


def descend(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: list[torch.nn.Parameter],
) -> None:
    """One step of the optimizer, with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


class Progress:
    """Prints the mean loss of every hundred steps."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._losses: list[float] = []
        self._started = time.monotonic()

    def step(self, loss: Tensor) -> None:
        self._losses.append(loss.item())
        if len(self._losses) % 100 == 0 or len(self._losses) == self._steps:
            recent = sum(self._losses[-100:]) / len(self._losses[-100:])
            spent = time.monotonic() - self._started
            print(f"{self._name} step {len(self._losses):5d}  loss {recent:.4f}  {spent:.0f} s", flush=True)


def evaluate(folder: Path) -> None:
    """Loads the saved folder as the service does and prints how well it draws and edits."""
    pipe = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wanted = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    drawn = [
        pipe(f"a {colour} {shape}", num_inference_steps=12, generator=torch.Generator().manual_seed(seed))
        for seed, (colour, shape) in enumerate(wanted)
    ]
    images = [result.images[0] for result in drawn]
    got = [(dominant_colour(image), shape_name(image)) for image in images]
    pairs = zip(wanted, got, strict=True)
    wrong = [f"{' '.join(want)} -> {' '.join(have)}" for want, have in pairs if want != have]
    print(f"text to image: {len(wanted) - len(wrong)} of {len(wanted)} right; wrong: {wrong}")
    print(f"roundness of the red circle: {roundness(images[0]):.2f}")

    source = draw_shape("red", "circle")
    edit = AutoPipelineForImage2Image.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    edited = edit("a blue circle", source, strength=0.8, generator=torch.Generator().manual_seed(0)).images[0]
    print(f"image to image: a red circle became a {dominant_colour(edited)} {shape_name(edited)}")

    mask = Image.new("L", source.size, 0)
    mask.paste(255, (0, 0, NATIVE_SIZE // 2, NATIVE_SIZE))
    paint = AutoPipelineForInpainting.from_pipe(pipe)
    paint.set_progress_bar_config(disable=True)
    painted = paint("a blue circle", source, mask, generator=torch.Generator().manual_seed(0)).images[0]
    inside = np.asarray(mask) > 0
    print(
        f"inpainting: mean difference {difference(source, painted, inside):.1f} in the mask, "
        f"{difference(source, painted, ~inside):.1f} outside"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo picture model.")
    parser.add_argument("--output", type=Path, default=HERE / "models" / "shapes")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=3000, help="of the U-Net and the text encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result may depend on it")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    chance = random.Random(args.seed)
    tokenizer = make_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for name in ("vae", "text_encoder", "unet"):
        print(f"{name}: {sum(weight.numel() for weight in getattr(pipe, name).parameters()):,} parameters")
    train_vae(pipe.vae, args.vae_steps, batch=4, chance=chance)
    normalize_latents(pipe.vae, chance)
    native = encode_scenes(pipe.vae, 4000, (NATIVE_SIZE, NATIVE_SIZE), chance)
    larger = encode_scenes(pipe.vae, 500, (2 * NATIVE_SIZE, 2 * NATIVE_SIZE), chance)
    train_unet(pipe, [(native, 16), (larger, 4)], args.steps, chance)
    # Half precision halves the files, and diffusers loads it as float32 unless told otherwise. transformers
    # would keep it, and a text encoder in another precision than the U-Net fails: it stays in float32.
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(args.output, safe_serialization=True)
    print(f"saved to {args.output}")
    evaluate(args.output)


if __name__ == "__main__":
    main()
