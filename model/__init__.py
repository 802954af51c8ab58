"""SmallThinker in PyTorch: configuration, attention, router and experts, losses and checkpoint mapping.

``from model import SmallThinkerConfig, SmallThinkerForCausalLM, preset``
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from model.checkpoint import CheckpointError, OfficialCheckpoint, write_checkpoint
from model.configuration import ConfigError, SmallThinkerConfig
from model.losses import LoadBalance
from model.modeling import CausalLMOutput, RouterStats, SmallThinkerForCausalLM, SmallThinkerModel
from model.presets import PRESETS, preset

AutoConfig.register("smallthinker", SmallThinkerConfig)
AutoModel.register(SmallThinkerConfig, SmallThinkerModel)
AutoModelForCausalLM.register(SmallThinkerConfig, SmallThinkerForCausalLM)
register_checkpoint_conversion_mapping(
    "smallthinker",
    [
        WeightConverter(
            source_patterns=[".experts.*.gate.weight", ".experts.*.up.weight"],
            target_patterns=".experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=".experts.*.down.weight",
            target_patterns=".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)

__all__ = [
    "PRESETS",
    "CausalLMOutput",
    "CheckpointError",
    "ConfigError",
    "LoadBalance",
    "OfficialCheckpoint",
    "RouterStats",
    "SmallThinkerConfig",
    "SmallThinkerForCausalLM",
    "SmallThinkerModel",
    "preset",
    "write_checkpoint",
]
