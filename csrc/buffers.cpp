#include "buffers.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace lmc {
namespace {

constexpr std::size_t kept_at_most = std::size_t(64) << 20;

struct Block {
    void* data;
    std::size_t bytes;
};

// Never destroyed: a buffer may outlive the statics of this library.
struct Store {
    std::mutex mutex;
    std::vector<Block> blocks;  // oldest first
    std::size_t total = 0;
};

Store& store() {
    static Store* store = new Store;
    return *store;
}

}  // namespace

Buffer::Buffer(std::size_t bytes) {
    if (!bytes) return;
    Store& s = store();
    {
        std::lock_guard<std::mutex> lock(s.mutex);
        for (std::size_t i = s.blocks.size(); i-- > 0;) {
            const Block block = s.blocks[i];
            if (block.bytes < bytes || block.bytes / 2 > bytes) continue;
            s.blocks.erase(s.blocks.begin() + i);
            s.total -= block.bytes;
            data_ = block.data;
            bytes_ = block.bytes;
            return;
        }
    }
    bytes_ = (bytes + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes_);
    if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() {
    if (!data_) return;
    if (bytes_ > kept_at_most) {
        std::free(data_);
        return;
    }
    Store& s = store();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.blocks.push_back({data_, bytes_});
    s.total += bytes_;
    while (s.total > kept_at_most) {
        s.total -= s.blocks.front().bytes;
        std::free(s.blocks.front().data);
        s.blocks.erase(s.blocks.begin());
    }
}

void release_buffers() {
    Store& s = store();
    std::lock_guard<std::mutex> lock(s.mutex);
    for (const Block& block : s.blocks) std::free(block.data);
    s.blocks.clear();
    s.total = 0;
}

}  // namespace lmc
