// Launches of Triton kernels from Python, without Triton's own way to them: what Triton compiled is kept by a key of
// our own, made of what it compiles for: the arguments' types, alignment and constant values, and the options.
#include "launches.h"

#include <pybind11/stl.h>
#include <structmember.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <string_view>
#include <unordered_map>

#include "../common/tensors.h"
#include "../cuda/core/stream.h"
#include "tape.h"

namespace py = pybind11;

namespace pk {
namespace {

using Key = std::vector<uint64_t>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0x9E3779B97F4A7C15;
    for (uint64_t word : key) hash = (hash ^ word) * 0xFF51AFD7ED558CCD, hash ^= hash >> 32;
    return hash;
  }
};

// How an argument reaches the kernel.
enum class Passed : char { address = 'p', int32 = 'i', int64 = 'l', float32 = 'f' };

struct Argument {
  size_t index;
  Passed passed;
};

struct Entry {
  bool prepared = false;  // else Triton's launcher runs it each time
  driver::Kernel kernel;
  std::vector<Argument> arguments;
  size_t scratch = 0;            // addresses behind them that Triton adds, null for kernels that need no such memory
  std::vector<py::object> kept;  // the compiled kernel, and objects that the key knows by their addresses
};

// How a parameter of a kernel is specialised.
enum class Parameter : char { constant = 'c', specialised = 's', plain = 'n' };

// Words of a key that are no addresses of objects; those are larger.
enum Tag : uint64_t { is_none = 1, is_integer, is_float, is_tensor, is_text };

// A number for a text, the same for equal texts; used with the GIL.
uint64_t number_of(std::string_view text) {
  static std::map<std::string, uint64_t, std::less<>> numbers;
  const auto found = numbers.find(text);
  return found != numbers.end() ? found->second : numbers.emplace(text, numbers.size()).first->second;
}

// Names of attributes, kept for the life of the process.
PyObject *data_ptr_name, *dtype_name;

// A kernel: called with a grid, its arguments and options.
struct Launches {
  PyObject_HEAD;
  vectorcallfunc vectorcall;
  py::object* prepare;  // called where no entry fits: launches by Triton, returns what an entry is made of
  std::string* name;
  std::vector<Parameter>* parameters;
  std::unordered_map<Key, Entry, KeyHash>* entries;
};

struct Arguments {
  Key key;
  std::vector<uint64_t> values;
};

bool fail(const std::string& message) {
  PyErr_SetString(PyExc_RuntimeError, message.c_str());
  return false;
}

uint64_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Appends what is compiled for one argument to the key, and notes its value; false with an exception set.
bool add_argument(PyObject* argument, Parameter parameter, Arguments& to) {
  Key& key = to.key;
  uint64_t value = 0;
  if (argument == Py_None) {
    key.push_back(is_none);
  } else if (PyUnicode_Check(argument)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(argument, &size);
    if (text == nullptr) return false;
    key.push_back(is_text);
    key.push_back(number_of({text, static_cast<size_t>(size)}));
  } else if (PyBool_Check(argument) || (parameter == Parameter::constant && !PyLong_Check(argument))) {
    key.push_back(reinterpret_cast<uint64_t>(argument));
  } else if (PyLong_Check(argument)) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (overflow != 0) return fail("an integer argument has more than 64 bits");
    value = static_cast<uint64_t>(number);
    key.push_back(is_integer);
    if (parameter == Parameter::constant) {
      key.push_back(value);
    } else {
      const bool wide = number != static_cast<int32_t>(number);
      const bool specialised = parameter == Parameter::specialised;
      key.push_back(wide | (specialised && number % 16 == 0) << 1 | (specialised && number == 1) << 2);
    }
  } else if (PyFloat_Check(argument)) {
    value = bits_of(static_cast<float>(PyFloat_AS_DOUBLE(argument)));
    key.push_back(is_float);
  } else {
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(argument, data_ptr_name));
    if (!address) return false;
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(argument, dtype_name));
    if (!dtype) return false;
    value = PyLong_AsUnsignedLongLong(address.ptr());
    if (PyErr_Occurred()) return false;
    key.push_back(is_tensor);
    key.push_back(reinterpret_cast<uint64_t>(dtype.ptr()) | (value % 16 == 0));  // dtypes live for ever
  }
  to.values.push_back(value);
  return true;
}

void keep_objects(Entry& entry, PyObject* const* args, size_t count, PyObject* names) {
  for (size_t i = 0; i < count; ++i)
    if (!PyLong_Check(args[i]) && !PyFloat_Check(args[i]) && !PyObject_HasAttr(args[i], data_ptr_name))
      entry.kept.push_back(py::reinterpret_borrow<py::object>(args[i]));
  if (names != nullptr) entry.kept.push_back(py::reinterpret_borrow<py::object>(names));
}

