"""A small BLIP of transformers with random weights, and a small LLaVA, which chats."""

from pathlib import Path

import torch
import transformers

from simplclip.models import packaged

TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} answer:"
)
VISION = {"image_size": 32, "patch_size": 16}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _tokens() -> dict:
    """Returns the vocabulary's ids of a config: MiniLM's, and 8 more."""
    return {"vocab_size": 30530, "bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}


def write(folder: Path, kind: str = "blip", seed: int = 0) -> None:
    """Writes a model and its processor."""
    tokenizer = transformers.BertTokenizerFast(
        tokenizer_file=str(packaged.minilm_folder() / "tokenizer.json")
    )
    torch.manual_seed(seed)
    if kind == "blip":
        text = TOWER | _tokens() | {"sep_token_id": 102, "encoder_hidden_size": 16}
        config = transformers.BlipConfig(text_config=text, vision_config=TOWER | VISION)
        model = transformers.BlipForConditionalGeneration(config)
        images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
        processor = transformers.BlipProcessor(images, tokenizer)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        text = TOWER | _tokens() | {"model_type": "llama", "num_key_value_heads": 2}
        config = transformers.LlavaConfig(
            text_config=text,
            vision_config=TOWER | VISION | {"model_type": "clip_vision_model"},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        model = transformers.LlavaForConditionalGeneration(config)
        images = transformers.CLIPImageProcessor(size=32, crop_size=32)
        processor = transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=16,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
