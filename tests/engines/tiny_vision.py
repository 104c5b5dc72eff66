"""Tiny random models that see images, of several families, with their processors."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlavaConfig,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from protocol.jobs import ChatImage, ChatJob, SamplingParams
from tests.engines.tiny_chat import SPECIAL, VOCABULARY, make_tokenizer
from workers.engines.chat.vision.processor import load_processor, without_video

TEMPLATE = (
    "{%- for message in messages -%}<|{{- message['role'] }}|>"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
GEMMA3_TEMPLATE = TEMPLATE.replace("IMAGE", "<start_of_image>")
PARTS_ONLY = (
    "{%- for message in messages -%}<|{{- message['role'] }}|>"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- elif part['type'] == 'image' -%}IMAGE{%- endif -%}"
    "{%- endfor -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""As Idefics3's, which writes nothing of a content that is a string."""

_text = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
}
_vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_qwen: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 14,
}
_qwen |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "initializer_range": 0.2}
_mrope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


class Family:
    """How to make one family's model and processor. `tokens`: those that it adds, its image token first."""

    def __init__(self, tokens: list[str], config: Any, processor: Any, template: str = TEMPLATE) -> None:
        self.tokens, self._config, self._processor, self._template = tokens, config, processor, template

    def save(self, folder: Path) -> Path:
        torch.manual_seed(20)
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], *self.tokens]})
        # the attributes of Gemma 3's tokenizer
        names: tuple[str, ...]
        if "<start_of_image>" in self.tokens:
            names = ("image_token", "boi_token", "eoi_token")
            tokenizer._set_model_specific_special_tokens(dict(zip(names, self.tokens, strict=True)))
        # those of InternVL's
        if "<IMG_CONTEXT>" in self.tokens:
            names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
            tokenizer._set_model_specific_special_tokens(dict(zip(names, self.tokens, strict=True)))
        ids = tokenizer.convert_tokens_to_ids(self.tokens)
        image = (
            "".join(self.tokens[1:2] + self.tokens[:1] + self.tokens[2:3])
            if "vision" in self.tokens[-1]
            else self.tokens[0]
        )
        tokenizer.chat_template = self._template.replace("IMAGE", image)
        config = self._config(*ids)
        config.eos_token_id = config.text_config.eos_token_id = tokenizer.eos_token_id
        config.text_config.pad_token_id = tokenizer.eos_token_id
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for parameter in model.model.parameters():
            # projections of images that are as large as the embeddings of tokens
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        model.save_pretrained(folder)
        processor = self._processor(tokenizer)
        processor.image_processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        import json

        own = processor.to_dict()
        for name in ("tokenizer", "image_processor", "video_processor"):
            own.pop(name, None)
        (folder / "processor_config.json").write_text(json.dumps(own))
        return folder


def _llava(image: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **_vision,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
        },
        text_config={"model_type": "llama", **_text},
        image_token_index=image,
        vision_feature_layer=-1,
    )


def _llava_processor(tokenizer: Any) -> Any:
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen_config(cls: Any, vision: dict[str, Any], rope: dict[str, Any]) -> Any:
    def make(image: int, start: int, end: int) -> Any:
        return cls(
            vision_config={**_qwen, **vision},
            text_config={**_text, "rope_parameters": {**_mrope, **rope}},
            image_token_id=image,
            video_token_id=VOCABULARY - 1,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )

    return make


def _qwen_processor(cls: Any) -> Any:
    def make(tokenizer: Any) -> Any:
        images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
        return without_video(cls)(images, tokenizer, None)

    return make


def _idefics3(image: int, *others: int) -> Idefics3Config:
    vision = {**_vision, "image_size": 32, "patch_size": 8}
    return Idefics3Config(
        vision_config=vision,
        text_config={"model_type": "llama", **_text},
        image_token_id=image,
        scale_factor=2,
    )


def _idefics3_processor(tokenizer: Any) -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


_QWEN_TOKENS = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]


