// The only file that knows torch, with its parts in bind/: it turns ops into calls of kernels. Tensors are checked
// here, and the work is split over torch's threads. Built on torch's stable ABI: one build serves torch 2.10 and later.

#include "bind/attention.h"
#include "bind/convolution.h"
#include "bind/linear.h"
#include "bind/recurrent.h"
#include "bind/rows.h"
#include "bind/torch.h"
#include "select.h"

namespace {

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("w8a16_conv", TORCH_BOX(&w8a16_conv));
  m.impl("w8a16_conv_transpose", TORCH_BOX(&w8a16_conv_transpose));
  m.impl("w8a16_experts_linear", TORCH_BOX(&w8a16_experts_linear));
  m.impl("w8a8_experts_linear", TORCH_BOX(&w8a8_experts_linear));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("quantize_per_tensor", TORCH_BOX(&quantize_per_tensor));
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("w8a16_embedding", TORCH_BOX(&w8a16_embedding));
  m.impl("w8a8_linear_at_once", TORCH_BOX(&w8a8_linear_at_once));
  m.impl("float_linear", TORCH_BOX(&float_linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("recurrent", TORCH_BOX(&recurrent));
  m.impl("int8_attention", TORCH_BOX(&int8_attention));
  m.impl("float_attention", TORCH_BOX(&float_attention));
  m.impl("int8_attention_of_codes", TORCH_BOX(&int8_attention_of_codes));
  m.impl("float_attention_of_codes", TORCH_BOX(&float_attention_of_codes));
  m.impl("quantize_states", TORCH_BOX(&quantize_states));
}

}  // namespace

// For Python (octavo/ops/native.py): chooses the kernels. Returns why these or, with `*error` set, what is wrong.
extern "C" __attribute__((visibility("default"))) const char* octavo_select(const char* forced, int* error) {
  static octavo::Choice choice;
  choice = octavo::choose(octavo::this_machine(), forced);
  *error = choice.error;
  if (!choice.error) active.store(choice.kernels);
  return choice.why;
}

// The instruction set of the chosen kernels; null if there are none.
extern "C" __attribute__((visibility("default"))) const char* octavo_isa() {
  return active.load() ? kernels().isa : nullptr;
}

// Whether they have convolutions; otherwise the reference computes these.
extern "C" __attribute__((visibility("default"))) bool octavo_convolves() {
  return active.load() && kernels().convolution(Float::bf16);
}

// Whether they have int8 attention; otherwise it is composed of the other ops.
extern "C" __attribute__((visibility("default"))) bool octavo_attends() {
  return active.load() && kernels().int8_attention;
}

// The most rows of x for which float linear layers are faster than torch's own, for a type of `Float`.
extern "C" __attribute__((visibility("default"))) int64_t octavo_multiplies_in(int type) {
  return active.load() ? most_rows(static_cast<Float>(type)) : 0;
}

// The most rows of a key head for which float attention is faster than torch's own, for a type of `Float`.
extern "C" __attribute__((visibility("default"))) int64_t octavo_attends_in(int type) {
  return active.load() ? kernels().float_attention(static_cast<Float>(type)).most_rows : 0;
}
