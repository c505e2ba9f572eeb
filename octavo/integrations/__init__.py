"""The edge: where octavo meets other libraries. Nothing below imports from here.

hub.py              the public quantize, save, load and quantize_checkpoint, for any module and for transformers' models
local_files.py      where the files of a folder, a file or a Hub id are
model_classes.py    the class of transformers that a checkpoint's model has
transformers.py     quantize while transformers loads, and save int8 when it saves
diffusers.py        the same for diffusers' models, and pipelines of them
weight_rules.py     transformers' rules for loading and saving weights, where a layer is int8
stored_names.py     what the tensors of its models are called in files
stored_weights.py   which weights of an empty model are in the files: what is tied, what is new
language_model.py   tokenizers, chat templates and causal language models from folders, Hub ids and GGUF files
calibration.py      a float language model, and text as batches of token ids
attention.py        int8 attention in the place of transformers'
float_attention.py  float attention that is faster than torch's on CPUs
caches.py           what both caches share, and how a model is made to use one
float_cache.py      a key-value cache in float with spare room for new tokens
int8_cache.py       a key-value cache in int8; int8_states.py is the tensor that a model gets from it
generation.py       let a model write text
compiled.py         prefill and decode, compiled into one graph each
equal_calls.py      a pass over these graphs: equal calls are made once
side_by_side.py     another pass: layers that read the same row become one launch on GPUs
gpt_fast.py         gpt-fast's int8 checkpoints: a state dict in a .pth file
peft.py             adapters on int8 layers
lm_eval.py          scores on tasks, of a model and its baseline
"""
