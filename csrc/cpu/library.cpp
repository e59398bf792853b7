// The face of the CPU library: plain C functions for ctypes. Compiled once, for every CPU of its architecture; each other .cpp here is
// compiled once per instruction set, into fused_attn::cpu::avx512, ::avx2 and ::portable.

#include "cpu/choice.h"
