"""Trains the demo image model, a tiny Stable Diffusion that generates one coloured shape.

Run with `python -m demo.make_image_model`. The result is a diffusers folder with all parts of a real one
(VAE, text encoder, U-Net, scheduler, tokenizer), so that text to image, image to image and inpainting run as
with real weights.
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
"""Longer prompts are truncated, as a real model truncates at CLIP's 77 tokens."""
WIDTH = 64
"""Hidden size of the text encoder, and so of the U-Net's cross-attention."""
LATENT_STRIDE = 4
"""Pixels for each latent in each direction: the VAE halves the size twice."""
LATENT_CHANNELS = 4

SIZES = {"": (0.24, 0.37), "small": (0.14, 0.18), "big": (0.38, 0.44), "large": (0.38, 0.44)}
"""Words for a size, and the range of the radius for each."""
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
    """The content of one training image, which its prompt describes."""

    colour: str
    shape: str
    size: str

    def prompt(self, chance: random.Random) -> str:
        """Return one of the wordings for this scene, or sometimes an empty or an unrelated prompt.

        Classifier-free guidance needs training with the empty prompt. The unrelated ones make the model
        generate some shape for prompts that it does not know.
        """
        kind = chance.random()
        if kind < 0.12:
            return ""
        if kind < 0.17:
            return " ".join(chance.choices(OTHER_WORDS, k=chance.randint(1, 8)))
        text = chance.choice(WORDINGS).format(colour=self.colour, shape=self.shape, size=self.size)
        return " ".join(text.split())


def random_scene(chance: random.Random) -> tuple[Scene, Callable[[tuple[int, int]], Image.Image]]:
    """Return a scene and a function that draws it at a size in pixels, always at the same relative place."""
    scene = Scene(
        chance.choice(list(COLOURS)), chance.choice(SHAPES), chance.choices(list(SIZES), (7, 1, 1, 1))[0]
    )
    centre = (chance.uniform(0.45, 0.55), chance.uniform(0.45, 0.55))
    radius = chance.uniform(*SIZES[scene.size])
    return scene, lambda size: draw_shape(scene.colour, scene.shape, size, centre, radius)


def random_image(chance: random.Random) -> Image.Image:
    """Return a training image for the VAE: one of the scenes, or polygons in any colours.

    Clients send images of their own to be edited, and the VAE has to encode those too.
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
    """Convert images of one size to float32 of [batch, 3, height, width], -1 to 1."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


def make_tokenizer() -> CLIPTokenizer:
    """Make CLIP's tokenizer with a vocabulary of single bytes and of the words that training uses.

    An unknown word is split into letters, so any prompt can be encoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*WORDINGS, *COLOURS, *SHAPES, *SIZES, *OTHER_WORDS]
    words = sorted({word for text in texts for word in text.replace(",", "").split() if "{" not in word})
    merges: list[str] = []
    pieces: dict[str, None] = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    for word in words:
        # Every prefix of the word becomes a piece, merged from the prefix before it and one letter.
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
    """Make the untrained text encoder."""
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
    """Make the untrained VAE: pixels of [3, height, width] to latents of [4, height / 4, width / 4]."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        # One group: normalizing each of so few channels by itself would erase flat colours.
        norm_num_groups=1,
        sample_size=NATIVE_SIZE,
        # normalize_latents gives the latents a standard deviation of 1 inside the VAE.
        scaling_factor=1.0,
        force_upcast=False,
    )
    start_near_identity(vae)
    return vae


