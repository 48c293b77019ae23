// A recorded call that can be run again on other tensors: kernels' launches and operators' calls in order.
#pragma once

#include "../common/tensors.h"
#include "tape.h"

namespace pk {

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
    int slot;
    TensorFact fact;
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
  TensorFact output;
  int output_slot = -1;
  bool allocate_output = false;  // else an operator's result is the output
  std::vector<Step> steps;

  // {the result}, or {} where the tensors are not what the plan was made for.
  std::vector<Tensor> run(Tensor x, std::vector<Tensor> parameters) const;
};

}  // namespace pk
