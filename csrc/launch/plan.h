// A recorded call that can be run again on other tensors: kernels' launches and operators' calls in order.
#pragma once

#include "../common/tensors.h"
#include "tape.h"

namespace pk {

// torch's number of a dtype, by its Python name.
int32_t dtype_code(const std::string& name);

struct Plan {
  // A number, or with a slot an address: so many bytes behind the start of the slot's tensor.
  struct Where {
    uint64_t value = 0;
    int slot = -1;
  };
  struct Launch {
    std::string name;
    driver::Kernel kernel;
    unsigned blocks;
    std::vector<Where> words;
  };
  struct Argument {
    CallArgument value;
    Where where;  // of a tensor
    bool whole;   // the slot's tensor as it is
  };
  struct Result {
    int slot;  // -1: an argument, which is held already
    TensorFact fact;
  };
  // A tensor that is made before the first step.
  struct Allocation {
    int slot;
    TensorFact fact;
  };
  struct Output {
    int slot;
    TensorFact fact;
    int64_t offset;  // in elements
    bool whole;      // the slot's tensor as it is
  };
  struct Call {
    std::string op, overload;
    std::vector<Argument> arguments;
    std::vector<Result> results;
  };
  struct Step {
    std::variant<Launch, Call> what;
    std::vector<int> release;  // slots of results that nothing uses any more
  };

  int device;
  std::vector<TensorFact> inputs;  // x, then the parameters: slots 0, 1, …
  int slots;                       // inputs, the workspace, operators' results, the output
  int workspace_slot;
  uint64_t workspace = 0;  // bytes
  std::vector<Allocation> allocations;
  std::vector<Output> outputs;
  std::vector<Step> steps;

  // The results, or {} where the tensors are not what the plan was made for, or the memory is exhausted.
  std::vector<Tensor> run(std::vector<Tensor> inputs) const;
};

}  // namespace pk
