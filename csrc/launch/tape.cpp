#include "tape.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "../common/tensors.h"
#include "plan.h"

namespace pk {

uint64_t TensorFact::bytes() const {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return static_cast<uint64_t>(last + 1) * (dtype == "float32" ? 4 : 2);
}

Tape*& Tape::current() {
  static thread_local Tape* tape = nullptr;
  return tape;
}

void Tape::allocate(uint64_t address, uint64_t bytes) {
  if (bytes != 0) events_.push_back(Allocation{address, bytes});
}

void Tape::launch(std::string name, const driver::Kernel& kernel, unsigned blocks,
                  std::vector<LaunchArgument> arguments) {
  events_.push_back(Launch{std::move(name), kernel, blocks, std::move(arguments)});
}

void Tape::call(std::string op, std::string overload, std::vector<CallArgument> arguments,
                std::vector<CallResult> results) {
  events_.push_back(Call{std::move(op), std::move(overload), std::move(arguments), std::move(results)});
}

void Tape::refuse(std::string reason) {
  if (!refused_) refused_ = std::move(reason);
}

// Turns a tape into a plan.
class Planner {
 public:
  Planner(const std::vector<TensorFact>& inputs, int device) : plan_(std::make_shared<Plan>()) {
    plan_->device = device;
    plan_->inputs = inputs;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto bytes = inputs[i].bytes();
      if (bytes == 0) continue;
      for (const auto& [address, at] : inputs_)  // one of them could be replaced without the other
        if (address < inputs[i].address + bytes && inputs[i].address < address + inputs[at].bytes())
          throw std::runtime_error("two of the parameters share memory");
      inputs_.emplace(inputs[i].address, i);
    }
    plan_->slots = static_cast<int>(inputs.size());
    workspace_ = plan_->slots++;
  }

  std::shared_ptr<const Plan> plan(const Tape& tape, const std::vector<TensorFact>& outputs) {
    for (const auto& event : tape.events_) {
      if (const auto* allocation = std::get_if<Tape::Allocation>(&event)) {
        add_region(allocation->address, allocation->bytes, workspace_);
      } else if (const auto* launch = std::get_if<Tape::Launch>(&event)) {
        add(*launch);
      } else {
        add(std::get<Tape::Call>(event));
      }
    }
    for (const auto& output : outputs) own_output(output);
    for (const auto& output : outputs) add_output(output);
    place();
    return plan_;
  }

 private:
  // Memory that the call got; times are numbers of steps.
  struct Region {
    uint64_t address, bytes;
    int slot;
    int first, last;  // the steps that use it
    uint64_t offset;  // in the workspace
  };
  struct Place {
    int slot;
    uint64_t offset;
    int region;  // or -1: an input
  };

  int now() const { return static_cast<int>(plan_->steps.size()); }

  int add_region(uint64_t address, uint64_t bytes, int slot) {
    // what lay there before has been freed
    auto after = live_.lower_bound(address);
    if (after != live_.begin() && std::prev(after)->first + regions_[std::prev(after)->second].bytes > address) --after;
    while (after != live_.end() && after->first < address + bytes) after = live_.erase(after);
    const int number = static_cast<int>(regions_.size());
    live_[address] = number;
    regions_.push_back({address, bytes, slot, now(), now(), 0});
    return number;
  }

  Place resolve(uint64_t address) {
    auto found = live_.upper_bound(address);
    if (found != live_.begin()) {
      Region& region = regions_[(--found)->second];
      if (address < region.address + region.bytes) {
        region.last = now();
        return {region.slot, address - region.address, found->second};
      }
    }
    auto input = inputs_.upper_bound(address);
    if (input != inputs_.begin()) {
      const auto& [start, number] = *--input;
      if (address < start + plan_->inputs[number].bytes()) return {static_cast<int>(number), address - start, -1};
    }
    throw std::runtime_error("an argument is in memory that is neither an input's nor the call's own");
  }

  void add(const Tape::Launch& launch) {
    Plan::Launch step{launch.name, launch.kernel, launch.blocks, {}};
    for (const auto& argument : launch.arguments) {
      if (!argument.address || argument.value == 0) {
        step.words.push_back({argument.value, -1});
        continue;
      }
      const Place place = resolve(argument.value);
      if (place.slot == workspace_) pending_.push_back({now(), static_cast<int>(step.words.size()), place.region});
      step.words.push_back({place.offset, place.slot});
    }
    plan_->steps.emplace_back(Plan::Step{std::move(step), {}});
  }

