// What a call launched, written down once and run again by one operator call: the inference chain on CUDA
// (poolformer_kernels/backends/triton/chain.py).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "driver.h"

namespace pk {

// A tensor as the recorded call saw it: its address then, and what must be the same in each run.
struct TensorFact {
  uint64_t address = 0;
  std::string dtype;  // "float32", "bfloat16" or "float16"
  std::vector<int64_t> sizes, strides;
  uint64_t bytes() const;  // from its first element to its last
};

// An argument of an operator. `Optional` says that the schema has a `Tensor?`, which is passed otherwise.
struct TensorArgument {
  TensorFact tensor;
  bool optional;
};
struct Nothing {};
struct DtypeArgument {
  std::string name;
};
using CallArgument =
    std::variant<TensorArgument, Nothing, DtypeArgument, bool, int64_t, double, std::string, std::vector<int64_t>>;
// A result of an operator; none where it returns an argument that it has written to.
using CallResult = std::optional<TensorFact>;

// An argument of a kernel: eight bytes, and whether they are an address.
struct LaunchArgument {
  uint64_t value;
  bool address;
};

// Everything that a call did, in order, with the addresses of that one call.
class Tape {
 public:
  // The call got memory for a tensor.
  void allocate(uint64_t address, uint64_t bytes);
  void launch(std::string name, const driver::Kernel& kernel, unsigned blocks, std::vector<LaunchArgument> arguments);
  void call(std::string op, std::string overload, std::vector<CallArgument> arguments, std::vector<CallResult> results);
  // The call did what cannot be written down; the first reason is kept.
  void refuse(std::string reason);
  // Makes a plan of it: addresses become places relative to the inputs, to a workspace and to operators' results.
  // Throws std::runtime_error with the reason where there can be none.
  std::shared_ptr<const struct Plan> plan(const std::vector<TensorFact>& inputs, const std::vector<TensorFact>& outputs,
                                          int device) const;
  // A plan for `chain_cuda`, whose inputs are x, then the parameters. Returns its number.
  int64_t finish_chain(const std::vector<TensorFact>& inputs, const TensorFact& output, int device) const;
  // A plan for `replay` of calls with these settings, on tensors like these.
  void finish_call(int64_t settings, const std::vector<TensorFact>& inputs, const std::vector<TensorFact>& outputs,
                   int device) const;

  // The tape of this thread that launches are written to, or null.
  static Tape*& current();

 private:
  struct Allocation {
    uint64_t address, bytes;
  };
  struct Launch {
    std::string name;
    driver::Kernel kernel;
    unsigned blocks;
    std::vector<LaunchArgument> arguments;
  };
  struct Call {
    std::string op, overload;
    std::vector<CallArgument> arguments;
    std::vector<CallResult> results;
  };
  std::vector<std::variant<Allocation, Launch, Call>> events_;
  std::optional<std::string> refused_;
  friend class Planner;
};

void free_plan(int64_t number);

}  // namespace pk
