// Host-side facts about the compiled extension. The operators register themselves (csrc/cpu, csrc/cuda).
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>

#include "cpu/isa/isa.h"
#include "cpu/rate/rate.h"
#include "cuda/core/kernels.h"
#include "cuda/core/stream.h"
#include "launch/launches.h"

#ifndef PK_TORCH_VERSION
#error "setup.py defines PK_TORCH_VERSION, PK_CUDA_VERSION and PK_CUDA_ARCHS"
#endif

namespace py = pybind11;

static std::vector<std::string> names(const std::vector<pk::Isa>& levels) {
  std::vector<std::string> out;
  for (auto isa : levels) out.emplace_back(pk::isa_name(isa));
  return out;
}

static std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string out = status == 0 ? text : name;
  std::free(text);
  return out;
}

// What `ptxas -v` said of the kernels, its first line a digest of their sources; empty without nvcc.
static const char* const kPtxasReport =
#ifdef PK_PTXAS_REPORT  // setup.py writes it
#include PK_PTXAS_REPORT
#else
    ""
#endif
    ;

static std::string ptxas_report() {
  const std::string report = kPtxasReport, before = "function '";
  std::string out;
  size_t end = 0;
  for (size_t at; (at = report.find(before, end)) != std::string::npos;) {
    at += before.size();
    out.append(report, end, at - end);
    end = report.find("'", at);
    out += demangled(report.substr(at, end - at));
  }
  return out.append(report, end);
}

static py::dict kernel_launch(const pk::KernelFact& kernel) {
  py::dict out;
  out["name"] = demangled(kernel.name);
  out["threads"] = kernel.threads;
  out["shared"] = kernel.shared;
  return out;
}

static py::list kernel_launches() {
  py::list out;
  for (const auto& kernel : pk::kernel_facts()) out.append(kernel_launch(kernel));
  return out;
}

static py::list kernel_uses() {
  py::list out;
#ifdef PK_PTXAS_REPORT
  for (const auto& kernel : pk::kernel_facts()) {
    const pk::KernelUse use = pk::kernel_use(kernel);
    py::dict row = kernel_launch(kernel);
    row["arch"] = use.arch;
    row["registers"] = use.registers;
    row["local"] = use.local;
    row["static_shared"] = use.shared;
    row["blocks"] = use.blocks;
    out.append(row);
  }
#endif
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
  info["cuda_stream_bound"] = aoti_torch_get_current_cuda_stream != nullptr;
  return info;
}

static double multiply_rate(const std::string& level, bool bfloat16, double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
  for (auto isa : pk::isa_supported())
    if (level == pk::isa_name(isa)) return pk::multiply_rate(isa, bfloat16, seconds);
  throw std::invalid_argument("level is '" + level + "', which this machine or this build has not");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of poolformer_kernels";
  pk::isa_chosen();  // a wrong POOLFORMER_KERNELS_ISA fails the import, not the first call
  m.def(
      "build_info", &build_info,
      "The instruction-set levels compiled, supported here and chosen; compiler, torch and CUDA versions of the build; "
      "CUDA architectures (empty without nvcc), whether torch's stream function was found.");
  m.def("ptxas_report", &ptxas_report, "A digest of the CUDA sources, then what ptxas -v said; empty without nvcc.");
  m.def("kernel_launches", &kernel_launches,
        "How the CUDA kernels are launched: name, threads of a block, bytes of dynamic shared memory.");
  m.def("kernel_uses", &kernel_uses, "What the current CUDA device says of the kernels' launches; it must exist.");
  m.def(
      "multiply_rate", &multiply_rate, py::arg("level"), py::arg("bfloat16"), py::arg("seconds"),
      py::call_guard<py::gil_scoped_release>(),
      "FLOPs a second that torch's threads multiply together at an instruction-set level, on random operands in their "
      "L1 caches, while each of them does nothing else for so many seconds.");
  pk::add_launching(m);
}
