"""The plugin in the real vLLM: same greedy tokens as the dense checkpoint, offline, sharded and served.

vLLM takes several GB, so its environment is not installed for the tests: they run where it is there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.errors import UserError
from sparsedeploy.reference import reference_model
from sparsedeploy.runtimes.environments import Environment, check, require
from sparsedeploy.runtimes.installation import process_environment
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.formats.test_transformers import save_sparse_model
from tests.hub import TOKEN, running_hub

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]

CANDIDATES = [[(7 * i + 3 * j) % 250 for j in range(8 + i % 4)] for i in range(24)]
NEW_TOKENS = 12
# Runs one model after another: vLLM takes many seconds to import.
PROGRAM = """
import json, os, sys, traceback
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

def run(folder, prompts, ranks):
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.2,
              tensor_parallel_size=ranks)
    options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]

if __name__ == "__main__":
    for folder, prompts, ranks, wish in json.loads(sys.argv[1]):
        os.environ["SPARSEDEPLOY_CPU"] = wish
        try:
            print("TOKENS", json.dumps(run(folder, prompts, ranks)), flush=True)
        except Exception:
            traceback.print_exc()
        cleanup_dist_env_and_memory()
        print("END OF RUN", flush=True)
"""


@pytest.fixture(scope="module")
def runtime() -> Environment:
    try:
        return require("vllm")
    except UserError as error:
        pytest.skip(f"{error} (several GB)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense checkpoint with zeros in every pattern, and its packed form."""
    folder = tmp_path_factory.mktemp("plugin")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_sparse_model(folder / "dense", "llama", torch.float32, **sizes)
    export_checkpoint(folder / "dense", "vllm", folder / "packed")
    return folder / "dense", folder / "packed"


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that transformers' dense model continues it with, greedily."""

    prompt: list[int]
    tokens: list[int]
    margin: float


def clearest(dense: Path) -> list[Case]:
    """The three prompts whose best tokens lead most clearly: rounding to 16 bits, as in a served model, keeps them."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    found = []
    for prompt in CANDIDATES:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        found.append(Case(prompt, output.sequences[0, len(prompt) :].tolist(), margin))
    return sorted(found, key=lambda case: case.margin)[-3:]


@pytest.fixture(scope="module")
def cases(folders: tuple[Path, Path]) -> list[Case]:
    return clearest(folders[0])


@pytest.fixture(scope="module")
def prompts(cases: list[Case]) -> list[list[int]]:
    return [case.prompt for case in cases]


@pytest.fixture(scope="module")
def expected(cases: list[Case]) -> list[list[int]]:
    return [case.tokens for case in cases]


def variables(runtime: Environment, **changes: str) -> dict[str, str]:
    """Packed kernels even where dense ones are faster, as they are for layers this small."""
    base = {"SPARSEDEPLOY_CPU": "packed", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return {**process_environment(runtime.runtime), **base, **changes}


@dataclass(frozen=True)
class Run:
    """What a model said in vLLM; ``tokens`` is None where it was refused."""

    tokens: list[list[int]] | None
    said: str


# A folder or a name on the hub, prompts, ranks, and what SPARSEDEPLOY_CPU says.
Job = tuple[Path | str, list[list[int]], int, str]


def run_offline(runtime: Environment, jobs: Sequence[Job], tmp_path: Path, **changes: str) -> list[Run]:
    """Run models one after another in one process, which may have others for the engine and its ranks."""
    program = tmp_path / "offline.py"
    program.write_text(PROGRAM)
    command = [str(runtime.python), str(program), json.dumps(jobs, default=str)]
    done = subprocess.run(
        command,
        env=variables(runtime, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    *runs, rest = done.stdout.split("END OF RUN\n")
    assert len(runs) == len(jobs), rest[-4000:]
    return [Run(tokens_of(said), said) for said in runs]


def tokens_of(said: str) -> list[list[int]] | None:
    lines = [line for line in said.splitlines() if line.startswith("TOKENS ")]
    return json.loads(lines[-1].removeprefix("TOKENS ")) if lines else None


@dataclass(frozen=True)
class Codes:
    """A checkpoint that pruning rounded to codes, packed, and the tokens that transformers gives for its dense form."""

    packed: Path
    cases: list[Case]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Codes]:
    """In int8 and int4; untied head. vLLM says once in a process what a shape and sparsity run as: two sparsities."""
    found = {}
    text = CalibrationOptions(data="stdlib", sequences=4, length=96)
    kinds: dict[Literal["int8", "int4"], float] = {"int8": 0.5, "int4": 0.6}
    for kind, sparsity in kinds.items():
        folder = tmp_path_factory.mktemp(kind)
        options = PruneOptions(sparsity=sparsity, method="sparsegpt", quantize=kind, calibration=text)
        prune(str(reference_model("tiny")), folder / "dense", options, RunOptions(device="cpu"))
        export_checkpoint(folder / "dense", "vllm", folder / "packed")
        found[kind] = Codes(folder / "packed", clearest(folder / "dense"))
    return found


@pytest.fixture(scope="module")
def broken(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The packed folder with one bit of a mask turned, and the name of its linear."""
    folder = shutil.copytree(folders[1], tmp_path_factory.mktemp("broken") / "packed")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_mask"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, name.removesuffix(".weight_mask")


