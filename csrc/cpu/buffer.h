// Memory that nothing has been written to yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace fastsae {

// n elements of T, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) : p_(n > 0 ? allocate(n) : nullptr) {}
  ~Buffer() { ::operator delete(p_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(p_, other.p_);
    return *this;
  }
  T* get() const { return p_; }
  T& operator[](int64_t i) const { return p_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static T* allocate(int64_t n) {
    return static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), kAlign));
  }
  T* p_;
};

}  // namespace fastsae
