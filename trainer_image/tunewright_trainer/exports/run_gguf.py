"""What llama.cpp gives with a GGUF file. It runs in a process of its own, so that nothing that it does can end the training's.

answer = ask(path, prompts=[[1, 2, 3]], texts=["one two"], plain=4, threads=2)
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

CHOICES: Final = 100  # most likely tokens that are asked for after each prompt
LIMIT_SECONDS: Final = 3600


class Answer(NamedTuple):
    """For each prompt the log probabilities of the likeliest next tokens, by id; for each text its tokens."""

    log_probabilities: list[dict[int, float]]
    tokens: list[list[int]]


def ask(path: Path, *, prompts: list[list[int]], texts: list[str], plain: int, threads: int) -> Answer:
    """Load ``path`` in llama.cpp and ask it. ``plain`` is a token whose text is whole characters. Raises ChildProcessError with llama.cpp's last words."""
    wanted = {"path": str(path), "prompts": prompts, "texts": texts, "plain": plain, "threads": threads}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(wanted), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if " E " in line]
        raise ChildProcessError((errors or done.stderr.splitlines() or ["it died"])[0][:300])
    found = json.loads(done.stdout.splitlines()[-1])
    return Answer([{int(token): value for token, value in one.items()} for one in found["log_probabilities"]], found["tokens"])


def _main() -> None:
    wanted = json.load(sys.stdin)
    server = _server(wanted)
    found = {
        "log_probabilities": [_next(server, prompt, plain=wanted["plain"]) for prompt in wanted["prompts"]],
        "tokens": [_tokens(server, text) for text in wanted["texts"]],
    }
    print("\n" + json.dumps(found), flush=True)


def _server(wanted: dict[str, Any]) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = wanted["path"]
    parameters.n_ctx = 2 + max(map(len, wanted["prompts"]))
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 1  # errors
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = wanted["threads"]
    # In full precision, as the probabilities are compared with the trained model's.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def _next(server: Any, prompt: list[int], *, plain: int) -> dict[int, float]:
    # An answer whose text is no whole character, or the end, would come without probabilities: these are of before the bias.
    options = {"max_tokens": 1, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True, "logit_bias": [[plain, 1e6]]}
    answer = server.handle_completions({"prompt": prompt, "n_probs": CHOICES, **options})
    choices = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {choice["id"]: choice["logprob"] for choice in choices}


def _tokens(server: Any, text: str) -> list[int]:
    import httpx

    reply = httpx.post(
        f"{server.listening_address}/tokenize",
        json={"content": text, "add_special": False, "parse_special": False},
        timeout=60,
        trust_env=False,  # no proxy leads to this process
    )
    tokens: list[int] = reply.raise_for_status().json()["tokens"]
    return tokens


if __name__ == "__main__":
    _main()
