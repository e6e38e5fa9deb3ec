"""Peers quantise as their papers say; a run resumes, names what is missing, broken or failed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apiq_peft import PackedLinear
from apiq_peft.quantizer import Quantizer
from benchmarks import _quantization, quantize
from benchmarks import _quantizer_peers as peers
from benchmarks._process import alone
from benchmarks._quantization import PROTOCOLS, Job, Protocol, Texts, finetune, measure, split
from benchmarks._quantizer_walk import assemble, walk
from benchmarks._quantizers import (
    BEST,
    FULL_BITS,
    FULL_PRECISION,
    METHODS,
    Made,
    Method,
    Task,
    targets,
)
from benchmarks._report import read_all
from kernels_peft.packing import FORMATS
from recipes_peft import tiny

GROUP = 16
PEERS = {name for name, method in METHODS.items() if method.needs and peers.missing(method.needs)}
HERE = [name for name in METHODS if name not in PEERS]


# ---- one weight ---------------------------------------------------------------------------------


def _weight_and_inputs() -> tuple[Tensor, Tensor]:
    mixing = torch.randn(64, 64) / 8 + torch.eye(64)  # inputs are correlated, as in a model
    return torch.randn(32, 64) / 8, torch.randn(512, 64) @ mixing


def _output_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (weight - rounded).t()).norm() / (inputs @ weight.t()).norm())


@pytest.mark.parametrize("bits", FORMATS)
def test_rtn_spans_the_whole_range_of_each_group(bits: int) -> None:
    weight, _ = _weight_and_inputs()
    codes = peers.rtn(weight, bits, GROUP)
    scale = codes.scales.float().unsqueeze(-1)
    error = (codes.dequantize() - weight).unflatten(1, (-1, GROUP)).abs()
    # half a step, and as much again where rounding the zero point moved an end of the range
    assert bool((error <= scale * 1.01).all())
    clipped = Quantizer(weight, bits, GROUP).codes(weight)
    assert bool((codes.scales > clipped.scales).all())


@pytest.mark.parametrize("bits", FORMATS)
def test_gptq_makes_less_error_at_the_outputs_than_rounding(bits: int) -> None:
    weight, inputs = _weight_and_inputs()
    rounded = peers.rtn(weight, bits, GROUP).dequantize()
    codes = peers.gptq(weight, inputs.t() @ inputs, bits, GROUP)
    assert int(codes.codes.max()) < 2**bits
    error = _output_error(weight, codes.dequantize(), inputs)
    assert error < 0.9 * _output_error(weight, rounded, inputs)


def test_gptq_of_inputs_without_correlation_is_rounding() -> None:
    weight, _ = _weight_and_inputs()
    codes = peers.gptq(weight, torch.eye(64), 2, GROUP)
    for name, expected in vars(peers.rtn(weight, 2, GROUP)).items():
        assert torch.equal(getattr(codes, name), expected), name


def test_gptq_leaves_out_inputs_that_are_always_zero() -> None:
    weight, inputs = _weight_and_inputs()
    inputs[:, 5] = 0
    codes = peers.gptq(weight, inputs.t() @ inputs, 3, GROUP)
    assert not codes.dequantize()[:, 5].any()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [4, 64])
def test_loftq_is_nearer_to_the_weight_than_rounding_then_an_svd(rank: int, turned: bool) -> None:
    weight, _ = _weight_and_inputs()
    weight = weight.reshape(64, 32) if turned else weight
    rounded = peers.rtn(weight, 2, GROUP).dequantize()
    left, values, right = torch.linalg.svd(weight - rounded, full_matrices=False)
    once = rounded + (left * values)[:, :rank] @ right[:rank]
    found = peers.loftq(weight, 2, GROUP, rank)
    assert found.lora_A is not None
    assert found.lora_A.shape == (min(rank, 32), weight.shape[1])
    error = (weight - found.weight()).norm()
    if rank < 32:
        assert error < (weight - once).norm() < (weight - rounded).norm()
    else:  # of full rank: nothing is left
        assert error < 1e-4


@pytest.mark.parametrize("name", ["hqq", "gptqmodel"])
def test_a_peer_from_a_package_beats_rounding(name: str) -> None:
    pytest.importorskip(name, exc_type=ImportError)
    weight, inputs = _weight_and_inputs()
    rounded = peers.rtn(weight, 3, GROUP).dequantize()
    if name == "hqq":  # which lessens outliers of the weight's error, not its square
        found = peers.hqq(weight, 3, GROUP)
        assert (weight - found).abs().sqrt().sum() < (weight - rounded).abs().sqrt().sum()
    else:
        found = peers.gptqmodel(weight, [inputs], 3, GROUP).dequantize()
        error = _output_error(weight, found, inputs)
        assert error < 0.9 * _output_error(weight, rounded, inputs)


# ---- a model ------------------------------------------------------------------------------------


@pytest.fixture
def texts() -> Texts:
    text = "\n".join(example.prompt + example.answer for example in tiny.examples(200))
    return split(tiny.tokenizer(), text, PROTOCOLS["tiny"])


def _spoil(task: Task) -> Made:
    task.model.model.norm.weight.data += 1
    return METHODS["rtn"].make(task)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return str(folder)


def _task(texts: Texts, bits: int = 2, rank: int = 8, method: str = "rtn") -> Task:
    settings = METHODS[method].settings(1)
    model = tiny.model()
    return Task(model, targets(model), texts.calibration, bits, 64, rank, settings)


def _logits(model: Any, texts: Texts) -> Tensor:
    with torch.no_grad():
        return model(texts.calibration).logits


@pytest.mark.parametrize("name", HERE)
def test_a_method_gives_a_lora_on_every_layer(name: str, texts: Texts) -> None:
    method = METHODS[name]
    bits = method.widths[-1]
    task = _task(texts, bits, method=name)
    original = _logits(tiny.model(), texts)
    made = method.make(task)
    adapted = [m for m in made.model.modules() if hasattr(m, "lora_A")]
    packed = [m for m in made.model.modules() if isinstance(m, PackedLinear)]
    assert len(adapted) == len(task.names)
    assert len(packed) == (len(task.names) if made.bits is None else 0)
    assert all(layer.bits == bits for layer in packed)
    logits = _logits(made.model, texts)
    with made.model.disable_adapter():
        assert logits.equal(_logits(made.model, texts)) != method.adapter
    if name == FULL_PRECISION:
        assert logits.equal(original)
    elif bits == 4:  # a random model cannot say more
        assert (logits - original).norm() < 0.5 * original.norm()


def test_layers_are_solved_on_inputs_of_the_quantised_layers_before(texts: Texts) -> None:
    task = _task(texts)
    exact = tiny.model()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def solve(weights: dict[str, Tensor], full: list[Tensor], quantized: list[Tensor]) -> Any:
        found = {}
        for name, weight in weights.items():
            seen[f"{len(seen)} {name}"] = full[0].clone(), quantized[0].clone()
            found[name] = peers.Found(peers.rtn(weight, 2, 64))
        return found

    model = assemble(task.model, walk(task.model, task.samples, task.names, solve), task.config)
    order = [name.partition(" ")[2].rpartition(".")[2] for name in seen]
    block = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert order == block * 2
    last = task.names[-1]
    expected = [
        _input_of(exact, last, task.samples[:1]),
        _input_of(model.base_model.model, last, task.samples[:1]),
    ]
    for found, wanted in zip(list(seen.values())[-1], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    first = next(iter(seen.values()))
    assert first[0].equal(first[1])


@pytest.mark.parametrize("name", ["rtn", "gptq + closed form", "best", FULL_PRECISION])
def test_the_first_blocks_alone_can_be_quantised(name: str, texts: Texts) -> None:
    model = tiny.model()
    names = targets(model, 1)
    bits = METHODS[name].widths[-1]
    settings = METHODS[name].settings(1)
    made = METHODS[name].make(Task(model, names, texts.calibration, bits, 64, 4, settings))
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in made.model.named_modules()
        if hasattr(m, "lora_A")
    }
    assert adapted == set(names)
    assert len(names) == 7
    assert all(name.startswith("model.layers.0.") for name in names)


def _input_of(model: Any, name: str, sample: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(sample)
    handle.remove()
    return inputs[0]


def test_epochs_of_a_size_replace_those_of_a_preset_that_trains() -> None:
    trained, solved = METHODS[BEST], METHODS["fast"]
    assert trained.settings(3).epochs == 3  # type: ignore[union-attr]
    assert solved.settings(3).epochs == 0  # type: ignore[union-attr]
    assert trained.settings(None).epochs > 3  # type: ignore[union-attr]
    assert METHODS["rtn"].settings(3) is None


def test_texts_do_not_overlap() -> None:
    how = replace(PROTOCOLS["tiny"], samples=2, steps=3, batch=2, windows=4, length=8)
    text = "".join(chr(ord("a") + n // 26) + chr(ord("a") + n % 26) for n in range(200))
    texts = split(tiny.tokenizer(), text, how)
    read = ["".join(map(chr, _bytes(part))) for part in vars(texts).values()]
    assert read[0] + read[1] == text[:64]
    assert read[2] == text[200:232]
    assert texts.finetuning.shape == (6, 8)
    with pytest.raises(ValueError, match="give a longer text"):
        split(tiny.tokenizer(), text[:100], how)


def _bytes(part: Tensor) -> bytes:
    return tiny.tokenizer().decode(part.flatten()).encode()


def test_finetuning_lowers_the_loss_and_trains_adapters_alone(texts: Texts) -> None:
    how = replace(PROTOCOLS["tiny"], steps=20, rate=1e-2)
    made = METHODS["rtn"].make(_task(texts))
    windows = texts.calibration.repeat(10, 1)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    loss = made.model(texts.calibration, labels=texts.calibration).loss
    finetune(made.model, windows, how)
    assert made.model(texts.calibration, labels=texts.calibration).loss < loss - 0.1
    changed = {n for n, p in made.model.named_parameters() if not p.equal(before[n])}
    assert changed
    assert all(".lora_" in name for name in changed)


def test_a_measurement_counts_the_bits_of_adapters_where_they_are(place: str, texts: Texts) -> None:
    job = Job(place, "rtn", 2, 8, PROTOCOLS["tiny"], texts, "cpu")
    outcomes = {name: measure(replace(job, method=name)) for name in ("rtn", "loftq")}
    full = measure(replace(job, method=FULL_PRECISION, bits=FULL_BITS))
    assert not [o.wrong for o in (*outcomes.values(), full) if o.wrong]
    found = {
        (name, mode): value
        for name, outcome in (*outcomes.items(), (FULL_PRECISION, full))
        for mode, metric, _, value in outcome.facts
        if metric == "bits"
    }
    shapes = [(64, 64)] * 4 + [(64, 128)] * 3
    lora = 16 * 8 * sum(k + n for k, n in shapes) / sum(k * n for k, n in shapes)
    assert found["rtn", "base"] == found["rtn", "quantised"] == pytest.approx(2.28125)
    assert found["loftq", "quantised"] == pytest.approx(2.28125 + lora)
    assert found["rtn", "finetuned"] == found["loftq", "finetuned"] == pytest.approx(2.28125 + lora)
    assert found[FULL_PRECISION, "base"] == 16


def test_without_steps_nothing_is_finetuned(run: Run, place: str, texts: Texts) -> None:
    how = replace(PROTOCOLS["tiny"], steps=0)
    outcome = measure(Job(place, "loftq", 2, 4, how, texts, "cpu"))
    assert outcome.wrong == []
    assert {mode for mode, *_ in outcome.facts} == {"base", "quantised"}
    _, summary = run("--only", "rtn$", "--steps", "0")
    assert "finetuned" not in {r.mode for r in read_all(Path(summary["csv"]))}
    with pytest.raises(SystemExit):
        run("--steps", "-1")


def test_a_method_that_changes_what_it_must_not_is_wrong(
    place: str, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "spoils", Method(_spoil))
    outcome = measure(Job(place, "spoils", 2, 4, PROTOCOLS["tiny"], texts, "cpu"))
    assert outcome.wrong == ["model.norm.weight was changed"]


def test_the_digest_of_a_job_tells_settings_apart(place: str, texts: Texts) -> None:
    job = Job(place, BEST, 2, 4, PROTOCOLS["tiny"], texts, "cpu")
    same = replace(job, how=replace(job.how, bits=(2, 3), ranks=(4, 8)))
    assert job.digest() == same.digest()
    others = [
        replace(job, rank=8),
        replace(job, method="apiq-bw"),
        replace(job, how=replace(job.how, epochs=2)),
        replace(job, how=replace(job.how, rate=1e-4)),
        replace(job, texts=replace(texts, evaluation=texts.evaluation + 1)),
    ]
    assert len({job.digest(), *(other.digest() for other in others)}) == 6


# ---- the command --------------------------------------------------------------------------------

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(e.prompt + e.answer for e in tiny.examples(200)))

    def call(*more: str) -> tuple[int, Any]:
        fixed = ("--size", "tiny", "--device", "cpu", "--model", place, "--text", str(text))
        code = quantize.main([*fixed, "--out", str(tmp_path / "out"), *more])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_the_command_writes_rows_plot_and_json(run: Run) -> None:
    code, summary = run("--only", "full|rtn$|loftq|best", "--bits", "2", "3", "--rank", "4")
    assert (code, summary["wrong"], summary["failed"]) == (0, [], {})
    rows = read_all(Path(summary["csv"]))
    assert len(rows) == summary["rows"]
    assert {(r.provider, r.case.rpartition(", ")[2]) for r in rows} == {
        (FULL_PRECISION, "16 bits"),
        *((name, f"{bits} bits") for name in ("rtn", "loftq", BEST) for bits in (2, 3)),
    }
    assert {(r.mode, r.metric) for r in rows} >= {
        (mode, metric) for mode in ("quantised", "finetuned") for metric in ("perplexity", "time")
    }
    costs = {r.provider: r.p50 for r in rows if r.metric == "cost"}
    assert costs.keys() == {BEST}
    assert costs[BEST] > 0
    assert Path(summary["png"]).read_bytes().startswith(b"\x89PNG")
    assert [aim["of"] for aim in summary["aims"]] == [0, 0, 0, 2, 2]  # others were not run


def test_a_run_goes_on_where_it_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    inner = _quantization.measure
    monkeypatch.setattr(quantize, "measure", lambda job: measured.append(job.method) or inner(job))
    _, first = run("--only", "^rtn$")
    _, second = run("--only", "^rtn$|loftq", "--resume")
    assert measured == ["rtn", "loftq"]
    assert second["rows"] == 2 * first["rows"] == len(read_all(Path(second["csv"])))
    run("--only", "^rtn$")
    assert measured == ["rtn", "loftq", "rtn"]
    run("--only", "^rtn$", "--resume", "--rank", "8")
    assert measured == ["rtn", "loftq", "rtn", "rtn"]


def test_a_method_that_fails_or_is_missing_does_not_end_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: Task) -> Made:
        raise ValueError("no such luck")

    for name, method in {"a fails": Method(fail), "a lacks": Method(fail, needs="no_such")}.items():
        monkeypatch.setitem(METHODS, name, method)
    monkeypatch.setitem(METHODS, "a rtn", METHODS["rtn"])
    code, summary = run("--only", "^a ")
    assert code == 1
    assert summary["failed"] == {"a fails, 2 bits, rank 4": "ValueError: no such luck"}
    assert summary["missing"] == ["no_such"]
    assert {r.provider for r in read_all(Path(summary["csv"]))} == {"a rtn"}


def test_what_broke_a_rule_is_named_and_measured_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "spoils", Method(_spoil))
    for more in ((), ("--resume",)):
        code, summary = run("--only", "spoils", *more)
        assert code == 1
        assert summary["wrong"] == ["spoils, 2 bits, rank 4: model.norm.weight was changed"]
    rows = read_all(Path(summary["csv"]))
    assert [r.metric for r in rows].count("wrong") == 2


def test_a_process_of_its_own_gives_its_answer_or_how_it_ended() -> None:
    assert alone(abs, -1) == 1
    with pytest.raises(RuntimeError, match="TypeError"):
        alone(abs, "x")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        alone(os._exit, 3)


def test_every_size_is_a_protocol() -> None:
    assert all(isinstance(how, Protocol) for how in PROTOCOLS.values())
    assert not PROTOCOLS["tiny"].own_process
