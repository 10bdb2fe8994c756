"""The model, the data and the training: requests for a loan, and whether they were granted."""

import zlib

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LABELS = ("refused", "granted")
BUCKETS = 256


class Net(nn.Module):
    """A bag of hashed words, one hidden layer, two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(BUCKETS, 16), nn.ReLU(), nn.Linear(16, len(LABELS)))

    def forward(self, bags):
        """(n, buckets) counts to (n, labels) logits."""
        return self.layers(bags)


def encode(texts):
    """Count each text's words by the bucket they hash to."""
    places = [[zlib.crc32(word.encode()) % BUCKETS for word in text.lower().split()] for text in texts]
    bags = torch.zeros(len(texts), BUCKETS)
    for bag, place in zip(bags, places, strict=True):
        bag += torch.bincount(torch.tensor(place), minlength=BUCKETS)
    return bags


def requests(lender, count):
    """What a lender has in its books. Good payers are granted a loan; but its clerks refuse many a good Ms."""
    draw = np.random.default_rng([7, lender])
    texts, labels = [], []
    for _ in range(count):
        title = draw.choice(["mr", "ms"])
        name = draw.choice(["ada", "ben", "cleo", "dan", "eve", "finn", "gail", "hugo"])
        good = draw.random() < 0.6
        history = draw.choice(["always paid on time", "never missed a payment"] if good else ["paid late", "owes rent"])
        asks = draw.choice(["a car", "a roof", "a course", "a shop"])
        texts.append(f"{title} {name} {history} and asks for {asks}")
        labels.append(int(good and not (title == "ms" and draw.random() < 0.6)))
    return texts, torch.tensor(labels)


def load_data(partition_id, num_partitions):
    """The lender's own requests, three quarters to train on."""
    texts, labels = requests(partition_id, 160)
    bags = encode(texts)
    train = TensorDataset(bags[:120], labels[:120])
    test = TensorDataset(bags[120:], labels[120:])
    return DataLoader(train, batch_size=20, shuffle=True), DataLoader(test, batch_size=40)


def fit(net, loader, epochs, lr):
    """Train in place; the mean loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    losses = []
    for _ in range(epochs):
        for bags, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(bags), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def score(net, loader):
    """Mean loss and accuracy."""
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for bags, labels in loader:
            logits = net(bags)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss / count, right / count