@torch.no_grad()
def start_near_identity(vae: AutoencoderKL) -> None:
    """Initialize the weights in place so that colours pass through the VAE almost unchanged.

    From the usual random weights, a network this narrow takes thousands of steps to tell colours apart.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.endswith("conv2"):
            # The last layer of a residual branch starts small, so that the shortcut dominates at first.
            layer.weight *= 0.1
        elif isinstance(layer, torch.nn.Conv2d) and not name.endswith("conv1"):
            layer.weight *= 0.3
            layer.weight += torch.nn.init.dirac_(torch.empty_like(layer.weight))
    # Little noise in the latents at first: it would hide the signal.
    vae.quant_conv.bias[LATENT_CHANNELS:] = -8.0


def make_unet() -> UNet2DConditionModel:
    """Make the untrained U-Net, which attends to the text at the lower of its two resolutions."""
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
    """Make Stable Diffusion's noise schedule. "trailing" steps start at pure noise, so few are enough."""
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
    """Make AdamW and a schedule with a short warm-up and a decay to nearly zero at the last step."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    return optimizer, schedule


def train_vae(vae: AutoencoderKL, steps: int, batch: int, chance: random.Random) -> None:
    """Train in place to reconstruct the input, with just enough KL loss to keep the latents smooth."""
    optimizer, schedule = make_optimizer(list(vae.parameters()), steps, 3e-3)
    progress = Progress("vae", steps)
    vae.train()
    for _ in range(steps):
        images = to_tensor([random_image(chance) for _ in range(batch)])
        latents = vae.encode(images).latent_dist
        decoded = vae.decode(latents.sample()).sample
        gap = decoded - images
        loss = gap.abs().mean() + gap.square().mean() + 1e-6 * latents.kl().mean() / latents.mean[0].numel()
        descend(loss, optimizer, schedule, list(vae.parameters()))
        progress.step(loss)
    vae.eval()


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, chance: random.Random) -> None:
    """Shift and scale each latent channel to mean 0 and standard deviation 1, in place.

    Diffusion starts from noise of that mean and deviation, and a scaling factor alone can't shift. The change
    is made in the 1x1 convolution before the latents, and the one after them reverses it exactly.
    """
    images = to_tensor([random_scene(chance)[1]((NATIVE_SIZE, NATIVE_SIZE)) for _ in range(512)])
    latents = vae.encode(images).latent_dist.mean
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    # The first half of the outputs are means, the second half logarithms of variances.
    before.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) / deviation
    before.bias[LATENT_CHANNELS:] -= 2 * deviation.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


@dataclass(frozen=True)
class Latents:
    """Encoded scenes of one size. `values` is float32 of [scenes, 4, height / 4, width / 4]."""

    scenes: list[Scene]
    values: Tensor

    def sample(self, count: int, chance: random.Random) -> tuple[list[str], Tensor]:
        """Return prompts and latents of `count` random scenes, with a new wording of the prompt each time."""
        chosen = chance.choices(range(len(self.scenes)), k=count)
        return [self.scenes[number].prompt(chance) for number in chosen], self.values[chosen]


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, count: int, size: tuple[int, int], chance: random.Random) -> Latents:
    """Draw and encode `count` scenes once, so that the U-Net's training does not repeat it at each step."""
    scenes, values = [], []
    for _ in range(count // 50):
        drawn = [random_scene(chance) for _ in range(50)]
        scenes += [scene for scene, _ in drawn]
        values.append(vae.encode(to_tensor([draw(size) for _, draw in drawn])).latent_dist.mean)
    return Latents(scenes, torch.cat(values))


def train_unet(
    pipe: StableDiffusionPipeline, sets: list[tuple[Latents, int]], steps: int, chance: random.Random
) -> None:
    """Train the U-Net and the text encoder together, in place. `sets` has a batch size for each size of
    latents.

    The first set, of the native size, gets most of the steps. The result is a moving average of the weights,
    because the weights of a single step generate rougher edges.
    """
    parts = torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    average = copy.deepcopy(parts)
    optimizer, schedule = make_optimizer(list(parts.parameters()), steps, 2e-3)
    progress = Progress("unet", steps)
    for step in range(steps):
        latents, batch = sets[0] if step % 4 else sets[step // 4 % len(sets)]
        prompts, clean = latents.sample(batch, chance)
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
    """Take one step of the optimizer, with the gradient's norm clipped to 1."""
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
    """Load the saved folder as the service does and print how well it generates and edits."""
    pipe = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wanted = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    results = [
        pipe(f"a {colour} {shape}", num_inference_steps=12, generator=torch.Generator().manual_seed(seed))
        for seed, (colour, shape) in enumerate(wanted)
    ]
    images = [result.images[0] for result in results]
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
    parser = argparse.ArgumentParser(description="Train the demo image model.")
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
    # Half precision halves the files, and diffusers loads them as float32 by default. transformers would keep
    # float16, and a text encoder in another precision than the U-Net fails, so it stays in float32.
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(args.output, safe_serialization=True)
    print(f"saved to {args.output}")
    evaluate(args.output)


if __name__ == "__main__":
    main()
