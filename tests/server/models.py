"""Checkpoints to serve: tiny, with random weights, and with the tokenizers that users have."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_text_of_tokenizers import begin, byte_pairs, llama, save, special

NUM_LAYERS, EXITS, MAX_POSITIONS = 6, (2, 4), 256
CHAT = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}<begin><{{ m['role'] }}>{{ m['content'] }}<end of turn>"
    "{% endfor %}<assistant>"
)
ROLES = ("<system>", "<user>", "<assistant>", "<end of turn>")


def chat_model(folder: Path, max_positions: int = MAX_POSITIONS) -> Path:
    """A Llama whose tokenizer adds a begin of text to prompts and has a chat template. Returns the checkpoint."""
    backend = byte_pairs()
    begin(backend)
    backend.add_special_tokens([special(name) for name in ROLES])
    save(backend, folder / "hf", chat_template=CHAT)
    return _llama(folder, max_positions)


def plain_model(folder: Path) -> Path:
    """The same with no begin of text and no chat template."""
    save(byte_pairs(), folder / "hf")
    return _llama(folder)


def sentencepiece_chat_model(folder: Path) -> Path:
    """As Llama-2's: SentencePiece with byte fallback; the first piece of a text decodes without its space."""
    (folder / "hf").mkdir(parents=True)
    llama(folder / "hf", chat_template=CHAT)
    return _llama(folder)


def _llama(folder: Path, max_positions: int = MAX_POSITIONS) -> Path:
    import torch
    import transformers

    from megatron.early_exit.checkpoint.convert_command import main as convert

    hf = str(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=max_positions, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(hf)
    plain, model = str(folder / "plain"), str(folder / "model")
    layers = [str(layer) for layer in EXITS]
    for words in (
        ["from-hf", "--input", hf, "--save", plain, "--skip-comparison"],
        ["add-exits", "--load", plain, "--save", model, "--exit-layer-nums", *layers],
    ):
        assert not convert(words), words
    return Path(model)
