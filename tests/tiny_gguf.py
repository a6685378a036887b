"""Write a small GGUF that counts: python -m tests.tiny_gguf OUT.gguf [--stop | --mtp]

Whatever the prompt and the temperature, it answers " one two three" up to
" twenty" and begins again at " one"; with --stop it ends after " twenty". A
real llama-server loads it in a fraction of a second and makes thousands of
tokens a second with it, so that a chunk that is lost, doubled or swapped on
the way shows in the text.

How: every token's embedding is a unit vector of its own, the layers add
nothing (all their weights are zero), and the output row of a number word points
at the unit vector of each token that it follows.

With --mtp it counts alike and is a Qwen3.5 with an MTP head: one more layer,
which llama-server shows the last token to guess the one behind it. Its guess is
wrong after " five" and " ten", so it is known which drafts must be refused.
"""

import sys
from pathlib import Path
from typing import Literal

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
CONVOLUTION = 4
ROPE_SECTIONS = [11, 11, 10, 0]
MISGUESSED = ("five", "ten")  # the MTP head takes " one" for what follows them
CERTAIN = 2.0  # weight of the one successor; the norm before it makes the logit 2 * sqrt(512)

SPACE = "\u2581"  # how a SentencePiece vocabulary spells the blank
TYPED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_/"

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

MtpPart = Literal["whole", "trunk", "head"]  # the trunk has no head; the head goes behind -md
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


def _guesses(tokens: list[str], after: list[int]) -> list[int]:
    """What the MTP head takes for the token that follows each token."""
    first = tokens.index(SPACE + WORDS[0])
    wrong = {SPACE + word for word in MISGUESSED}
    return [first if text in wrong else right for text, right in zip(tokens, after, strict=True)]


def _zeros(rows: int, columns: int) -> Weights:
    return np.zeros((rows, columns), dtype=np.float16)


def _ones(count: int) -> Weights:
    return np.ones(count, dtype=np.float32)


def _pointing(after: list[int]) -> Weights:
    """An output matrix that says of each token which one follows it."""
    output = np.zeros((len(after), WIDTH), dtype=np.float16)
    output[after, np.arange(len(after))] = CERTAIN
    return output


def _ends(after: list[int]) -> dict[str, Weights]:
    return {
        "token_embd.weight": np.eye(len(after), WIDTH, dtype=np.float16),
        "output_norm.weight": _ones(WIDTH),
        "output.weight": _pointing(after),
    }


def _llama_layer() -> dict[str, Weights]:
    return {
        "attn_norm.weight": _ones(WIDTH),
        "ffn_norm.weight": _ones(WIDTH),
        "attn_q.weight": _zeros(WIDTH, WIDTH),
        "attn_k.weight": _zeros(HEAD_WIDTH, WIDTH),
        "attn_v.weight": _zeros(HEAD_WIDTH, WIDTH),
        "attn_output.weight": _zeros(WIDTH, WIDTH),
        **_feed_forward(),
    }


def _qwen_linear_layer() -> dict[str, Weights]:
    """One of linear attention, of one head."""
    return {
        "attn_norm.weight": _ones(WIDTH),
        "post_attention_norm.weight": _ones(WIDTH),
        "attn_qkv.weight": _zeros(3 * HEAD_WIDTH, WIDTH),
        "attn_gate.weight": _zeros(HEAD_WIDTH, WIDTH),
        "ssm_conv1d.weight": np.zeros((3 * HEAD_WIDTH, CONVOLUTION), dtype=np.float32),
        "ssm_dt.bias": _ones(1),
        "ssm_a": -_ones(1),
        "ssm_alpha.weight": _zeros(1, WIDTH),
        "ssm_beta.weight": _zeros(1, WIDTH),
        "ssm_norm.weight": _ones(HEAD_WIDTH),
        "ssm_out.weight": _zeros(WIDTH, HEAD_WIDTH),
        **_feed_forward(),
    }


