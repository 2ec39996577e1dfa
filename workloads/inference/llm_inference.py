#!/usr/bin/env python3
"""Token generation: prefill and decode of a language model with a key-value cache.

    python3 workloads/inference/llm_inference.py --shape 1b --batch-size 8
    python3 workloads/inference/llm_inference.py --model FOLDER_OR_NAME --prompt "Once upon a time"

Each request is a batch of prompts that are read in one pass (time to first token) and then answered
token by token (time per output token), always as many as asked for: an end-of-text token ends
nothing, and the most likely token is taken. --shape has the sizes of a published model and random
weights, which is said and recorded; speed does not depend on the values. The cache is allocated
once; prefill and decode step are one CUDA graph each (--engine graph), the decode step compiled
before (--engine compile). Decode steps feed each other on the device: the host looks at the tokens
when they are there, and the device never waits for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, console, torch
from workloads.common.device import ComputeDevice, open_device
from workloads.common.engine import Pacer, compile_module, prepare_step, step_pool
from workloads.common.errors import (
    MIB,
    NotFiniteError,
    OutOfGpuMemoryError,
    UsageError,
    first_line,
)
from workloads.common.hub import (
    HubUnreachableError,
    hub_model_folder,
    load_from_folder,
    load_pretrained,
)
from workloads.common.results import sample_note, summarize_latency_ms
from workloads.inference.decode_attention import cache_name, registered_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

GIB = 2**30
# Layers, hidden size, attention heads, key-value heads, feed-forward size, vocabulary, and whether
# the output layer is the embedding (tied). Llama 3.2 1B with a vocabulary of 32,000; Llama 3.1 8B;
# SmolLM2-135M (each from the model's published config.json).
SHAPES = {
    "1b": (16, 2048, 32, 8, 8192, 32_000, True),
    "8b": (32, 4096, 32, 8, 14_336, 128_256, False),
    "smollm2": (30, 576, 9, 3, 1536, 49_152, True),
}
# Kept free for what a prefill holds beside weights and cache.
RESERVED_SHARE = 0.1
FIRST_TOKEN, OUTPUT_TOKEN = "ttft", "tpot"


def parse_arguments() -> argparse.Namespace:
    """Return the flags of this script."""
    parser = cli.workload_parser("Generate text with a language model and a key-value cache.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape", choices=tuple(SHAPES), default="1b",
        help="sizes of a published model, with random weights (default: 1b)",
    )  # fmt: skip
    model.add_argument(
        "--model", metavar="FOLDER_OR_NAME",
        help="a pretrained model instead: a folder of transformers, or a name on the hub",
    )  # fmt: skip
    flag = cli.flags(parser, "the job")
    flag("--batch-size", 8, "sequences generated at a time")
    flag("--prompt-tokens", 512, "length of each prompt")
    flag("--output-tokens", 128, "tokens to generate for each, the first included")
    flag("--requests", 8, "batches to answer, one after the other")
    length = "length of the key-value cache (default: prompt and output)"
    flag("--cache-tokens", None, length, type=cli.positive_int, metavar="N")
    layers = "with --shape: only so many layers, for a small card or a quick look"
    flag("--layers", None, layers, type=cli.positive_int, metavar="N")
    flag("--prompt", None, "with --model: this prompt, and its answer is shown", metavar="TEXT")
    args = parser.parse_args()
    if args.model is None and args.prompt is not None:
        parser.error("--prompt needs a --model that knows words; a --shape has random weights")
    if args.model is not None and args.layers is not None:
        parser.error("--layers is for a --shape")
    if args.output_tokens < 2:
        parser.error("--output-tokens: the time per output token needs 2 or more")
    if args.prompt is None:  # of a text, the length is known once the model is
        require_room(args, args.prompt_tokens)
    return args


def require_room(args: argparse.Namespace, prompt_tokens: int) -> int:
    """Return the length of the cache; raises `UsageError` where it holds no prompt and answer."""
    needed = prompt_tokens + args.output_tokens
    if args.cache_tokens is not None and args.cache_tokens < needed:
        raise UsageError(
            f"--cache-tokens {args.cache_tokens} holds no {prompt_tokens} prompt and "
            f"{args.output_tokens} output tokens; give {needed} or more"
        )
    return args.cache_tokens or needed


class TokenGeneration(client.Workload):
    """Answers a fixed number of requests; units of work are first tokens and further tokens."""

    name = "llm_inference"
    title = "Token generation"
    device: ComputeDevice
    _model: PreTrainedModel
    _tokenizer: PreTrainedTokenizerBase  # of a pretrained model

    def load(self) -> None:
        """Load or make the model, and allocate its cache."""
        self.device = open_device(self.args)
        args = self.args
        if args.model is None:
            self._model = self._random_model()
            self.warnings.append(
                f"random weights in the shape of {args.shape}: speed is that of the model, the "
                "text means nothing"
            )
        else:
            self._model = self._pretrained_model()
        self._model.eval().requires_grad_(False)
        if self._model._supports_sdpa:  # else its scores need more than keys, values and a mask
            self._model.set_attn_implementation(registered_attention())
        elif not self._model._can_compile_fullgraph:
            raise UsageError(
                f"transformers has no cache of fixed length for {type(self._model).__name__} of "
                f"{args.model}; name another model"
            )
        # Of a model that sees or hears as well, the part that writes.
        self._config = config = self._model.config.get_text_config(decoder=True)
        self._prompt = self._prompt_tokens(config.vocab_size)
        self._prompt_tokens_count = self._prompt.shape[1]
        self._cache_tokens = require_room(args, self._prompt_tokens_count)
        most = getattr(config, "max_position_embeddings", None)
        if args.model is not None and most is not None and self._cache_tokens > most:
            raise UsageError(
                f"{args.model} reads {most} tokens at most and {self._cache_tokens} are asked for; "
                "lower --prompt-tokens or --output-tokens"
            )
        self._cache = self._allocate_cache()
        place = self.device.torch_device
        self._tokens = torch.zeros(args.batch_size, 1, dtype=torch.int64, device=place)
        self._answer = torch.zeros(
            args.batch_size, args.output_tokens, dtype=torch.int64, device=place
        )
        self._written = torch.zeros(1, dtype=torch.int64, device=place)

    def _random_model(self) -> PreTrainedModel:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, hidden, heads, key_value_heads, feed_forward, vocabulary, tied = SHAPES[
            self.args.shape
        ]
        config = LlamaConfig(
            num_hidden_layers=self.args.layers or layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            intermediate_size=feed_forward,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            max_position_embeddings=131_072,
        )
        usual_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.device.model_dtype)
        try:
            with torch.device(self.device.torch_device):
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(usual_dtype)

    def _pretrained_model(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self._folder()
        fix = "name a folder with config.json, model.safetensors and a tokenizer"
        # Left open, transformers asks on standard input whether to run code of the folder's.
        self._tokenizer = load_from_folder(AutoTokenizer, folder, fix, trust_remote_code=False)
        model = load_pretrained(
            AutoModelForCausalLM, folder, fix, dtype=self.device.model_dtype,
            trust_remote_code=False,
        )  # fmt: skip
        # One that sees as well has attention of both kinds.
        if {part.is_causal for part in model.modules() if hasattr(part, "is_causal")} == {False}:
            raise UsageError(
                f"{self.args.model} is an encoder ({type(model).__name__}), which reads text and "
                "writes none; name a model that was trained to continue text"
            )
        return model.to(self.device.torch_device)

    def _folder(self) -> Path:
        """Return where the pretrained model lies; a name on the hub is downloaded once.

        Raises:
            UsageError: It is neither there nor to be downloaded.
        """
        name = self.args.model
        folder = Path(os.path.expanduser(name))
        if folder.is_dir():
            return folder.resolve()
        try:
            return hub_model_folder(name)
        except HubUnreachableError as error:
            raise UsageError(
                f"{name} is no folder and cannot be downloaded ({error}); name a folder with "
                "--model, or use --shape"
            ) from error

    def _prompt_tokens(self, vocabulary: int) -> torch.Tensor:
        """Return the prompts, (batch, tokens): one text for all, or random tokens for each."""
        args, place = self.args, self.device.torch_device
        if args.prompt is not None:
            tokens = self._tokenizer(args.prompt, return_tensors="pt").input_ids
            if not tokens.numel():
                raise UsageError("--prompt is no token to this model; give a word")
            if tokens.max() >= vocabulary:
                raise UsageError(
                    f"the tokenizer in {args.model} has more tokens than the {vocabulary} of its "
                    "model; put the model's own there"
                )
            return tokens.expand(args.batch_size, -1).contiguous().to(place)
        random = torch.Generator().manual_seed(args.seed)
        shape = (args.batch_size, args.prompt_tokens)
        return torch.randint(vocabulary, shape, generator=random).to(place)

    def _allocate_cache(self) -> StaticCache:
        """Allocate keys and values for every sequence.

        Raises:
            OutOfGpuMemoryError: They do not fit; the sentence says what would.
            UsageError: The model keeps something else than keys and values of each token.
            NotFiniteError: Its outputs are NaN or infinite.
        """
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        of_one_token = self._keys_and_values()
        self._kv_bytes_per_token = sum(part.nbytes for pair in of_one_token for part in pair)
        sequence_bytes = self._kv_bytes_per_token * self._cache_tokens
        free_bytes = self._free_bytes()
        self._sequences_that_fit = int((1 - RESERVED_SHARE) * free_bytes // sequence_bytes)
        if self._sequences_that_fit < self.args.batch_size:
            raise OutOfGpuMemoryError(
                f"the key-value cache of {self.args.batch_size} sequences of {self._cache_tokens} "
                f"tokens takes {self.args.batch_size * sequence_bytes / GIB:.1f} GiB and "
                f"{free_bytes / GIB:.1f} GiB are free: {self._sequences_that_fit} sequences would "
                "fit; lower --batch-size, --prompt-tokens or --output-tokens",
                {"where": "gpu" if self.device.is_cuda else "host", "free_mib": free_bytes / MIB},
            )
        cache = StaticCache(config=self._config, max_cache_len=self._cache_tokens)
        # A layer that attends to the last tokens alone gets them by its mask: the cache that
        # transformers has for it counts on the host, unseen by graphs and never reset.
        cache.layers = [StaticLayer(max_cache_len=self._cache_tokens) for _ in of_one_token]
        for layer, pair in zip(cache.layers, of_one_token, strict=True):
            keys, values = (
                part.expand(self.args.batch_size, -1, -1, -1)[:, :, :0] for part in pair
            )
            layer.lazy_initialization(keys, values)
        return cache

    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what each layer keeps of one token: no config says it the same way for all."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config)
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device.torch_device)
        try:
            with torch.no_grad():
                logits = self._model(token, **{cache_name(): cache}, use_cache=True).logits
            if not logits.isfinite().all():
                raise NotFiniteError(
                    f"the outputs of {self.args.model} are NaN or infinite: its weights are of a "
                    "training that diverged; name another --model"
                )
            return [(layer.keys, layer.values) for layer in cache.layers]
        except (AttributeError, TypeError) as error:
            raise UsageError(
                f"{self.args.model} keeps more than keys and values of its tokens, or reads them "
                f"in another way ({first_line(error)}); name a model whose layers are all attention"
            ) from error

    def _free_bytes(self) -> int:
        if self.device.is_cuda:
            return torch.cuda.mem_get_info()[0]
        import psutil

        return psutil.virtual_memory().available

    def warm_up(self) -> None:
        """Compile, capture, and answer a short request."""
        pool = step_pool(self.device)
        self._decoder = self._model
        self._prefill = prepare_step(self.device, self._read_prompts, pool=pool)
        self._decoder = compile_module(self.device, self._model)
        self._prefill()  # what the decode step goes on from
        self._decode = prepare_step(self.device, self._generate_one, pool=pool)
        self._answer_request(client.Recorder())

    def _read_prompts(self) -> None:
        """Fill the cache from the prompts and take the first token; one launch."""
        for layer in self._cache.layers:
            # The cache counts its length on the device, in a captured step too.
            layer.cumulative_length.zero_()
        self._written.zero_()
        self._take_token(self._model, self._prompt)

    def _generate_one(self) -> None:
        """Generate the next token of every sequence; one launch."""
        self._take_token(self._decoder, self._tokens)

    def _take_token(self, model: torch.nn.Module, inputs: torch.Tensor) -> None:
        with torch.inference_mode():
            logits = model(
                inputs, **{cache_name(): self._cache}, use_cache=True, logits_to_keep=1
            ).logits
            self._tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
            self._answer.index_copy_(1, self._written, self._tokens)
            self._written.add_(1)

    def run_job(self, recorder: client.Recorder) -> dict:
        """Answer every request and return the figures."""
        args = self.args
        begin_seconds = time.monotonic()
        first_seconds: list[float] = []
        output_seconds: list[float] = []
        with console.progress(args.requests, "requests") as bar:
            for _ in range(args.requests):
                first, others = self._answer_request(recorder)
                first_seconds.append(first)
                output_seconds += others
                bar.advance()
        elapsed_seconds = time.monotonic() - begin_seconds
        tokens = args.requests * args.batch_size * args.output_tokens
        prompt_tokens = args.batch_size * self._prompt_tokens_count
        seconds = {FIRST_TOKEN: first_seconds, OUTPUT_TOKEN: output_seconds}
        return {
            **{f"{what}_{name}": ms for what, values in seconds.items()
               for name, ms in summarize_latency_ms(values).items()},
            "output_tokens_per_second": tokens / elapsed_seconds,
            "prefill_tokens_per_second": prompt_tokens * len(first_seconds) / sum(first_seconds),
            "requests": args.requests,
            "output_steps": len(output_seconds),
            "kv_bytes_per_token": self._kv_bytes_per_token,
            "sequences_that_fit": self._sequences_that_fit,
            "elapsed_seconds": elapsed_seconds,
        }  # fmt: skip

    def _answer_request(self, recorder: client.Recorder) -> tuple[float, list[float]]:
        """Answer one batch; return seconds to the first token and of each further one.

        One step is launched ahead, so the device has work while the host takes note of a token.
        """
        recorder.check_stop()
        start_seconds = time.monotonic()
        self._prefill()
        self.device.synchronize()
        first_end_seconds = time.monotonic()
        recorder.unit(FIRST_TOKEN, start_seconds, first_end_seconds, latency="apart")
        steps = client.StepTimes(recorder, latency=True)
        pacer = Pacer(self.device, steps)
        for _ in range(self.args.output_tokens - 1):
            pacer.run(OUTPUT_TOKEN, self._decode)
        pacer.drain()
        return first_end_seconds - start_seconds, steps.seconds

    def resolve(self) -> list[str]:
        """Find or download the model."""
        return [] if self.args.model is None else ["--model", str(self._folder())]

    def settings(self) -> dict:
        """Return what was run."""
        args = self.args
        names = ("batch_size", "output_tokens", "requests", "seed")
        return {
            **{name: getattr(args, name) for name in names},
            "model": args.model,
            "shape": None if args.model else args.shape,
            "layers": self._config.num_hidden_layers,
            "weights": "pretrained" if args.model else "random",
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "prompt_tokens": self._prompt_tokens_count,
            "cache_tokens": self._cache_tokens,
            "engine": self.device.engine,
            "precision": self.device.precision,
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return the lines of the terminal summary."""
        args = self.args
        parameters = sum(p.numel() for p in self._model.parameters())
        model = args.model or f"shape {args.shape}, random weights"
        rows = [
            ("Model", f"{model}, {parameters / 1e9:.2f} billion parameters"),
            ("Requests", f"{args.requests} of {args.batch_size} sequences, "
             f"{self._prompt_tokens_count} + {args.output_tokens} tokens"),
            ("Time to first token", _percentiles(figures, FIRST_TOKEN, figures["requests"])),
            ("Time per output token", _percentiles(figures, OUTPUT_TOKEN, figures["output_steps"])),
            ("Throughput", f"{figures['output_tokens_per_second']:.0f} output tokens/s, "
             f"{figures['prefill_tokens_per_second']:.0f} prompt tokens/s while reading"),
            ("Key-value cache", f"{figures['kv_bytes_per_token']:,} bytes a token; "
             f"{figures['sequences_that_fit']:,} sequences of {self._cache_tokens} tokens fit"),
        ]  # fmt: skip
        if args.prompt is not None:
            text = self._tokenizer.decode(self._answer[0].tolist(), skip_special_tokens=True)
            rows.append(("Answer", " ".join(text.split())))
        return rows


def _percentiles(figures: dict, what: str, count: int) -> str:
    parts = (figures[f"{what}_{name}_ms"] for name in ("p50", "p95", "p99"))
    text = " / ".join("none" if ms is None else f"{ms:.2f}" for ms in parts)
    return f"p50 / p95 / p99 {text} ms {sample_note(count)}"


if __name__ == "__main__":
    cli.run_main(client.main_of(TokenGeneration, parse_arguments))
