"""The worker of `engines/llama_cpp.py`: llama.cpp, in the Python that has llama-cpp-python.

Run by `lib/worker_loop.py`, with nothing of this project importable. Logits go to logits.bin in
the folder of the request "load".
"""

import time
from pathlib import Path

CHUNK_ROWS = 512
"""Rows of a prompt that go through the model at once."""


class Worker:
    """One model, and one context at a time."""

    def __init__(self):
        import gguf
        import llama_cpp

        self.api, self.gguf = llama_cpp, gguf
        self.model = self.context = None
        self.next, self.found, self.position = [], [], 0

    def load(self, folder, config, tensors, threads):
        self.folder, self.config, self.threads = Path(folder), config, threads
        path = self.folder / "model.gguf"
        self.write_gguf(path, tensors)
        api = self.api
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        path.unlink()  # the mapping stays
        if not self.model:
            raise RuntimeError("llama.cpp does not load the GGUF file; see what it printed")
        return {}

    def write_gguf(self, path, tensors):
        import numpy as np

        gguf, config = self.gguf, self.config
        writer = gguf.GGUFWriter(path, "llama")
        for name in (
            *("context_length", "embedding_length", "block_count", "feed_forward_length"),
            *("head_count", "head_count_kv"),
        ):
            getattr(writer, f"add_{name}")(config[name])
        for add in (
            writer.add_key_length,
            writer.add_value_length,
            writer.add_rope_dimension_count,
        ):
            add(config["head_size"])
        writer.add_layer_norm_rms_eps(config["rms_epsilon"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(config["vocabulary"])
        writer.add_tokenizer_model("no_vocab")
        for name in tensors:
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            kind = gguf.GGMLQuantizationType.BF16 if array.dtype == np.uint16 else None
            writer.add_tensor(name, array.view(np.uint8) if kind else array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for name in tensors:
            (self.folder / f"{name}.npy").unlink()

    def open(self, batch, rows):
        """A context for so many sequences of so many rows each, each with its own memory."""
        api = self.api
        self.empty()
        kind = self.gguf.GGMLQuantizationType["BF16" if self.config["is_bfloat16"] else "F32"]
        options = api.llama_context_default_params()
        options.n_ctx = batch * (-(-rows // 256) * 256)
        options.n_seq_max = batch
        options.kv_unified = False
        options.n_batch = options.n_ubatch = max(CHUNK_ROWS, batch)
        options.n_threads = options.n_threads_batch = self.threads
        options.type_k = options.type_v = int(kind)
        # Decoding 2000 rows on an AVX-512 BF16 processor, llama-cpp-python 0.3.36: 57 ms a step
        # like this, 76 with flash attention; with float16 K and V 58 and 95.
        options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context for {batch} x {rows} rows")
        self.memory = api.llama_get_memory(self.context)

    def empty(self):
        if self.context:
            self.api.llama_free(self.context)
        self.context = None
        return {}

    def decode(self, rows):
        """Rows (token, position, sequence, whether logits are wanted) through the model."""
        api = self.api
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        code = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def prompt(self, tokens, sequence):
        for first in range(0, len(tokens), CHUNK_ROWS):
            chunk = tokens[first : first + CHUNK_ROWS]
            self.decode([(t, first + i, sequence, False) for i, t in enumerate(chunk)])

    def fill(self, prompt, batch, new):
        """The prompt's rows for every sequence; its last token is the first step's."""
        self.open(batch, len(prompt) + new)
        self.prompt(prompt[:-1], 0)
        for sequence in range(1, batch):  # copies K and V: memory is not shared
            self.api.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.begin([prompt[-1]] * batch, len(prompt) - 1)
        return {}

    def begin(self, tokens, position):
        self.next, self.position = tokens, position
        self.found = [[] for _ in tokens]

    def last_logits(self, sequence):
        import numpy as np

        found = self.api.llama_get_logits_ith(self.context, sequence)
        return np.ctypeslib.as_array(found, (self.config["vocabulary"],))

    def step(self):
        """One token for every sequence, greedily chosen."""
        self.decode([(token, self.position, i, True) for i, token in enumerate(self.next)])
        self.position += 1
        self.next = [int(self.last_logits(i).argmax()) for i in range(len(self.next))]
        for tokens, token in zip(self.found, self.next, strict=True):
            tokens.append(token)

    def steps(self, count):
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def logits(self):
        """Of the last step, as float32, sequence by sequence, into logits.bin."""
        with open(self.folder / "logits.bin", "wb") as file:
            for i in range(len(self.next)):
                file.write(self.last_logits(i).tobytes())
        return {"rows": len(self.next)}

    def result(self):
        return {"tokens": self.found}

    def generate(self, prompts, new):
        self.open(len(prompts), len(prompts[0]) + new)
        for sequence, prompt in enumerate(prompts):
            self.prompt(prompt[:-1], sequence)
        self.begin([prompt[-1] for prompt in prompts], len(prompts[0]) - 1)
        self.steps(new)
        return {"tokens": [[*p, *found] for p, found in zip(prompts, self.found, strict=True)]}
