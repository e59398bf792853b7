// The passes of attention and of masked softmax, one set of them per instruction set.
#pragma once

#include "cpu/params.h"

namespace fused_attn::cpu::FUSED_ATTN_ISA {

int attention_fwd(const Attention& call);
// dq, dk, dv and what the modifications' tensors get of their own; delta.
int attention_bwd(const Attention& call);
// The gradient of modification `call.place`, whose tensor heads or batches share, summed over those in their order.
int attention_bwd_bias(const Attention& call);

}  // namespace fused_attn::cpu::FUSED_ATTN_ISA
