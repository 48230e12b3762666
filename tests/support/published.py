"""Model folders as their makers publish them: end tokens, chat templates, special tokens; tiny otherwise.

Ids are smaller than the real ones and in their order: 256 bytes, then the special tokens. What the
generation configs name: Qwen's base models EOS alone, although their template writes `<|im_end|>`
(QwenLM/Qwen3 issues 927 and 1422); Llama's and Gemma's base models come without a template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Reporter, Reporters
from mergeopd.storage.run_folder import RunFolder

QWEN = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN3 = """
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
    {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
{%- endfor %}"""

_QWEN25 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")
_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


@dataclass(frozen=True)
class Published:
    """`plain` are added tokens that decoding keeps; they follow the special ones."""

    model_type: str
    special: tuple[str, ...]
    eos_token: str
    end_tokens: tuple[str, ...]
    template: str | None
    bos_token: str | None = None
    plain: tuple[str, ...] = ()


_THINK = ("<tool_response>", "</tool_response>", "<think>", "</think>")
FOLDERS = {
    "qwen2.5-base": Published("qwen2", _QWEN25, "<|endoftext|>", ("<|endoftext|>",), QWEN),
    "qwen2.5": Published("qwen2", _QWEN25, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), QWEN),
    "qwen3-base": Published("qwen3", _QWEN25, "<|im_end|>", ("<|endoftext|>",), QWEN3, plain=_THINK),
    "qwen3": Published("qwen3", _QWEN25, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), QWEN3, plain=_THINK),
    "llama-3.1-base": Published(
        "llama", _LLAMA, "<|end_of_text|>", ("<|end_of_text|>",), None, "<|begin_of_text|>"
    ),
    "llama-3.1": Published(
        "llama",
        _LLAMA,
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        LLAMA,
        "<|begin_of_text|>",
    ),
    "gemma-3-base": Published("gemma3_text", _GEMMA, "<eos>", ("<eos>",), None, "<bos>"),
    "gemma-3": Published("gemma3_text", _GEMMA, "<eos>", ("<eos>", "<end_of_turn>"), GEMMA, "<bos>"),
    "mistral": Published("mistral", _MISTRAL, "</s>", ("</s>",), MISTRAL, "<s>"),
}


def write_published(folder: Path, name: str, *, beyond: Sequence[str] = (), rows: int | None = None) -> Path:
    """A folder like that of `name`, with the special tokens `beyond` added behind its own.

    The head has `rows` rows; by default one for every id but those `beyond` (Gemma 3's `<image_soft_token>`).
    """
    model = FOLDERS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(model.special))
    tokenizer.add_tokens(list(model.plain))
    num_ids = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(list(beyond))
    ends = [tokenizer.token_to_id(token) for token in model.end_tokens]
    config = AutoConfig.for_model(
        model.model_type,
        vocab_size=rows or num_ids,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=ends[0],
        pad_token_id=None,
    )
    torch.manual_seed(num_ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": model.eos_token, "bos_token": model.bos_token, "chat_template": model.template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in names.items() if v}))
    generation = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_project(folder: Path, student: str, teacher: str, recipe: dict[str, object] | None = None) -> Path:
    """The recipe of a project with a folder `student` and a folder `teacher`, written if not there."""
    folder.mkdir(exist_ok=True)
    for name, of in (("student", student), ("teacher", teacher)):
        if not (folder / name).exists():
            write_published(folder / name, of)
    (folder / "teacher.yaml").write_text(json.dumps({"card": 1, "name": "t", "model": "teacher"}))
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p, "answer": "a"}) for p in ("ab", "c")))
    document = {
        "recipe": 1,
        "name": "job",
        "threads": 1,
        "student": {"model": "student"},
        "teachers": {"t": "teacher.yaml"},
        "prompts": [{"source": "p.jsonl", "domain": "d", "teachers": "t"}],
        "rollout": {"max_new_tokens": 8},
        "phases": [{"name": "merge", "updates": 1, "loss": "reverse_kl", "prompts_per_round": 2}],
        "optimizer": {"lr": 0.01},
        "output": "run",
        **(recipe or {}),
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(document, indent=1))
    return path


def run_to_the_end(recipe: Path, *overrides: str, reporter: Reporter | None = None) -> RunFolder:
    """Train, export and measure on one CPU."""
    inputs = preflight(recipe, overrides)
    folder = RunFolder(Path(inputs.plan.output))
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    parts = load_models(inputs, Machine(torch.device("cpu"), SingleProcess()))
    trainer = build(parts, reporter=reporter or Reporters(), clock=Clock(), interrupt=Interrupt())
    trainer.run(Progress(), None)
    return folder
