"""A tiny random Whisper with its feature extractor and tokenizer, and prompts of noise for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

VOCAB = 512
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>")
SECONDS = 2
"""Of sound in a request: 100 rows of the encoder's output."""
SAMPLING_RATE = 16000


def make_whisper(path: Path) -> None:
    """Saves the model like any Hugging Face model."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=128,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=50 * SECONDS,
        max_target_positions=256,
        num_mel_bins=8,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).save_pretrained(path)
    names = [*SPECIAL, *(f"t{i}" for i in range(len(SPECIAL), VOCAB))]
    end = SPECIAL[0]
    tokenizer = WhisperTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        unk_token=end,
        bos_token=end,
        eos_token=end,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS)
    WhisperProcessor(extractor, tokenizer).save_pretrained(path)


def noise_prompts(lengths: list[int]) -> list[dict[str, Any]]:
    """A prompt of each length for the decoder, each with another second of noise to listen to."""
    random = np.random.default_rng(0)
    prompts = []
    for i, length in enumerate(lengths):
        sound = random.standard_normal(SAMPLING_RATE).astype(np.float32)
        encoder = {"prompt": "", "multi_modal_data": {"audio": (sound, SAMPLING_RATE)}}
        decoder = {"prompt_token_ids": [(7 * i + 3 * j) % 500 + 6 for j in range(length)]}
        prompts.append({"encoder_prompt": encoder, "decoder_prompt": decoder})
    return prompts
