"""Tiny random models of five architectures, as folders in the `transformers` format, with the bundled tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

import fedcanary

ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2", "bert")
CAUSAL = ARCHITECTURES[:4]
LABELS = ("no", "maybe", "yes")


def configurations(vocabulary: int) -> dict[str, object]:
    from transformers import BertConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    usual = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gpt2 = {
        "vocab_size": vocabulary,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "llama": LlamaConfig(**usual, num_key_value_heads=2),
        "gpt2": GPT2Config(**gpt2),  # linear layers are Conv1D, weights tied
        "neox": GPTNeoXConfig(**usual),  # query, key and value in one layer
        "qwen2": Qwen2Config(**usual, num_key_value_heads=2),  # biases in the attention
        "bert": BertConfig(**usual, num_labels=len(LABELS), pad_token_id=0),
    }


def save_all(folder: Path) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(Path(fedcanary.__file__).parent / "models" / "bundled")
    places = {}
    for name, config in configurations(len(tokenizer)).items():
        auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = auto.from_config(config)
        places[name] = folder / name
        model.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    return places