  void add(const Tape::Call& call) {
    Plan::Call step{call.op, call.overload, {}, {}};
    for (const auto& argument : call.arguments) {
      Plan::Argument out{argument, {0, -1}, false};
      if (const auto* given = std::get_if<TensorArgument>(&argument); given && given->tensor.bytes() != 0) {
        const Place place = resolve(given->tensor.address);
        if (place.slot == workspace_)
          pending_.push_back({now(), static_cast<int>(step.arguments.size()), place.region});
        out.where = {place.offset, place.slot};
        out.whole = is_whole(place, given->tensor);
      } else if (given) {
        throw std::runtime_error("an operator's argument is empty");
      }
      step.arguments.push_back(std::move(out));
    }
    for (const auto& result : call.results) {
      if (!result) {
        step.results.push_back({-1, {}});
        continue;
      }
      const int slot = plan_->slots++;
      step.results.push_back({slot, *result});
      if (result->bytes() == 0) continue;
      results_[slot] = *result;
      owners_[slot] = add_region(result->address, result->bytes(), slot);
    }
    plan_->steps.emplace_back(Plan::Step{std::move(step), {}});
  }

  // Whether a tensor is an input or a result as it is, so that no view needs to be made.
  bool is_whole(const Place& place, const TensorFact& tensor) const {
    if (place.slot == workspace_ || place.offset != 0) return false;
    const auto& of = place.region < 0 ? plan_->inputs[place.slot] : results_.at(place.slot);
    return of.sizes == tensor.sizes && of.strides == tensor.strides && of.dtype == tensor.dtype;
  }

  // Memory that an output lies in leaves the workspace, or is not released.
  void own_output(const TensorFact& output) {
    if (output.bytes() == 0) return;
    const Place place = resolve(output.address);
    if (place.region < 0) throw std::runtime_error("a result is an argument");
    Region& region = regions_[place.region];
    if (region.slot != workspace_) {
      owners_.erase(region.slot);
      return;
    }
    region.slot = plan_->slots++;
    const int64_t elements = region.bytes / (output.dtype == "float32" ? 4 : 2);
    const bool whole = place.offset == 0 && output.bytes() == region.bytes;
    results_[region.slot] = whole ? output : TensorFact{region.address, output.dtype, {elements}, {1}};
    plan_->allocations.push_back({region.slot, results_[region.slot]});
  }

  void add_output(const TensorFact& output) {
    if (output.bytes() == 0) {
      plan_->allocations.push_back({plan_->slots, output});
      plan_->outputs.push_back({plan_->slots++, output, 0, true});
      return;
    }
    const Place place = resolve(output.address);
    const int itemsize = output.dtype == "float32" ? 4 : 2;
    if (results_.at(place.slot).dtype != output.dtype || place.offset % itemsize != 0)
      throw std::runtime_error("two results of different dtypes share memory");
    const auto offset = static_cast<int64_t>(place.offset / itemsize);
    plan_->outputs.push_back({place.slot, output, offset, is_whole(place, output)});
  }

  // Gives the regions of the workspace places, the largest first, each at the lowest one that is free for as long as it
  // is used; then says after which step an operator's result may go.
  void place() {
    std::vector<Region*> order;
    for (auto& region : regions_)
      if (region.slot == workspace_) order.push_back(&region);
    std::stable_sort(order.begin(), order.end(), [](const Region* a, const Region* b) { return a->bytes > b->bytes; });
    std::vector<const Region*> placed;
    for (Region* region : order) {
      const uint64_t bytes = padded(region->bytes);
      uint64_t offset = 0;
      for (const Region* other : placed) {  // in the order of their offsets
        if (other->last < region->first || region->last < other->first) continue;
        if (offset + bytes <= other->offset) break;
        offset = std::max(offset, other->offset + padded(other->bytes));
      }
      region->offset = offset;
      plan_->workspace = std::max(plan_->workspace, offset + bytes);
      placed.insert(std::upper_bound(placed.begin(), placed.end(), region,
                                     [](const Region* a, const Region* b) { return a->offset < b->offset; }),
                    region);
    }
    for (const auto& [step, argument, number] : pending_) {
      const Region& region = regions_[number];
      auto& what = plan_->steps[step].what;
      Plan::Where* where;
      if (auto* launch = std::get_if<Plan::Launch>(&what))
        where = &launch->words[argument];
      else
        where = &std::get<Plan::Call>(what).arguments[argument].where;
      where->slot = region.slot;
      if (region.slot == workspace_) where->value += region.offset;
    }
    for (const auto& [slot, number] : owners_)
      plan_->steps[std::min(regions_[number].last, now() - 1)].release.push_back(slot);
    plan_->workspace_slot = workspace_;
  }

