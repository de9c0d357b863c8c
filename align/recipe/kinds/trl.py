"""The keys of a stage that runs one of TRL's trainers (https://github.com/huggingface/trl)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from align.errors import InputError
from align.recipe.blocks.base import ArtifactType, Data, PolicyRef, RecordType, RowLimits, Stage, unknown_name
from align.recipe.blocks.scoring import Scoring
from align.recipe.blocks.train import Lora
from align.recipe.kinds import KINDS, trl_source
from align.recipe.kinds.trl_source import OTHERS, TRAINERS, TrlTrainer, config_name, short
from align.recipe.language.effects import Needs

_ONE_PROCESS = "TRL runs in one process here, on the device that is found"
_ENCODED = "the data reach TRL encoded, by the encoder of all other stages"
_LOGGED = "what TRL logs goes to metrics.jsonl"
_UPLOADS = "nothing is uploaded"
_RECORDS: Mapping[str, RecordType] = {"prompts": "prompt", "pairs": "preference", "answers": "unpaired"}
"""What TRL's trainer takes -> the record type of the rows."""
_RESUMES = "the stage saves and resumes by itself"
_LOADED = "align loads the model, and never runs code of its folder"
_ONE_SCORER = "`reward` is the scorer; an ensemble has several"
OWNED: dict[str, str] = {
    "output_dir": "TRL writes into the work folder of the stage",
    "seed": "write `seed` in the stage or the recipe",
    "data_seed": "write `seed` in the stage or the recipe",
    "max_length": "write `max_length` in the stage",
    **dict.fromkeys(("trust_remote_code", "model_init_kwargs"), _LOADED),
    **dict.fromkeys(("reward_model_path", "reward_weights"), _ONE_SCORER),
    **dict.fromkeys(
        ("resume_from_checkpoint", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"), _RESUMES
    ),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUMES),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "the stage trains, and evaluates where there is `eval_data`"
    ),
    **dict.fromkeys(
        ("report_to", "run_name", "project", "log_completions", "log_multimodal", "log_unique_prompts"), _LOGGED
    ),
    **dict.fromkeys(
        ("num_completions_to_print", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"), _LOGGED
    ),
    **dict.fromkeys(("logging_nan_inf_filter", "generate_during_eval"), _LOGGED),
    **dict.fromkeys(("log_completions_hub_repo", "push_to_hub"), _UPLOADS),
    **dict.fromkeys(
        ("remove_unused_columns", "dataset_num_proc", "chat_template_kwargs", "label_names", "length_column_name"),
        _ENCODED,
    ),
    **dict.fromkeys(("padding_value", "is_encoder_decoder", "include_num_input_tokens_seen"), _ENCODED),
    **dict.fromkeys(("use_cpu", "local_rank", "deepspeed", "accelerator_config", "parallelism_config"), _ONE_PROCESS),
    **dict.fromkeys(("auto_find_batch_size", "debug"), "it would start training again behind the stage's back"),
    "use_vllm": "TRL's vLLM listens on the network or needs a GPU; `kind: ppo` samples with vLLM",
}
"""Arguments that belong to the stage, and why."""
_OWNED_GROUPS = {
    "hub_": _UPLOADS,
    "trackio_": _UPLOADS,
    "vllm_": OWNED["use_vllm"],
    "ddp_": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "ds3_": _ONE_PROCESS,
}


def _trainer(text: str) -> str:
    """The name of the trainer's class."""
    known = {short(name): name for name in TRAINERS}
    if short(text) in known:
        return known[short(text)]
    reason = next((f"{name} {why}" for name, why in OTHERS.items() if short(name) == short(text)), None)
    message = reason or f"no trainer `{text[:80]}` that runs as a stage; those are {', '.join(TRAINERS)}"
    raise unknown_name(InputError(message), () if reason else (*TRAINERS, *known))