// What `prepare` returned: None, or (function, threads, shared, [(index, how it is passed)], scratch, what to keep).
void fill(Entry& entry, const py::object& prepared) {
  if (prepared.is_none()) return;
  const auto fields = prepared.cast<py::tuple>();
  entry.kernel.function = reinterpret_cast<driver::Function>(fields[0].cast<uint64_t>());
  entry.kernel.threads = fields[1].cast<unsigned>();
  entry.kernel.shared = fields[2].cast<unsigned>();
  for (const auto& argument : fields[3].cast<py::list>()) {
    const auto pair = argument.cast<py::tuple>();
    entry.arguments.push_back({pair[0].cast<size_t>(), static_cast<Passed>(pair[1].cast<char>())});
  }
  entry.scratch = fields[4].cast<size_t>();
  entry.kept.push_back(fields[5].cast<py::object>());
  entry.prepared = true;
}

void write_down(Tape& tape, const std::string& name, const Entry& entry, unsigned blocks,
                const std::vector<uint64_t>& values) {
  if (!entry.prepared) return tape.refuse(name + " is launched by Triton itself");
  std::vector<LaunchArgument> arguments;
  for (const auto& [index, passed] : entry.arguments) arguments.push_back({values[index], passed == Passed::address});
  arguments.resize(arguments.size() + entry.scratch, {0, false});
  tape.launch(name, entry.kernel, blocks, std::move(arguments));
}

bool launch(const std::string& name, const Entry& entry, unsigned blocks, int device, std::vector<uint64_t>& values) {
  uint64_t null = 0;
  thread_local std::vector<void*> addresses;
  addresses.clear();
  for (const auto& [index, passed] : entry.arguments) addresses.push_back(&values[index]);
  addresses.resize(addresses.size() + entry.scratch, &null);
  void* stream;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) return fail("no current CUDA stream");
  const char* error;
  Py_BEGIN_ALLOW_THREADS;
  error = driver::launch(entry.kernel, blocks, device, stream, addresses.data());
  Py_END_ALLOW_THREADS;
  return error == nullptr || fail("launch of " + name + ": " + error);
}

