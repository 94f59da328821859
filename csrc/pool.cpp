#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace lmc {
namespace {

class Pool {
  public:
    void run(long count, int threads, const std::function<void(long, int)>& task) {
        std::lock_guard<std::mutex> one_caller(callers_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            int id = static_cast<int>(workers_.size()) + 1;
            workers_.emplace_back([this, id] { serve(id); });
            workers_.back().detach();
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            count_ = count;
            // Large enough that the counter is not contended, small enough that the last chunks even out.
            chunk_ = std::max(1L, count / (32L * threads));
            next_ = 0;
            error_ = nullptr;
            members_ = threads;
            busy_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        work(0);
        // The others are in their last chunk: sleeping and waking would often take longer than that.
        spin([this] { return busy_ == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void serve(int id) {
        long seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (id >= members_) continue;
            lock.unlock();
            work(id);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
            // The products inside a large matrix follow each other closely.
            lock.unlock();
            spin([&] { return round_ != seen; });
            lock.lock();
        }
    }

    // Waits for `ready` without sleeping, for some 30 µs at most.
    template <class Ready> static void spin(const Ready& ready) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
        while (!ready() && std::chrono::steady_clock::now() < until) {
        }
    }

    void work(int id) {
        try {
            for (long begin; (begin = next_.fetch_add(chunk_)) < count_;)
                for (long i = begin; i < std::min(begin + chunk_, count_); ++i) (*task_)(i, id);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
            next_ = count_;
        }
    }

    std::mutex callers_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(long, int)>* task_ = nullptr;
    std::exception_ptr error_;
    std::atomic<long> next_{0}, round_{0};
    std::atomic<int> busy_{0};
    long count_ = 0, chunk_ = 1;
    int members_ = 0;
};

// Threads do not survive a fork, so a child gets a pool of its own. Pools are never destroyed: their threads wait for work
// until the process ends.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        owner = getpid();
        current = new Pool;
    }
    return *current;
}

}  // namespace

void parallel_for(long count, int threads, const std::function<void(long, int)>& task) {
    threads = static_cast<int>(std::min<long>(threads, count));
    if (threads <= 1) {
        for (long i = 0; i < count; ++i) task(i, 0);
        return;
    }
    pool().run(count, threads, task);
}

}  // namespace lmc
