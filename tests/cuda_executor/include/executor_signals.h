// mbarriers and bulk copies (signals.cpp). A copy lands when its mbarrier is waited for: until then shared memory has
// what it had.
#pragma once

#include <stdint.h>

namespace executor {

void signal_init(uint64_t* signal, int arrivals);  // mbarrier.init
void signals_ready();                              // fence.mbarrier_init: before it no copy may use them
// mbarrier.arrive, where `bytes` are also expected (.expect_tx) of copies in this phase.
void signal_arrive(uint64_t* signal, int bytes);
void signal_wait(uint64_t* signal, int parity);  // mbarrier.try_wait.parity until it is true
// cp.async.bulk: the signal's phase has `bytes` fewer to wait for when they have arrived.
void copy_bulk(void* to, const void* from, int bytes, uint64_t* signal);

void signals_begin_block();  // nothing is under way
void signals_end_block();    // fails where a copy still is

}  // namespace executor
