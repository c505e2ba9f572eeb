"""Checkpoints: models on disk.

saving.py              a quantized model -> a checkpoint folder
loading.py             a checkpoint folder -> int8 layers in a model
stream.py              a float checkpoint -> an int8 one, one tensor at a time, without a model
compressed_tensors.py  how an int8 weight is stored (the layout that vLLM and transformers read)
experts.py             how a stack of experts [E, N, K] is stored: as 2-D weights of each expert
conversions.py         float tensors that are stored in another form than the model has them
checkpoint.py          the files: sharded safetensors, read and written one tensor at a time
outputs.py             folders and files that appear whole or not at all
companions.py          the files beside the weights: tokenizer, generation config, ...
"""

from octavo.formats.conversions import Conversion
from octavo.formats.experts import stored_expert_parts
from octavo.formats.loading import (
    Rename,
    int8_names,
    load_into,
    read_experts,
    restore_reasons,
    stored_attention,
    stored_coverage,
    stored_decisions,
)
from octavo.formats.saving import (
    COVERAGE_FILE,
    OnDisk,
    describe_layout,
    quantization_config,
    save,
    state_dict,
    write_descriptions,
)

__all__ = [
    "COVERAGE_FILE",
    "Conversion",
    "OnDisk",
    "Rename",
    "describe_layout",
    "int8_names",
    "load_into",
    "quantization_config",
    "read_experts",
    "restore_reasons",
    "save",
    "state_dict",
    "stored_attention",
    "stored_coverage",
    "stored_decisions",
    "stored_expert_parts",
    "write_descriptions",
]
