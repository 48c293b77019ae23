// Cubins: ELF files whose .nv.info sections NVIDIA does not document. What cannot be read is taken on trust.
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "driver.h"

namespace null_gpu {
namespace {

constexpr unsigned char kEntryPoint = 0x10;  // in st_other of a kernel's symbol
constexpr int kSizedFormat = 4;              // an attribute with a size and so many bytes

enum Attribute {  // of .nv.info
  kMaxThreads3 = 0x05,
  kRequiredThreads3 = 0x10,
  kFrameSize = 0x11,
  kKernelParameter = 0x17,
  kRegisterCount = 0x2f,
  kCluster3 = 0x3d,
};

class Cubin {
 public:
  explicit Cubin(Module& module) : module_(module), base_(module.image.data()) {
    sections_ = reinterpret_cast<const Elf64_Shdr*>(base_ + header().e_shoff);
    names_ = base_ + sections_[header().e_shstrndx].sh_offset;
    for (int i = 0; i < header().e_shnum; ++i)
      if (sections_[i].sh_type == SHT_SYMTAB) read_symbols(sections_[i]);
    for (int i = 0; i < header().e_shnum; ++i) read_section(sections_[i]);
  }

 private:
  const Elf64_Ehdr& header() const { return *reinterpret_cast<const Elf64_Ehdr*>(base_); }

  void read_symbols(const Elf64_Shdr& section) {
    const char* strings = base_ + sections_[section.sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(base_ + section.sh_offset);
    for (size_t i = 0; i < section.sh_size / sizeof(Elf64_Sym); ++i) {
      symbols_.push_back(strings + symbols[i].st_name);
      const int type = ELF64_ST_TYPE(symbols[i].st_info);
      if (type == STT_OBJECT) module_.variables[symbols_.back()] = symbols[i].st_size;
      if (type == STT_FUNC && (symbols[i].st_other & kEntryPoint)) {
        auto kernel = std::make_unique<Kernel>();
        kernel->module = &module_;
        kernel->name = symbols_.back();
        kernel->known = true;
        module_.kernels[kernel->name] = std::move(kernel);
      }
    }
  }

  // The kernel whose section this is: its name is the prefix and the kernel's.
  Kernel* kernel_of(const std::string& section, const std::string& prefix) {
    if (section.compare(0, prefix.size(), prefix)) return nullptr;
    return kernel(section.substr(prefix.size()));
  }

  Kernel* kernel(const std::string& name) {
    const auto it = module_.kernels.find(name);
    return it == module_.kernels.end() ? nullptr : it->second.get();
  }

  void read_section(const Elf64_Shdr& section) {
    const std::string name = names_ + section.sh_name;
    // From sm_90 on a kernel's section counts what is the system's, too.
    const int reserved = module_.arch >= 90 ? kReservedShared : 0;
    if (Kernel* k = kernel_of(name, ".nv.shared.")) k->static_shared = std::max(0, int(section.sh_size) - reserved);
    Kernel* own = kernel_of(name, ".nv.info.");
    if (!own && name != ".nv.info") return;
    const char* at = base_ + section.sh_offset;
    for (const char* end = at + section.sh_size; at + 4 <= end;) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(at);
      const int size = bytes[0] == kSizedFormat ? bytes[2] | bytes[3] << 8 : 0;
      uint32_t words[3] = {};
      memcpy(words, at + 4, std::min<size_t>(size, sizeof words));
      if (own)
        read_attribute(*own, bytes[1], size, words);
      else
        read_attribute_of_any(bytes[1], size, words);
      at += 4 + size;
    }
  }

  static void read_attribute(Kernel& kernel, int key, int size, const uint32_t (&words)[3]) {
    if (size != 12) return;
    if (key == kKernelParameter) {  // index; ordinal and offset; size in the upper 14 bits
      const size_t ordinal = words[1] & 0xffff;
      if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1);
      kernel.parameters[ordinal] = {int(words[1] >> 16), int(words[2] >> 18)};
    }
    if (key == kMaxThreads3 || key == kRequiredThreads3) kernel.max_threads = int(words[0] * words[1] * words[2]);
    if (key == kCluster3) memcpy(kernel.cluster, words, sizeof kernel.cluster);
  }

  void read_attribute_of_any(int key, int size, const uint32_t (&words)[3]) {
    if (size != 8 || words[0] >= symbols_.size()) return;
    Kernel* k = kernel(symbols_[words[0]]);
    if (k && key == kRegisterCount) k->registers = int(words[1]);
    if (k && key == kFrameSize) k->local = int(words[1]);
  }

  Module& module_;
  const char* base_;
  const Elf64_Shdr* sections_;
  const char* names_;
  std::vector<std::string> symbols_;
};

}  // namespace

int arch_of_cubin(const void* elf) {
  const auto& header = *static_cast<const Elf64_Ehdr*>(elf);
  const bool old = header.e_ident[EI_ABIVERSION] < 8;
  return int(old ? header.e_flags & 0xff : header.e_flags >> 8 & 0xff);
}

void parse(Module& module) {
  if (module.parsed) return;
  module.parsed = true;
  if (module.packed && !unpack(module.packed, module.image)) {
    fprintf(stderr, "null GPU: no libzstd.so.1 or liblz4.so.1 to unpack a fat binary: its kernels are not checked\n");
    module.image.clear();
    return;
  }
  if (module.image.size() > sizeof(Elf64_Ehdr) && !memcmp(module.image.data(), ELFMAG, SELFMAG)) Cubin cubin(module);
}

}  // namespace null_gpu
