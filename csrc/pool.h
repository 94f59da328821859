// A small persistent thread pool: starting a thread costs more than most calls here.
#pragma once

#include <functional>

namespace lmc {

// Calls task(i, worker) once for every i in [0, count), on at most `threads` threads, this one included; worker < threads.
// Which worker gets which i is not fixed, so a task's result must depend on i alone. Calls from several threads take
// turns. A task that throws ends the call with its exception.
void parallel_for(long count, int threads, const std::function<void(long, int)>& task);

}  // namespace lmc