def _gemma3(image: int, start: int, end: int) -> Gemma3Config:
    vision = {"model_type": "siglip_vision_model", **_vision, "image_size": 56, "patch_size": 14}
    text = {**_text, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
    return Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=end,
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


def _internvl(image: int, *others: int) -> InternVLConfig:
    vision = {**_vision, "image_size": [28, 28], "patch_size": [14, 14]}
    return InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **_text}, image_token_id=image
    )


def _internvl_processor(tokenizer: Any) -> Any:
    size = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    return without_video(InternVLProcessor)(images, tokenizer, None, image_seq_length=1)


FAMILIES = {
    "llava": Family(["<image>"], _llava, _llava_processor),
    "qwen2_5_vl": Family(
        _QWEN_TOKENS,
        _qwen_config(Qwen2_5_VLConfig, {"window_size": 56, "fullatt_block_indexes": [1]}, {}),
        _qwen_processor(Qwen2_5_VLProcessor),
    ),
    "qwen3_vl": Family(
        _QWEN_TOKENS,
        _qwen_config(
            Qwen3VLConfig,
            {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            {"mrope_interleaved": True},
        ),
        _qwen_processor(Qwen3VLProcessor),
    ),
    "idefics3": Family(
        [
            "<image>",
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{r}_col_{c}>" for r in range(1, 3) for c in range(1, 3)),
        ],
        _idefics3,
        _idefics3_processor,
        PARTS_ONLY,
    ),
    "internvl": Family(["<IMG_CONTEXT>", "<img>", "</img>", "<video>"], _internvl, _internvl_processor),
}

GEMMA3 = Family(
    ["<image_soft_token>", "<start_of_image>", "<end_of_image>"], _gemma3, _gemma3_processor, GEMMA3_TEMPLATE
)
"""Not among FAMILIES: its images can't be served."""


def png(width: int = 112, height: int = 84, seed: int = 0) -> bytes:
    """Make a PNG file of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def processor_of(folder: Path, tokenizer: Any) -> Any:
    """Load a saved processor."""
    return load_processor(str(folder), AutoConfig.from_pretrained(folder), {}, tokenizer)


WORDS = ("Look: ", " and ", " What is it?")


def image_job(
    id: str, *images: bytes, detail: Any = "auto", words: tuple[str, str, str] = WORDS, **sampling: Any
) -> ChatJob:
    """Make a job with one message in which words stand before, between and after the images."""
    content: list[dict[str, Any]] = [{"type": "text", "text": words[0]}]
    for number in range(len(images)):
        content += [{"type": "image"}, {"type": "text", "text": words[1 if number < len(images) - 1 else 2]}]
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling})
    return ChatJob(
        id=id,
        model="tiny",
        messages=[{"role": "user", "content": content}],
        sampling=params,
        images=[
            ChatImage(data=data, detail=detail, param=f"messages.0.content.{2 * number + 1}")
            for number, data in enumerate(images)
        ],
    )


class Reference:
    """The whole model and its processor, as transformers has them."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = processor_of(folder, self.tokenizer)
        # rows of the embedding without a token
        self.padding = list(range(len(self.tokenizer), self.model.config.text_config.vocab_size))

    def inputs(self, job: ChatJob) -> dict[str, torch.Tensor]:
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in job.messages
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [Image.open(io.BytesIO(image.data)) for image in job.images] or None
        return dict(
            self.processor(
                text=[text],
                images=images,
                return_tensors="pt",
                add_special_tokens=False,
                return_mm_token_type_ids="Qwen" in type(self.processor).__name__,
            )
        )

    def greedy(self, job: ChatJob) -> tuple[str, int]:
        """Generate. Returns the text and the number of tokens of the prompt."""
        inputs = self.inputs(job)
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=job.sampling.max_tokens,
            eos_token_id=None,
            suppress_tokens=self.padding,
        )
        return self.tokenizer.decode(out[0, length:], skip_special_tokens=True), length
