// Python's view: batches as (pointer, count, n), float32 or float64 as the function's name says. The wrappers in
// lmc_fast/solvers own the tensors and check them; here is only the loop over the batch, without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffers.h"
#include "pool.h"
#include "solvers.h"

namespace py = pybind11;
using namespace lmc;

namespace {

template <class T> const Solvers<T>*& active() {
    static const Solvers<T>* table = solvers<T>();
    return table;
}

void use_isa(const std::string& name) {
    if (!solvers<float>(name.c_str()))
        throw std::invalid_argument("this processor or build has no '" + name + "' variant; try generic, avx2 or avx512");
    active<float>() = solvers<float>(name.c_str());
    active<double>() = solvers<double>(name.c_str());
}

template <class T> T* at(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

void run_team(long count, int threads, void (*task)(void*, long, int), void* data) {
    parallel_for(count, threads, [=](long i, int worker) { task(data, i, worker); });
}

// How a batch uses its threads: one matrix each, or all of them inside a matrix where matrices are large and few. Waking
// threads costs some 10 µs: not for less work than that. The results do not depend on the choice.
struct Split {
    int outer = 1;
    Team team;

    Split(long batch, long n, int threads) {
        if (double(batch) * n * n * n < 5e5) return;
        if (n >= 256 && batch < 2L * threads)
            team = {threads, run_team};
        else
            outer = threads;
    }
};

void keep_lowest(std::atomic<long>& lowest, long i) {
    for (long seen = lowest; i < seen && !lowest.compare_exchange_weak(seen, i);) {
    }
}

// Runs task(i, team, scratch) -> Status over the batch; the first matrix whose status is not ok, with that status, else (-1, 0).
template <class T, class Task>
std::pair<long, int> over_batch(long batch, long n, int threads, long (*numbers)(long, int), const Task& task) {
    const Split split(batch, n, threads);
    std::vector<Buffer> scratch;
    for (int worker = 0; worker < split.outer; ++worker) scratch.emplace_back(numbers(n, split.team.threads) * sizeof(T));
    constexpr long none = std::numeric_limits<long>::max();
    std::array<std::atomic<long>, 4> lowest;
    for (auto& l : lowest) l = none;
    parallel_for(batch, split.outer, [&](long i, int worker) {
        if (const Status status = task(i, split.team, static_cast<T*>(scratch[worker].data()))) keep_lowest(lowest[status], i);
    });
    for (int status : {refused, too_large, overflow})
        if (lowest[status] != none) return {lowest[status], status};
    return {-1, ok};
}

template <class T>
auto cayley_forward(std::uintptr_t X, std::uintptr_t Q, long batch, long n, int threads) {
    const Solvers<T>& s = *active<T>();
    return over_batch<T>(batch, n, threads, s.cayley_work, [&](long i, const Team& team, T* work) {
        return s.cayley_forward(team, at<T>(X) + i * n * n, at<T>(Q) + i * n * n, n, work, i + 1 < batch);
    });
}

template <class T>
void cayley_backward(std::uintptr_t Q, std::uintptr_t G, std::uintptr_t X_bar, long batch, long n, int threads) {
    const Solvers<T>& s = *active<T>();
    over_batch<T>(batch, n, threads, s.cayley_work, [&](long i, const Team& team, T* work) {
        s.cayley_backward(team, at<T>(Q) + i * n * n, at<T>(G) + i * n * n, at<T>(X_bar) + i * n * n, n, work, i + 1 < batch);
        return ok;
    });
}

// NaN where either is.
double larger(double a, double b) { return a >= b || a != a ? a : b; }

// The largest norm of the batch, NaN where one is NaN: the room on the tape depends on it.
template <class T>
double one_norm(std::uintptr_t X, long batch, long n, int threads) {
    const Solvers<T>& s = *active<T>();
    if (double(batch) * n * n < 1e5) threads = 1;
    std::vector<std::vector<T>> work(threads, std::vector<T>(n));
    std::vector<double> largest(threads, 0);
    parallel_for(batch, threads, [&](long i, int worker) {
        const double norm = s.one_norm(at<T>(X) + i * n * n, n, work[worker].data());
        largest[worker] = larger(largest[worker], norm);
    });
    double result = 0;
    for (double norm : largest) result = larger(result, norm);
    return result;
}

using Row = std::vector<double>;

// The table of taylor.py and the functions that run it.
class Expm {
  public:
    void add(double theta32, double theta64, const std::vector<Row>& left, const std::vector<Row>& right, const Row& result) {
        if (schemes_.count == Schemes::max_count) throw std::invalid_argument("too many schemes");
        Scheme& s = schemes_.at[schemes_.count++];
        s = {};
        s.products = static_cast<int>(left.size());
        if (left.empty() || s.products > Scheme::max_products || right.size() != left.size())
            throw std::invalid_argument("a scheme has 1 to 5 products, each with a left and a right row");
        s.theta32 = theta32;
        s.theta64 = theta64;
        for (int k = 0; k < s.products; ++k) {
            copy(left[k], s.left[k], k + 2);
            copy(right[k], s.right[k], k + 2);
        }
        copy(result, s.result, s.products + 2);
    }

    // Room for `squarings` squarings of each matrix.
    template <class T>
    Buffer tape(long batch, long n, int squarings) const {
        return Buffer(batch * active<T>()->expm_tape(n, squarings) * sizeof(T));
    }

    template <class T>
    auto forward(std::uintptr_t X, std::uintptr_t E, long batch, long n, const Buffer* tape, int squarings,
                 std::uintptr_t plans, int threads) const {
        const Solvers<T>& s = *active<T>();
        const long stride = s.expm_tape(n, squarings);
        return over_batch<T>(batch, n, threads, s.expm_work, [&](long i, const Team& team, T* work) {
            Plan plan{};
            T* own = tape ? static_cast<T*>(tape->data()) + i * stride : nullptr;
            const Status status = s.expm_forward(team, schemes_, at<T>(X) + i * n * n, at<T>(E) + i * n * n, n, own, &plan, work);
            at<std::int32_t>(plans)[2 * i] = plan.scheme;
            at<std::int32_t>(plans)[2 * i + 1] = plan.squarings;
            return status;
        });
    }

    template <class T>
    void backward(std::uintptr_t X, const Buffer& tape, int squarings, std::uintptr_t plans, std::uintptr_t G,
                  std::uintptr_t X_bar, long batch, long n, int threads) const {
        const Solvers<T>& s = *active<T>();
        const long stride = s.expm_tape(n, squarings);
        const T* all = static_cast<const T*>(tape.data());
        over_batch<T>(batch, n, threads, s.expm_work, [&](long i, const Team& team, T* work) {
            const Plan plan{at<std::int32_t>(plans)[2 * i], at<std::int32_t>(plans)[2 * i + 1]};
            s.expm_backward(team, schemes_, at<T>(X) + i * n * n, all + i * stride, at<T>(G) + i * n * n,
                            at<T>(X_bar) + i * n * n, n, plan, work);
            return ok;
        });
    }

  private:
    static void copy(const Row& from, double* to, int terms) {
        if (static_cast<int>(from.size()) > terms) throw std::invalid_argument("a row uses a product that is not there yet");
        for (std::size_t i = 0; i < from.size(); ++i) to[i] = from[i];
    }

    Schemes schemes_{};
};

template <class T>
void bind(py::module_& m, py::class_<Expm>& expm, const std::string& dtype) {
    using no_gil = py::call_guard<py::gil_scoped_release>;
    m.def(("cayley_forward_" + dtype).c_str(), cayley_forward<T>, no_gil());
    m.def(("cayley_backward_" + dtype).c_str(), cayley_backward<T>, no_gil());
    m.def(("one_norm_" + dtype).c_str(), one_norm<T>, no_gil());
    expm.def(("tape_" + dtype).c_str(), &Expm::tape<T>);
    expm.def(("forward_" + dtype).c_str(), &Expm::forward<T>, no_gil());
    expm.def(("backward_" + dtype).c_str(), &Expm::backward<T>, no_gil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Batched solvers on raw pointers; use lmc_fast.solvers instead.";
    m.def("isa", [] { return std::string(active<float>()->isa); });
    m.def("use_isa", use_isa);
    m.def("release_buffers", release_buffers);
    py::class_<Buffer>(m, "Buffer");
    py::class_<Expm> expm(m, "Expm");
    expm.def(py::init<>()).def("add", &Expm::add);
    bind<float>(m, expm, "float32");
    bind<double>(m, expm, "float64");
}
