"""Engine options and request defaults of each kind of model. Each has its help beside its default."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


ToolFormat = Literal[
    "none", "hermes", "llama3_json", "mistral", "harmony", "gemma4", "qwen3_coder", "glm", "invoke"
]


class Table(BaseModel):
    """A table of the file; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineOptions(Table):
    """`[models.engine]`: what every kind of engine has."""

    max_batch_size: int
    dtype: Dtype = Field(
        default="auto",
        description="auto: bfloat16 on a GPU, float16 on one before compute capability 8.0, float32 on a CPU",
    )
    torch_threads: int | None


class TextEngineOptions(EngineOptions):
    """`[models.engine]` of a model for completions alone."""

    dtype: Dtype = Field(
        default="auto",
        description="of the weights. auto: bfloat16 on a GPU, float16 on one before compute capability 8.0; "
        "float32 on a CPU, or bfloat16 if the checkpoint has 16 bits, the processor has AVX512-BF16 or AMX, "
        "and a measurement at load finds it faster",
    )

    max_batch_size: int = Field(
        default=64, ge=1, le=1024, description="sequences decoded together in one step"
    )
    max_context: int | None = Field(
        default=None, ge=16, description="tokens of prompt and answer. Default: the model's own limit"
    )
    kv_cache_tokens: int | None = Field(
        default=None,
        ge=64,
        description="size of the KV cache in tokens; takes precedence over memory_fraction",
    )
    memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the GPU memory free after loading that the KV cache may take",
    )
    prefill_chunk: int | None = Field(
        default=None,
        ge=16,
        description="prompt tokens computed between two decode steps; smaller values give steadier streams. "
        "Default: 512 on a CPU, 2048 on a GPU",
    )
    prefix_cache: bool = Field(
        default=True, description="reuse the KV of finished requests for prompts with the same beginning"
    )
    num_speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=32,
        description="draft tokens by n-gram lookup, for texts that repeat their prompt: summaries, code edits; "
        "the text stays the same. 0: none",
    )
    compile: bool = Field(default=True, description="on a GPU: capture decode steps as CUDA graphs")
    torch_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of torch. Default: all cores but one on a CPU, torch's own number with a GPU. "
        "On a CPU, 2 compute the halves of each large step of Llama, Mistral and Qwen 2 and 3, which is also the "
        "default with two cores",
    )


class ChatEngineOptions(TextEngineOptions):
    """`[models.engine]` of a chat model."""

    control_tokens_in_content: bool = Field(
        default=False,
        description="encode control tokens such as `</s>` in messages as those that the chat template writes; "
        "false: as text, so that a message can't end its turn or begin another",
    )
    max_images: int = Field(
        default=8, ge=1, le=64, description="images in the messages of one request, if the model takes any"
    )
    max_image_pixels: int = Field(
        default=1_572_864,
        ge=4096,
        le=16_777_216,
        description="larger images in messages are scaled down to this width x height. While an image is computed, "
        "all streams wait",
    )
    tool_format: ToolFormat | None = Field(
        default=None,
        description="how the model writes calls of tools; `none`: it gets no tools. Default: as its chat template "
        "shows it",
    )


class ImageEngineOptions(EngineOptions):
    """`[models.engine]` of an image model."""

    max_batch_size: int = Field(
        default=4, ge=1, le=64, description="images denoised together in one pipeline call"
    )
    default_size: int | None = Field(
        default=None,
        ge=8,
        description="width and height in pixels where a request names none. Default: the pipeline's own",
    )
    max_side: int = Field(default=2048, ge=8, description="largest width or height of a request, in pixels")
    max_pixels: int = Field(default=4_194_304, ge=64, description="largest width x height of a request")
    size_multiple: int = Field(default=8, ge=1, description="width and height must be multiples of this")
    max_n: int = Field(default=10, ge=1, description="largest number of images in a request")
    max_steps: int = Field(default=100, ge=1, description="largest `step` (num_inference_steps) of a request")
    compile: bool = Field(
        default=False,
        description="on a GPU: torch.compile the denoiser (minutes at the start, faster images afterwards)",
    )
    torch_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch. Default: torch's own number"
    )


class EmbeddingEngineOptions(EngineOptions):
    """`[models.engine]` of an embedding model."""

    max_batch_size: int = Field(
        default=64, ge=1, le=1024, description="requests whose inputs are computed together"
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=64,
        description="tokens of a forward pass, with padding; a longer input has one of its own. "
        "Default: 2048 on a CPU, 32768 on a GPU",
    )
    max_context: int | None = Field(
        default=None,
        ge=16,
        description="tokens of an input. Default: max_seq_length of the model's sentence_bert_config.json, or the "
        "most that the model can have",
    )
    matryoshka: bool | None = Field(
        default=None,
        description="the first numbers of a vector are a vector too, so that requests may set `dimensions`. Default: "
        "as config.json says (is_matryoshka, matryoshka_dimensions)",
    )
    torch_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of torch. Default: all cores but one on a CPU, torch's own number with a GPU",
    )


class TextDefaults(Table):
    """`[models.defaults]` of a model for completions alone, for fields that a request leaves out.

    Where this table has no value either, the model's generation_config.json decides, then the neutral value.
    """

    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="sample from the most likely tokens that reach this probability"
    )
    top_k: int | None = Field(
        default=None, ge=0, description="sample from this many most likely tokens; 0: from all"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="drop tokens less likely than this share of the most likely one"
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=2,
        description="above 1: tokens of the prompt and the answer become less likely",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logits of tokens that the answer contains"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="the same, for each time that the answer contains the token"
    )


class ChatDefaults(TextDefaults):
    """`[models.defaults]` of a chat model, for fields that a request leaves out."""

    max_tokens: int = Field(default=2048, ge=1, description="longest answer where a request names no limit")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the model's chat template; a request's are merged in"
    )


class ImageDefaults(Table):
    """`[models.defaults]` of an image model, for fields that a request leaves out.

    Where this table has no value either, the pipeline's own defaults apply.
    """

    num_inference_steps: int | None = Field(default=None, ge=1, description="denoising steps")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="how closely the image follows the prompt"
    )
    strength: float | None = Field(
        default=None, gt=0, le=1, description="edits: how much of the given image may change"
    )
    negative_prompt: str | None = Field(default=None, description="what the image should not show")


class EmbeddingDefaults(Table):
    """`[models.defaults]` of an embedding model, for fields that a request leaves out."""

    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="cut longer inputs to this number of tokens, -1: to max_context. Default: they are refused",
    )