  static uint64_t padded(uint64_t bytes) { return (bytes + 511) / 512 * 512; }  // as torch's allocator aligns

  std::shared_ptr<Plan> plan_;
  std::map<uint64_t, size_t> inputs_;  // by address
  std::map<uint64_t, int> live_;       // regions by address
  std::vector<Region> regions_;
  std::map<int, TensorFact> results_;  // operators' results by slot
  std::map<int, int> owners_;          // regions of operators' results by slot
  struct Pending {
    int step, argument, region;
  };
  std::vector<Pending> pending_;  // arguments whose place in the workspace is not known yet
  int workspace_;
};

namespace {

std::shared_mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans;  // of chains, by number
int64_t next_plan = 1;

std::shared_ptr<const Plan> plan_numbered(int64_t number) {
  std::shared_lock lock(plans_mutex);
  const auto found = plans.find(number);
  STD_TORCH_CHECK(found != plans.end(), "chain_cuda: there is no plan ", number);
  return found->second;
}

std::vector<Tensor> chain_cuda(Tensor x, std::vector<Tensor> parameters, int64_t plan) {
  parameters.insert(parameters.begin(), std::move(x));
  return plan_numbered(plan)->run(std::move(parameters));
}

constexpr size_t kMostCalls = 1024;  // plans of operators' calls that are kept

// What a call's plan depends on: its settings, and of each tensor what `take_inputs` looks at.
using CallKey = std::vector<int64_t>;
struct CallKeyHash {
  size_t operator()(const CallKey& key) const {
    uint64_t hash = 0x9E3779B97F4A7C15;
    for (int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 0xFF51AFD7ED558CCD, hash ^= hash >> 32;
    return hash;
  }
};
std::shared_mutex calls_mutex;
std::unordered_map<CallKey, std::shared_ptr<const Plan>, CallKeyHash> calls;

void add_tensor(CallKey& key, int32_t dtype, uint64_t address, const int64_t* sizes, const int64_t* strides,
                size_t dim) {
  key.push_back(dtype);
  key.push_back(static_cast<int64_t>(address % 16));
  key.push_back(static_cast<int64_t>(dim));
  key.insert(key.end(), sizes, sizes + dim);
  key.insert(key.end(), strides, strides + dim);
}

std::vector<Tensor> replay(std::vector<Tensor> tensors, int64_t settings) {
  CallKey key = {settings, tensors[0].get_device()};
  for (const auto& t : tensors) {
    const auto sizes = t.sizes(), strides = t.strides();
    add_tensor(key, dtype_of(t), reinterpret_cast<uint64_t>(t.data_ptr()), sizes.data(), strides.data(), sizes.size());
  }
  std::shared_ptr<const Plan> plan;
  {
    std::shared_lock lock(calls_mutex);
    const auto found = calls.find(key);
    if (found == calls.end()) return {};
    plan = found->second;
  }
  return plan->run(std::move(tensors));
}

}  // namespace

std::shared_ptr<const Plan> Tape::plan(const std::vector<TensorFact>& inputs, const std::vector<TensorFact>& outputs,
                                       int device) const {
  if (refused_) throw std::runtime_error(*refused_);
  return Planner(inputs, device).plan(*this, outputs);
}

int64_t Tape::finish_chain(const std::vector<TensorFact>& inputs, const TensorFact& output, int device) const {
  auto made = plan(inputs, {output}, device);
  std::unique_lock lock(plans_mutex);
  plans.emplace(next_plan, std::move(made));
  return next_plan++;
}

void Tape::finish_call(int64_t settings, const std::vector<TensorFact>& inputs, const std::vector<TensorFact>& outputs,
                       int device) const {
  CallKey key = {settings, device};
  for (const auto& fact : inputs)
    add_tensor(key, dtype_code(fact.dtype), fact.address, fact.sizes.data(), fact.strides.data(), fact.sizes.size());
  auto made = plan(inputs, outputs, device);
  std::unique_lock lock(calls_mutex);
  if (calls.size() >= kMostCalls) calls.clear();
  calls[std::move(key)] = std::move(made);
}

void free_plan(int64_t number) {
  std::unique_lock lock(plans_mutex);
  plans.erase(number);
}

}  // namespace pk

STABLE_TORCH_LIBRARY_IMPL(poolformer_kernels, CUDA, m) {
  m.impl("chain_cuda", TORCH_BOX(&pk::chain_cuda));
  m.impl("replay", TORCH_BOX(&pk::replay));
}
