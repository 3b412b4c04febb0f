"""The examples that each command's help starts with: what people copy."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("sparsedeploy demo", "sparsedeploy demo --model smollm2 -s 0.6 -o my-demo"),
    "import": (
        "sparsedeploy import model.Q4_K_M.gguf -o MODEL",
        "sparsedeploy import model.Q8_0.gguf -o MODEL --dtype bfloat16",
    ),
    "deploy": (
        "sparsedeploy deploy MODEL --for cpu --within 5% -o deployed",
        "sparsedeploy deploy MODEL --for llamacpp --data train.txt --held-out test.txt --dry-run",
    ),
    "prune": (
        "sparsedeploy prune MODEL -o sparse --sparsity 0.7 --method alps --allocation dlp --data my-text.txt",
        "sparsedeploy prune MODEL -o sparse-2-4 --pattern 2:4 --method wanda --data my-text.txt --resume",
    ),
    "recover": (
        "sparsedeploy recover pruned -o recovered --method sparse-lora --train-data my-text.txt",
        "sparsedeploy recover pruned -o recovered --method elsa --train-data my-text.txt --dtype float32 --resume",
    ),
    "allocate": (
        "sparsedeploy allocate MODEL -o plan.json --sparsity 0.7 --allocation dlp --data my-text.txt",
        "sparsedeploy allocate MODEL -o plan.json --sparsity 0.7 --allocation alphapruning",
    ),
    "inspect": (
        "sparsedeploy inspect pruned --mask mask.svg",
        "sparsedeploy inspect pruned --against MODEL",
    ),
    "eval": (
        "sparsedeploy eval pruned --data held-out.txt",
        "sparsedeploy eval pruned --tasks papers --batch-size 8 -o quality.json",
    ),
    "card": (
        "sparsedeploy card pruned --eval quality.json",
        "sparsedeploy card pruned --eval pruned.json --eval dense.json",
    ),
    "export": (
        "sparsedeploy export pruned --target llamacpp --quantize q8_0 -o artifact",
        "sparsedeploy export pruned --target deepsparse -o artifact",
    ),
    "runtime list": ("sparsedeploy runtime list", "sparsedeploy runtime list --json"),
    "runtime install": (
        "sparsedeploy runtime install llamacpp",
        "sparsedeploy runtime install deepsparse --with server",
    ),
    "runtime check": ("sparsedeploy runtime check llamacpp", "sparsedeploy runtime check deepsparse --json"),
    "runtime remove": ("sparsedeploy runtime remove vllm", "sparsedeploy runtime remove onnxruntime"),
    "generate": (
        'sparsedeploy generate artifact "Once upon a time"',
        'sparsedeploy generate artifact "def main(" --max-new-tokens 64 --temperature 0.7',
    ),
    "serve": (
        "sparsedeploy serve artifact --port 8000",
        "sparsedeploy serve artifact --host 0.0.0.0 --port 8000 --length 2048",
    ),
    "bench": (
        "sparsedeploy bench pruned-ds --baseline dense-ds --html speed.html",
        "sparsedeploy bench --compare old.json new.json --threshold 5%",
    ),
    "sweep": (
        "sparsedeploy sweep grid.yaml -o cells --jobs 2",
        "sparsedeploy sweep grid.yaml -o cells --pick 'smallest within 5 % of dense'",
    ),
    "push": (
        "sparsedeploy push pruned me/model-70",
        "sparsedeploy push artifact me/model-70-gguf --private",
    ),
}
