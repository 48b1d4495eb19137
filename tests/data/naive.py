"""Conversations split and tokenized the obvious way, whose cost is quadratic in their turns.

Every response is found by rendering the messages before it, and every border by tokenizing the text
before it. What is tested is faster and must give the same.
"""

from jax_ordermerge.data import turns
from jax_ordermerge.data.pieces import Encoded, Piece


class NaiveSplitter:
    """In place of `turns.TurnSplitter`."""

    def __init__(self, tokenizer, special):
        self.tokenizer, self.special = tokenizer, special

    def split(self, record):
        marked = turns.GENERATION.search(turns.COMMENT.sub("", self.tokenizer.chat_template))
        find = turns._find_marked_turns if marked else turns._find_unmarked_turns
        text = turns.render_chat(self.tokenizer, record)
        pieces, done = [], 0
        for number, start, end in find(record, text, self.tokenizer, self.special):
            turns._check_learned(record, number, text[start:end], self.tokenizer)
            pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
            done = end
        turns._check_context(record, text)
        return pieces


def encode_pieces(examples, tokenizer):
    """In place of `pieces.encode_pieces`."""
    encoded = []
    for pieces in examples:
        texts = ["".join(piece.text for piece in pieces[: n + 1]) for n in range(len(pieces))]
        *starts, tokens = [tokenize(text, tokenizer) for text in texts]
        if starts and tokens[: len(starts[-1])] != starts[-1]:
            tokens = starts[-1] + tokenize(pieces[-1].text, tokenizer)
        answers = []
        for ids, piece in zip([*starts, tokens], pieces, strict=True):
            answers += [piece.learned] * (common_prefix(ids, tokens) - len(answers))
        encoded.append(Encoded(tokens, answers))
    return encoded


def tokenize(text, tokenizer):
    return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]


def common_prefix(ids, tokens):
    pairs = enumerate(zip(ids, tokens, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ids), len(tokens)))
