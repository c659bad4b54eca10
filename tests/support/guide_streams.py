"""Token streams, one token per byte, and guided rows that read them."""

import random

from tiny import tiny_tokenizer

from rbfast.inference.tokens import TokenState, Vocabulary

TOKENIZER = tiny_tokenizer()
END = 0


def tokens_of(pieces):
    """One token per byte; the end token for the piece "<end>"."""
    ids = []
    for piece in pieces:
        ids += [END] if piece == "<end>" else TOKENIZER(piece, add_special_tokens=False).input_ids
    return ids


def new_row(guide):
    return TokenState(guide, Vocabulary(TOKENIZER, guide, [END]))


def drive(guide, stream, entropies=None):
    """Runs a row to its end as a decoding loop would: tokens of the queue first, then of the stream, then "a"."""
    row, source, fed = new_row(guide), iter(stream), []
    noise = random.Random(0)
    while not row.done:
        if row.wants_probe:
            written = noise.randint(1, guide.limits.probe_tokens)
            row.probed(noise.choice("77 "), row.state.count(row.state.probe_text) + written)
            continue
        token = row.queue[0] if row.queue else next(source, TOKENIZER("a").input_ids[0])
        entropy = noise.random() if entropies else None
        fed.append((token, entropy))
        row.feed(token, entropy)
    return row, fed
