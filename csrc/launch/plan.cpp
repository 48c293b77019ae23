#include "plan.h"

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/core/stream.h"

namespace pk {

int32_t dtype_code(const std::string& name) {
  if (name == "float32") return aoti_torch_dtype_float32();
  if (name == "bfloat16") return aoti_torch_dtype_bfloat16();
  STD_TORCH_CHECK(name == "float16", "poolformer_kernels: a tensor of ", name);
  return aoti_torch_dtype_float16();
}

namespace {

ScalarType scalar_type(const std::string& name) {
  if (name == "float32") return ScalarType::Float;
  return name == "bfloat16" ? ScalarType::BFloat16 : ScalarType::Half;
}

bool same_layout(const Tensor& t, const TensorFact& fact) {
  if (t.dim() != static_cast<int64_t>(fact.sizes.size())) return false;
  for (size_t i = 0; i < fact.sizes.size(); ++i) {
    if (t.size(i) != fact.sizes[i]) return false;
    if (fact.sizes[i] != 1 && t.stride(i) != fact.strides[i]) return false;
  }
  return dtype_of(t) == dtype_code(fact.dtype);
}

// Whether kernels that were specialised for the one's address are right for the other.
bool same_alignment(uint64_t a, uint64_t b) { return (a - b) % 16 == 0; }

// No tensor where there is no memory.
OptionalTensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                     int device) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cuda(), device,
                               &handle) != AOTI_TORCH_SUCCESS)
    return std::nullopt;
  return Tensor(handle);
}

// One run of a plan: where each slot's tensor is now.
class Run {
 public:
  Run(const Plan& plan, std::vector<Tensor> inputs)
      : plan_(plan), guard_(plan.device), bases_(plan.slots), tensors_(plan.slots) {
    for (size_t i = 0; i < inputs.size(); ++i) tensors_[i].emplace(std::move(inputs[i]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(plan.device, &stream_));
  }

  // Whether the inputs are what the plan was made for; notes their addresses.
  bool take_inputs() {
    for (size_t i = 0; i < plan_.inputs.size(); ++i) {
      const Tensor& t = *tensors_[i];
      const TensorFact& fact = plan_.inputs[i];
      bases_[i] = reinterpret_cast<uint64_t>(t.data_ptr());
      if (!t.is_cuda() || t.get_device() != plan_.device || !same_layout(t, fact) ||
          !same_alignment(bases_[i], fact.address))
        return false;
    }
    return true;
  }

  // False where there is not enough memory.
  bool allocate() {
    const auto bytes = static_cast<int64_t>(plan_.workspace);
    if (bytes != 0 && !hold(plan_.workspace_slot, empty({bytes}, {1}, aoti_torch_dtype_uint8(), plan_.device)))
      return false;
    for (const auto& [slot, fact] : plan_.allocations)
      if (!hold(slot, empty(fact.sizes, fact.strides, dtype_code(fact.dtype), plan_.device))) return false;
    return true;
  }

  void step(const Plan::Launch& launch) {
    values_.resize(launch.words.size());
    addresses_.resize(launch.words.size());
    for (size_t i = 0; i < launch.words.size(); ++i) {
      values_[i] = at(launch.words[i]);
      addresses_[i] = &values_[i];
    }
    const char* error = driver::launch(launch.kernel, launch.blocks, plan_.device, stream_, addresses_.data());
    STD_TORCH_CHECK(error == nullptr, "launch of ", launch.name, ": ", error);
  }

  // False where it fails (the caller's own way to it has the error), or a result is not laid out as it was.
  bool step(const Plan::Call& call) {
    stack_.clear();
    for (const auto& argument : call.arguments) stack_.push_back(packed(argument));
    stack_.resize(std::max(call.arguments.size(), call.results.size()));
    if (torch_call_dispatcher(call.op.c_str(), call.overload.c_str(), stack_.data(), TORCH_ABI_VERSION) !=
        AOTI_TORCH_SUCCESS)
      return false;
    for (size_t i = 0; i < call.results.size(); ++i) {
      auto result = torch::stable::detail::to<Tensor>(stack_[i]);
      if (call.results[i].slot >= 0) hold(call.results[i].slot, std::move(result));
    }
    for (const auto& result : call.results)
      if (result.slot >= 0 && !same_layout(*tensors_[result.slot], result.fact)) return false;
    return true;
  }

  void release(const std::vector<int>& slots) {
    for (int slot : slots) tensors_[slot].reset();
  }

  std::vector<Tensor> outputs() const {
    std::vector<Tensor> out;
    for (const auto& output : plan_.outputs) {
      const Tensor& held = *tensors_[output.slot];
      if (output.whole) {
        out.push_back(held);
        continue;
      }
      const TensorFact& fact = output.fact;
      AtenTensorHandle handle;
      TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(held.get(), fact.sizes.size(), fact.sizes.data(),
                                                            fact.strides.data(), output.offset, &handle));
      out.emplace_back(handle);
    }
    return out;
  }

 private:
  uint64_t at(const Plan::Where& where) const {
    return where.slot < 0 ? where.value : bases_[where.slot] + where.value;
  }

  bool hold(int slot, OptionalTensor t) {
    tensors_[slot] = std::move(t);
    if (tensors_[slot]) bases_[slot] = reinterpret_cast<uint64_t>(tensors_[slot]->data_ptr());
    return tensors_[slot].has_value();
  }

  Tensor tensor(const Plan::Argument& argument) const {
    if (argument.whole) return *tensors_[argument.where.slot];
    const TensorFact& fact = std::get<TensorArgument>(argument.value).tensor;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        reinterpret_cast<void*>(at(argument.where)), fact.sizes.size(), fact.sizes.data(), fact.strides.data(), 0,
        dtype_code(fact.dtype), aoti_torch_device_type_cuda(), plan_.device, &handle));
    return Tensor(handle);
  }

  StableIValue packed(const Plan::Argument& argument) const {
    using torch::stable::detail::from;
    return std::visit(
        [&](const auto& value) -> StableIValue {
          using T = std::decay_t<decltype(value)>;
          if constexpr (std::is_same_v<T, TensorArgument>) {
            return value.optional ? from(OptionalTensor(tensor(argument))) : from(tensor(argument));
          } else if constexpr (std::is_same_v<T, Nothing>) {
            return from(std::nullopt);
          } else if constexpr (std::is_same_v<T, DtypeArgument>) {
            return from(scalar_type(value.name));
          } else {
            return from(value);
          }
        },
        argument.value);
  }

  const Plan& plan_;
  torch::stable::accelerator::DeviceGuard guard_;
  driver::Stream stream_;
  std::vector<uint64_t> bases_;
  std::vector<std::optional<Tensor>> tensors_;
  std::vector<uint64_t> values_;
  std::vector<void*> addresses_;
  std::vector<StableIValue> stack_;
};

}  // namespace

std::vector<Tensor> Plan::run(std::vector<Tensor> given) const {
  if (given.size() != inputs.size()) return {};
  Run run(*this, std::move(given));
  if (!run.take_inputs() || !run.allocate()) return {};
  for (const auto& step : steps) {
    if (const auto* launch = std::get_if<Launch>(&step.what)) {
      run.step(*launch);
    } else if (!run.step(std::get<Call>(step.what))) {
      return {};
    }
    run.release(step.release);
  }
  return run.outputs();
}

}  // namespace pk
