// The kernels of the CUDA files and how they are launched, listed while the extension loads: no device is touched.
#pragma once

#include <typeinfo>
#include <vector>

namespace pk {

struct KernelFact {
  const char* name;      // mangled, as the argument of `Kernel`
  const void* function;  // its address, for the CUDA runtime
  int threads;           // of a block
  int shared;            // bytes of dynamic shared memory, the most that a launch asks for
};

// What the current device says of a kernel (kernel_use.cu).
struct KernelUse {
  int arch;       // of the code that it runs: 90, for example
  int registers;  // of a thread
  int local;      // bytes of local memory of a thread: spilled registers and the stack
  int shared;     // bytes of static shared memory of a block
  int blocks;     // resident on a multiprocessor
};
KernelUse kernel_use(const KernelFact& kernel);

// Loads a kernel on a device, the current one, where that has not been done before (load_kernel.cu).
void load_kernel(const char* name, const void* function, int device);

inline std::vector<KernelFact>& kernel_facts() {
  static std::vector<KernelFact> all;
  return all;
}

template <auto KERNEL>
struct Kernel;

// Lists instantiations that share a launch; called once, where a file registers its operators.
template <auto... KERNELS>
void list_kernels(int threads, int shared = 0) {
  (kernel_facts().push_back({typeid(Kernel<KERNELS>*).name(), reinterpret_cast<const void*>(KERNELS), threads, shared}),
   ...);
}

}  // namespace pk
