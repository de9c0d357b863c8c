"""The kinds of stages, one module for each family, and the table of those that come with the package.

A new kind consists of its class in a module here, the objects that this class names (stage, planner, view), and a line
in this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Shipped(NamedTuple):
    """Where the class of a kind is, and its name in sentences. The name is repeated here for the help texts, because
    importing the classes takes half a second."""

    place: str
    """`module:Class` below this package."""
    words: str
    """`Stage.words`."""


KINDS = {
    "sft": Shipped("sft_dpo:SftStage", "supervised fine-tuning"),
    "reward": Shipped("reward:RewardStage", "reward modelling"),
    "dpo": Shipped("sft_dpo:DpoStage", "preference optimisation"),
    "select_prompts": Shipped("sampling:SelectPromptsStage", "prompts worth learning from"),
    "label": Shipped("sampling:LabelStage", "preferences from scored samples"),
    "ppo": Shipped("ppo:PpoStage", "reinforcement learning"),
    "self_contrast": Shipped("self_contrast:SelfContrastStage", "preferences from a policy's own samples"),
    "trl": Shipped("trl:TrlStage", "KTO, GRPO and other trainers of TRL"),
    "evaluate": Shipped("evaluate:EvaluateStage", "policies compared on held-out data"),
}
"""The kinds by their names in recipes."""