// kernel(grid, *arguments, **options)
PyObject* call(PyObject* object, PyObject* const* args, size_t flagged, PyObject* names) {
  auto* self = reinterpret_cast<Launches*>(object);
  const size_t given = PyVectorcall_NARGS(flagged), count = self->parameters->size();
  const size_t options = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  try {
    if (given != count + 1 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != 1) {
      fail(*self->name + " takes a grid of one number and " + std::to_string(count) + " arguments, got " +
           std::to_string(given) + " of both");
      return nullptr;
    }
    const size_t blocks = PyLong_AsSize_t(PyTuple_GET_ITEM(args[0], 0));
    if (PyErr_Occurred()) return nullptr;
    if (blocks == 0) Py_RETURN_NONE;
    if (blocks >= uint64_t{1} << 31) {
      fail("launch of " + *self->name + ": the tensors are too large for one launch, " + std::to_string(blocks) +
           " blocks");
      return nullptr;
    }
    int32_t device;
    if (aoti_torch_get_current_device_index(&device) != AOTI_TORCH_SUCCESS) {
      fail("no current CUDA device");
      return nullptr;
    }
    Arguments arguments;
    arguments.key.reserve(2 * count + 3 * options + 1);
    arguments.values.reserve(count + options);
    arguments.key.push_back(device);
    for (size_t i = 0; i < count; ++i)
      if (!add_argument(args[i + 1], (*self->parameters)[i], arguments)) return nullptr;
    for (size_t i = 0; i < options; ++i) {
      arguments.key.push_back(reinterpret_cast<uint64_t>(PyTuple_GET_ITEM(names, i)));  // interned by Python
      if (!add_argument(args[given + i], Parameter::constant, arguments)) return nullptr;
    }
    const auto found = self->entries->find(arguments.key);
    // Entries stay where they are, whatever other threads add while this one waits for the driver.
    Entry* known = found == self->entries->end() ? nullptr : &found->second;
    if (known == nullptr || !known->prepared) {
      const auto prepared =
          py::reinterpret_steal<py::object>(PyObject_Vectorcall(self->prepare->ptr(), args, flagged, names));
      if (!prepared) return nullptr;
      if (known == nullptr) {
        Entry entry;
        keep_objects(entry, args + 1, count, nullptr);
        keep_objects(entry, args + given, options, names);
        fill(entry, prepared);
        known = &self->entries->emplace(arguments.key, std::move(entry)).first->second;
      }
    } else if (!launch(*self->name, *known, static_cast<unsigned>(blocks), device, arguments.values)) {
      return nullptr;
    }
    if (Tape* tape = Tape::current())
      write_down(*tape, *self->name, *known, static_cast<unsigned>(blocks), arguments.values);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    fail(error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  const char *name, *parameters;
  PyObject* prepare;
  if (!PyArg_ParseTuple(args, "ssO", &name, &parameters, &prepare)) return nullptr;
  auto* self = reinterpret_cast<Launches*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->vectorcall = call;
  self->prepare = new py::object(py::reinterpret_borrow<py::object>(prepare));
  self->name = new std::string(name);
  self->parameters = new std::vector<Parameter>;
  for (const char* p = parameters; *p != 0; ++p) self->parameters->push_back(static_cast<Parameter>(*p));
  self->entries = new std::unordered_map<Key, Entry, KeyHash>;
  return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
  auto* self = reinterpret_cast<Launches*>(object);
  delete self->prepare;
  delete self->name;
  delete self->parameters;
  delete self->entries;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Launches, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {0, nullptr},
};

PyType_Spec spec = {"poolformer_kernels._C.Launches", sizeof(Launches), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

// (address, dtype, sizes, strides)
TensorFact fact_of(const py::handle& given) {
  const auto fields = given.cast<py::tuple>();
  return {fields[0].cast<uint64_t>(), fields[1].cast<std::string>(), fields[2].cast<std::vector<int64_t>>(),
          fields[3].cast<std::vector<int64_t>>()};
}

std::vector<TensorFact> facts_of(const py::list& given) {
  std::vector<TensorFact> out;
  for (const auto& fact : given) out.push_back(fact_of(fact));
  return out;
}

CallArgument call_argument(const py::handle& given) {
  if (given.is_none()) return Nothing{};
  if (py::isinstance<py::bool_>(given)) return given.cast<bool>();
  if (py::isinstance<py::int_>(given)) return given.cast<int64_t>();
  if (py::isinstance<py::float_>(given)) return given.cast<double>();
  if (py::isinstance<py::str>(given)) return given.cast<std::string>();
  if (py::isinstance<py::list>(given)) return given.cast<std::vector<int64_t>>();
  const auto pair = given.cast<py::tuple>();  // (fact, whether the schema has a Tensor?), or (a dtype's name,)
  if (pair.size() == 1) return DtypeArgument{pair[0].cast<std::string>()};
  return TensorArgument{fact_of(pair[0]), pair[1].cast<bool>()};
}

}  // namespace

void add_launching(py::module_& m) {
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  dtype_name = PyUnicode_InternFromString("dtype");
  m.attr("Launches") = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  m.def(
      "launching_unavailable",
      [] {
        return aoti_torch_get_current_cuda_stream == nullptr ? "torch's stream function is not bound"
                                                             : driver::unavailable();
      },
      "Why `Launches` cannot launch here, or None.");
  m.def("exchange_capture_mode", &driver::exchange_capture_mode,
        "cuThreadExchangeStreamCaptureMode: 0 global, 1 thread local, 2 relaxed; returns the mode before.");
  m.def(
      "refuse_recording",
      [](std::string reason) {
        if (Tape* tape = Tape::current()) tape->refuse(std::move(reason));
      },
      "What this thread writes down now cannot be run again.");
  m.def("free_plan", &free_plan, "Forgets a plan of `Tape.finish`.");
  py::class_<Tape>(m, "Tape", "What a call launched, to be run again: csrc/launch/tape.h.")
      .def(py::init<>())
      .def(
          "start", [](Tape& tape) { Tape::current() = &tape; }, "This thread's launches are written to the tape.")
      .def("stop", [](Tape&) { Tape::current() = nullptr; })
      .def("allocate", &Tape::allocate)
      .def("refuse", &Tape::refuse)
      .def("call",
           [](Tape& tape, std::string op, std::string overload, const py::list& arguments, const py::list& results) {
             std::vector<CallArgument> values;
             for (const auto& argument : arguments) values.push_back(call_argument(argument));
             std::vector<CallResult> made;
             for (const auto& result : results) made.push_back(result.is_none() ? CallResult() : fact_of(result));
             tape.call(std::move(op), std::move(overload), std::move(values), std::move(made));
           })
      .def("finish_chain", [](const Tape& tape, const py::list& inputs, const py::tuple& output,
                              int device) { return tape.finish_chain(facts_of(inputs), fact_of(output), device); })
      .def("finish_call", [](const Tape& tape, int64_t settings, const py::list& inputs, const py::list& outputs,
                             int device) { tape.finish_call(settings, facts_of(inputs), facts_of(outputs), device); });
}

}  // namespace pk
