// One table of kernels per instruction set. Each csrc/cpu/<family>.cpp is compiled once per level into its own
// namespace and exports one function, `register_<family>`; register.cpp calls those of the level chosen at load time.
// Such a file must have no static initialisers: they would run, with its instructions, on every CPU.
#pragma once
#include <torch/csrc/stable/library.h>

// The families, one X(name) each.
#define TRISKELE_FAMILIES(X) X(sla_route) X(sla_forward) X(sla_backward) X(vmoba) X(vmoba_select) X(taa) X(svdq) X(adaln)

#define TRISKELE_DECLARE(family) void register_##family(torch::stable::detail::StableLibrary& m);
namespace triskele::base { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
namespace triskele::avx2 { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
namespace triskele::avx512 { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
namespace triskele::avx512_bf16 { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
namespace triskele::amx { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
namespace triskele::dotprod { TRISKELE_FAMILIES(TRISKELE_DECLARE) }
#undef TRISKELE_DECLARE
