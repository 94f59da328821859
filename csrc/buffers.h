// Scratch and tapes, reused: a fresh page costs more to fault in than a small product costs to compute.
#pragma once

#include <cstddef>

namespace lmc {

// Memory aligned to 64 bytes, from a list of at most 64 MB of returned blocks where one fits.
class Buffer {
  public:
    explicit Buffer(std::size_t bytes = 0);
    ~Buffer();
    Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* data() const { return data_; }

  private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

void release_buffers();  // frees what the list holds

}  // namespace lmc
