"""Checkpoints in the formats of timm and transformers, small and with random content."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

from maskvlm.data.text import train_tokenizer
from maskvlm.model.encoders import ImageEncoder

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CAPTIONS = ["a red ball on a table", "two dogs run", "the small blue cube is left of a ball"]


def make_vit(size: int = 64, name: str = "vit_tiny_patch16_224", **config: Any) -> nn.Module:
    """A classifier as timm publishes it, every tensor random."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size, num_classes=10, **(VIT | config))
    with torch.no_grad():
        for value in vit.parameters():
            value.normal_(std=0.2)
    return vit


def save_vit(folder: Path, size: int = 64) -> Path:
    path = folder / "vit.safetensors"
    save_file(make_vit(size).state_dict(), path)
    return path


def save_bert(folder: Path) -> PreTrainedTokenizerFast:
    """A BERT trained by masking words, with its tokenizer, as save_pretrained writes it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 60)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **BERT)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def image_encoder(weights: Path, size: int = 64, **kwargs: Any) -> ImageEncoder:
    return ImageEncoder("vit_tiny_patch16_224", size, str(weights), config=VIT, **kwargs).eval()
