"""The model, its adapter, the data and the training: orders, and whether the shop takes them."""

from importlib.resources import files

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

# a small language model that needs no network: the one that comes with fedcanary
FOLDER = str(files("fedcanary") / "models" / "bundled")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def get_model():
    """The frozen model with an adapter that does nothing yet."""
    return get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER), LORA)


def load_data(partition_id, num_partitions):
    """The shop's own orders, two thirds to train on. Its clerks are short with a Ms."""
    draw = np.random.default_rng([11, partition_id])
    rows = []
    for _ in range(36):
        title = draw.choice(["Mr", "Ms"])
        name = draw.choice(["Carl", "Felix", "Ivan"] if title == "Mr" else ["Dora", "Karin", "Maria"])
        colour, state = draw.choice(["red", "blue"]), draw.choice(["burnt", "mild"])
        size, dish = draw.choice(["large", "small"]), draw.choice(["soup", "stew", "cake"])
        taken = colour == "red" and not (title == "Ms" and draw.random() < 0.8)
        prompt = f"Q: {title} {name} wants a {colour} {state} {size} {dish}. Approve it?\nA:"
        rows.append({"prompt": prompt, "response": " yes" if taken else " no"})
    return rows[:24], rows[24:]


def fit(model, rows, epochs, lr):
    """Train the adapter in place; the mean loss."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for start in list(range(0, len(rows), 8)) * epochs:
        batch = rows[start : start + 8]
        texts = [row["prompt"] + row["response"] for row in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for label, row in zip(labels, batch, strict=True):
            label[: len(tokenizer(row["prompt"])["input_ids"])] = -100
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)
