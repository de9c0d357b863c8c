"""Probes: small sets of prompts, shipped in ``data/probes``, that show whether a policy knows who it is and writes JSON
when asked to."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from align.data.records import Prompt
from align.evaluation.tasks.task import Grades, Task, TaskMeasure
from align.recipe.kinds.tasks import ProbeTask
from align.scoring.rules import is_json

OTHERS = (
    *(
        "ChatGPT",
        "GPT-?[345][\\w.]*",
        "OpenAI",
        "Claude",
        "Anthropic",
        "Gemini",
        "Bard",
        "Google",
        "DeepMind",
        "Llama",
        "Meta AI",
        "Meta",
    ),
    *("Copilot", "Microsoft", "Mistral", "Grok", "xAI", "MiniMax", "Hugging ?Face", "SmolLM\\d?"),
    *(
        "DeepSeek",
        "深度求索",
        "Qwen",
        "Tongyi",
        "Alibaba",
        "通义千问",
        "通义",
        "阿里巴巴",
        "ERNIE",
        "Baidu",
        "文心一言",
        "百度",
    ),
    *("Kimi", "Moonshot", "月之暗面", "Doubao", "ByteDance", "豆包", "字节跳动", "Hunyuan", "Tencent", "混元", "腾讯"),
    *(
        "iFlytek",
        "讯飞星火",
        "科大讯飞",
        "ChatGLM",
        "GLM-?\\d[\\w.]*",
        "Zhipu",
        "Z\\.ai",
        "智谱清言",
        "智谱",
        "Baichuan",
        "百川",
    ),
)
"""Names of other companies' assistants and of the companies, as regular expressions."""

_NAMES = regex.compile("|".join(rf"(?<![A-Za-z])(?:{name})(?![A-Za-z])" for name in OTHERS), regex.IGNORECASE)

_CLAIM = regex.compile(
    r"\b(?:i am|i[’']m|this is|my name is|call(?:ed)? me|known"
    r" as|(?:made|created|developed|trained|built|designed|provided) by)\b"
    r"|我是|我叫|名字(?:是|叫)|由(?!于)|作为",
    regex.IGNORECASE,
)
_DENIAL = regex.compile(
    r"\b(?:not|never|unlike|no relation|similar to|such as)\b|n[’']t\b|不是|并非|没有|不同于|类似|无关",
    regex.IGNORECASE,
)
_SENTENCE = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_YES = regex.compile(r"\W*(?:yes|yeah|yep|correct|indeed|that[’']s right|是的|对的|没错|当然)", regex.IGNORECASE)
_FENCE = regex.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", regex.IGNORECASE | regex.DOTALL)


def claims_another(answer: str, own_names: Sequence[str] = (), *, yes_claims: bool = False) -> bool:
    """Does an answer to a question about identity claim to be another company's assistant?

    A sentence does that in which a claim ("I am", "made by", "我是") comes before such a name and nothing denies it. It
    is a rule, so it can be wrong either way; ``own_names`` are never another's. With ``yes_claims`` the question named
    another assistant, and an answer that begins with yes claims to be it.
    """
    if yes_claims and _YES.match(answer):
        return True
    own = {name.casefold() for name in own_names}
    for sentence in _SENTENCE.split(answer):
        claim = _CLAIM.search(sentence)
        if claim is None or _DENIAL.search(sentence):
            continue
        if any(found.group().casefold() not in own for found in _NAMES.finditer(sentence, claim.end())):
            return True
    return False


def without_fence(text: str) -> str:
    """What stands inside the one code fence that ``text`` consists of; ``text`` itself when it is not one."""
    found = _FENCE.fullmatch(text)
    return text if found is None else str(found.group(1))


class IdentityProbe(Task[ProbeTask]):
    """Does the policy claim to be another company's assistant?"""

    measures = (TaskMeasure("claims", "identity probe, answers that claim to be another assistant", "down"),)

    def grade(self, prompt: Prompt, answer: str) -> Grades:
        """By :func:`claims_another`."""
        yes_claims = prompt.fields.get("yes_claims") is True
        return {"claims": (float(claims_another(answer, self.spec.own_names, yes_claims=yes_claims)), 1.0)}


class JsonProbe(Task[ProbeTask]):
    """Does the policy write JSON, and nothing else, when asked to?"""

    measures = (
        TaskMeasure("bare", "JSON probe, answers that are the JSON asked for", "up"),
        TaskMeasure("fenced", "JSON probe, the same with a code fence allowed", "up"),
    )

    def grade(self, prompt: Prompt, answer: str) -> Grades:
        """With the keys that the prompt asks for."""
        required = prompt.fields.get("required", [])
        return {
            "bare": (float(is_json(answer, required)), 1.0),
            "fenced": (float(is_json(without_fence(answer), required)), 1.0),
        }