@pytest.fixture(scope="module")
def offline(
    runtime: Environment,
    folders: tuple[Path, Path],
    prompts: list[list[int]],
    codes: dict[str, Codes],
    broken: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Run]:
    """What one process of vLLM makes of several folders: the engine runs in it."""
    jobs: dict[str, Job] = {wish: (folders[1], prompts, 1, wish) for wish in ("packed", "dense")}
    for kind, one in codes.items():
        jobs[kind] = (one.packed, [case.prompt for case in one.cases], 1, "packed")
    jobs["broken"] = (broken[0], CANDIDATES[:1], 1, "packed")
    place = tmp_path_factory.mktemp("offline")
    runs = run_offline(runtime, list(jobs.values()), place, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    return dict(zip(jobs, runs, strict=True))


def test_check(runtime: Environment) -> None:
    assert check("vllm").largest_difference < 1e-4


@pytest.mark.parametrize("wish", ["packed", "dense"])
def test_offline(offline: dict[str, Run], expected: list[list[int]], wish: str) -> None:
    run = offline[wish]
    assert run.tokens == expected, run.said[-4000:]
    assert f"runs {wish} (SPARSEDEPLOY_CPU says so)" in run.said


def test_by_its_name_on_a_hub(
    runtime: Environment,
    folders: tuple[Path, Path],
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    """vLLM fetches the packed folder itself; the engine has a process of its own.

    A folder of another version is refused before that process is started.
    """
    newer = shutil.copytree(folders[1], tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    with running_hub() as hub:
        hub.repos["me/packed"] = {path.name: path.read_bytes() for path in folders[1].iterdir() if path.is_file()}
        hub.commits["me/packed"] = ["0" * 40]
        changes = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        jobs: list[Job] = [(newer, CANDIDATES[:1], 1, "packed"), ("me/packed", prompts, 1, "packed")]
        refused, run = run_offline(runtime, jobs, tmp_path, HF_TOKEN=TOKEN, **changes)
        assert run.tokens == expected, run.said[-4000:]
        assert "runs packed" in run.said
        assert "EngineCore" in run.said
        assert any("model.safetensors" in request for request in hub.asked)
    assert refused.tokens is None
    assert "packed format version 2, this version of sparsedeploy reads 1" in refused.said
    assert "EngineCore" not in refused.said


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes(offline: dict[str, Run], codes: dict[str, Codes], kind: str) -> None:
    """Weights that pruning rounded run as their codes; the clearest tokens bear 8-bit activations."""
    run = offline[kind]
    assert run.tokens == [case.tokens for case in codes[kind].cases], run.said[-4000:]
    assert "runs packed" in run.said


def test_damage_is_refused_before_a_kernel_runs(offline: dict[str, Run], broken: tuple[Path, str]) -> None:
    run = offline["broken"]
    assert run.tokens is None
    assert broken[1].rpartition(".")[0] in run.said
    assert "weight_offsets has" in run.said


def test_two_ranks(
    runtime: Environment,
    folders: tuple[Path, Path],
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    """The same tokens; weights that cannot be cut are refused: half of 200 columns is not whole bytes of mask bits."""
    sizes = {"hidden_size": 128, "intermediate_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_sparse_model(tmp_path / "dense", "llama", torch.float32, **sizes)
    export_checkpoint(tmp_path / "dense", "vllm", tmp_path / "packed")
    cores = sorted(os.sched_getaffinity(0))
    binding = f"{cores[0]}|{cores[-1]}"
    jobs: list[Job] = [(tmp_path / "packed", CANDIDATES[:1], 2, "packed")]
    if len(cores) > 1:
        jobs.insert(0, (folders[1], prompts, 2, "packed"))
    changes = {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    *whole, refused = run_offline(runtime, jobs, tmp_path, **changes)
    assert refused.tokens is None
    assert "2 ranks would get 100 of 200 columns each" in refused.said
    if not whole:
        pytest.skip("needs two cores")
    assert whole[0].tokens == expected, whole[0].said[-4000:]


def test_worker(
    runtime: Environment, folders: tuple[Path, Path], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """The worker protocol: generated tokens, and log-probabilities whose best token is the one generated."""
    with runtime.worker(timeout=600) as worker:
        worker.call("load", folder=str(folders[1]), cores=1, prompt_length=48, new_tokens=16, chunk=16, batch=2)
        events = list(
            worker.stream(
                "generate", model=1, prompt=prompts[0], new_tokens=NEW_TOKENS, temperature=0.0, seed=0, stop=[]
            )
        )
        assert [event["token"] for event in events if "token" in event] == expected[0]
        timing = worker.call("measure", model=1, prompt=prompts[0], decode_tokens=3)
        assert len(timing["decode_seconds"]) == 3
        timing = worker.call("measure", model=1, prompt=prompts[0], decode_tokens=3, batch=2)
        assert len(timing["decode_seconds"]) == 3
        reply = worker.call("logits", model=1, prompt=prompts[0], tokens=expected[0][:4], folder=str(worker.folder))
        arrays = worker.arrays(reply)
        found = [int(arrays["prefill"][-1].argmax()), *arrays["decode"].argmax(axis=1).tolist()]
        assert found == expected[0][:5]


def test_served_without_a_flag(
    runtime: Environment, folders: tuple[Path, Path], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(runtime.python.parent / "vllm"), "serve", str(folders[1]), "--port", str(port)]
    log = folders[1].parent / "serve.log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            command, env=variables(runtime), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        body = {"model": str(folders[1]), "prompt": prompts, "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            choices = json.load(reply)["choices"]
        assert [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])] == expected
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not answer: {log.read_text()[-4000:]}")
