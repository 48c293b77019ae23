// Host-side facts about the compiled extension. The operators register themselves (csrc/cpu, csrc/cuda).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

#ifndef PK_TORCH_VERSION
#error "setup.py defines PK_TORCH_VERSION, PK_CUDA_VERSION and PK_CUDA_ARCHS"
#endif

namespace py = pybind11;

static std::vector<std::string> names(const std::vector<pk::Isa>& levels) {
  std::vector<std::string> out;
  for (auto isa : levels) out.emplace_back(pk::isa_name(isa));
  return out;
}

static py::dict build_info() {
  py::dict info;
  info["isa_compiled"] = names(pk::isa_compiled());
  info["isa_supported"] = names(pk::isa_supported());
  info["isa_chosen"] = pk::isa_name(pk::isa_chosen());
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["torch_built_with"] = PK_TORCH_VERSION;
  info["cuda_built_with"] = PK_CUDA_VERSION;
  info["cuda_archs"] = py::module_::import("builtins").attr("str")(PK_CUDA_ARCHS).attr("split")();
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of poolformer_kernels";
  pk::isa_chosen();  // a wrong POOLFORMER_KERNELS_ISA fails the import, not the first call
  m.def(
      "build_info", &build_info,
      "The instruction-set levels compiled, supported here and chosen; compiler, torch and CUDA versions of the build; "
      "CUDA architectures (empty without nvcc).");
}
