"""The images of a call while it runs: what schedulers expect of them, and how their latents are decoded."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    PNDMScheduler,
    QwenImagePipeline,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.engines.tiny_images import make_model
from workers.engines.images.decoding import decode_latents
from workers.engines.images.pipeline import CallParams, ImageParams, ImagePipeline
from workers.engines.images.unfinished import UnfinishedImages

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""diffusers' schedulers, with NumPy 2."""


class Vae:
    """What a pipeline's VAE has, with latents as pixels. It keeps the dtypes in which it has decoded."""

    def __init__(self, dtype: torch.dtype = torch.float32, **config: Any) -> None:
        self.dtype = dtype
        self.config = SimpleNamespace(**config)
        self.seen: list[torch.dtype] = []

    def to(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        self.seen.append(latents.dtype)
        return (latents,)


class Processor:
    def postprocess(self, pixels: torch.Tensor, output_type: str) -> list[torch.Tensor]:
        return [pixels]


def pipe_with(vae: Vae, **parts: Any) -> Any:
    return SimpleNamespace(vae=vae, image_processor=Processor(), vae_scale_factor=8, **parts)


CLEAN = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def ideal(scheduler: Any, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """What a model says that knows the clean latents."""
    if isinstance(scheduler, EulerDiscreteScheduler | FlowMatchEulerDiscreteScheduler):
        # the derivative by sigma, in both
        return (sample - CLEAN) / scheduler.sigmas[scheduler.step_index or 0]
    kept = scheduler.alphas_cumprod[int(timestep)]
    noise = (sample - kept.sqrt() * CLEAN) / (1 - kept).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return kept.sqrt() * noise - (1 - kept).sqrt() * CLEAN
    return noise


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        LCMScheduler(clip_sample=False),
        EulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(),
        PNDMScheduler(skip_prk_steps=True),
        PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', '')}",
)
def test_each_step_of_an_ideal_model_shows_the_clean_latents(scheduler: Any) -> None:
    scheduler.set_timesteps(8)
    kept = torch.tensor(0.0)
    if isinstance(scheduler, EulerDiscreteScheduler):
        sample = CLEAN + scheduler.sigmas[0] * NOISE
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sample = (1 - scheduler.sigmas[0]) * CLEAN + scheduler.sigmas[0] * NOISE
    else:
        kept = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
        sample = kept.sqrt() * CLEAN + (1 - kept).sqrt() * NOISE
    with UnfinishedImages(pipe_with(Vae(), scheduler=scheduler), 64, 64) as unfinished:
        assert unfinished.image(0) is None, "before the first step"
        for timestep in scheduler.timesteps:
            output = ideal(scheduler, timestep, sample)
            (sample,) = scheduler.step(output, timestep, sample, return_dict=False)[:1]
            for row in range(2):
                seen: Any = unfinished.image(row)
                torch.testing.assert_close(seen, CLEAN[row : row + 1], atol=2e-3, rtol=2e-3)


def test_a_scheduler_that_tells_nothing_else_shows_its_latents() -> None:
    scheduler = DEISMultistepScheduler()
    scheduler.set_timesteps(4)
    with UnfinishedImages(pipe_with(Vae(), scheduler=scheduler), 64, 64) as unfinished:
        after = scheduler.step(NOISE, scheduler.timesteps[0], NOISE).prev_sample
        assert torch.equal(torch.as_tensor(unfinished.image(1)), after[1:])


def test_the_scheduler_is_as_before_after_the_call() -> None:
    scheduler = DDIMScheduler()
    with (
        pytest.raises(InterruptedError),
        UnfinishedImages(pipe_with(Vae(), scheduler=scheduler), 64, 64),
    ):
        assert "step" in vars(scheduler)
        raise InterruptedError
    assert "step" not in vars(scheduler)


GRID = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
"""Latents of an image of 48 x 32 pixels."""


def test_latents_in_rows_of_tokens_become_a_grid() -> None:
    packed = FluxPipeline._pack_latents(GRID, 1, 16, 4, 6)
    pipe = pipe_with(Vae(scaling_factor=0.5, shift_factor=0.25), _unpack_latents=FluxPipeline._unpack_latents)
    torch.testing.assert_close(torch.as_tensor(decode_latents(pipe, packed, 48, 32)), GRID / 0.5 + 0.25)


def test_the_image_of_a_vae_for_videos_is_its_first_frame() -> None:
    packed = QwenImagePipeline._pack_latents(GRID[:, :, None], 1, 16, 4, 6)
    mean, deviation = torch.arange(16.0), torch.arange(16.0) + 1
    vae = Vae(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    pipe = pipe_with(vae, _unpack_latents=QwenImagePipeline._unpack_latents)
    expected = GRID * deviation.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    torch.testing.assert_close(torch.as_tensor(decode_latents(pipe, packed, 48, 32)), expected)


def test_latents_in_patches_are_normalized_and_become_a_grid() -> None:
    patches = Flux2Pipeline._patchify_latents(GRID)
    ids = Flux2Pipeline._prepare_latent_ids(patches)
    mean, variance = torch.arange(64.0), torch.arange(64.0) + 1
    vae = Vae(batch_norm_eps=0.5)
    vae.__dict__["bn"] = SimpleNamespace(running_mean=mean, running_var=variance)
    pipe = pipe_with(vae, _unpatchify_latents=Flux2Pipeline._unpatchify_latents)
    packed = Flux2Pipeline._pack_latents(patches)
    # as the pipeline does it at the end of a call, with the place of each token
    grid = Flux2Pipeline._unpack_latents_with_ids(packed, ids)
    scaled = torch.as_tensor(grid) * (variance + 0.5).sqrt().view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    expected = Flux2Pipeline._unpatchify_latents(scaled)
    torch.testing.assert_close(torch.as_tensor(decode_latents(pipe, packed, 48, 32)), expected)


@pytest.mark.parametrize("upcasts", [True, False])
def test_a_vae_decodes_in_float32_where_its_pipeline_does_so(upcasts: bool) -> None:
    vae = Vae(torch.float16, force_upcast=True)
    pipe = pipe_with(vae, **({"upcast_vae": None} if upcasts else {}))
    decode_latents(pipe, GRID.half(), 48, 32)
    assert vae.seen == [torch.float32 if upcasts else torch.float16]
    assert vae.dtype == torch.float16


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny untrained FLUX."""
    torch.manual_seed(0)
    tokenizer = make_model(tmp_path_factory.mktemp("flux")).tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    yield FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            shift_factor=0.1,
            scaling_factor=0.4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def test_the_last_latents_of_a_whole_pipeline_are_its_image(flux: Any) -> None:
    pipeline = ImagePipeline(flux, "text2image")
    shared = CallParams("text2image", 48, 32, 1, None, None, has_negative_prompt=False)
    pipeline.warm_up(shared, ImageParams("p", "", 7), lambda *_: None, lambda: None)
    unfinished = pipeline.unfinished(shared)
    assert unfinished is not None
    seen: list[Any] = []

    def on_step(*_: int) -> None:
        seen.append(unfinished.image(1))

    images = [ImageParams("p", "", seed) for seed in (7, 8)]
    pipeline(shared._replace(num_inference_steps=3), images, on_step, lambda: None, unfinished)
    assert [image.size for image in seen] == [(48, 32)] * 3
    flux.vae.register_to_config(shift_factor=2.0)
    pipeline.warm_up(shared, ImageParams("p", "", 7), lambda *_: None, lambda: None)
    assert pipeline.unfinished(shared) is not None, "the pipeline reads it too"
