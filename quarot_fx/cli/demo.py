"""``quarot-fx demo``: a small language model quantised with and without rotation, side by side."""

from __future__ import annotations

import gc
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quarot_fx.cli.settings import parse_setting

SETTINGS = ("float", "W4A4KV4 without rotation", "W4A4KV4", "W6A6KV6", "W8A8KV8")
EXPLAINED = "W4A4KV4"
PROMPT = "Explain what a compiler does in one sentence."
WINDOW = 128  # one shape for the perplexity and for the answers: one compilation a setting
WINDOWS = 8
NEW_TOKENS = 13

INTRODUCTION = (
    "SmolLM2-135M-Instruct with weights (W), activations (A), keys and values (KV) rounded to 8, 6 and "
    "4 bits (simulated: the arithmetic is float32). Perplexity, the lower the better, is over "
    f"{WINDOWS} windows of {WINDOW} tokens of Python's own help texts. Each setting then answers: {PROMPT}\n"
)
CONCLUSION = (
    "A few outlier channels set the scale for all the others, so 4 bits without rotation leave nothing of "
    "the model. A rotation, absorbed by the weights, spreads them: 8 bits cost almost nothing and 6 bits "
    "little. Four keep far more than without rotation, but rounded to nearest a model this small does not "
    "yet speak in them."
)


def demo(
    nested_backend: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "eager",
) -> None:
    """Show SmolLM2-135M in float32, in 4 bits without rotation, and rewritten by quarot (about 5 minutes)."""
    console = Console()
    started = time.perf_counter()

    import quarot_fx
    from quarot_fx.cli.models import DEMO_MODEL, compile_model, load_model
    from quarot_fx.cli.perplexity import measure
    from quarot_fx.text import read_text, split_windows

    with Console(stderr=True).status("loading the model"):
        model, tokenizer = load_model(DEMO_MODEL)
        windows = split_windows(read_text("pydoc"), tokenizer, WINDOW, WINDOWS)
    console.print(INTRODUCTION)

    title = f"torch.compile(model, backend='quarot'), nested backend {nested_backend!r}"
    table = Table(title=title, show_lines=True)
    for column in ("setting", "perplexity", "ratio", "answer"):
        table.add_column(column, justify="right" if column in ("perplexity", "ratio") else "left")
    float_perplexity = 0.0
    for name in SETTINGS:
        runnable = compile_model(model, parse_setting(name), nested_backend)
        perplexity = measure(runnable, windows, name).perplexity
        float_perplexity = float_perplexity or perplexity
        with Console(stderr=True).status(f"{name}: writing an answer"):
            answer = generate(runnable, tokenizer, PROMPT)
        table.add_row(name, f"{perplexity:.1f}", f"{perplexity / float_perplexity:.3f}", answer)
        if name == EXPLAINED:  # now, while the compiled graph keeps its weights in the store
            inputs = {"input_ids": windows[:1], "use_cache": False}
            report = quarot_fx.explain(model, inputs, **parse_setting(name).options or {})
        del runnable
        gc.collect()  # compiled graphs lie in reference cycles, and the next setting needs their memory
    console.print(table)

    console.print(f"What quarot did for {EXPLAINED}:")
    console.print(report)
    console.print(CONCLUSION)
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Next: quarot-fx eval --help")


def generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the greedy answer to a prompt, up to ``NEW_TOKENS`` tokens, computed without a cache."""
    import torch

    chat = [{"role": "user", "content": prompt}]
    sequence = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    length = len(sequence)
    for _ in range(NEW_TOKENS):
        # Attention is causal, so no token sees the padding that keeps the shape at the one already compiled.
        padding = [tokenizer.eos_token_id] * (WINDOW - len(sequence))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence + padding]), use_cache=False).logits
        sequence.append(int(logits[0, len(sequence) - 1].argmax()))
        if sequence[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(sequence[length:], skip_special_tokens=True).strip()
