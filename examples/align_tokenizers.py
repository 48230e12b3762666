"""Group the tokens of two tokenizers that cover the same bytes of a text.

Usage: python examples/align_tokenizers.py A/tokenizer.json B/tokenizer.json [TEXT]
Without arguments, it trains two small tokenizers.
"""

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mergeopd.align import ByteTokenizer, EndTokens, align_responses


def small_tokenizer(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    return tokenizer


files = sys.argv[1:3]
tokenizers = [Tokenizer.from_file(file) for file in files] or [small_tokenizer(280), small_tokenizer(360)]
text = sys.argv[3] if len(sys.argv) > 3 else "Two tokenizers of one text."

student, teacher = (ByteTokenizer.of(tokenizer, "AB"[i]) for i, tokenizer in enumerate(tokenizers))
[ids] = student.encode([text])
[alignment] = align_responses([ids], student, teacher, EndTokens([], 0))

print(f"{'A':>24} | B")
edges = (alignment.student_starts, alignment.student_stops, alignment.teacher_starts, alignment.teacher_stops)
for start_a, stop_a, start_b, stop_b in zip(*edges, strict=True):
    tokens_a = [tokenizers[0].decode([i]) for i in ids[start_a:stop_a]]
    tokens_b = [tokenizers[1].decode([i]) for i in alignment.teacher_ids[start_b:stop_b].tolist()]
    print(f"{'·'.join(tokens_a):>24} | {'·'.join(tokens_b)}")
print("tokens in no group:", dict(alignment.unaligned) or "none")

student_bytes, teacher_bytes = (tokenizer.tokens.ids.keys() for tokenizer in (student, teacher))
print(f"tokens with the same bytes: {len(student_bytes & teacher_bytes)}")