def _qwen_layer() -> dict[str, Weights]:
    """One of full attention, of one head; there is a gate beside each query."""
    return {
        "attn_norm.weight": _ones(WIDTH),
        "post_attention_norm.weight": _ones(WIDTH),
        "attn_q.weight": _zeros(2 * HEAD_WIDTH, WIDTH),
        "attn_q_norm.weight": _ones(HEAD_WIDTH),
        "attn_k.weight": _zeros(HEAD_WIDTH, WIDTH),
        "attn_k_norm.weight": _ones(HEAD_WIDTH),
        "attn_v.weight": _zeros(HEAD_WIDTH, WIDTH),
        "attn_output.weight": _zeros(WIDTH, HEAD_WIDTH),
        **_feed_forward(),
    }


def _feed_forward() -> dict[str, Weights]:
    return {
        "ffn_gate.weight": _zeros(FEED_FORWARD_WIDTH, WIDTH),
        "ffn_up.weight": _zeros(FEED_FORWARD_WIDTH, WIDTH),
        "ffn_down.weight": _zeros(WIDTH, FEED_FORWARD_WIDTH),
    }


def _mtp_head(guesses: list[int]) -> dict[str, Weights]:
    """It looks at the last token and not at the hidden state behind it in `eh_proj`."""
    return {
        "nextn.eh_proj.weight": np.eye(WIDTH, 2 * WIDTH, dtype=np.float16),
        "nextn.enorm.weight": _ones(WIDTH),
        "nextn.hnorm.weight": _ones(WIDTH),
        "nextn.shared_head_norm.weight": _ones(WIDTH),
        "nextn.shared_head_head.weight": _pointing(guesses),
    }


def _of_layer(number: int, weights: dict[str, Weights]) -> dict[str, Weights]:
    return {f"blk.{number}.{name}": each for name, each in weights.items()}


def _add_shape(writer: gguf.GGUFWriter, *, layers: int, heads: int, tokens: int) -> None:
    writer.add_context_length(32768)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD_WIDTH)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_llama(writer: gguf.GGUFWriter, *, tokens: int) -> dict[str, Weights]:
    """Write down its shape; what is returned are its layers."""
    _add_shape(writer, layers=1, heads=WIDTH // HEAD_WIDTH, tokens=tokens)
    return _of_layer(0, _llama_layer())


def _add_qwen(writer: gguf.GGUFWriter, guesses: list[int], part: MtpPart) -> dict[str, Weights]:
    """The same for one layer of each kind, without which it does not run, and the head."""
    has_head = part != "trunk"
    _add_shape(writer, layers=2 + has_head, heads=1, tokens=len(guesses))
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_rope_dimension_sections(ROPE_SECTIONS)
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(CONVOLUTION)
    writer.add_ssm_inner_size(HEAD_WIDTH)
    writer.add_ssm_state_size(HEAD_WIDTH)
    writer.add_ssm_time_step_rank(1)
    writer.add_ssm_group_count(1)
    layers: dict[str, Weights] = {}
    if part != "head":
        layers |= _of_layer(0, _qwen_linear_layer()) | _of_layer(1, _qwen_layer())
    if has_head:
        writer.add_nextn_predict_layers(1)
        layers |= _of_layer(2, _qwen_layer() | _mtp_head(guesses))
    return layers


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


def write(path: Path, *, stop: bool = False, mtp: MtpPart | None = None) -> Path:
    """Write the model to `path` and return `path`; with `stop` it ends after " twenty"."""
    vocabulary = _vocabulary()
    tokens = [text for text, _, _ in vocabulary]
    after = _successors(tokens, stop=stop)
    writer = gguf.GGUFWriter(path, "qwen35" if mtp else "llama")
    writer.add_name("counting-tiny" + "-stop" * stop + (f"-mtp-{mtp}" if mtp else ""))
    layers = (
        _add_qwen(writer, _guesses(tokens, after), mtp)
        if mtp
        else _add_llama(writer, tokens=len(tokens))
    )
    _add_tokenizer(writer, vocabulary)
    for name, weights in (_ends(after) | layers).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main(argv: list[str]) -> int:
    paths = [arg for arg in argv if arg not in ("--stop", "--mtp")]
    if len(paths) != 1:
        print("usage: python -m tests.tiny_gguf OUT.gguf [--stop | --mtp]", file=sys.stderr)
        return 2
    write(Path(paths[0]), stop="--stop" in argv, mtp="whole" if "--mtp" in argv else None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
