"""Train both demo models into a folder: `python -m tools.demo.make FOLDER SECONDS`.

`tools/demo/model.py` runs this in a process of its own and looks after everything else: where
the folder is, that it is complete, that nobody else is at it.
"""

import sys
import time

STARTED = time.monotonic()  # the imports below take seconds, and belong to the budget

from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from tools.demo import corpus, train  # noqa: E402

SHARES = {"target": 0.72, "draft": 0.28}  # of the time that is left for training
SAMPLE_PROMPT = "import os\nimport sys\n\n\ndef "


def say(text: str) -> None:
    print(f"demo model: {text}", flush=True)


def make(folder: Path, seconds: float) -> None:
    """Train and save target and draft into `folder` within `seconds`, this import included."""
    start = STARTED
    say(f"training on the Python standard library for at most {seconds:.0f} s")
    text = corpus.load_corpus(train.CORPUS_CHARS)
    tokenizer = corpus.train_tokenizer(text, train.VOCABULARY)
    stream = torch.tensor(corpus.encode(text, tokenizer))
    say(
        f"{len(text.modules)} modules, {len(text.chats)} conversations, {len(stream)} tokens, "
        f"vocabulary {len(tokenizer)} ({time.monotonic() - start:.0f} s)"
    )
    saving = min(5.0, 0.1 * seconds)  # and the sample text
    left = max(seconds - saving - (time.monotonic() - start), 0.3 * seconds)
    for name, share in SHARES.items():
        config = train.model_config(name, tokenizer)
        result = train.train(config, stream, left * share, name)
        train.save(result.model, tokenizer, folder / name)
        say(
            f"{name}: {sum(p.numel() for p in result.model.parameters()) / 1e6:.1f} M parameters, "
            f"{result.steps} steps, {result.tokens} tokens, loss {result.loss:.2f} nats per token"
        )
        if name == "target":
            sample = train.complete(result.model, tokenizer, SAMPLE_PROMPT)
            say("it writes:\n    " + sample.replace("\n", "\n    "))
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), float(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
