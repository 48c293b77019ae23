// Fat binaries, whose layout NVIDIA does not document: what public tools know of it.
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstring>

#include "driver.h"

namespace null_gpu {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1, kMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1, kCubin = 2;
constexpr uint64_t kLz4 = 0x2000, kZstd = 0x8000;

struct Wrapper {  // what nvcc's host code registers
  uint32_t magic, version;
  const void* data;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;  // of the entries
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_size;
  uint64_t padded_size;
  uint32_t packed_size, options;
  uint16_t minor, major;
  uint32_t arch;
  uint32_t name_offset, name_size;
  uint64_t flags, zero, unpacked_size;
};

template <class F>
F function_of(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW);
  return handle ? reinterpret_cast<F>(dlsym(handle, name)) : nullptr;
}

// Code of an architecture runs on later ones of the same major version.
bool runs(int arch) { return arch / 10 == options().model->capability / 10 && arch <= options().model->capability; }

// Of the images that the device runs the latest; PTX of its or an earlier architecture where there is none.
const Entry* choose(const Header& header, std::string& architectures) {
  const Entry *best = nullptr, *ptx = nullptr;
  const char* at = reinterpret_cast<const char*>(&header) + header.header_size;
  for (const char* end = at + header.size; at < end;) {
    const auto* entry = reinterpret_cast<const Entry*>(at);
    const int arch = int(entry->arch);
    architectures += (entry->kind == kPtx ? " compute_" : " sm_") + std::to_string(arch);
    if (entry->kind == kCubin && runs(arch) && (!best || arch > int(best->arch))) best = entry;
    if (entry->kind == kPtx && arch <= options().model->capability && (!ptx || arch > int(ptx->arch))) ptx = entry;
    at += entry->header_size + entry->padded_size;
  }
  return best ? best : ptx;
}

CUresult no_image(const std::string& architectures) {
  return complain(CUDA_ERROR_NO_BINARY_FOR_GPU, "no image for sm_%d among%s", options().model->capability,
                  architectures.c_str());
}

}  // namespace

bool unpack(const void* packed, std::vector<char>& image) {
  const auto& entry = *static_cast<const Entry*>(packed);
  const char* data = static_cast<const char*>(packed) + entry.header_size;
  const size_t size = entry.packed_size ? entry.packed_size : entry.padded_size;
  image.resize(entry.unpacked_size);
  if (entry.flags & kZstd) {
    using Decompress = size_t (*)(void*, size_t, const void*, size_t);
    static const auto decompress = function_of<Decompress>("libzstd.so.1", "ZSTD_decompress");
    return decompress && decompress(image.data(), image.size(), data, size) == image.size();
  }
  if (entry.flags & kLz4) {
    using Decompress = int (*)(const char*, char*, int, int);
    static const auto decompress = function_of<Decompress>("liblz4.so.1", "LZ4_decompress_safe");
    return decompress && decompress(data, image.data(), int(size), int(image.size())) == int(image.size());
  }
  image.assign(data, data + entry.padded_size);
  return true;
}

CUresult load(Module** out, const void* code) {
  if (!code) return CUDA_ERROR_INVALID_VALUE;
  auto module = std::make_unique<Module>();
  Dl_info file;
  module->of_torch = dladdr(code, &file) && strstr(file.dli_fname, "libtorch_cuda");
  uint32_t magic;
  memcpy(&magic, code, sizeof magic);
  if (magic == kWrapperMagic) {
    code = static_cast<const Wrapper*>(code)->data;
    memcpy(&magic, code, sizeof magic);
  }
  const char* bytes = static_cast<const char*>(code);
  if (magic == kMagic) {
    std::string architectures;
    const Entry* entry = choose(*static_cast<const Header*>(code), architectures);
    if (!entry) return no_image(architectures);
    module->arch = int(entry->arch);
    module->ptx = entry->kind == kPtx;
    module->packed = entry;
  } else if (!memcmp(code, ELFMAG, SELFMAG)) {
    const auto& elf = *static_cast<const Elf64_Ehdr*>(code);
    module->arch = arch_of_cubin(code);
    if (!runs(module->arch)) return no_image(" sm_" + std::to_string(module->arch));
    const size_t sections = elf.e_shoff + size_t(elf.e_shnum) * elf.e_shentsize;
    const size_t segments = elf.e_phoff + size_t(elf.e_phnum) * elf.e_phentsize;
    module->image.assign(bytes, bytes + std::max(sections, segments));
  } else if (std::string(bytes).find(".target") != std::string::npos) {
    module->ptx = true;
    module->image.assign(bytes, bytes + strlen(bytes) + 1);
  } else {
    return complain(CUDA_ERROR_INVALID_IMAGE, "a module that is neither a cubin nor a fat binary nor PTX");
  }
  *out = module.release();
  return CUDA_SUCCESS;
}

}  // namespace null_gpu
