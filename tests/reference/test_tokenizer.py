"""The reference tokenizer: exact round trips, and the same merges in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsedeploy.reference.corpus import stdlib_documents
from sparsedeploy.reference.tokenizer import save_tokenizer, train_tokenizer

VOCABULARY = 400
SCRIPT = f"""
import hashlib
from sparsedeploy.reference.corpus import stdlib_documents
from sparsedeploy.reference.tokenizer import train_tokenizer
tokenizer = train_tokenizer(stdlib_documents("validation"), {VOCABULARY})
print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(stdlib_documents("validation"), VOCABULARY)


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x\n", "\ttabs \t and  spaces   \n\n\n", "caf\xe9 \u4f60\u597d \U0001f600 \x00", "", " "],
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_come_first_and_the_vocabulary_is_full(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == VOCABULARY


def test_training_is_the_same_in_another_process_and_with_other_threads(tokenizer: PreTrainedTokenizerFast) -> None:
    here = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    again = train_tokenizer(stdlib_documents("validation"), VOCABULARY)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == here


def test_saved_folder_loads_and_encodes_alike(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = stdlib_documents("test")[0]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.pad_token_id == tokenizer.pad_token_id
