"""What joeynmt makes of small recurrent encoder-decoders, kept in seq2seq.json: GRU, LSTM, two attentions, fed and not.

In an environment of its own, in tests/: pip install --no-deps joeynmt==2.3.0 tensorboard 'importlib_metadata<8.6' zipp torchtext
absl-py, then python -m oracles.seq2seq --write

License of the package: Apache-2.0.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from . import frozen

WORDS, WIDTH, HIDDEN, SOURCE, TARGET, LENGTHS = 4, 2, 4, 4, 3, (4, 2, 1)
CASES = list(itertools.product(("gru", "lstm"), ("luong", "bahdanau"), ("alone", "feeding")))


def found() -> dict[str, Any]:
    """Of each case weights, logits ``[B, T, V]`` and gradients; of all of them the source, its lengths and the target."""
    from joeynmt.decoders import RecurrentDecoder
    from joeynmt.encoders import RecurrentEncoder

    torch.manual_seed(0)
    source, target = torch.randint(WORDS, (len(LENGTHS), SOURCE)), torch.randint(WORDS, (len(LENGTHS), TARGET))
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(SOURCE) < lengths[:, None])[:, None]
    results: dict[str, Any] = {"source": source, "target": target, "lengths": lengths}
    for cell, attention, fed in CASES:
        encoder = RecurrentEncoder(rnn_type=cell, hidden_size=HIDDEN // 2, emb_size=WIDTH, num_layers=1, bidirectional=True)
        options: dict[str, Any] = {"attention": attention, "init_hidden": "bridge", "input_feeding": fed == "feeding"}
        decoder = RecurrentDecoder(cell, WIDTH, HIDDEN, encoder, num_layers=2, vocab_size=WORDS, **options)
        embeddings = {"source": nn.Embedding(WORDS, WIDTH), "target": nn.Embedding(WORDS, WIDTH)}
        model = nn.ModuleDict({"encoder": encoder, "decoder": decoder, **embeddings}).double().eval()
        memory, last = encoder(model["source"](source), lengths, mask)
        logits, *_ = decoder(model["target"](target), memory, last, mask, TARGET)
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(frozen.weighted(logits), list(weights.values()))
        case = {"weights": weights, "logits": logits, "gradients": dict(zip(weights, grads, strict=True))}
        results[f"{cell} {attention} {fed}"] = case
    return results


if __name__ == "__main__":
    frozen.main(__file__, __doc__, {"package": "joeynmt", "version": "2.3.0", "license": "Apache-2.0"}, found)
