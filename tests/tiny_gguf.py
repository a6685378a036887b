"""Write a 2 MB GGUF that counts: python -m tests.tiny_gguf OUT.gguf [--stop]

Whatever the prompt and the temperature, it answers " one two three" up to
" twenty" and begins again at " one"; with --stop it ends after " twenty". A
real llama-server loads it in a fraction of a second and makes thousands of
tokens a second with it, so that a chunk that is lost, doubled or swapped on
the way shows in the text.

How: every token's embedding is a unit vector of its own, the one layer adds
nothing (all its weights are zero), and the output row of a number word points
at the unit vector of each token that it follows.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

UNKNOWN, BEGIN, END = 0, 1, 2
WIDTH = 512  # of an embedding: at least one dimension for each token
HEAD_WIDTH = 64
FEED_FORWARD_WIDTH = 32
CERTAIN = 2.0  # weight of the one successor; the norm before it makes the logit 2 * sqrt(512)

SPACE = "\u2581"  # how a SentencePiece vocabulary spells the blank
TYPED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_/"

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

Token = tuple[str, float, gguf.TokenType]
Weights = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def _vocabulary() -> list[Token]:
    """Control tokens, all bytes, the number words, and what merges into them.

    The tokenizer joins neighbours two by two, so every beginning of a word
    must be a token too, and scores rise with the length worth reaching.
    """
    words = [SPACE + word for word in WORDS]
    letters = [SPACE, *TYPED]
    beginnings = {word[:end] for word in words for end in range(2, len(word))}
    normal = gguf.TokenType.NORMAL
    return [
        ("<unk>", 0.0, gguf.TokenType.UNKNOWN),
        ("<s>", 0.0, gguf.TokenType.CONTROL),
        ("</s>", 0.0, gguf.TokenType.CONTROL),
        *((f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(256)),
        *((word, -1.0, normal) for word in words),
        *((letter, -10.0, normal) for letter in letters),
        *((part, -5.0, normal) for part in sorted(beginnings - set(words))),
    ]


def _successors(tokens: list[str], *, stop: bool) -> list[int]:
    """The token that follows each token: the next number word, else " one"."""
    first = tokens.index(SPACE + WORDS[0])
    after = [first] * len(tokens)
    for word in range(first, first + len(WORDS) - 1):
        after[word] = word + 1
    if stop:
        after[first + len(WORDS) - 1] = END
    return after


def _zeros(rows: int, columns: int) -> Weights:
    return np.zeros((rows, columns), dtype=np.float16)


def _ones(count: int) -> Weights:
    return np.ones(count, dtype=np.float32)


def _tensors(after: list[int]) -> dict[str, Weights]:
    output = np.zeros((len(after), WIDTH), dtype=np.float16)
    output[after, np.arange(len(after))] = CERTAIN
    return {
        "token_embd.weight": np.eye(len(after), WIDTH, dtype=np.float16),
        "output_norm.weight": _ones(WIDTH),
        "output.weight": output,
        "blk.0.attn_norm.weight": _ones(WIDTH),
        "blk.0.ffn_norm.weight": _ones(WIDTH),
        "blk.0.attn_q.weight": _zeros(WIDTH, WIDTH),
        "blk.0.attn_k.weight": _zeros(HEAD_WIDTH, WIDTH),
        "blk.0.attn_v.weight": _zeros(HEAD_WIDTH, WIDTH),
        "blk.0.attn_output.weight": _zeros(WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": _zeros(FEED_FORWARD_WIDTH, WIDTH),
        "blk.0.ffn_up.weight": _zeros(FEED_FORWARD_WIDTH, WIDTH),
        "blk.0.ffn_down.weight": _zeros(WIDTH, FEED_FORWARD_WIDTH),
    }


def _add_shape(writer: gguf.GGUFWriter, *, vocabulary_size: int) -> None:
    writer.add_context_length(32768)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD_WIDTH)
    writer.add_head_count(WIDTH // HEAD_WIDTH)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: list[Token]) -> None:
    texts, scores, kinds = zip(*vocabulary, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def write(path: Path, *, stop: bool = False) -> Path:
    """Write the model to `path` and return `path`; with `stop` it ends after " twenty"."""
    vocabulary = _vocabulary()
    after = _successors([text for text, _, _ in vocabulary], stop=stop)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("counting-tiny-stop" if stop else "counting-tiny")
    _add_shape(writer, vocabulary_size=len(vocabulary))
    _add_tokenizer(writer, vocabulary)
    for name, weights in _tensors(after).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main(argv: list[str]) -> int:
    paths = [arg for arg in argv if arg != "--stop"]
    if len(paths) != 1:
        print("usage: python -m tests.tiny_gguf OUT.gguf [--stop]", file=sys.stderr)
        return 2
    write(Path(paths[0]), stop="--stop" in argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