class TrlStage(Stage):
    """Runs one of these trainers of TRL, with the data, artefacts, caching and report of the other stages: KTO, GRPO,
    RLOO and, from `trl.experimental`, ORPO, CPO, GMPO and OnlineDPO. [TRL's trainers](trl.md) says what each of them
    takes."""

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "align.stages.trl.run:run"
    plan: ClassVar[str] = "align.planning.trl:TrlPlanner"
    view: ClassVar[str] = "align.report.views.trl:TrlView"
    words: ClassVar[str] = KINDS["trl"].words
    keeps_checkpoints: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = (
        *(
            "args.save_total_limit",
            "args.gradient_checkpointing",
            "args.torch_empty_cache_steps",
            "args.dataloader_num_workers",
        ),
        *("args.dataloader_pin_memory", "args.logging_steps", "args.logging_first_step", "lora.save_merged", "samples"),
    )
    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs("reward", lambda stage: stage.method.rows == "prompts", "with {trainer}: it samples no answers"),
        Needs(
            "too_long",
            lambda stage: stage.method.rows != "prompts",
            "with {trainer}: prompts that are too long are left out",
        ),
        Needs("eval_data", lambda stage: stage.method.evaluates, "with {trainer}: it has no evaluation"),
    )

    takes_arguments: ClassVar[str] = "an argument of TRL's belongs under `args`"

    kind: Literal["trl"]
    """`trl`"""
    trainer: Annotated[str, AfterValidator(_trainer)]
    """The trainer's class, or its short name: `KTOTrainer` or `kto`."""
    policy: PolicyRef | None = None
    """The model to start from, which is also the reference if the method has one; the recipe's `model` when absent."""
    data: Data
    """Preferences, or prompts for a trainer that samples its answers: one source, or a list (a mixture when they have
    weights)."""
    eval_data: Data | None = None
    """Held-out data of the same kind: TRL's own evaluation is reported before and after training."""
    reward: Scoring | None = None
    """The scorer of sampled answers. Required for trainers that sample, and only for them."""
    max_length: int = Field(default=2048, ge=2)
    """Longest prompt with an answer, in tokens. With a trainer that samples, prompts that leave no room for its longest
    answer are left out."""
    too_long: Literal["drop", "error"] = "drop"
    """Only for trainers on preferences: longer preferences are left out and counted, or an error. Nothing is cut."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the weights are stored. `args: {bf16: true}` computes in bf16 and leaves the stored weights as
    they are."""
    lora: Lora | None = None
    """Adapters instead of full training; `{}` for the defaults."""
    args: dict[str, Any] = Field(default={})
    """Arguments of the trainer's config class (`KTOConfig` and so on), with TRL's names, checked against that class.
    Arguments that the stage itself sets are refused with the reason."""
    samples: int = Field(default=2, ge=0)
    """Held-out prompts that are answered before and after training, for the report."""

    def neutral_keys(self) -> tuple[str, ...]:
        """See :meth:`Stage.neutral_keys`. If the best checkpoint is kept, the result depends on when checkpoints are
        saved and evaluated."""
        return (
            self.neutral
            if self.args.get("load_best_model_at_end")
            else (*self.neutral, "args.save_steps", "args.eval_steps")
        )

    def record_types(self) -> Mapping[str, RecordType]:
        """See :meth:`Stage.record_types`."""
        return dict.fromkeys(("data", "eval_data"), _RECORDS[self.method.rows])

    def row_limits(self, key: str) -> RowLimits:
        """See :meth:`Stage.row_limits`."""
        if self.method.rows == "prompts":
            return RowLimits(self.max_length, room=self.longest_answer or 0)
        return RowLimits(self.max_length, self.too_long)

    @property
    def method(self) -> TrlTrainer:
        """The entry of the trainer in the table of trainers."""
        return TRAINERS[self.trainer]

    @property
    def longest_answer(self) -> int | None:
        """Maximum length of a sampled answer in tokens; None for a trainer that does not sample."""
        name = self.method.answer_length
        return None if name is None else self.argument(name)

    def argument(self, name: str) -> Any:
        """The value of an argument: the recipe's, or the config class's own default (None when that is not a plain
        value)."""
        known = trl_source.arguments(self.trainer).get(name)
        return self.args.get(name, None if known is None else known.default)

    @model_validator(mode="after")
    def _the_trainer_can_run(self) -> TrlStage:
        details = [
            InitErrorDetails(type=PydanticCustomError("value_error", "{text}", {"text": text}), loc=place, input=None)
            for place, text in self._mistakes()
        ]
        if details:
            raise ValidationError.from_exception_data("TrlStage", details)
        return self

    def _mistakes(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """(place, message) of each mistake. A place that ends with ``[key]`` is that of the key, not of its value."""
        samples = self.method.rows == "prompts"
        if samples and self.reward is None:
            yield ("trainer",), f"{self.trainer} samples answers and needs `reward`, the scorer of them"
        if self.lora is not None and self.lora.quantize:
            yield (
                ("lora", "quantize"),
                "`kind: trl` trains no adapters on 4-bit weights; remove the key, or use `kind: sft` or `dpo`",
            )
        try:
            known = trl_source.arguments(self.trainer)
        except ModuleNotFoundError as error:
            yield (
                ("trainer",),
                f"needs the Python package {error.name}, which is not installed; `align doctor` says what is missing",
            )
            return
        yield from self._mistakes_of_arguments(known)
        answer = self.longest_answer
        if isinstance(answer, int) and answer >= self.max_length:
            place = (
                ("args", str(self.method.answer_length)) if self.method.answer_length in self.args else ("max_length",)
            )
            yield (
                place,
                f"{self.method.answer_length} ({answer}) leaves no room for a prompt in max_length ({self.max_length})",
            )
        for name in ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end"):
            if self.args.get(name) not in (None, False, "no") and self.eval_data is None:
                yield ("args", name, "[key]"), "needs `eval_data`"

    def _mistakes_of_arguments(self, known: dict[str, trl_source.Argument]) -> Iterator[tuple[tuple[str, ...], str]]:
        config = config_name(self.trainer)
        for name, value in self.args.items():
            argument = known.get(name)
            if owned := _owned(name):
                yield ("args", name, "[key]"), f"belongs to the stage: {owned}"
            elif argument is None:
                if known:
                    free = [other for other in known if not _owned(other)]
                    yield ("args", name, "[key]"), f"{config} has no such argument{_nearest(name, free)}"
            elif not argument.takes(value):
                yield ("args", name), f"expected {argument.words}, as in {config}; got {_shown(value)}"
            elif isinstance(value, str) and argument.choices and value not in argument.choices:
                yield (
                    ("args", name),
                    (
                        f"must be one of {', '.join(argument.choices)}; got"
                        f" `{value[:80]}`{_nearest(value, argument.choices)}"
                    ),
                )


def _owned(name: str) -> str | None:
    """Why an argument belongs to the stage; None when it does not."""
    return OWNED.get(name) or next((why for start, why in _OWNED_GROUPS.items() if name.startswith(start)), None)


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{nearest[0]}`?" if nearest else ""


def _shown(value: Any) -> str:
    words = {bool: "the true/false value", str: "the text", int: "the number", float: "the number"}
    if type(value) not in words:
        if isinstance(value, dict):
            return "a mapping"
        if isinstance(value, list):
            return "a list"
        return "nothing"
    return f"{words[type(value)]} `{str(value).lower() if isinstance(value, bool) else str(value)[:80]}`"
