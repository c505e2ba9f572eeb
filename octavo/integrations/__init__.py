"""The edge: where octavo meets other people's libraries. Nothing below imports from here.

hub.py              the public quantize, save, load and quantize_checkpoint: any module's, and transformers' models
local_files.py      a folder, a file or a Hub id: where its files are
model_classes.py    which class of transformers a checkpoint's model is of
transformers.py     int8 layers while transformers loads and saves
weight_rules.py     transformers' rules for loading and saving weights, where a layer is int8
stored_names.py     what the tensors of its models are called in files
stored_weights.py   which weights of an empty model files hold: what is tied, what is new
language_model.py   tokenizers, chat templates and causal language models from folders, Hub ids and GGUF files
calibration.py      a float language model, and text as batches of token ids
attention.py        int8 attention in the place of transformers'
float_attention.py  float attention that is faster than torch's on CPUs
caches.py           caches that take the place of transformers' own
float_cache.py      the same keys and values, with room for more
int8_cache.py       keys and values as codes; int8_states.py is what a model sees of them
generation.py       a model writes, token by token
compiled.py         prefill and decode compiled whole
equal_calls.py      a pass over their graphs: equal calls are made once
side_by_side.py     another: layers that read the same row become one launch on GPUs
gpt_fast.py         gpt-fast's int8 checkpoints: a state dict in a .pth file
peft.py             adapters on int8 layers
lm_eval.py          scores on tasks, of a model and its baseline
"""
