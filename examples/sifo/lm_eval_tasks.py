"""The tested chains as tasks of lm-eval: a YAML file for each set, a group, and what they name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import verifier
import yaml
from prompts import SYSTEM, answer, prompt
from samples import SifoSample

from recipes_peft import report

__all__ = ["export"]

METRICS = ("sample_acc", "instr_acc", "depth")


class _Function(str):
    """A function in a YAML file, as lm-eval writes it: `!function module.name`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


def export(folder: Path, tests: Mapping[str, Sequence[SifoSample]], max_new_tokens: int) -> None:
    """Write the sets to `folder`; lm-eval takes it as `--include_path`, the group is `sifo`.

    Scores are those of the strict mode. Answers end at the model's own end of turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"sifo_{name.replace(' ', '_')}": samples for name, samples in tests.items()}
    for name, samples in names.items():
        rows = [
            {
                "task": sample.task,
                "golds": list(sample.golds),
                "prompt": prompt(sample),
                "target": answer(sample.golds),
            }
            for sample in samples
        ]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        report.write(folder / f"{name}.jsonl", f"{lines}\n".encode())
        write_yaml(folder / f"{name}.yaml", _task(folder, name, max_new_tokens))
    mean = [
        {"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in METRICS
    ]
    write_yaml(
        folder / "sifo.yaml",
        {"group": "sifo", "task": list(names), "aggregate_metric_list": mean},
    )
    shutil.copy(verifier.__file__, folder / "verifier.py")


def _task(folder: Path, name: str, max_new_tokens: int) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "description": f"{SYSTEM}\n\n",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "max_gen_toks": max_new_tokens,
        },
        "process_results": _Function("verifier.process_results"),
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in METRICS
        ],
        "metadata": {"version": 1.0},
    }


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML file that appears whole or not at all."""
    report.write(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False).encode())
