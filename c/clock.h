/*
 * Time: what every wait and every delay of the core is measured by.
 *
 * It is the processor's and the kernel's own, unless a test holds it (xn_time_hold): then it stands still, and moves on
 * when it is told to.
 */
#ifndef XN_CLOCK_H
#define XN_CLOCK_H

#include <time.h>

#include "base.h"

struct clock {
	bool held;
	u64 cycles; /* while it is */
	u64 ns;
};

extern struct clock held_clock;

static inline bool clock_is_held(void)
{
	return unlikely(__atomic_load_n(&held_clock.held, __ATOMIC_ACQUIRE));
}

static inline u64 real_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (u64)ts.tv_sec * 1000000000u + (u64)ts.tv_nsec;
}

static inline u64 real_cycles(void)
{
#if defined(__x86_64__) || defined(__i386__)
	return __builtin_ia32_rdtsc();
#else
	return real_ns();
#endif
}

/* A cheap clock for spinning and for cycles per packet: the TSC, or nanoseconds where there is none. */
static inline u64 cycles(void)
{
	return clock_is_held() ? __atomic_load_n(&held_clock.cycles, __ATOMIC_RELAXED) : real_cycles();
}

static inline u64 monotonic_ns(void)
{
	return clock_is_held() ? __atomic_load_n(&held_clock.ns, __ATOMIC_RELAXED) : real_ns();
}

/* Whole seconds: what ages is older by one when this is. */
static inline u32 monotonic_s(void)
{
	return (u32)(monotonic_ns() / 1000000000u);
}

/* How fast cycles() runs; measured once in a process, for 2 ms, against the monotonic clock. */
u64 clock_cycles_per_us(void);
/* Moves a held clock on; -EINVAL: it is not held. */
int clock_advance(u64 us);

#endif
