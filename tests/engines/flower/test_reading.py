"""What an app's model says, and what an app's held-out examples are, in every form that is read."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedcanary.engines.flower.reading import ModuleReader, Own, PeftReader, call, own_of, undisturbed
from fedcanary.errors import BadInput
from fedcanary.models import adapters
from fedcanary.models import base as models
from fedcanary.types import Item

LABELS = ("no", "yes", "perhaps")
HELD = DataLoader(TensorDataset(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])), batch_size=4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.noise = nn.Linear(2, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.noise(self.head(x))


def encode(texts):
    return torch.tensor([[len(text), text.count("a")] for text in texts], dtype=torch.float32)


def state(seed=1):
    torch.manual_seed(seed)
    return Model().state_dict()


def item(text, *choices, answer=0):
    return Item(prompt=text, choices=choices, answer=answer)


def test_choices_are_a_softmax_over_their_own_logits():
    arrays = state()
    items = (item("banana", *LABELS), item("kiwi", "yes", "no"), item("kiwi", "yes", "never"))
    said = ModuleReader(Model, encode, LABELS).said(arrays, Own(items))
    logits = (encode(["banana", "kiwi"]) @ arrays["head.weight"].T + arrays["head.bias"]).double()
    np.testing.assert_allclose(said[0], torch.softmax(logits[0], 0), atol=1e-6)  # and no dropout
    np.testing.assert_allclose(said[1], [*torch.softmax(logits[1][[1, 0]], 0), 0.0], atol=1e-6)
    assert np.isnan(said[2]).all()  # a choice that is no label: unscoreable, and counted so


def test_examples_without_text_are_put_to_the_module_as_they_are():
    arrays, reader = state(), ModuleReader(Model, encode, LABELS)
    own = own_of(HELD, LABELS, 99)
    assert [i.answer for i in own.items] == [0, 1, 2, 0, 1, 2]
    logits = HELD.dataset.tensors[0] @ arrays["head.weight"].T + arrays["head.bias"]
    np.testing.assert_allclose(reader.said(arrays, own), torch.softmax(logits.double(), 1), atol=1e-6)
    assert reader.said(arrays, Own(())).shape == (0, 1)


FORMS = {
    "the last of two parts": (([("x", 0)], [("a", "yes")]), ["a"], [1]),
    "the last of three": (([("x", 0)], [], [("a", 1), ("b", 2)]), ["a", "b"], [1, 2]),
    "items": ([item("a", *LABELS, answer=2)], ["a"], [2]),
    "mappings": ([{"text": "a", "label": "yes", "group": "g"}], ["a"], [1]),
    "choices": ([{"prompt": "a", "choices": [" x", " y"], "answer": " y"}], ["a"], [1]),
    "responses": ([{"prompt": "a", "response": "b"}], ["a"], [0]),
    "a dataset": (HELD.dataset, [""] * 6, [0, 1, 2] * 2),
    "batches of mappings": ([{"x": torch.zeros(2, 2), "labels": torch.tensor([1, 2])}], ["", ""], [1, 2]),
    "no more than asked for": ([(str(i), 0) for i in range(20)], [str(i) for i in range(8)], [0] * 8),
}


@pytest.mark.parametrize("form", FORMS)
def test_held_out_examples_in_every_form(form):
    found, texts, answers = FORMS[form]
    own = own_of(found, LABELS, 8)
    assert ([i.prompt for i in own.items], [i.answer for i in own.items]) == (texts, answers)
    assert len(own.inputs) == (len(own.items) if "" in texts else 0)


@pytest.mark.parametrize(
    "found", [[("a", "never")], [("a", 3)], [{"txt": "a"}], [3], [("a", 0), (torch.zeros(2), 1)], [{"text": "a"}]]
)
def test_what_is_no_example_is_said_with_a_remedy(found):
    with pytest.raises(BadInput, match="remedy: give examples as"):
        own_of(found, LABELS, 8)


def test_a_function_of_the_app_gets_what_it_asks_for_by_name():
    known = {"partition_id": 3, "num_partitions": 9, "batch_size": 4, "context": "c"}
    assert call(lambda partition_id, *, batch_size=2: (partition_id, batch_size), known) == (3, 4)
    assert call(lambda: 7, known) == 7
    with pytest.raises(BadInput, match=r"'partition'.*\n.*partition_id"):
        call(lambda partition: partition, known)


def test_reading_moves_no_generator_of_the_app():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002  # the app's may be the legacy one

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002  # the app's may be the legacy one
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002  # the app's may be the legacy one
    with undisturbed():
        draws()
        ModuleReader(Model, encode, LABELS).check(Model().state_dict())
    assert draws() == expected


def test_the_apps_own_module_is_never_the_one_that_is_read():
    """Not even where what builds it gives the same one every time."""
    shared = Model().train()
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    ModuleReader(lambda: shared, encode, LABELS).said(state(9), Own((item("a", *LABELS),)))
    assert shared.training and all(torch.equal(before[name], t) for name, t in shared.state_dict().items())


def test_arrays_that_came_as_a_list_are_in_the_state_dicts_order():
    arrays, own = state(), Own((item("banana", *LABELS),))
    listed = {str(at): tensor for at, tensor in enumerate(arrays.values())}
    reader = ModuleReader(Model, encode, LABELS)
    np.testing.assert_array_equal(reader.said(listed, own), reader.said(arrays, own))


@pytest.mark.parametrize(
    ("build", "encoder", "labels", "message"),
    [
        (lambda: nn.Linear(2, 3), encode, LABELS, "cannot take the app's arrays"),
        (Model, lambda texts: "text", LABELS, "could not be asked about a text"),
        (Model, encode, LABELS[:2], r"says \(2, 3\) to two texts, and there are 2 labels"),
        (lambda: 1 / 0, encode, LABELS, "ZeroDivisionError"),
    ],
)
def test_a_model_that_cannot_be_read_is_told_before_the_run(build, encoder, labels, message):
    with pytest.raises(BadInput, match=message):
        ModuleReader(build, encoder, labels).check(state())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's and transformers' own
def test_an_adapter_says_what_peft_says_of_it():
    """Against the model that the app itself would build, with the arrays as the app sends them."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(models.BUNDLED_DIR)
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(whole, config).eval()
    arrays = get_peft_model_state_dict(peft)
    base = models.load("bundled", max_length=64)
    reader = PeftReader(base, adapters.find_targets(base, r=4, alpha=8, targets=["q_proj", "v_proj"]))
    reader.check(arrays)
    one = item("Q: Ms Karin wants a red burnt large cake. Approve it?\nA:", " yes", " no")
    ids = [base.encode(one.prompt, choice)[0] for choice in one.choices]
    with torch.no_grad():
        logits = peft(input_ids=torch.tensor([ids[0][:-1]])).logits[0, -1].double()
    expected = torch.softmax(logits[[ids[0][-1], ids[1][-1]]], 0)
    np.testing.assert_allclose(reader.said(arrays, Own((one,)))[0], expected, atol=1e-5)
    with pytest.raises(BadInput, match="not those of an adapter"):
        PeftReader(base, adapters.find_targets(base, r=2, alpha=8, targets=["q_proj"])).check(arrays)
