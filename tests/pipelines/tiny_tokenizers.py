"""Real tokenizers and image processors, with vocabularies of a few hundred pieces, built without a download.

Every word of the pipelines' prompt templates is one token, as in the published vocabularies, so a template has the
length that its pipeline crops (34 and 64 tokens for Qwen-Image, 95 and 103 for HunyuanVideo) and what is left is the
prompt. A word that is not in `WORDS` falls apart into smaller pieces, so prompts differ in their token counts.
"""

import copy
import functools
import itertools
from collections.abc import Iterable

from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from diffusers.pipelines.qwenimage import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    T5TokenizerFast,
)

VOCABULARY = """
a an the of in on at with and two small large red green blue golden black white fox cat dog bird robot tower city
river forest mountain snow rain fog sunset night morning walking running flying sleeping jumps over under photo painting
video style light slowly softly near quiet low quality blurry watermark change make it add remove background hat to sky
"""
WORDS = tuple(VOCABULARY.split())

QWEN_SPECIAL = tuple(
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
)
LLAMA_SPECIAL = (
    *(f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")),
    "<pad>",
    "<image>",
)
# How the published tokenizer of Llama 3 splits a text: at most three digits a piece, a space goes with the word after.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pieces(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: apply the merge of the lowest rank until none applies."""
    while len(word) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(word)))
        if rank == len(ranks):
            break
        word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]
    return word


def _byte_pair_vocabulary(
    words: Iterable[str], *, suffix: str = "", special: Iterable[str] = ()
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary and merges in which each of `words` (already in byte-level characters) is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [character + suffix for character in alphabet if suffix]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _pieces([*word[:-1], word[-1] + suffix], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *special]))}
    return vocabulary, list(ranks)


def _split_words(tokenizer: Tokenizer, texts: Iterable[str], special: Iterable[str]) -> list[str]:
    words: dict[str, None] = {}
    for text in texts:
        for token in special:
            text = text.replace(token, "\0")
        for part in text.split("\0"):
            words.update((word, None) for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part))
    return list(words)


def _vocabulary_texts(*templates: str) -> list[str]:
    return [*(template.replace("{}", "\0") for template in templates), *WORDS, *(f" {word}" for word in WORDS)]


@functools.lru_cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, 77 tokens long; the end token has the highest id, as in the published vocabulary."""
    vocabulary, merges = _byte_pair_vocabulary(WORDS, suffix="</w>", special=("<|startoftext|>", "<|endoftext|>"))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@functools.lru_cache
def t5_tokenizer() -> T5TokenizerFast:
    """T5's and UMT5's tokenizer: a unigram vocabulary of whole words and single characters."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(character, -8.0) for character in characters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


@functools.lru_cache
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The same words and characters for Gemma, which pads on the left."""
    tokenizer = copy.deepcopy(t5_tokenizer())
    tokenizer.padding_side = "left"
    return tokenizer


@functools.lru_cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer with the chat and vision tokens that the Qwen-Image templates use."""
    templates = [_qwen_template(cls) for cls in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)]
    words = _split_words(
        Qwen2Tokenizer()._tokenizer, _vocabulary_texts(*templates, "Picture 1: 2: 3:"), special=QWEN_SPECIAL
    )
    vocabulary, merges = _byte_pair_vocabulary(words, special=QWEN_SPECIAL)
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        additional_special_tokens=list(QWEN_SPECIAL[1:]),
        model_max_length=2048,
        padding_side="right",
    )


@functools.lru_cache
def qwen_chat_tokenizer() -> Qwen2Tokenizer:
    """The same with a chat template."""
    tokenizer = copy.deepcopy(qwen_tokenizer())
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen_template(pipeline_class: type) -> str:
    # The template is set in __init__, which needs no component to run.
    components = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None, "transformer": None}
    if pipeline_class is not QwenImagePipeline:
        components["processor"] = None
    return pipeline_class(**components).prompt_template_encode


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, which needs torchvision and which no image pipeline calls."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """Accept the missing video processor; check the others as usual."""
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


@functools.lru_cache
def qwen_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor; a reference image of up to 84x84 pixels becomes 4 to 9 tokens."""
    return ImageOnlyQwenProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84}),
        tokenizer=qwen_tokenizer(),
        video_processor=None,
    )


@functools.lru_cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's tokenizer with Llava's `<image>` token, padding on the right as HunyuanVideo ships it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    templates = [
        module.DEFAULT_PROMPT_TEMPLATE["template"]
        for module in (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    ]
    words = _split_words(
        tokenizer, _vocabulary_texts(*templates, "<|start_header_id|>assistant<|end_header_id|>"), special=LLAMA_SPECIAL
    )
    vocabulary, merges = _byte_pair_vocabulary(words, special=LLAMA_SPECIAL)
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=1024,
    )


@functools.lru_cache
def clip_image_processor(size: int) -> CLIPImageProcessor:
    """CLIP's image processor for square images of `size` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
